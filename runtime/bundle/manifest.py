"""A bundle: the folder that holds all a device needs. Its manifest, and the checks before a session exists.

``Bundle.open`` trusts nothing: every field of the manifest is typed and capped, every file is a regular file
inside the folder of the recorded size and sha256, and every tensor of every graph lies inside a listed file.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle import hub, signature, stamp
from lawcat_edge.runtime.bundle.flavours import FLAVOURS
from lawcat_edge.runtime.bundle.graph_check import MAX_MODEL_BYTES, ModelSummary, check_model
from lawcat_edge.runtime.bundle.limits import (
    GEOMETRY,
    LAYER_TYPES,
    MAX_FEATURES,
    MAX_SINKS,
    MAX_SPAN,
    MAX_TAPS,
    MAX_WINDOW,
    WINDOW_SCALINGS,
)
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.errors import CheckFailed, LawcatError

MANIFEST = "lawcat_bundle.json"
# Since 3: keys and values in buffers that grow, full-attention layers, query heads in order.
# Since 4: attention sinks.
FORMAT = 4
READABLE = (3, 4)
# The graphs a flavour may have, all over one weights file. last: logits of the last position; all: of every
# position. step and chunk: as last, with B = 1 and a fixed T, for runtimes without dynamic shapes. genai: as
# last, with the inputs that onnxruntime-genai gives; the runner here does not use it. ort_format: as last, in
# onnxruntime's own format and with its weights inside, for mobile apps.
GRAPHS = ("last", "all", "step", "chunk", "genai", "ort_format")
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_STATE_BYTES = 4 << 30

_LAWCAT_CAPS = {"conv_kernel": MAX_TAPS, "feature_dim": MAX_FEATURES}
TOKENS = "tokens"  # the axis of a buffer along which it grows


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state: its graph input and output, its shape without the batch, float32.

    buffer: "window" or "full" for keys or values, whose shape is (G, TOKENS, d): one row a token, in slots
    from 0 on; as many slots as the runner likes. "" for a tensor of constant size.
    """

    input: str
    output: str
    shape: tuple[int | str, ...]
    buffer: str = ""
    dtype: str = "float32"

    def sizes(self, rows: int = 0) -> tuple[int, ...]:
        """Its shape with this many rows, where it is a buffer."""
        return tuple(rows if isinstance(size, str) else size for size in self.shape)

    def to_dict(self) -> dict[str, Any]:
        data = {"input": self.input, "output": self.output, "shape": ["B", *self.shape], "dtype": self.dtype}
        return data | ({"buffer": self.buffer} if self.buffer else {})


@dataclass(frozen=True)
class Parity:
    """Recorded logits: feed `tokens` in `pieces`, compare top_ids, top_logits [n,k] at `positions`.

    bound: largest allowed |difference| relative to the largest |logit| recorded at that position.
    """

    tokens: list[int]
    pieces: list[int]
    positions: list[int]
    top_ids: list[list[int]]
    top_logits: list[list[float]]
    max_rel_err: float
    kl: float
    bound: float


@dataclass
class Manifest:
    """What lawcat_bundle.json says. An exporter builds one and calls ``write_manifest``.

    source: "teacher", "teacher_sha256", "adapter_sha256" (None: an untrained conversion), and where they are
    known "trained_tokens" of the adapter and "short_text", the mean loss in nats of the bundle and of its
    teacher on a short text ({"tokens", "loss", "teacher_loss"}).
    """

    name: str
    created_by: str
    source: dict[str, Any]
    lawcat: dict[str, Any]
    geometry: dict[str, Any]
    scheme: str
    ops: list[str]
    graphs: dict[str, dict[str, str]]
    state: list[StateTensor]
    tokens: dict[str, Any] = field(default_factory=lambda: {"bos": None, "eos": []})
    min_onnxruntime: dict[str, str] = field(default_factory=dict)  # by flavour
    parity: Parity | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def vocab_size(self) -> int:
        return int(self.geometry["vocab_size"])

    @property
    def num_layers(self) -> int:
        return int(self.geometry["num_layers"])

    @property
    def window(self) -> int:
        return int(self.lawcat.get("window", 0))

    @property
    def rope(self) -> bool:
        return bool(self.lawcat.get("rope", False))

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        kinds = self.lawcat.get("layer_types", [])
        return tuple(i for i, kind in enumerate(kinds) if kind == LAYER_TYPES[1])

    @cached_property
    def spans(self) -> dict[str, Span]:
        """What layers with buffers of each kind see."""
        return expected_spans(self.geometry, self.lawcat)

    @property
    def rotary(self) -> bool:
        """Whether the graphs take the rotary tables of the tokens' positions."""
        return self.rope or bool(self.spans)

    @property
    def eos(self) -> list[int]:
        return list(self.tokens["eos"])

    def kept(self, buffer: str, tokens: int) -> int:
        """Rows of a buffer that a text of so many tokens goes on from: the others are never seen again."""
        return self.spans[buffer].kept(tokens)

    def state_bytes(self, tokens: int | None = None) -> int:
        """Bytes of the state of one text of so many tokens, as a snapshot holds it; None: at most."""
        return state_bytes(self.state, self.spans, tokens)

    def to_dict(self) -> dict[str, Any]:
        data = {key: getattr(self, key) for key in _ORDER}
        data["state"] = [tensor.to_dict() for tensor in self.state]
        data["parity"] = None if self.parity is None else asdict(self.parity)
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Check every field; raises LawcatError naming the first that is wrong."""
        if not isinstance(data, dict):
            raise LawcatError(f"{MANIFEST} is not a JSON object; export the bundle again.")
        version = data.get("format")
        if version not in READABLE or type(version) is not int:
            raise LawcatError(
                f"{MANIFEST} has format {str(version)[:40]!r} and this runner reads {READABLE[0]} to {FORMAT}"
                "; update lawcat-edge or export the bundle again."
            )
        unknown = sorted(set(data) - set(_ORDER))
        if unknown:
            raise _bad(unknown[0][:60], "is not known to this version")
        reader = _Reader(data)
        manifest = cls(
            name=reader.text("name"),
            created_by=reader.text("created_by"),
            source=reader.mapping("source"),
            lawcat=reader.mapping("lawcat"),
            geometry=reader.mapping("geometry"),
            scheme=reader.text("scheme"),
            ops=reader.items("ops", 1, len(FLAVOURS)),
            graphs=reader.mapping("graphs"),
            state=[_state_tensor(item, i) for i, item in enumerate(reader.items("state", 1, 8192))],
            tokens=reader.mapping("tokens"),
            min_onnxruntime=reader.mapping("min_onnxruntime"),
            files=reader.mapping("files"),
        )
        manifest._check_geometry()
        manifest._check_graphs_and_files()
        manifest._check_state()
        manifest._check_source_and_tokens()
        manifest.parity = _parity(data.get("parity"), manifest.vocab_size)
        return manifest

    def _check_geometry(self) -> None:
        for data, where, caps in (
            (self.geometry, "geometry", GEOMETRY),
            (self.lawcat, "lawcat", _LAWCAT_CAPS),
        ):
            for key, cap in caps.items():
                _whole(data.get(key), f"{where}.{key}", 1, cap)
        _whole(self.lawcat.get("window", 0), "lawcat.window", 0, MAX_WINDOW)
        if type(self.lawcat.get("rope", False)) is not bool:
            raise _bad("lawcat.rope", "must be true or false")
        if self.lawcat.get("window_scaling", WINDOW_SCALINGS[0]) not in WINDOW_SCALINGS:
            raise _bad("lawcat.window_scaling", f"must be one of {', '.join(WINDOW_SCALINGS)}")
        kinds, count = self.lawcat.get("layer_types", []), self.geometry["num_layers"]
        if not isinstance(kinds, list) or len(kinds) not in (0, count):
            raise _bad("lawcat.layer_types", f"must name the {count} layers or none")
        if not all(isinstance(kind, str) and kind in LAYER_TYPES for kind in kinds):
            raise _bad("lawcat.layer_types", f"must be {' or '.join(LAYER_TYPES)} each")
        least, most = (1, MAX_SPAN) if LAYER_TYPES[1] in kinds else (0, 0)
        _whole(self.lawcat.get("attention_span", 0), "lawcat.attention_span", least, most)
        sinks = self.lawcat.get("attention_sinks", 0)
        _whole(sinks, "lawcat.attention_sinks", 0, MAX_SINKS if most else 0)
        if sinks and (not self.spans["full"].possible or self.geometry.get("sliding_window")):
            raise _bad("lawcat.attention_sinks", "does not fit the span")
        if self.geometry.get("sliding_window") is not None:
            _whole(self.geometry["sliding_window"], "geometry.sliding_window", 1, 1 << 31)
        _text(self.geometry.get("family", ""), "geometry.family")
        if self.geometry["num_heads"] % self.geometry["num_kv_heads"]:
            raise _bad("geometry.num_kv_heads", "does not divide num_heads")

    def _check_graphs_and_files(self) -> None:
        if not 1 <= len(self.files) <= 64:
            raise _bad("files", "must list 1 to 64 files")
        for name, entry in self.files.items():
            files.check_member_name(name)
            if name == MANIFEST:
                raise _bad("files", "lists the manifest itself")
            if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
                raise _bad(f"files.{name}", "must give size and sha256")
            _whole(entry["size"], f"files.{name}.size", 0, 1 << 44)
            _hex256(entry["sha256"], f"files.{name}.sha256")
        if len({name.lower() for name in self.files}) != len(self.files):
            raise _bad("files", "lists two names that are one on some systems")
        if TOKENIZER not in self.files:
            raise _bad("files", f"does not list {TOKENIZER}")
        if any(op not in FLAVOURS for op in self.ops) or len(set(self.ops)) != len(self.ops):
            raise _bad("ops", f"must be some of {', '.join(FLAVOURS)}")
        if set(self.graphs) != set(self.ops):
            raise _bad("graphs", "must have one entry for each of ops")
        for op, graph in self.graphs.items():
            if not isinstance(graph, dict) or "last" not in graph or not set(graph) <= set(GRAPHS):
                raise _bad(f"graphs.{op}", f"must name the graph 'last' and may name {', '.join(GRAPHS[1:])}")
            for kind, name in graph.items():
                if not isinstance(name, str) or name not in self.files:
                    raise _bad(f"graphs.{op}.{kind}", "is not among the files")
                # onnxruntime goes by the ending
                if name.endswith(".ort") != (kind == "ort_format"):
                    raise _bad(f"graphs.{op}.{kind}", "must end in .ort if and only if it is ort_format")
        if set(self.min_onnxruntime) != set(self.ops):
            raise _bad("min_onnxruntime", "must give a version for each of ops")
        for op, version in self.min_onnxruntime.items():
            if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", _text(version, f"min_onnxruntime.{op}")):
                raise _bad(f"min_onnxruntime.{op}", "must be a version such as 1.25.1")

    def _check_state(self) -> None:
        expected = expected_state(self.geometry, self.lawcat)
        got = {tensor.input: tensor for tensor in self.state}
        if len(got) != len(self.state) or len({tensor.output for tensor in self.state}) != len(self.state):
            raise _bad("state", "names a tensor twice")
        for tensor in expected:
            if got.get(tensor.input) != tensor:
                shape = ", ".join(map(str, tensor.shape))
                raise _bad("state", f"does not have {tensor.input} of shape [B, {shape}] float32")
        if len(got) != len(expected):
            raise _bad("state", f"has {len(got)} tensors where the geometry gives {len(expected)}")
        if self.state_bytes() > MAX_STATE_BYTES:
            raise _bad("state", f"would take up to {self.state_bytes():,} bytes")

    def _check_source_and_tokens(self) -> None:
        _text(self.source.get("teacher"), "source.teacher")
        _hex256(self.source.get("teacher_sha256"), "source.teacher_sha256")
        if self.source.get("adapter_sha256") is not None:
            _hex256(self.source["adapter_sha256"], "source.adapter_sha256")
        if self.source.get("trained_tokens") is not None:
            _whole(self.source["trained_tokens"], "source.trained_tokens", 0, 1 << 53)
        measured = self.source.get("short_text")
        if measured is not None:
            if not isinstance(measured, dict) or set(measured) != {"tokens", "loss", "teacher_loss"}:
                raise _bad("source.short_text", "must give tokens, loss and teacher_loss")
            _whole(measured["tokens"], "source.short_text.tokens", 1, 1 << 24)
            for name in ("loss", "teacher_loss"):
                _real(measured[name], f"source.short_text.{name}", 0, 1e6)
        if self.tokens.get("bos") is not None:
            _whole(self.tokens["bos"], "tokens.bos", 0, self.vocab_size - 1)
        eos = self.tokens.get("eos")
        if not isinstance(eos, list) or len(eos) > 64:
            raise _bad("tokens.eos", "must be a list of token ids")
        for token in eos:
            _whole(token, "tokens.eos", 0, self.vocab_size - 1)


_ORDER = (
    *("format", "name", "created_by", "source", "lawcat", "geometry", "scheme", "ops", "min_onnxruntime"),
    *("graphs", "state", "tokens", "parity", "files"),
)


def expected_state(geometry: dict[str, Any], lawcat: dict[str, Any]) -> list[StateTensor]:
    """The state tensors the graph contract prescribes, layer by layer.

    A linear-attention layer has conv_state [B, 2 H d, K-1] (q channels, then repeated k channels) and
    recurrent_state [B, H, F, d+1], and with a window key and value. A full-attention layer has key and value
    [B, G, tokens, d] alone, keys rotated at their positions.
    """
    H, G, d = geometry["num_heads"], geometry["num_kv_heads"], geometry["head_dim"]
    fixed: dict[str, tuple[int | str, ...]] = {
        "conv_state": (2 * H * d, lawcat["conv_kernel"] - 1),
        "recurrent_state": (H, 2 * lawcat["feature_dim"], d + 1),
    }
    kinds = lawcat.get("layer_types") or [LAYER_TYPES[0]] * geometry["num_layers"]
    state = []
    for i, kind in enumerate(kinds):
        full = kind == LAYER_TYPES[1]
        buffer = "full" if full else "window" if lawcat.get("window", 0) else ""
        names = [(name, shape, "") for name, shape in fixed.items() if not full]
        names += [(name, (G, TOKENS, d), buffer) for name in ("key", "value") if buffer]
        state += [
            StateTensor(f"past_key_values.{i}.{name}", f"present.{i}.{name}", shape, own)
            for name, shape, own in names
        ]
    return state


def expected_spans(geometry: dict[str, Any], lawcat: dict[str, Any]) -> dict[str, Span]:
    """What layers with buffers of each kind see: those of the window, and of full attention."""
    kinds = lawcat.get("layer_types") or [LAYER_TYPES[0]]
    spans = {}
    if lawcat.get("window", 0) and LAYER_TYPES[0] in kinds:
        spans["window"] = Span(lawcat["window"])
    if LAYER_TYPES[1] in kinds:
        tokens = min(lawcat["attention_span"], geometry.get("sliding_window") or MAX_SPAN)
        spans["full"] = Span(tokens, lawcat.get("attention_sinks", 0))
    return spans


def state_bytes(state: Iterable[StateTensor], spans: dict[str, Span], tokens: int | None = None) -> int:
    """Bytes of the state after so many tokens: what a text goes on from. None: at most."""
    total = 0
    for tensor in state:
        span = spans.get(tensor.buffer, Span(1))
        total += 4 * _product(tensor.sizes(span.most if tokens is None else span.kept(tokens)))
    return total


def state_sizes(state: Iterable[StateTensor], spans: dict[str, Span]) -> dict[str, int]:
    """Bytes of the state of one text before its first token, after 8,192 tokens, and at most."""
    tensors = list(state)
    return {
        name: state_bytes(tensors, spans, n) for name, n in (("empty", 0), ("8192", 8192), ("most", None))
    }


def describe_state(sizes: dict[str, int]) -> str:
    """``state_sizes`` in words."""
    empty, later, most = (f"{sizes[key] / 1e6:.2f} MB" for key in ("empty", "8192", "most"))
    if sizes["empty"] == sizes["most"]:
        return f"{most} a text, whatever its length"
    return f"{empty} before the first token, {later} after 8,192, {most} at most"


class Bundle:
    """An opened, checked bundle folder. ``sha256`` is that of the manifest, and so stands for every file."""

    def __init__(self, folder: Path, manifest: Manifest, sha256: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.sha256 = sha256
        self._seen: dict[str, tuple[int, ...]] = {}
        self.graphs: dict[str, ModelSummary] = {}

    @classmethod
    def open(
        cls,
        path: Path | str,
        check_hashes: bool = True,
        public_key: Path | str | None = None,
        rehash: bool = False,
    ) -> Bundle:
        """Open the bundle in folder `path`, or of that name on the hub (see ``hub``).

        check_hashes: compare every file's sha256 too (sizes, names and tensor positions are always checked).
        A large bundle whose files have not changed since that was done here is not read again (see
        ``stamp``), unless rehash is true or a public_key is given.
        public_key: PEM file of the maker's key; the manifest must be signed with it (see ``signature``).
        Raises LawcatError for what is no bundle, CheckFailed for a file that is not as recorded.
        """
        folder = hub.located(path)
        if not folder.is_dir():
            raise LawcatError(f"There is no bundle folder {folder}; make one with `lawcat-edge export`.")
        if not (folder / MANIFEST).exists():
            raise LawcatError(
                f"{folder} is not a bundle (it has no {MANIFEST}); make one with `lawcat-edge export`."
            )
        data = files.read_bytes(files.member_path(folder, MANIFEST), files.MAX_JSON_BYTES)
        if public_key is not None:
            signature.check(folder, data, public_key)
        manifest = Manifest.from_dict(files.parse_json(data, str(folder / MANIFEST)))
        bundle = cls(folder, manifest, hashlib.sha256(data).hexdigest())
        bundle._check_files()
        if check_hashes:
            bundle._check_hashes(rehash or public_key is not None)
        for graph in manifest.graphs.values():
            for name in graph.values():
                if name not in bundle.graphs:
                    bundle.graphs[name] = bundle._check_graph(name)
        return bundle

    def path(self, name: str) -> Path:
        """Path of a file the manifest lists; LawcatError for any other."""
        if name not in self.manifest.files:
            raise LawcatError(f"The bundle {self.folder} has no file {name!r}; export it again.")
        return files.member_path(self.folder, name)

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    def read(self, name: str, limit: int = 64 << 20) -> bytes:
        """The bytes of a listed file, compared with its recorded sha256: what is used is what was checked."""
        data = files.read_bytes(self.path(name), limit)
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name]["sha256"]:
            raise self._altered(name)
        return data

    def _altered(self, name: str) -> CheckFailed:
        return CheckFailed(
            f"{self.folder / name} is not the file that was exported (sha256 differs); copy it again."
        )

    @cached_property
    def bytes_on_disk(self) -> int:
        return sum(entry["size"] for entry in self.manifest.files.values())

    def check_unchanged(self) -> None:
        """Raise CheckFailed if a file was replaced or written since it was checked."""
        for name, seen in self._seen.items():
            if files.fingerprint(self.path(name)) != seen:
                raise CheckFailed(f"{self.folder / name} changed while it was being loaded; try again.")

    def _check_files(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path(name)
            self._seen[name] = files.fingerprint(path)
            size = os.stat(path).st_size
            if size != entry["size"]:
                raise CheckFailed(
                    f"{path} has {size:,} bytes and should have {entry['size']:,}; copy the bundle again."
                )

    def _check_hashes(self, rehash: bool) -> None:
        stamped = not rehash and self.bytes_on_disk >= stamp.LEAST_BYTES
        if stamped and stamp.stands(self.folder, self.sha256, self._seen):
            return
        begin = time.time_ns()
        names = sorted(self.manifest.files, key=lambda name: -self.manifest.files[name]["size"])
        with ThreadPoolExecutor(min(4, len(names))) as pool:
            found = pool.map(lambda name: files.sha256_file(self.path(name)), names)
            for name, digest in zip(names, found, strict=True):
                if digest != self.manifest.files[name]["sha256"]:
                    raise self._altered(name)
        if stamped:
            self.check_unchanged()
            stamp.put(self.folder, self.sha256, self._seen, begin)

    def _check_graph(self, name: str) -> ModelSummary:
        if name.endswith(".ort"):
            # onnxruntime verifies the flatbuffer itself, and nothing in it can point outside of it
            with open(self.path(name), "rb") as file:
                if file.read(8)[4:] != b"ORTM":
                    raise LawcatError(f"{self.folder / name} is not in ORT format; export the bundle again.")
            return ModelSummary()
        graphs = {graph for entry in self.manifest.graphs.values() for graph in entry.values()}

        def size_of(location: str) -> int | None:
            entry = self.manifest.files.get(location)
            return None if entry is None or location in graphs else int(entry["size"])

        path = self.folder / name
        summary = check_model(files.read_bytes(self.path(name), MAX_MODEL_BYTES), str(path), size_of)
        if summary.suspicious is not None:
            raise LawcatError(f"{path} has {summary.suspicious}, which no export writes; export it again.")
        return summary


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """size and sha256 of each named member of `folder`, as the manifest records them."""
    result = {}
    for name in sorted(names):
        path = files.member_path(folder, name)
        result[name] = {"size": os.stat(path).st_size, "sha256": files.sha256_file(path)}
    return result


def write_manifest(folder: Path | str, manifest: Manifest, names: Iterable[str] | None = None) -> Manifest:
    """Describe the files of `folder` (all, or `names`), check the manifest as a reader would, write it."""
    folder = Path(folder)
    if names is None:
        apart = (MANIFEST, signature.SIGNATURE)
        names = [p.name for p in folder.iterdir() if p.name not in apart and not p.name.startswith(".")]
    manifest.files = describe_files(folder, names)
    return save_manifest(folder, manifest)


def save_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Check the manifest as a reader would and write it, with the files as it describes them."""
    checked = Manifest.from_dict(manifest.to_dict())
    files.write_json(folder / MANIFEST, checked.to_dict())
    return checked


def _bad(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{MANIFEST}: {where} {problem}; export or copy the bundle again.")


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _whole(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _bad(where, f"must be a whole number from {low} to {high}, not {str(value)[:40]!r}")
    return value


def _real(value: Any, where: str, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise _bad(where, f"must be a number from {low:g} to {high:g}, not {str(value)[:40]!r}")
    return float(value)


def _text(value: Any, where: str) -> str:
    # `info` prints these: a control character could rewrite what the terminal shows.
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise _bad(where, "must be a text of at most 4096 printable characters")
    return value


def _hex256(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise _bad(where, "must be a sha256 in 64 hexadecimal digits")


class _Reader:
    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def text(self, key: str) -> str:
        return _text(self.data.get(key), key)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise _bad(key, "must be an object")
        return value

    def items(self, key: str, low: int, high: int) -> list[Any]:
        value = self.data.get(key)
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise _bad(key, f"must be a list of {low} to {high} entries")
        return value


def _state_tensor(data: Any, index: int) -> StateTensor:
    where = f"state[{index}]"
    if not isinstance(data, dict) or set(data) - {"buffer"} != {"input", "output", "shape", "dtype"}:
        raise _bad(where, "must give input, output, shape and dtype")
    shape = data["shape"]
    if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or shape[0] != "B":
        raise _bad(f"{where}.shape", 'must begin with "B"')
    sizes = tuple(
        size if size == TOKENS else _whole(size, f"{where}.shape", 1, 1 << 24) for size in shape[1:]
    )
    if data["dtype"] != "float32":
        raise _bad(f"{where}.dtype", "must be float32: error in a smaller state accumulates")
    return StateTensor(
        _text(data["input"], f"{where}.input"),
        _text(data["output"], f"{where}.output"),
        sizes,
        _text(data.get("buffer", ""), f"{where}.buffer"),
    )


def _parity(data: Any, vocab_size: int) -> Parity | None:
    if data is None:
        return None
    if not isinstance(data, dict) or set(data) != set(Parity.__dataclass_fields__):
        raise _bad("parity", f"must give {', '.join(Parity.__dataclass_fields__)}")
    read = _Reader(data)
    tokens = [_whole(t, "parity.tokens", 0, vocab_size - 1) for t in read.items("tokens", 1, 1 << 16)]
    pieces = [_whole(n, "parity.pieces", 1, len(tokens)) for n in read.items("pieces", 1, len(tokens))]
    if sum(pieces) != len(tokens):
        raise _bad("parity.pieces", "must add up to the number of tokens")
    positions = [_whole(p, "parity.positions", 0, len(tokens) - 1) for p in read.items("positions", 1, 4096)]
    top_ids: list[list[int]] = []
    top_logits: list[list[float]] = []
    for key in ("top_ids", "top_logits"):
        for row in read.items(key, len(positions), len(positions)):
            if not isinstance(row, list) or not 1 <= len(row) <= 256:
                raise _bad(f"parity.{key}", "must have 1 to 256 entries a position")
            if key == "top_ids":
                top_ids.append([_whole(item, "parity.top_ids", 0, vocab_size - 1) for item in row])
            else:
                top_logits.append([_real(item, "parity.top_logits", -1e30, 1e30) for item in row])
    if [len(row) for row in top_ids] != [len(row) for row in top_logits]:
        raise _bad("parity.top_logits", "does not match top_ids")
    numbers = {key: _real(data[key], f"parity.{key}", 0.0, 1e6) for key in ("max_rel_err", "kl", "bound")}
    return Parity(tokens, pieces, positions, top_ids, top_logits, **numbers)
