"""A bundle: the folder that holds all a device needs. Its manifest, and the checks before a session exists.

``Bundle.open`` trusts nothing: every field of the manifest is typed and capped, every file is a regular file
inside the folder of the recorded size and sha256, and every tensor of every graph lies inside a listed file.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lawcat_edge.runtime import files, schema
from lawcat_edge.runtime.bundle import hub, signature, stamp
from lawcat_edge.runtime.bundle.flavours import FLAVOURS
from lawcat_edge.runtime.bundle.graph_check import MAX_MODEL_BYTES, ModelSummary, check_model
from lawcat_edge.runtime.bundle.limits import (
    LAYER_TYPES,
    MAX_FEATURES,
    MAX_SINKS,
    MAX_SPAN,
    MAX_TAPS,
    MAX_WINDOW,
    HeadDim,
    Heads,
    HiddenSize,
    Layers,
    LayerType,
    VocabSize,
    WindowScaling,
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
Graph = Literal["last", "all", "step", "chunk", "genai", "ort_format"]
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_STATE_BYTES = 4 << 30

TOKENS = "tokens"  # the axis of a buffer along which it grows
_Bound = Annotated[float, Meta(ge=0.0, le=1e6)]


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


class Parity(Struct, frozen=True, forbid_unknown_fields=True):
    """Recorded logits: feed `tokens` in `pieces`, compare top_ids, top_logits [n,k] at `positions`.

    bound: largest allowed |difference| relative to the largest |logit| recorded at that position.
    """

    tokens: Annotated[list[int], Meta(min_length=1, max_length=1 << 16)]
    pieces: Annotated[list[Annotated[int, Meta(ge=1)]], Meta(min_length=1)]
    positions: Annotated[list[int], Meta(min_length=1, max_length=4096)]
    top_ids: list[Annotated[list[int], Meta(min_length=1, max_length=256)]]
    top_logits: list[list[Annotated[float, Meta(ge=-1e30, le=1e30)]]]
    max_rel_err: _Bound
    kl: _Bound
    bound: _Bound


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
        data["parity"] = None if self.parity is None else msgspec.structs.asdict(self.parity)
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
        document = schema.convert(data, _Document, _bad)
        manifest = cls(
            **{key: data[key] for key in _ORDER if key not in ("format", "state", "parity")},
            state=[entry.tensor() for entry in document.state],
            parity=document.parity,
        )
        manifest._check_texts(document)
        manifest._check_attention(document)
        manifest._check_graphs_and_files()
        manifest._check_state(document)
        manifest._check_tokens(document)
        return manifest

    def _check_texts(self, document: _Document) -> None:
        # `info` prints these: a control character could rewrite what the terminal shows.
        texts = {key: getattr(self, key) for key in ("name", "created_by", "scheme")}
        texts |= {"source.teacher": document.source.teacher, "geometry.family": document.geometry.family}
        for where, text in texts.items():
            if not text.isprintable():
                raise _bad(where, f"must be {_TEXT}")

    def _check_attention(self, document: _Document) -> None:
        geometry, lawcat = document.geometry, document.lawcat
        if len(lawcat.layer_types) not in (0, geometry.num_layers):
            raise _bad("lawcat.layer_types", f"must name the {geometry.num_layers} layers or none")
        least, most = (1, MAX_SPAN) if LAYER_TYPES[1] in lawcat.layer_types else (0, 0)
        _check(lawcat.attention_span, schema.whole(least, most), "lawcat.attention_span")
        sinks = schema.whole(0, MAX_SINKS if most else 0)
        _check(lawcat.attention_sinks, sinks, "lawcat.attention_sinks")
        if lawcat.attention_sinks and (not self.spans["full"].possible or geometry.sliding_window):
            raise _bad("lawcat.attention_sinks", "does not fit the span")
        if geometry.num_heads % geometry.num_kv_heads:
            raise _bad("geometry.num_kv_heads", "does not divide num_heads")

    def _check_graphs_and_files(self) -> None:
        for name in self.files:
            files.check_member_name(name)
        if MANIFEST in self.files:
            raise _bad("files", "lists the manifest itself")
        if len({name.lower() for name in self.files}) != len(self.files):
            raise _bad("files", "lists two names that are one on some systems")
        if TOKENIZER not in self.files:
            raise _bad("files", f"does not list {TOKENIZER}")
        if any(op not in FLAVOURS for op in self.ops) or len(set(self.ops)) != len(self.ops):
            raise _bad("ops", f"must be some of {', '.join(FLAVOURS)}")
        if set(self.graphs) != set(self.ops):
            raise _bad("graphs", "must have one entry for each of ops")
        if set(self.min_onnxruntime) != set(self.ops):
            raise _bad("min_onnxruntime", "must give a version for each of ops")
        for op, graph in self.graphs.items():
            if "last" not in graph:
                raise _bad(f"graphs.{op}", "must name the graph 'last'")
            for kind, name in graph.items():
                if name not in self.files:
                    raise _bad(f"graphs.{op}.{kind}", "is not among the files")
                # onnxruntime goes by the ending
                if name.endswith(".ort") != (kind == "ort_format"):
                    raise _bad(f"graphs.{op}.{kind}", "must end in .ort if and only if it is ort_format")

    def _check_state(self, document: _Document) -> None:
        for i, entry in enumerate(document.state):
            if entry.shape[0] != "B":
                raise _bad(f"state[{i}].shape", 'must begin with "B"')
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

    def _check_tokens(self, document: _Document) -> None:
        token = schema.whole(0, self.vocab_size - 1)
        if document.tokens.bos is not None:
            _check(document.tokens.bos, token, "tokens.bos")
        _check(document.tokens.eos, schema.listed(token), "tokens.eos")
        parity = document.parity
        if parity is None:
            return
        _check(parity.tokens, schema.listed(token), "parity.tokens")
        _check(parity.top_ids, schema.listed(schema.listed(token)), "parity.top_ids")
        position = schema.whole(0, len(parity.tokens) - 1)
        _check(parity.positions, schema.listed(position), "parity.positions")
        if sum(parity.pieces) != len(parity.tokens):
            raise _bad("parity.pieces", "must add up to the number of tokens")
        if len(parity.top_ids) != len(parity.positions):
            raise _bad("parity.top_ids", "must have one entry for each of positions")
        if [len(row) for row in parity.top_logits] != [len(row) for row in parity.top_ids]:
            raise _bad("parity.top_logits", "does not match top_ids")


_TEXT = "a text of at most 4096 printable characters"
_Text = Annotated[str, Meta(max_length=4096, description=_TEXT)]
_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="a sha256 in 64 hexadecimal digits")]
_Version = Annotated[str, Meta(pattern=r"^\d{1,4}(\.\d{1,4}){1,3}\Z", description="a version such as 1.25.1")]
_Axis = Annotated[
    Annotated[int, Meta(ge=1, le=1 << 24)] | Literal["B", "tokens"],
    Meta(description=f"a whole number from 1 to {1 << 24}, {TOKENS!r}, or 'B' as the first"),
]
_Loss = Annotated[float, Meta(ge=0, le=1e6)]


class _ShortText(Struct, forbid_unknown_fields=True):
    tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    loss: _Loss
    teacher_loss: _Loss


class _Source(Struct):
    teacher: _Text
    teacher_sha256: _Sha256
    adapter_sha256: _Sha256 | None = None
    trained_tokens: Annotated[int, Meta(ge=0, le=1 << 53)] | None = None
    short_text: _ShortText | None = None


class _Lawcat(Struct):
    conv_kernel: Annotated[int, Meta(ge=1, le=MAX_TAPS)]
    feature_dim: Annotated[int, Meta(ge=1, le=MAX_FEATURES)]
    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] = 0
    rope: bool = False
    window_scaling: WindowScaling = "max_score"
    layer_types: Annotated[list[LayerType], Meta(description=f"{' or '.join(LAYER_TYPES)} each")] = []
    attention_span: Any = 0  # their limits depend on the layers
    attention_sinks: Any = 0


class _Geometry(Struct):
    hidden_size: HiddenSize
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: Heads
    head_dim: HeadDim
    vocab_size: VocabSize
    sliding_window: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    family: _Text = ""


class _StateEntry(Struct, forbid_unknown_fields=True):
    input: _Text
    output: _Text
    shape: Annotated[list[_Axis], Meta(min_length=2, max_length=8)]
    dtype: Annotated[Literal["float32"], Meta(description="float32: error in a smaller state accumulates")]
    buffer: _Text = ""

    def tensor(self) -> StateTensor:
        return StateTensor(self.input, self.output, tuple(self.shape[1:]), self.buffer)


class _Tokens(Struct):
    eos: Annotated[list[Any], Meta(max_length=64, description="a list of at most 64 token ids")]
    bos: Any = None


class _File(Struct, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=0, le=1 << 44)]
    sha256: _Sha256


class _Document(Struct, forbid_unknown_fields=True, kw_only=True):
    """The JSON of a manifest, in the order in which it is written; those that may hold more are kept."""

    format: int
    name: _Text
    created_by: _Text
    source: _Source
    lawcat: _Lawcat
    geometry: _Geometry
    scheme: _Text
    ops: Annotated[list[str], Meta(min_length=1, max_length=len(FLAVOURS))]
    min_onnxruntime: dict[str, _Version]
    graphs: dict[str, dict[Graph, str]]
    state: Annotated[list[_StateEntry], Meta(min_length=1, max_length=8192)]
    tokens: _Tokens
    parity: Parity | None = None
    files: Annotated[dict[str, _File], Meta(min_length=1, max_length=64)]


_ORDER = _Document.__struct_fields__


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


def _check(value: Any, kind: Any, where: str) -> None:
    schema.convert(value, kind, _bad, where)
