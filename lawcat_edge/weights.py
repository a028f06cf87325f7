"""Weights, one tensor (or a few rows) at a time and always float32: the model is never whole in memory."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lawcat_edge.families import Geometry
from lawcat_edge.lora import ATTENTION_TARGETS
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import MAX_JSON_BYTES, check_member_name, open_regular, parse_json, read_json

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_OTHER_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_OTHER_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1}
_MAX_RANK = 16
INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Tensors under their Hugging Face names; linear weights are [out, in] as in torch."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> np.ndarray:
        """The whole tensor, float32."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """``get(name)[start:stop]`` without reading the rest, float32."""
        ...


def tensor_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Every tensor a teacher of this geometry has, in the order of the computation."""
    D, I, V = geometry.hidden_size, geometry.intermediate_size, geometry.vocab_size
    Q, KV, d = geometry.query_width, geometry.kv_width, geometry.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(geometry.num_layers):
        at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (D,)
        for name, width in (("q", Q), ("k", KV), ("v", KV)):
            shapes[f"{at}{name}_proj.weight"] = (width, D)
            if geometry.attention_bias:
                shapes[f"{at}{name}_proj.bias"] = (width,)
        if geometry.qk_norm:
            shapes[f"{at}q_norm.weight"] = shapes[f"{at}k_norm.weight"] = (d,)
        shapes[f"{at}o_proj.weight"] = (D, Q)
        if geometry.output_bias:
            shapes[f"{at}o_proj.bias"] = (D,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (D,)
        for name, shape in (("gate", (I, D)), ("up", (I, D)), ("down", (D, I))):
            shapes[f"{mlp}{name}_proj.weight"] = shape
            if geometry.mlp_bias:
                shapes[f"{mlp}{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (D,)
    if not geometry.tie_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def check_shapes(source: WeightSource, geometry: Geometry) -> None:
    """Raise LawcatError when a tensor is missing or has another shape than the geometry says."""
    present = set(source.names())
    for name, shape in tensor_shapes(geometry).items():
        if name not in present:
            raise LawcatError(
                f"The teacher's weights lack {name}; its folder is incomplete or of another model."
            )
        if source.shape(name) != shape:
            raise LawcatError(f"{name} is {list(source.shape(name))}, but config.json implies {list(shape)}.")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold a folder's weights, sorted, and which of them holds a tensor (from the index).

    An index decides where there is one, else model.safetensors alone counts: beside them lie variants in
    other precisions, optimiser states, a second copy in another layout. Without either, all safetensors do
    but hidden ones (``._model.safetensors`` of macOS). LawcatError for a folder without any, a damaged index,
    and a file that the index names and that is not there.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        data = read_json(index)
        held = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(held, dict) or not held or not all(isinstance(v, str) for v in held.values()):
            raise LawcatError(f"{index} has no weight_map of file names; get the model anew.")
        paths = [folder / check_member_name(name) for name in sorted(set(held.values()))]
        for path in paths:
            if not path.is_file():
                raise LawcatError(f"{index} names {path.name}, which is not in {folder}; get the model anew.")
        return paths, held
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(".")]
    if single.is_file():
        paths = [single]
    if not paths:
        raise LawcatError(f"{folder} has no *.safetensors; save the model with save_pretrained first.")
    return paths, {}


class SafetensorsWeights:
    """The weights of a folder, by plain file reads: a memory map would keep the pages resident."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        paths, held = weight_files(Path(folder))
        self._index: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in paths:
            for name, entry in read_header(path).items():
                if held.get(name, path.name) != path.name:
                    continue
                if name in self._index:
                    raise LawcatError(f"{name} is in two files of {folder}; remove the stale one.")
                self._index[name] = (path, *entry)

    def names(self) -> list[str]:
        return list(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[2]

    def get(self, name: str) -> np.ndarray:
        shape = self.shape(name)
        return self._read(name, 0, math.prod(shape)).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape = self.shape(name)
        width = math.prod(shape[1:])
        start, stop, _ = slice(start, stop).indices(shape[0])
        return self._read(name, start * width, max(stop - start, 0) * width).reshape(-1, *shape[1:])

    def _entry(self, name: str) -> tuple[Path, str, tuple[int, ...], int]:
        try:
            entry = self._index[name]
        except KeyError:
            raise LawcatError(f"The weights lack {name}; the teacher's folder is of another model.") from None
        if entry[1] not in DTYPES:  # said of what is used alone: a folder may hold positions or counters too
            raise LawcatError(f"{name} in {entry[0]} is {entry[1]}; only float tensors are supported.")
        return entry

    def _read(self, name: str, start: int, count: int) -> np.ndarray:
        path, kind, _, offset = self._entry(name)
        dtype = DTYPES[kind]
        raw = np.fromfile(path, dtype, count, offset=offset + start * dtype.itemsize)
        if raw.size != count:
            raise LawcatError(f"{path.name} ends inside {name}; copy the file again.")
        values = as_float32(raw, kind)
        if not np.isfinite(values).all():
            raise LawcatError(f"{path}: {name} holds NaN or infinity; get the model anew.")
        return values


def as_float32(raw: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as a safetensors file stores them, as float32 of the same shape."""
    if kind == "BF16":  # bfloat16 is the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which the caller refuses
        return raw.astype(np.float32, copy=False)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (dtype, shape, byte offset in the file) of a safetensors file; see ``check_header``."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        return check_header(file.read(8 + min(length, MAX_JSON_BYTES + 1)), size, path)


def check_header(data: bytes, size: int, path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """The header in `data`, the beginning of a safetensors file of `size` bytes. Nothing of it is trusted.

    Every entry is checked: types, sizes without overflow, within the file, one after the other without a gap
    or an overlap, as the format wants it. LawcatError names the file and the tensor.
    """
    damaged = f"{path} is damaged or truncated"
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(MAX_JSON_BYTES, size - 8):
        raise LawcatError(f"{damaged}; copy the file again.")
    header = parse_json(data[8 : 8 + length], f"{damaged}: its header")
    if not isinstance(header, dict):
        raise LawcatError(f"{damaged}: its header is no JSON object; copy the file again.")
    header.pop("__metadata__", None)
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    spans = []
    for name, info in header.items():
        kind, shape, begin, end = _entry(info, f"{damaged}: tensor {name[:200]!r}")
        item = DTYPES[kind].itemsize if kind in DTYPES else _OTHER_SIZES.get(kind, 0)
        if not item or end - begin != math.prod(shape) * item or end > size - 8 - length:
            what = f"tensor {name[:200]!r} ({kind[:20]}) has not the size of its shape"
            raise LawcatError(f"{damaged}: {what}; copy the file again.")
        entries[name] = (kind, shape, 8 + length + begin)
        spans.append((begin, end))
    spans.sort()
    if any(begin != before for (begin, _), (_, before) in zip(spans, [(0, 0), *spans], strict=False)):
        raise LawcatError(f"{damaged}: its tensors overlap or leave gaps; copy the file again.")
    return entries


def _entry(info: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    if isinstance(info, dict) and set(info) == {"dtype", "shape", "data_offsets"}:
        kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
        if whole and isinstance(kind, str) and len(shape) <= _MAX_RANK and len(offsets) == 2:
            return kind, tuple(shape), offsets[0], offsets[1]
    raise LawcatError(f"{where} has a wrong dtype, shape or data_offsets; copy the file again.")


class ArrayWeights:
    """Tensors that are in memory already: a small model in a test, or a torch ``state_dict`` made numpy."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)

    def names(self) -> list[str]:
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.get(name).shape

    def get(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise LawcatError(f"The weights lack {name}; the teacher is of another model.")
        return np.asarray(self._arrays[name], np.float32)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.get(name)[start:stop]


class MergedWeights:
    """A teacher with an adapter's LoRA added on the fly: W + alpha / rank * B A on its targets."""

    def __init__(self, base: WeightSource, adapter: Any) -> None:
        """``adapter``: ``.tensors`` (name -> array) and ``.lora`` (LoraSettings or None)."""
        self._base = base
        self._pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if not adapter.lora:
            return
        scale = np.float32(adapter.lora.scale)
        for name, down in adapter.tensors.items():
            if name.endswith(".lora_A"):
                layer, projection = name.removeprefix("layers.").removesuffix(".lora_A").split(".")
                up = adapter.tensors[name[:-1] + "B"]
                part = "self_attn" if projection in ATTENTION_TARGETS else "mlp"
                target = f"model.layers.{layer}.{part}.{projection}.weight"
                if base.shape(target) != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
                    raise LawcatError(
                        f"The adapter's {name} does not fit {target}; it is for another teacher."
                    )
                self._pairs[target] = (scale * up.astype(np.float32), down.astype(np.float32))

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def get(self, name: str) -> np.ndarray:
        return self.rows(name, 0, self.shape(name)[0]) if name in self._pairs else self._base.get(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        block = self._base.rows(name, start, stop)
        if name in self._pairs:
            up, down = self._pairs[name]
            block = block + up[start:stop] @ down
        return block


class RandomWeights:
    """A teacher of any shape, made up block by block: to test the export of models far larger than memory.

    Values depend on (seed, name, block of 256 rows) only, so any slice of a tensor is reproducible.
    """

    _BLOCK = 256

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self._shapes = tensor_shapes(geometry)
        self._seed = seed

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(self, name: str) -> np.ndarray:
        return self.rows(name, 0, self._shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape = self._shapes[name]
        start, stop, _ = slice(start, stop).indices(shape[0])
        out = np.empty((max(stop - start, 0), *shape[1:]), np.float32)
        for block in range(start // self._BLOCK, -(-stop // self._BLOCK)):
            low = block * self._BLOCK
            high = min(low + self._BLOCK, shape[0])
            values = self._block(name, block, (high - low, *shape[1:]))
            first, last = max(start, low), min(stop, high)
            out[first - start : last - start] = values[first - low : last - low]
        return out

    def _block(self, name: str, block: int, shape: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng((self._seed, zlib.crc32(name.encode()), block))
        values = generator.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            return 1 + np.float32(0.1) * values
        # 1/sqrt(fan-in) keeps activations at the size of a real model's
        return values * np.float32(0.02 if len(shape) == 1 else shape[-1] ** -0.5)
