"""What is done to each kind of artefact, and how it is used afterwards (see ``mutate.py``)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1, 3.5, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1e300, "", "x" * 5000, [], {}),
    *("../../etc/passwd", "/dev/zero", "C:\\x", "\x1b[2J", "nan", [[]], {"a": {"b": []}}, "con"),
]
MANIFEST = "lawcat_bundle.json"


class Whole:
    """The undamaged artefacts, a folder each; what is slow to open is opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model: Any = None

    @property
    def model(self) -> Any:
        from lawcat_edge.runtime import Model

        if self._model is None:
            self._model = Model.load(self.folder / "bundle", threads=1)
        return self._model


@dataclass(frozen=True)
class Kind:
    """make: damage a copy in a folder, (names of what changed, what was done). use: read and run it."""

    make: Callable[[Whole, random.Random, Path], tuple[list[str], str]]
    use: Callable[[Whole, Path], None]
    hashed: bool = True  # a change must be noticed unless the hashes were corrected
    names: Callable[[str], bool] = lambda message: False
    alone: bool = False

    def may_pass(self, what: str) -> bool:
        # A lone file may be a link: its user names it, and it is read once.
        linked = self.alone and what in ("hard-link", "link-out")
        return not self.hashed or linked or "rehashed" in what or what == "harmless"


# -- bytes -----------------------------------------------------------------------------------------------


def damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One of the things that happen to bytes; never the same bytes."""
    size = len(data)
    out = bytearray(data)
    what = rng.choice(
        ["flip", "flip", "set", "cut", "cut-edge", "insert", "drop", "zero", "repeat", "longer", "swap"]
    )
    at = rng.randrange(max(size, 1))
    span = rng.choice([1, 2, 4, 8, 64, 4096])
    if what == "flip" and size:
        for _ in range(rng.choice([1, 1, 1, 8])):
            out[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif what == "set" and size:
        out[at] = rng.choice([0, 1, 127, 128, 255])
    elif what == "cut":
        del out[at:]
    elif what == "cut-edge":
        del out[rng.choice([0, 1, 4, 7, 8, 12, size - 1, size - 8, size - 32, size // 2]) :]
    elif what == "insert":
        out[at:at] = rng.randbytes(span)
    elif what == "drop":
        del out[at : at + span]
    elif what == "zero":
        out[at : at + span] = bytes(len(out[at : at + span]))
    elif what == "repeat":
        out[at:at] = out[at : at + span]
    elif what == "swap":
        other = rng.randrange(max(size, 1))
        a, b = sorted((at, other))
        out[:] = out[b:] + out[a:b] + out[:a]
    else:
        out += rng.randbytes(span)
    if bytes(out) == data:
        out += b"\0"
    return bytes(out), what


def damage_json(rng: random.Random, text: bytes) -> tuple[bytes, str]:
    """A hostile value, a missing, a doubled or an unknown key somewhere in a JSON document."""
    data = json.loads(text)
    spots: list[tuple[Any, Any]] = []
    open_values = [data]
    while open_values:
        value = open_values.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            spots.append((value, key))
            if isinstance(value[key], (dict, list)):
                open_values.append(value[key])
    holder, key = rng.choice(spots)
    what = rng.choice(["value", "value", "value", "missing", "extra", "deep", "huge", "double", "nan"])
    if what == "value":
        new = rng.choice(HOSTILE)
        holder[key] = new if new != holder[key] or type(new) is not type(holder[key]) else "?"
    elif what == "missing":
        del holder[key]
    elif what == "extra" and isinstance(holder, dict):
        holder["zzz"] = 1
    else:
        holder[key] = "\0"
    out = json.dumps(data).encode()
    if what in ("deep", "huge", "double", "nan", "extra") and b'"\\u0000"' in out:
        bad = {
            "deep": b"[" * 5000 + b"]" * 5000, "huge": b"[" + b"[]," * 3_000_000 + b"1]", "nan": b"NaN",
            "double": b'{"a":1,"a":2}', "extra": b"1e999",
        }[what]  # fmt: skip
        out = out.replace(b'"\\u0000"', bad, 1)
    return out, f"json-{what}"


def damage_floats(rng: random.Random, data: bytes, start: int = 0) -> tuple[bytes, str]:
    """NaN, infinity, or a huge or random number in the place of some float32."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 10])):
        at = start + rng.randrange(max((len(out) - start) // 4, 1)) * 4
        value = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, -1e30, rng.uniform(-100, 100)])
        out[at : at + 4] = struct.pack("<f", value)
    return bytes(out), "floats"


def damage_place(rng: random.Random, path: Path) -> str:
    """What can be in the place of a file: nothing, a folder, a link out, a pipe, a terabyte of zeros."""
    what = rng.choice(
        ["gone", "folder", "link-out", "hard-link", "pipe", "sparse", "device", "loop", "empty"]
    )
    outside = path.parent.with_name(path.parent.name + ".outside")
    if what == "hard-link":
        os.link(path, outside)
        return what
    if what == "link-out":
        path.rename(outside)
        path.symlink_to(outside)
        return what
    if what == "sparse":
        with open(path, "r+b") as file:
            file.truncate(1 << 40)
        return what
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "empty":
        path.touch()
    return what


# -- bundles ---------------------------------------------------------------------------------------------


def make_bundle(whole: Whole, rng: random.Random, place: Path, kind: str = "bundle") -> tuple[list[str], str]:
    shutil.copytree(whole.folder / kind, place)
    names = sorted(path.name for path in place.iterdir())
    rehash = rng.random() < 0.6
    way = rng.choice(["bytes", "bytes", "json", "json", "graph", "graph", "floats", "place", "exchange"])
    changed = [rng.choice(names)]
    if way == "place":
        return changed, damage_place(rng, place / changed[0])
    if way == "json":
        changed = [MANIFEST]
        content, what = damage_json(rng, (place / MANIFEST).read_bytes())
        (place / MANIFEST).write_bytes(content)
        # The manifest has no hash of its own: a bundle is what its manifest says.
        return changed, f"{what} rehashed"
    if way == "exchange":
        a, b = rng.sample([name for name in names if name != MANIFEST], 2)
        (place / a).rename(place / "x")
        (place / b).rename(place / a)
        (place / "x").rename(place / b)
        changed, what = [a, b], "exchange"
    elif way == "graph":
        changed = [rng.choice(["model.onnx", "model_all.onnx"])]
        what = damage_graph(rng, place / changed[0])
    elif way == "floats":
        changed = ["model.onnx.data"]
        content, what = damage_floats(rng, (place / changed[0]).read_bytes())
        (place / changed[0]).write_bytes(content)
    else:
        content, what = damage(rng, (place / changed[0]).read_bytes())
        (place / changed[0]).write_bytes(content)
        if changed == [MANIFEST]:
            return changed, f"{what} rehashed"
    if rehash:
        correct(place)
        what += " rehashed"
    return [*changed, *(["model.onnx", "tokenizer"] if rehash else [])], what


def correct(folder: Path) -> None:
    """Sizes and hashes in the manifest as they are now, where it is still JSON."""
    data = json.loads((folder / MANIFEST).read_bytes())
    for name in data["files"]:
        content = (folder / name).read_bytes()
        data["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(data))


def damage_graph(rng: random.Random, path: Path) -> str:
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    tensor = rng.choice(graph.initializer)
    node = rng.choice(graph.node)
    ways: list[Callable[[], Any]] = [
        lambda: tensor.dims.append(rng.choice([2, 1 << 20, 1 << 40, -1, (1 << 62)])),
        lambda: setattr(tensor, "data_type", rng.randrange(30)),
        lambda: graph.initializer.append(tensor),
        lambda: graph.node.remove(node),
        lambda: graph.node.append(node),
        lambda: node.input.append(rng.choice(["", "x0", "nothing"])),
        lambda: setattr(node, "op_type", rng.choice(["Loop", "MatMul", "Nothing", "Tile", "Expand"])),
        lambda: setattr(node, "domain", rng.choice(["", "com.microsoft", "ai.onnx.ml", "x"])),
        lambda: graph.input.pop(),
        lambda: graph.output.append(graph.output[0]),
        lambda: setattr(graph.input[0].type.tensor_type, "elem_type", rng.randrange(12)),
        lambda: setattr(model.opset_import[0], "version", rng.choice([0, 1, 7, 99, -1])),
        lambda: setattr(model, "ir_version", rng.choice([0, 3, 99])),
        lambda: _attributes(rng, node),
        lambda: _shuffle(rng, graph),
        lambda: model.metadata_props.add(key="a", value="b" * 100_000),
    ]  # fmt: skip
    if tensor.external_data:
        for key, values in {
            "location": ["/etc/passwd", "../x", "model.onnx", "tokenizer.json", "*/_ORT_MEM_ADDR_/*", ""],
            "offset": ["-4", "99999999999", "1", "0", str(1 << 63)],
            "length": ["0", "4", "99999999999", "x"],
        }.items():
            ways.append(lambda key=key, values=values: _entry(tensor, key, rng.choice(values)))  # type: ignore[misc]
    before = model.SerializeToString()
    rng.choice(ways)()
    after = model.SerializeToString()
    path.write_bytes(after if after != before else after + b"\x08\x09")
    return "graph"


def _attributes(rng: random.Random, node: Any) -> None:
    for attribute in node.attribute:
        attribute.i = rng.choice([-1, 0, 1 << 40])


def _shuffle(rng: random.Random, graph: Any) -> None:
    nodes = list(graph.node)
    rng.shuffle(nodes)
    graph.ClearField("node")
    graph.node.extend(nodes)


def _entry(tensor: Any, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value


def use_bundle(whole: Whole, place: Path) -> None:
    from lawcat_edge.runtime.bundle.verify import verify

    verify(place, threads=1)


# -- adapters --------------------------------------------------------------------------------------------


def make_adapter(whole: Whole, rng: random.Random, place: Path) -> tuple[list[str], str]:
    shutil.copytree(whole.folder / "adapter", place)
    config, tensors = place / "lawcat_config.json", place / "adapter.safetensors"
    way = rng.choice(["bytes", "json", "header", "header", "floats", "place"])
    if way == "place":
        path = rng.choice([config, tensors])
        return [path.name], damage_place(rng, path)
    if way == "json":
        content, what = damage_json(rng, config.read_bytes())
        config.write_bytes(content)
        return [config.name, tensors.name], f"{what} rehashed"
    data = tensors.read_bytes()
    if way == "header":
        content, what = damage_header(rng, data)
    elif way == "floats":
        content, what = damage_floats(rng, data, 8 + int.from_bytes(data[:8], "little"))
    else:
        content, what = damage(rng, data)
    tensors.write_bytes(content)
    if rng.random() < 0.7:
        what += " rehashed"
        found = json.loads(config.read_bytes())
        config.write_text(json.dumps({**found, "tensors_sha256": hashlib.sha256(content).hexdigest()}))
    return [tensors.name], what


def damage_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Inflated, negative or overlapping sizes, wrong types, doubled and lost names in a header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = rng.choice(["dims", "dtype", "offsets", "lost", "double", "json", "order"])
    if what == "dims":
        entry["shape"] = rng.choice([[1 << 40], [-1, 2], [0], entry["shape"] * 8, [*entry["shape"][::-1], 1]])
    elif what == "dtype":
        entry["dtype"] = rng.choice(["F16", "I32", "BF16", "F64", "F8_E4M3", "X", 7, None])
    elif what == "offsets":
        entry["data_offsets"] = rng.choice(
            [[0, 4], [1 << 62, 1 << 62], [8, 4], [-4, 0], [0], "x", [0.0, 4.0]]
        )
    elif what == "lost":
        del header[name]
    elif what == "json":
        text, _ = damage_json(rng, json.dumps(header).encode())
        return len(text).to_bytes(8, "little") + text + data[8 + length :], "header-json"
    elif what == "order":
        header = dict(sorted(header.items(), key=lambda item: rng.random()))
    text = json.dumps(header).encode()
    if what == "double":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    if what == "order":
        text += b" "
    return len(text).to_bytes(8, "little") + text + data[8 + length :], f"header-{what}"


def use_adapter(whole: Whole, place: Path) -> None:
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.weights import MergedWeights, SafetensorsWeights

    adapter = Adapter.load(place)
    weights = MergedWeights(SafetensorsWeights(whole.folder / "safetensors"), adapter)
    for name in weights.names():
        assert np.isfinite(weights.get(name)).all(), name
    assert adapter.tensors.keys() == adapter.expected_shapes().keys()


# -- snapshots -------------------------------------------------------------------------------------------


def make_snapshot(whole: Whole, rng: random.Random, place: Path) -> tuple[list[str], str]:
    place.mkdir()
    path = place / "talk.snapshot"
    shutil.copy(whole.folder / "snapshot" / path.name, path)
    data = path.read_bytes()
    length = int.from_bytes(data[8:12], "little")
    way = rng.choice(["bytes", "bytes", "json", "floats", "place", "length"])
    if way == "place":
        return [path.name], damage_place(rng, path)
    body, rest = data[:-32], data[12 + length : -32]
    if way == "json":
        head, what = damage_json(rng, data[12 : 12 + length])
        body = data[:8] + len(head).to_bytes(4, "little") + head + rest
    elif way == "floats":
        body, what = damage_floats(rng, body, len(body) - len(rest) // 2)
    elif way == "length":
        body, what = data[:8] + rng.randbytes(4) + data[12:-32], "length"
    else:
        body, what = damage(rng, body)
    if rng.random() < 0.7:
        path.write_bytes(body + hashlib.sha256(body).digest())
        return [path.name, "snapshot", "message", "content"], f"{what} rehashed"
    path.write_bytes(body + data[-32:])
    return [path.name], what


def use_snapshot(whole: Whole, place: Path) -> None:
    model = whole.model
    context = model.restore(place / "talk.snapshot")
    if len(context) > context.fed:
        list(model.generate(context=context, max_new_tokens=2, ignore_eos=True))
    assert all(np.isfinite(values).all() for values in context.state.arrays)


# -- teachers --------------------------------------------------------------------------------------------


def make_safetensors(whole: Whole, rng: random.Random, place: Path) -> tuple[list[str], str]:
    shutil.copytree(whole.folder / "safetensors", place)
    path = place / rng.choice(["model.safetensors"] * 3 + ["config.json", "tokenizer.json"])
    way = rng.choice(["bytes", "header", "header", "floats", "place", "json"])
    if way == "place":
        return [path.name], damage_place(rng, path)
    data = path.read_bytes()
    if path.suffix == ".json":
        content, what = damage_json(rng, data) if way == "json" else damage(rng, data)
    elif way == "floats":
        content, what = damage_floats(rng, data, 8 + int.from_bytes(data[:8], "little"))
    else:
        content, what = damage_header(rng, data) if way == "header" else damage(rng, data)
    path.write_bytes(content)
    return [path.name, "config.json", "model.safetensors"], what


def use_teacher(whole: Whole, place: Path) -> None:
    from lawcat_edge.runtime.files import read_bytes
    from lawcat_edge.runtime.generate.text import MAX_TOKENIZER, load_tokenizer
    from lawcat_edge.teacher import resolve
    from lawcat_edge.weights import check_shapes

    teacher = resolve(place)
    weights = teacher.weights()
    check_shapes(weights, teacher.geometry)
    for name in weights.names():
        assert np.isfinite(weights.get(name)).all(), name
    load_tokenizer(read_bytes(teacher.tokenizer_path, MAX_TOKENIZER), str(teacher.tokenizer_path))


def make_gguf(whole: Whole, rng: random.Random, place: Path) -> tuple[list[str], str]:
    place.mkdir()
    path = place / "model.gguf"
    data = (whole.folder / "gguf" / path.name).read_bytes()
    if rng.random() < 0.1:
        path.write_bytes(data)
        return [path.name], damage_place(rng, path)
    if rng.random() < 0.2:
        content, what = damage_floats(rng, data, len(data) * 2 // 3 // 4 * 4)
    elif rng.random() < 0.5:  # the head: counts, keys, names, sizes
        content, what = damage(rng, data[:3000])
        content += data[3000:]
    else:
        content, what = damage(rng, data)
    path.write_bytes(content)
    return [path.name], what


def use_gguf(whole: Whole, place: Path) -> None:
    from lawcat_edge.teacher import resolve

    os.environ["LAWCAT_EDGE_CACHE"] = str(place / "cache")
    try:
        teacher = resolve(place / "model.gguf")
    finally:
        del os.environ["LAWCAT_EDGE_CACHE"]
    use_teacher(whole, teacher.folder)


# -- ranges ----------------------------------------------------------------------------------------------


def make_ranges(whole: Whole, rng: random.Random, place: Path) -> tuple[list[str], str]:
    place.mkdir()
    path = place / "ranges.json"
    shutil.copy(whole.folder / "ranges" / path.name, path)
    way = rng.choice(["bytes", "json", "json", "json", "place"])
    if way == "place":
        return [path.name], damage_place(rng, path)
    content, what = (damage_json if way == "json" else damage)(rng, path.read_bytes())
    path.write_bytes(content)
    return [path.name], what


def use_ranges(whole: Whole, place: Path) -> None:
    from lawcat_edge.calibration.ranges import Ranges

    found = Ranges.load(place / "ranges.json")
    for name in found.tensors:
        low, high = found.range(name, "percentile")
        assert np.isfinite([low, high]).all()
        assert low <= high
    found.save(place / "again.json")


def _of_bundle(message: str) -> bool:
    return "bundle" in message or "state" in message or "logits" in message or "onnxruntime" in message


KINDS = {
    "exported": Kind(functools.partial(make_bundle, kind="exported"), use_bundle, names=_of_bundle),
    "bundle": Kind(make_bundle, use_bundle, names=_of_bundle),
    "adapter": Kind(make_adapter, use_adapter),
    "snapshot": Kind(make_snapshot, use_snapshot, alone=True, names=lambda said: "not finite" in said),
    "safetensors": Kind(
        make_safetensors, use_teacher, hashed=False, names=lambda said: ".safetensors" in said
    ),
    "gguf": Kind(make_gguf, use_gguf, hashed=False),
    "ranges": Kind(make_ranges, use_ranges, hashed=False),
}
