"""The parsers of outside bytes, each as a function of bytes that returns or raises LawcatError.

``fuzz.py`` feeds them what atheris makes up; ``test_fuzz_corpus.py`` feeds them what was kept of that.
Where a checksum guards the bytes it is made right first: an attacker makes it right, too.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from chat_templates import CONVERSATIONS

from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.ranges import Ranges
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.export.schemes import Scheme
from lawcat_edge.families import Geometry
from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle.graph_check import check_model
from lawcat_edge.runtime.bundle.manifest import Manifest, StateTensor, state_bytes
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.engine.rotary import inverse_frequencies
from lawcat_edge.runtime.errors import BundleFault, LawcatError
from lawcat_edge.runtime.generate.snapshot import MAGIC, Snapshot
from lawcat_edge.runtime.generate.text import Detokenizer, StopStrings, load_tokenizer
from lawcat_edge.runtime.server.requests import parse_chat, parse_completion, read_body
from lawcat_edge.runtime.template.chat import ChatTemplate
from lawcat_edge.weights import SafetensorsWeights

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sea salt?"}]
STATE = (StateTensor("a", "b", (2, 3)), StateTensor("c", "d", (1, "tokens", 4), "window"))
SPANS = {"window": Span(3)}
ADAPTER = {
    "format": 1,
    "lawcat": {"conv_kernel": 2, "feature_dim": 2, "gate_rank": 1},
    "geometry": {
        "family": "llama", "hidden_size": 4, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1,
        "head_dim": 2, "intermediate_size": 4, "vocab_size": 8, "tie_embeddings": True,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    },
    "teacher": "toy", "teacher_sha256": "ab" * 32, "lora": None, "training": {},
}  # fmt: skip


def _json(data: bytes) -> Any:
    return files.parse_json(data, "input")


def manifest(data: bytes) -> None:
    checked = Manifest.from_dict(_json(data))
    assert Manifest.from_dict(checked.to_dict()).to_dict() == checked.to_dict()
    if checked.rope:
        assert np.isfinite(inverse_frequencies(checked.geometry)).all()


def onnx_graph(data: bytes) -> None:
    sizes = {"model.onnx.data": 1 << 16}
    summary = check_model(data, "model.onnx", sizes.get)
    for location, offset, length in summary.external:
        assert 0 <= offset <= offset + length <= sizes[location]


def snapshot(data: bytes) -> None:
    """The bytes after the magic; length of the header and checksum are made right."""
    head, _, rest = data.partition(b"\0\0")
    body = MAGIC + struct.pack("<I", len(head)) + head + rest
    spec = SimpleNamespace(
        state=STATE,
        state_bytes=lambda tokens=None: state_bytes(STATE, SPANS, tokens),
        kept=lambda buffer, tokens: SPANS[buffer].kept(tokens),
        vocab_size=100,
    )
    bundle: Any = SimpleNamespace(manifest=spec, sha256="0" * 64, folder="bundle")
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        path = Path(folder) / "s"
        path.write_bytes(body + hashlib.sha256(body).digest())
        found = Snapshot.load(path, bundle)
        assert 0 <= found.fed <= len(found.tokens)
        assert all(np.isfinite(values).all() for values in found.tensors)
        found.save(path)
        assert Snapshot.load(path, bundle).tokens == found.tokens


def safetensors(data: bytes) -> None:
    """A header (its length is made right), then data; read as a teacher's weights and as an adapter's."""
    head, _, rest = data.partition(b"\0\0")
    body = struct.pack("<Q", len(head)) + head + rest
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        path = Path(folder) / "adapter.safetensors"
        path.write_bytes(body)
        config = {**ADAPTER, "tensors_sha256": hashlib.sha256(body).hexdigest()}
        (Path(folder) / "lawcat_config.json").write_text(json.dumps(config))
        try:
            Adapter.load(folder)
        except LawcatError:
            weights = SafetensorsWeights(folder)
            for name in weights.names():
                assert weights.get(name).shape == weights.shape(name)


def adapter_config(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        (Path(folder) / "lawcat_config.json").write_bytes(data)
        (Path(folder) / "adapter.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        Adapter.load(folder)


def ranges(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        path = Path(folder) / "ranges.json"
        path.write_bytes(data)
        found = Ranges.load(path)
        for name in found.tensors:
            for method in ("minmax", "percentile", "mse"):
                low, high = found.range(name, method)
                assert np.isfinite([low, high]).all()
        found.save(path)


def template(data: bytes) -> None:
    """A template, then perhaps JSON of what it renders: {"messages", "variables", "add", "continue"}.

    Without that, every conversation of the tests.
    """
    source, _, rest = data.partition(b"\0\0")
    made = ChatTemplate(source.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": "</s>"})
    renderings: list[tuple[Any, Any, bool, bool]] = [(MESSAGES, None, True, False)]
    if rest:
        given = _json(rest)
        given = given if isinstance(given, dict) else {}
        variables = given.get("variables")
        variables = variables if isinstance(variables, dict) else None
        renderings = [
            (given.get("messages", MESSAGES), variables, bool(given.get("add")), bool(given.get("continue")))
        ]
    else:
        for k, (messages, variables) in enumerate(CONVERSATIONS.values()):
            renderings.append((messages, variables, bool(k % 2), k % 3 == 0))
    refused = []
    for messages, variables, add, going_on in renderings:
        try:
            assert isinstance(made.render(messages, add, going_on, variables), str)
        except BundleFault:
            raise
        except LawcatError as error:  # these messages are refused, others may be taken
            refused.append(error)
    if len(refused) == len(renderings):
        raise refused[0]


def request(data: bytes) -> None:
    body = read_body(data)
    for parse in (parse_chat, parse_completion):
        try:
            parse(body, 100)
        except LawcatError:
            continue


def settings(data: bytes) -> None:
    """Scheme files, recipes and a teacher's config.json."""
    value = _json(data)
    makers: list[Callable[[Any], Any]] = [Scheme.from_dict, Geometry.from_hf, Geometry.from_dict]
    if isinstance(value, dict):
        makers.append(lambda found: DistillSettings().with_changes(found))
    for make in makers:
        try:
            make(value)
        except LawcatError:
            continue


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, then some text through it and back in pieces."""
    engine = load_tokenizer(data)
    ids = engine.encode("Why is the sea salt?\u20ac").ids[:50]
    plain: Any = SimpleNamespace(decode=lambda ids, skip: engine.decode(list(ids), skip_special_tokens=skip))
    pieces, stops = Detokenizer(plain), StopStrings(["sea"])
    for token in ids:
        stops.push(pieces.push(token))
    stops.push(pieces.flush())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "onnx_graph": onnx_graph,
    "snapshot": snapshot,
    "safetensors": safetensors,
    "adapter_config": adapter_config,
    "ranges": ranges,
    "template": template,
    "request": request,
    "settings": settings,
}


def run(name: str, data: bytes) -> bool:
    """Whether the target took the bytes; False: it refused them, as it should what is wrong."""
    try:
        TARGETS[name](data)
    except LawcatError as error:
        message = str(error)
        assert message, "an empty message"
        assert len(message) < 4000, "a message too long to read"
        return False
    return True
