"""ORT format: the file for mobile apps writes the tokens of the runner; a small build knows its operators."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from chat_templates import TEMPLATES
from environments import RUNNER, environment
from exported import make_bundle, make_student
from kotlin_example import converse
from tiny_bundle import rewrite_manifest

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import mobile
from lawcat_edge.runtime import Bundle, Engine, LawcatError, Model
from lawcat_edge.runtime.bundle.flavours import FLAVOURS as KNOWN
from lawcat_edge.runtime.bundle.manifest import describe_files
from lawcat_edge.runtime.bundle.verify import verify
from lawcat_edge.runtime.engine import rotary
from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.files import read_json
from lawcat_edge.runtime.template.chat import ChatTemplate

PROMPT = list(range(40, 60))
NOT_PLAIN = {"llama 2", "mistral v3", "deepseek r1", "vicuna", "command r", "gpt-oss", "falcon", "minicpm"}
NOT_PLAIN |= {"internlm"}
"""Templates that write an answer otherwise than the model does, with a space before it for example."""
HYBRID: dict[str, Any] = {"layer_types": ("full_attention", "linear_attention"), "attention_span": 25}


def make(folder: Path, scheme: str, ops: tuple[str, ...], **settings: Any) -> Path:
    config = LawcatConfig(feature_dim=8, **settings)
    teacher, model, adapter = make_student(
        folder / "t", config=config, hidden_size=96, tie_word_embeddings=False, start=6
    )
    make_bundle(teacher, model, adapter, folder / "b", scheme=scheme, ops=ops, ort_format=True)
    return folder / "b"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mobile"), "int8", ("ort", "portable"), window=5, **HYBRID)


def greedy(path: Path, manifest: Any, count: int) -> list[int]:
    """As an app does: the file alone, plain arrays, token after token."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    tensors = manifest.state
    frequencies = rotary.inverse_frequencies(manifest.geometry) if manifest.rotary else None
    state = State(tensors, [False] * len(tensors), 1, manifest.spans, frequencies=frequencies)
    ids = list(PROMPT)
    tokens: list[int] = []
    while len(tokens) < count:
        feeds = state.feeds(np.array([ids], np.int64))
        out = dict(zip(names, session.run(names, feeds), strict=True))
        state.take(out, len(ids))
        ids = [int(out["logits"][0, -1].argmax())]
        tokens += ids
    return tokens


def expected(bundle: Path, flavour: str) -> list[int]:
    answer = Model.load(bundle, threads=1, flavour=flavour).generate(
        PROMPT, max_new_tokens=32, ignore_eos=True
    )
    list(answer)
    assert len(set(answer.tokens)) > 3, "a text that repeats one token would prove little"
    return answer.tokens


def test_the_file_alone_writes_the_same_tokens(int8: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(int8).manifest
    assert manifest.graphs["ort"]["ort_format"] == mobile.GRAPH
    alone = Path(shutil.copy(int8 / mobile.GRAPH, tmp_path))
    assert greedy(alone, manifest, 32) == expected(int8, "ort")
    assert "ort_format" in next(c.detail for c in verify(int8) if c.name == "parity (ort)")


def test_portable_operators_in_ort_format(tmp_path: Path) -> None:
    bundle = make(tmp_path, "fp32", ("onnx", "portable"))
    manifest = Bundle.open(bundle).manifest
    assert manifest.graphs["portable"]["ort_format"] == mobile.GRAPH
    assert greedy(bundle / mobile.GRAPH, manifest, 32) == expected(bundle, "portable")
    listed = (bundle / mobile.OPERATORS).read_text()
    assert "LinearAttention" not in listed
    with pytest.raises(LawcatError, match="add one of them with --ops"):
        make(tmp_path / "none", "fp32", ("onnx",))


def test_the_operators_are_listed_for_a_reduced_build(int8: Path) -> None:
    """In the form that the build of onnxruntime reads, each operator, and no path of this machine."""
    lines = (int8 / mobile.OPERATORS).read_text().splitlines()
    assert lines[0] == f"# model.ort, written by onnxruntime {onnxruntime.__version__}"
    assert all(re.match(r"(ai\.onnx|com\.microsoft);\d+;\w", line) for line in lines[1:])
    (special,) = (line for line in lines if line.startswith("com.microsoft;1;"))
    in_graph = {
        node.op_type
        for node in onnx.load(int8 / "model.onnx", load_external_data=False).graph.node
        if node.domain == "com.microsoft"
    }
    assert {"LinearAttention", "CausalConvWithState", "MatMulNBits"} <= in_graph
    assert all(op in special for op in in_graph)


def test_a_damaged_file_and_a_wrong_name_are_refused(int8: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(int8, tmp_path / "b"))
    whole = (bundle / mobile.GRAPH).read_bytes()

    def put(data: bytes) -> None:
        (bundle / mobile.GRAPH).write_bytes(data)
        names = [p.name for p in bundle.iterdir() if p.name != "lawcat_bundle.json"]
        rewrite_manifest(bundle, lambda manifest: manifest.update(files=describe_files(bundle, names)))

    put(b"\0" * 8 + whole[8:])
    with pytest.raises(LawcatError, match="not in ORT format"):
        Bundle.open(bundle)
    put(whole[: len(whole) // 2])
    with pytest.raises(LawcatError, match=r"cannot load model\.ort"):
        verify(bundle)
    put(whole)
    verify(bundle)
    rewrite_manifest(bundle, lambda manifest: manifest["graphs"]["ort"].update(last=mobile.GRAPH))
    with pytest.raises(LawcatError, match=r"must end in \.ort"):
        Bundle.open(bundle)
    rewrite_manifest(
        bundle, lambda manifest: manifest["graphs"]["ort"].update(last="model.onnx", ort_format="model.onnx")
    )
    with pytest.raises(LawcatError, match=r"must end in \.ort"):
        Bundle.open(bundle)


def test_weights_beyond_the_format_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "model.onnx.data", "wb") as file:
        file.truncate(3 << 30)  # a hole, not three gigabytes
    with pytest.raises(LawcatError, match="holds 2 GB"):
        mobile.write_ort(tmp_path, "model.onnx")


@pytest.mark.slow
def test_a_file_of_the_oldest_onnxruntime_runs_in_the_newest(
    pytestconfig: pytest.Config, int8: Path, tmp_path: Path
) -> None:
    """The rule of docs/mobile.md: write with the version that the app ships, or an older one."""
    import subprocess

    python = environment(pytestconfig, f"onnxruntime=={KNOWN['ort'].min_onnxruntime}", "numpy<3", *RUNNER)
    script = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.optimized_model_filepath = sys.argv[2]
options.add_session_config_entry("session.save_model_format", "ORT")
onnxruntime.InferenceSession(sys.argv[1], options, disabled_optimizers=["NchwcTransformer"])
"""
    subprocess.run([python, "-c", script, int8 / "model.onnx", tmp_path / "old.ort"], check=True, timeout=120)
    assert greedy(tmp_path / "old.ort", Bundle.open(int8).manifest, 32) == expected(int8, "ort")


def test_states_for_it_are_never_shared(int8: Path) -> None:
    """Which of its operators may write in place is not known, so none does."""
    engine = Engine(Bundle.open(int8), threads=1, flavour="ort")
    assert any(engine.new_state().in_place)
    assert not any(engine.new_state(kind="ort_format").in_place)


LLAMA = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}<end>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GRAVE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def talkative(folder: Path, template: str = LLAMA, **settings: Any) -> Path:
    """A bundle for mobile apps with a chat template."""
    changes: Any = {"rope_parameters": {**GRAVE, "rope_theta": 1e4, "original_max_position_embeddings": 64}}
    config = LawcatConfig(feature_dim=8, **settings)
    teacher, model, adapter = make_student(folder / "t", config=config, hidden_size=96, start=6, **changes)
    (teacher.folder / "chat_template.jinja").write_text(template)
    sampling = {"temperature": 0.0, "repetition_penalty": 1.2}
    make_bundle(teacher, model, adapter, folder / "b", ops=("ort",), ort_format=True, sampling=sampling)
    return folder / "b"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"window": 5, **HYBRID}, {"window": 5, **HYBRID, "attention_sinks": 3}, {}],
    ids=["hybrid", "sinks", "no buffers"],
)
def test_the_kotlin_of_the_guide_writes_the_runners_conversation(
    pytestconfig: pytest.Config, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Compiled and run as it stands in docs/mobile.md; a hybrid's buffers grow and forget on the way."""
    bundle = talkative(tmp_path, **settings)
    questions = ["Why is the sea salt?", "  And the rivers? é🌊 ", "Tell me more of it."]
    runner = Model.load(bundle, threads=1)
    options: Any = vars(runner.sampling_defaults())
    expected = [
        runner.chat(question, max_new_tokens=24, ignore_eos=False, **options).text for question in questions
    ]
    spans = runner.bundle.manifest.spans
    assert not spans or len(runner.context.tokens) > 2 * max(span.tokens for span in spans.values()) + 64
    assert sum(map(len, expected)) > 40
    answers, runs = converse(pytestconfig, bundle, questions, 24)
    assert answers == expected
    assert runs > 60


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_jinja_writes_what_it_writes(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    turns = mobile.chat_turns(template)
    if turns is None:
        assert name in NOT_PLAIN
        return
    assert name not in NOT_PLAIN
    said = ["Is it far?", "An hour by boat.", " In which direction? ", "North.", "Thank you"]
    strip = str.strip if turns["trim"] else str
    text = turns["first"] + strip(said[0])
    for answer, question in zip(said[1::2], said[2::2], strict=True):
        text += turns["answer"] + answer + turns["next"] + strip(question)
    messages = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(said)]
    assert text + turns["answer"] == template.render(messages)


def test_the_turns_are_written_where_there_are_any(tmp_path: Path) -> None:
    bundle = talkative(tmp_path / "a")
    turns = read_json(bundle / mobile.TURNS)
    assert turns["trim"] is True
    assert (turns["first"], turns["next"], turns["answer"]) == (
        "<user>", "<end><user>", "<end><assistant>",
    )  # fmt: skip
    assert mobile.TURNS in Bundle.open(bundle).manifest.files
    assert not (talkative(tmp_path / "b", LLAMA + "{{ strftime_now('%d') }}") / mobile.TURNS).exists()
