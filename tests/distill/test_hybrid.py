"""Hybrid students: full-attention layers beside linear ones, their span, their choice, their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import make_teacher, write_corpus
from torch import Tensor

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.distill.full_attention import FullAttention, rank_layers
from lawcat_edge.distill.run import distill
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.model import LawcatModel, load_student
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import resolve

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
}
SMALL = DistillSettings(
    transfer_tokens=64 * 4, finetune_tokens=64 * 4, seq_len=64, finetune_seq_len=64, window=8,
    lora_rank=2, ranking_tokens=64, checkpoint_every=2,
)  # fmt: skip


def student(folder: Path, family: str, span: int = 9, layers: tuple[int, ...] = (1,), **config: Any) -> Any:
    make_teacher(folder, family, num_hidden_layers=3, **FAMILIES[family])
    teacher = resolve(folder)
    settings = LawcatConfig(feature_dim=4, **config).with_full_attention(layers, span, teacher.geometry)
    model = load_student(teacher, config=settings, seed=3)
    with torch.no_grad():
        for parameter in model.new_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def pieces(model: LawcatModel, ids: Tensor, sizes: list[int]) -> Tensor:
    state, logits = model.empty_state(len(ids)), []
    for piece in ids.split(sizes, 1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("scaling", ["max_score", "softmax"])
def test_whole_pieces_and_tokens_agree_across_the_span(tmp_path: Path, family: str, scaling: str) -> None:
    model = student(tmp_path / "t", family, window=5, window_scaling=scaling)
    ids = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)[0]
        for sizes in ([30], [1] * 30, [7, 1, 9, 2, 11], [3, 27]):
            torch.testing.assert_close(pieces(model, ids, sizes), whole, rtol=1e-9, atol=1e-9)


def test_with_sinks_a_token_sees_the_first_ones_and_the_newest_as_if_nothing_was_between(
    tmp_path: Path,
) -> None:
    """Against the teacher's own attention, which reads just the tokens that are left."""
    model = student(tmp_path / "t", "llama")
    layer: Any = model.layers[1]
    span, T = Span(12, 2), 40
    x = torch.randn(1, T, model.geometry.hidden_size, dtype=torch.float64)
    _, q, k, v = layer.read(x)
    y = layer.self_attn.full_attention(q, k, v, model.rotary(0, T), None, span)[0]
    rows: list[int] = []
    for t in range(T):
        rows.append(t)
        few = [part[:, rows] for part in (q, k, v)]
        want = layer.self_attn.softmax(*few, model.rotary(0, len(rows)))[:, -1]
        torch.testing.assert_close(y[:, t], want, rtol=1e-9, atol=1e-9)
        if len(rows) == 12:
            del rows[2:5]


def test_a_full_attention_layer_is_the_teacher_within_its_span_and_forgets_beyond(tmp_path: Path) -> None:
    model = student(tmp_path / "t", "llama", span=6)
    layer: Any = model.layers[1]
    x = torch.randn(1, 20, model.geometry.hidden_size, dtype=torch.float64)
    rotary = model.rotary(0, 20)
    _, q, k, v = layer.read(x)
    y = layer.self_attn.full_attention(q, k, v, rotary, None, Span(6))[0]
    for t in range(20):  # the teacher, which reads only the last 6 tokens
        first = max(0, t - 5)
        tables = model.rotary(0, t + 1 - first)
        near = layer.self_attn.softmax(*(part[:, first : t + 1] for part in (q, k, v)), tables)
        torch.testing.assert_close(y[:, t], near[:, -1], rtol=1e-9, atol=1e-9)


def test_the_state_grows_to_the_span_and_not_beyond(tmp_path: Path) -> None:
    model = student(tmp_path / "t", "llama", span=6, window=4)
    state = model.empty_state(1)
    for n in range(1, 12):
        _, state = model(torch.tensor([[n]]), state)
        assert state[1].key.shape[2] == min(n, 5)
        assert state[0].recurrent.shape == model.empty_state(1)[0].recurrent.shape


def test_only_linear_layers_have_new_parameters_and_all_linear_means_all(
    tmp_path: Path,
) -> None:
    model = student(tmp_path / "t", "llama")
    assert {name.split(".")[1] for name in model.new_parameters()} == {"0", "2"}
    taught = model.teacher_hidden(torch.arange(9)[None])
    model.add_lora(2, 4.0, ("q_proj", "down_proj"))
    assert set(model.lora_parameters()) == {
        f"layers.{i}.{name}.lora_{m}" for i in range(3) for name in ("q_proj", "down_proj") for m in "AB"
    }
    before = model.hidden(torch.arange(9)[None])[0]
    with torch.no_grad():
        for parameter in model.lora_parameters().values():
            parameter.add_(0.1)
    assert not torch.allclose(model.hidden(torch.arange(9)[None])[0], before)
    torch.testing.assert_close(model.teacher_hidden(torch.arange(9)[None]), taught)  # has none of it


@pytest.mark.parametrize(
    ("layers", "span", "message"),
    [
        ((3,), 8, "no layer 3"),
        ((-1,), 8, "no layer -1"),
        ((1, 1), 8, "named twice"),
        ((0, 1, 2), 8, "the teacher itself"),
        ((1,), 0, "at least 1 token"),
        ((1,), 1 << 20, "beyond the teacher's range"),
        ((1,), 1 << 40, "attention_span"),
    ],
)
def test_layers_and_spans_that_cannot_be(tmp_path: Path, layers: tuple, span: int, message: str) -> None:
    make_teacher(tmp_path / "t", "llama", num_hidden_layers=3)
    with pytest.raises(LawcatError, match=message):
        LawcatConfig().with_full_attention(layers, span, resolve(tmp_path / "t").geometry)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", FullAttention("none")),
        ("14, 17,20", FullAttention("layers", (14, 17, 20))),
        ("every:7", FullAttention("every", (7,))),
        ("auto:4", FullAttention("auto", (4,))),
    ],
)
def test_choices_are_read(text: str, expected: FullAttention) -> None:
    assert FullAttention.parse(text) == expected


@pytest.mark.parametrize("text", ["", "auto", "auto:0", "auto:x", "every:-1", "1,,2", "all"])
def test_other_words_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(LawcatError, match="every:7"):
        FullAttention.parse(text)


def test_uniform_layers_are_the_last_of_each_stretch() -> None:
    assert FullAttention.parse("every:7").fixed(30) == (6, 13, 20, 27)


def test_the_ranking_is_the_greedy_choice_by_kl(tmp_path: Path) -> None:
    """Against whole hybrids built one by one, and KL taken from their logits."""
    make_teacher(tmp_path / "t", "llama", num_hidden_layers=3)
    teacher = resolve(tmp_path / "t")
    pure = LawcatConfig(feature_dim=4, window=4)
    ids = torch.randint(0, 257, (1, 150), generator=torch.Generator().manual_seed(2))
    ranking = rank_layers(load_student(teacher, config=pure, seed=5), [ids], 2, Span(64))

    def kl(layers: tuple[int, ...]) -> float:
        config = pure.with_full_attention(layers, 64, teacher.geometry, sinks=0)
        model = load_student(teacher, config=config)
        untouched = load_student(teacher, config=pure, seed=5).new_parameters()
        with torch.no_grad():
            for name, parameter in model.new_parameters().items():
                parameter.copy_(untouched[name])
            taught = model.teacher_logits(ids)[0, 64:].log_softmax(-1)
            student = model(ids)[0][0, 64:].log_softmax(-1)
        return float((taught.exp() * (taught - student)).sum(-1).mean())

    assert ranking.start == pytest.approx(kl(()), rel=1e-3)
    first = {i: kl((i,)) for i in range(3)}
    assert ranking.rounds[0] == pytest.approx(first, rel=1e-3)
    best = min(first, key=first.__getitem__)
    second = {i: kl((best, i)) for i in range(3) if i != best}
    assert ranking.rounds[1] == pytest.approx(second, rel=1e-3)
    assert ranking.layers == [best, min(second, key=second.__getitem__)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    make_teacher(folder / "teacher", "llama", num_hidden_layers=3)
    write_corpus(folder / "text.txt")
    return folder


def run(folder: Path, out: Path, settings: DistillSettings, **more: Any) -> Adapter:
    return distill(resolve(folder / "teacher"), [folder / "text.txt"], out, settings, **more)


def test_auto_ranks_after_the_transfer_and_says_what_it_found(corpus: Path, tmp_path: Path) -> None:
    changes = {"full_attention": "auto:1", "span": 40, "lora_targets": "all-linear"}
    adapter = run(corpus, tmp_path / "a", SMALL.with_changes(changes))
    table = json.loads((tmp_path / "a" / "full_attention.json").read_text())
    assert adapter.config.full_attention_layers == tuple(table["layers"])
    assert adapter.config.attention_span == 40
    assert len(table["rounds"][0]) == 3
    assert (tmp_path / "a" / "full_attention.png").read_bytes().startswith(b"\x89PNG")
    assert adapter.lora is not None
    assert adapter.lora.targets[-1] == "down_proj"
    load_student(resolve(corpus / "teacher"), adapter)


def test_a_killed_auto_run_goes_on_with_the_layers_it_found(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SMALL.with_changes({"full_attention": "auto:1", "span": 40})
    whole = run(corpus, tmp_path / "whole", settings)

    class Killed(BaseException):
        pass

    def report(record: dict[str, Any]) -> None:
        if record["stage"] == "finetune" and record["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        run(corpus, tmp_path / "cut", settings, report=report)
    monkeypatch.setattr("lawcat_edge.distill.run.rank_layers", None)  # once is enough
    again = run(corpus, tmp_path / "cut", settings, resume=True)
    assert again.config == whole.config
    for name, value in whole.tensors.items():
        assert (again.tensors[name] == value).all(), name


def test_fixed_layers_train_from_the_first_step_and_from_a_pure_adapter(corpus: Path, tmp_path: Path) -> None:
    fixed = run(corpus, tmp_path / "f", SMALL.with_changes({"full_attention": "0,2"}))
    assert fixed.config.full_attention_layers == (0, 2)
    assert fixed.config.attention_span == fixed.geometry.max_positions  # the default: the teacher's range
    assert {name.split(".")[1] for name in fixed.tensors if "conv_q" in name} == {"1"}
    pure = run(corpus, tmp_path / "p", SMALL.with_changes({"stage": "transfer"}))
    onward = SMALL.with_changes({"stage": "finetune", "full_attention": "1", "span": 20})
    hybrid = run(corpus, tmp_path / "h", onward, start_from=pure)
    assert hybrid.config.full_attention_layers == (1,)
    with pytest.raises(LawcatError, match="leave --full-attention out"):
        run(corpus, tmp_path / "x", onward, start_from=hybrid)


def test_an_adapter_whose_config_contradicts_its_tensors_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "a", SMALL.with_changes({"full_attention": "1", "span": 20}))
    path = tmp_path / "a" / "lawcat_config.json"
    data = json.loads(path.read_text())
    for change, message in (
        ({"layer_types": ["linear_attention"] * 3, "attention_span": 0, "attention_sinks": 0}, "conv_k"),
        ({"attention_sinks": 19}, "attention_sinks"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "3"),
        ({"layer_types": ["full_attention", "softmax", "linear_attention"]}, "softmax"),
        ({"attention_span": 1 << 40}, "attention_span"),
        ({"layer_types": []}, "attention_span"),
    ):
        path.write_text(json.dumps({**data, "lawcat": {**data["lawcat"], **change}}))
        with pytest.raises(LawcatError, match=message):
            Adapter.load(tmp_path / "a")
