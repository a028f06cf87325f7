"""The oldest onnxruntime of each flavour, in an environment of its own, gives the tokens of the newest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from environments import RUNNER, environment, run
from exported import make_bundle, make_student

from lawcat_edge.config import LawcatConfig
from lawcat_edge.runtime.bundle.flavours import FLAVOURS as KNOWN

PROMPT = list(range(40, 60))
HYBRID = {"layer_types": ("linear_attention", "full_attention"), "attention_span": 15}
# Greedy tokens of every flavour that runs here, the check of the bundle, and what is said of the others
SCRIPT = """
import json, sys
import onnxruntime
from lawcat_edge.runtime import Bundle, LawcatError, Model
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.bundle.verify import replay
folder, flavours, prompt = sys.argv[1], sys.argv[2].split(","), json.loads(sys.argv[3])
tokens, worst, refused = {}, {}, {}
for flavour in flavours:
    try:
        model = Model.load(folder, flavour=flavour, threads=1)
    except LawcatError as error:
        refused[flavour] = str(error)
        continue
    answer = model.generate(prompt, max_new_tokens=32, ignore_eos=True)
    list(answer)
    tokens[flavour] = answer.tokens
    worst[flavour] = replay(model.engine, model.bundle.manifest.parity)
default = Engine(Bundle.open(folder), threads=1).flavour
foreign = sorted({"torch", "transformers", "onnx", "typer"} & set(sys.modules))
print(json.dumps({"version": onnxruntime.__version__, "tokens": tokens, "worst": worst, "refused": refused,
                  "default": default, "foreign": foreign}))
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One with every option of the graph, one with none; float32 and int8 are the two kinds of arithmetic."""
    base = tmp_path_factory.mktemp("versions")
    made = []
    options: list[tuple[str, str, dict[str, Any]]] = [
        ("plain", "fp32", {}),
        ("window", "int8", {"window": 5, "rope": True}),
        ("dynamic", "int8-dynamic", {"window": 3}),
        ("hybrid", "int8", {"window": 4, **HYBRID}),
    ]
    for name, scheme, settings in options:
        config = LawcatConfig(feature_dim=8, **settings)
        teacher, model, adapter = make_student(
            base / f"{name}-teacher", config=config, hidden_size=96, tie_word_embeddings=False, start=6
        )
        make_bundle(teacher, model, adapter, base / name, scheme=scheme, ops=("ort", "onnx", "portable"))
        made.append(base / name)
    return made


@pytest.fixture(scope="module")
def newest(bundles: list[Path]) -> list[Any]:
    """What the onnxruntime of this environment says of each bundle."""
    return [greedy(Path(sys.executable), bundle, "ort,onnx,portable") for bundle in bundles]


def greedy(python: Path, bundle: Path, flavours: str) -> Any:
    return run(python, SCRIPT, bundle, flavours, json.dumps(PROMPT))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "numpy", "runs", "refuses"),
    [
        (KNOWN["portable"].min_onnxruntime, "numpy<2", ["portable"], ["ort", "onnx"]),
        (KNOWN["ort"].min_onnxruntime, "numpy<3", ["ort", "portable"], ["onnx"]),
    ],
)
def test_the_oldest_onnxruntime_gives_the_tokens_of_the_newest(
    pytestconfig: pytest.Config,
    bundles: list[Path],
    newest: list[Any],
    version: str,
    numpy: str,
    runs: list[str],
    refuses: list[str],
) -> None:
    python = environment(pytestconfig, f"onnxruntime=={version}", numpy, *RUNNER)
    for bundle, here in zip(bundles, newest, strict=True):
        assert not here["refused"]
        expected = here["tokens"]
        assert len(set(expected["ort"])) > 3, "a text that repeats one token would prove little"
        if bundle.name == "plain":  # with int8 activations in one flavour alone, close calls may differ
            assert expected["ort"] == expected["onnx"] == expected["portable"]
        oldest = greedy(python, bundle, "ort,onnx,portable")
        assert oldest["version"] == version
        assert set(oldest["tokens"]) == set(runs)
        for flavour in runs:
            # last bits differ by version; int8 activations can turn that into another token at a close call
            same = len(PROMPT) + 32 if bundle.name == "plain" else 8
            assert oldest["tokens"][flavour][:same] == expected[flavour][:same], flavour
        assert sorted(oldest["refused"]) == sorted(refuses)
        assert all("needs onnxruntime" in reason for reason in oldest["refused"].values())
        assert oldest["default"] == runs[0]
        assert not oldest["foreign"]
