"""The real onnxruntime-genai runs a bundle as it is, and writes the runner's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from environments import environment, run
from exported import make_bundle, make_student

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import genai
from lawcat_edge.runtime import Bundle, Engine, LawcatError, Model

SCRIPT = """
import json, sys
import onnxruntime_genai as og
folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
generator = og.Generator(model, params)
half = len(prompt) // 2  # in two parts: the second starts from a state that is not empty
generator.append_tokens(prompt[:half])
generator.append_tokens(prompt[half:])
tokens = []
while not generator.is_done():
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
text = [int(token) for token in tokenizer.encode("ships and boats")]
print(json.dumps({"tokens": tokens, "text": text, "version": og.__version__}))
"""
HYBRID: dict[str, Any] = {"layer_types": ("linear_attention", "full_attention"), "attention_span": 30}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("int8", "ort", {}),
    ("int8", "ort", {"window": 5, "rope": True}),
    ("int8", "portable", {"window": 5}),
    ("int8", "ort", {"window": 5, **HYBRID}),
    ("int8", "portable", {"window": 1, **HYBRID}),
]


def make(folder: Path, scheme: str, ops: str, settings: dict[str, Any]) -> Path:
    config = LawcatConfig(feature_dim=8, **settings)
    teacher, model, adapter = make_student(
        folder / "t", config=config, hidden_size=96, tie_word_embeddings=False
    )
    make_bundle(teacher, model, adapter, folder / "b", scheme=scheme, ops=(ops,))
    return folder / "b"


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "ops", "settings"), CASES)
def test_the_real_package_writes_the_same_tokens(
    pytestconfig: pytest.Config, tmp_path: Path, scheme: str, ops: str, settings: dict[str, Any]
) -> None:
    python = environment(pytestconfig, "onnxruntime-genai>=0.18", "onnxruntime>=1.32", "numpy<3")
    bundle = make(tmp_path, scheme, ops, settings)
    model = Model.load(bundle, threads=1)
    # longer than the pieces in which genai reads a prompt
    prompt = np.random.default_rng(5).integers(1, 257, 600).tolist()
    expected = model.generate(prompt, max_new_tokens=40, ignore_eos=True)
    list(expected)
    assert len(set(expected.tokens)) > 3, "a text that repeats one token would prove little"
    got = run(python, SCRIPT, bundle, json.dumps(prompt), "40")
    assert got["tokens"] == expected.tokens
    assert got["text"] == model.encode("ships and boats")


def test_a_graph_of_its_own_only_where_it_is_needed(tmp_path: Path) -> None:
    plain = Bundle.open(make(tmp_path / "p", "fp32", "ort", {}))
    assert "genai" not in plain.manifest.graphs["ort"]
    assert json.loads(plain.read("genai_config.json"))["model"]["decoder"]["filename"] == "model.onnx"
    assert plain.has("tokenizer_config.json")
    window = Bundle.open(make(tmp_path / "w", "fp32", "ort", {"window": 5, "rope": True}))
    assert window.manifest.graphs["ort"]["genai"] == genai.GRAPH
    assert json.loads(window.read("genai_config.json"))["model"]["decoder"]["filename"] == genai.GRAPH
    graph = onnx.load(window.path(genai.GRAPH), load_external_data=False).graph
    names = {value.name for value in graph.input}
    kinds = {name.rsplit(".", 1)[-1] for name in names - {"input_ids", "position_ids"}}
    assert {"input_ids", "position_ids"} <= names
    assert kinds == {"conv_state", "recurrent_state"}
    engine = Engine(window)
    assert engine.kinds == ("last", "all")
    with pytest.raises(LawcatError, match="no graph"):
        engine.run("genai", np.zeros((1, 1), np.int64), engine.new_state())


@pytest.mark.parametrize(
    ("ops", "settings"),
    [("ort", {"rope": True}), ("onnx", {"window": 2}), ("onnx", {"window": 9, **HYBRID}), ("ort", HYBRID)],
)
def test_the_adapted_graph_is_the_same_function(tmp_path: Path, ops: str, settings: dict[str, Any]) -> None:
    bundle = Bundle.open(make(tmp_path, "fp32", ops, settings))
    engine = Engine(bundle, threads=1)
    tokens = np.random.default_rng(0).integers(0, 257, 50)
    state, at, wanted = engine.new_state(), 0, []
    for piece in (7, 1, 1, 40, 1):
        at += piece
        wanted.append(engine.forward(tokens[None, at - piece : at], state)[0].copy())
    got = genai.replay(bundle.path(genai.GRAPH), tokens, [7, 1, 1, 40, 1])
    np.testing.assert_allclose(got, np.stack(wanted), atol=2e-5 * np.abs(wanted).max())


def test_the_adapted_graph_keeps_positions_past_any_length(tmp_path: Path) -> None:
    """Angles at position 100,000 are the runner's: they are computed in float64 in the graph too."""
    bundle = Bundle.open(make(tmp_path, "fp32", "ort", {"window": 5, "rope": True}))
    engine = Engine(bundle, threads=1)
    state = engine.new_state()
    tokens = np.random.default_rng(0).integers(0, 257, 40)
    state.load([np.zeros(tensor.sizes(4), np.float32) for tensor in bundle.manifest.state], 100_000)
    wanted = [engine.forward(tokens[None, i : i + 1], state)[0].copy() for i in range(40)]
    got = genai.replay(bundle.path(genai.GRAPH), tokens, [1] * 40, start=100_000)
    np.testing.assert_allclose(got, np.stack(wanted), atol=2e-5 * np.abs(wanted).max())
    shifted = genai.replay(bundle.path(genai.GRAPH), tokens, [1] * 40, start=100_001)
    assert np.abs(shifted - got).max() > 1e-2 * np.abs(got).max()  # one position more would be seen
