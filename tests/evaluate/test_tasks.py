"""Scoring, intervals, greedy decoding, batching, perplexity and KL, on models whose answers are known."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from evaluation_toys import prose, toy_tokenizer

from lawcat_edge.data.tasks.filler import Encoder
from lawcat_edge.data.tasks.prompts import (
    Prompt,
    score,
    score_contains,
    score_number,
    score_room,
    settled,
    wilson,
)
from lawcat_edge.evaluate import heatmap
from lawcat_edge.evaluate.lm import greedy, sample_prose
from lawcat_edge.evaluate.perplexity import (
    _student_t,
    perplexity,
    sequence_losses,
    text_sequences,
)
from lawcat_edge.evaluate.run import TaskReport, cell_prompts, run_task
from lawcat_edge.losses import token_losses
from lawcat_edge.runtime.errors import LawcatError


def prompt(task: str, answer: str, question: str = "") -> Prompt:
    return Prompt(task, np.zeros(1, np.int32), answer, "", None, question)


# -- scoring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" 123.", True),
        ("123", True),
        (" 0123", True),
        (" 1234", False),
        (" 12 3", False),
        (" 99, no: 123", False),
        ("", False),
        (" the key", False),
        (" is 123!", True),
    ],
)
def test_passkey_wants_the_first_number(output: str, right: bool) -> None:
    assert score_number(output, "123") is right
    assert score(prompt("passkey", "123"), output) is right


def test_niah_wants_the_value_anywhere_in_any_case() -> None:
    assert score_contains("It is ABCDEF-12.", "abcdef-12")
    assert score_contains("first 1, then 7654321", "7654321")
    assert not score_contains("765432", "7654321")
    assert not score_contains("", "7654321")


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" The apple was in the garden.", True),
        (" Garden.", True),
        (" Before the kitchen the apple was in the garden.", True),
        (" The apple was in the garden. Then the office.", True),
        (" The apple was in the garden or the office.", False),
        (" The apple was in the office. Then the garden.", False),
        (" The kitchen.", False),
        ("", False),
        (" I do not know", False),
    ],
)
def test_rooms_of_the_first_sentence_less_those_asked(output: str, right: bool) -> None:
    question = "Where was the apple before the kitchen?"
    assert score_room(output, "garden", question) is right
    assert score(prompt("babilong-qa3", "garden", question), output) is right


@pytest.mark.parametrize("task", ["passkey", "niah-1", "babilong-qa2"])
def test_settled_means_that_more_text_cannot_change_the_score(task: str) -> None:
    asked = prompt(task, "garden" if task == "babilong-qa2" else "1234567", "Where is the milk?")
    texts = [" 1234567 and 89", " 99 or 1234567.", " The garden. The office.", " Nowhere. garden", " ", "12"]
    for text in texts:
        for end in range(len(text)):
            if settled(asked, text[:end]):
                assert score(asked, text[:end]) == score(asked, text)
    assert not settled(asked, "")


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (10, 10, 0.7225, 1.0),
        (0, 10, 0.0, 0.2775),
        (50, 100, 0.4038, 0.5962),
        (15, 20, 0.5313, 0.8881),
        (1, 1, 0.2065, 1),
    ],
)
def test_wilson_interval_reference_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_its_equation() -> None:
    for n in (1, 7, 100):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            for bound in (low, high):  # |k/n − p| = z √(p (1 − p) / n), or a side that is clipped
                gap = abs(k / n - bound) - 1.959964 * math.sqrt(bound * (1 - bound) / n)
                assert abs(gap) < 1e-6 or bound in (0.0, 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


# -- models with known answers -------------------------------------------------------------------------------


class Parrot:
    """Says the scripted reply of whichever prompt it is shown; counts what it is asked."""

    kind, name = "toy", "parrot"

    def __init__(
        self, replies: dict[bytes, list[int]], tokenizer: tokenizers.Tokenizer, batch: int = 4
    ) -> None:
        self.replies, self.tokenizer, self.batch = replies, tokenizer, batch
        self.batches: list[tuple[int, ...]] = []
        self.steps = 0

    def max_batch(self, length: int) -> int:
        return self.batch

    def _logits(self, state: list[list[int]]) -> np.ndarray:
        table = np.zeros((len(state), self.tokenizer.get_vocab_size()), np.float32)
        for row, rest in zip(table, state, strict=True):
            row[rest[0] if rest else 0] = 5.0  # 0 is <|endoftext|>
        return table

    def prefill(self, ids: np.ndarray) -> tuple[Any, Any]:
        self.batches.append(ids.shape)
        state = [list(self.replies.get(row.astype(np.int32).tobytes(), [])) for row in ids]
        return self._logits(state), state

    def step(self, ids: np.ndarray, state: Any) -> tuple[Any, Any]:
        self.steps += 1
        assert [rest[0] if rest else 0 for rest in state] == ids.tolist(), "the greedy token is fed back"
        state = [rest[1:] for rest in state]
        return self._logits(state), state

    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[Any]:
        raise NotImplementedError


def replies(
    task: str, encoder: Encoder, lengths: list[int], samples: int, wrong: int = 0
) -> dict[bytes, list[int]]:
    from lawcat_edge.data.tasks.filler import Filler, split_sentences

    filler = Filler.build(encoder, split_sentences(prose(300)))
    found = {}
    for length in lengths:
        for k, (_, asked) in enumerate(cell_prompts(task, encoder, filler, length, samples, seed=5)):
            text = asked.reply if k >= wrong else " I would not know 1."
            found[asked.ids.tobytes()] = encoder.after_text(text).tolist()
    return found


@pytest.mark.parametrize("task", ["passkey", "niah-1", "niah-2", "niah-3", "babilong-qa2", "babilong-qa3"])
def test_task_scores_a_model_that_knows(task: str) -> None:
    encoder = Encoder(toy_tokenizer())
    lengths = [1024, 1536]
    model = Parrot(replies(task, encoder, lengths, 8, wrong=2), encoder.tokenizer)
    seen: list[int] = []
    report = run_task(
        model, task, lengths, 8, seed=5, prose=prose(300), on_cell=lambda r: seen.append(len(r.cells))
    )
    assert [cell.correct for cell in report.by_length()] == [6, 6]
    assert [cell.n for cell in report.by_length()] == [8, 8]
    low, high = wilson(6, 8)
    assert (report.cells[0].low, report.cells[0].high) == (low, high)
    assert report.complete
    assert seen == [1, 2]
    assert max(shape[0] for shape in model.batches) <= 4
    assert all(
        abs(s.tokens - s.length) <= 128 + 0.01 * s.length for s in report.samples if task != "babilong"
    )
    document = json.loads(json.dumps(report.to_dict()))
    assert document["settings"]["seed"] == 5
    assert document["by_length"][0]["accuracy"] == 0.75
    assert report.seconds >= 0


def test_unknown_answers_score_nothing() -> None:
    encoder = Encoder(toy_tokenizer())
    report = run_task(Parrot({}, encoder.tokenizer), "passkey", [512], 5, depths=[0.0, 0.5, 1.0])
    assert [(cell.depth, cell.n, cell.correct) for cell in report.cells] == [
        (0.0, 5, 0),
        (0.5, 5, 0),
        (1.0, 5, 0),
    ]


def test_decoding_stops_once_the_answer_is_settled() -> None:
    encoder = Encoder(toy_tokenizer())
    asked = cell_prompts("niah-1", encoder, None, 1024, 1, seed=5)[0][1]
    long_reply = encoder.after_text(asked.reply + " and so on and on" * 10).tolist()
    model = Parrot({asked.ids.tobytes(): long_reply}, encoder.tokenizer)
    report = run_task(model, "niah-1", [1024], 1, seed=5)
    assert report.samples[0].correct
    assert model.steps < 12


def test_deadline_gives_a_partial_report() -> None:
    encoder = Encoder(toy_tokenizer())
    report = run_task(Parrot({}, encoder.tokenizer), "passkey", [512], 5, deadline=0.0)
    assert not report.complete
    assert report.samples == report.cells == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "poetry"}, "Unknown task"),
        ({"lengths": []}, "at least one sample"),
        ({"samples": 0}, "at least one sample"),
        ({"lengths": [-1]}, "at least one sample"),
        ({"depths": [1.5]}, "from 0 to 100"),
        ({"lengths": [64]}, "needs at least"),
        ({"task": "niah-2", "lengths": [1024]}, "no whole sentence"),
        ({"task": "babilong-qa2", "lengths": [200], "prose": prose(50)}, "above 300"),
    ],
)
def test_bad_requests_are_one_sentence(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"task": "passkey", "lengths": [512], "samples": 2} | change
    with pytest.raises(LawcatError, match=message):
        run_task(Parrot({}, toy_tokenizer()), **arguments)


def test_greedy_ends_each_row_by_itself() -> None:
    tokenizer = toy_tokenizer()
    a, b = np.array([5, 6, 7], np.int32), np.array([8, 9, 10], np.int32)
    said = {
        a.tobytes(): tokenizer.encode("the tide").ids,
        b.tobytes(): tokenizer.encode("a letter and more").ids,
    }
    model = Parrot(said, tokenizer)
    assert greedy(model, np.stack([a, b]).astype(np.int64), 50) == ["the tide", "a letter and more"]
    assert greedy(model, np.stack([a, b]).astype(np.int64), 1) == [
        tokenizer.decode(ids[:1]) for ids in said.values()
    ]
    stop = greedy(model, np.stack([b]).astype(np.int64), 50, lambda row, text: "letter" in text)
    assert stop == ["a letter"]


def test_heat_map_holds_the_accuracies(tmp_path: Path) -> None:
    encoder = Encoder(toy_tokenizer())
    model = Parrot(replies("passkey", encoder, [512, 1024], 10, wrong=5), encoder.tokenizer)
    report = run_task(model, "passkey", [512, 1024], 10, seed=5)
    lengths, table = heatmap.depth_table(report)
    assert lengths == [512, 1024]
    assert table.shape == (10, 2)
    assert np.nanmean(table[:5]) < np.nanmean(table[5:])
    heatmap.draw(report, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(LawcatError, match="nothing to draw"):
        heatmap.draw(TaskReport("passkey", "m", "toy", {}), tmp_path / "none.png")


# -- perplexity ----------------------------------------------------------------------------------------------


class Bigram:
    """Logits that depend on the current token alone: a table [V,V]."""

    kind = "toy"

    def __init__(self, seed: int, as_torch: bool = False) -> None:
        self.name, self.tokenizer, self.as_torch = f"bigram {seed}", toy_tokenizer(), as_torch
        size = self.tokenizer.get_vocab_size()
        self.table = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32) * 3

    def max_batch(self, length: int) -> int:
        return 4

    def _give(self, ids: np.ndarray) -> Any:
        if not self.as_torch:
            return self.table[ids]
        import torch

        return torch.from_numpy(self.table[ids])

    def prefill(self, ids: np.ndarray) -> tuple[Any, Any]:
        return self._give(ids[:, -1]), None

    def step(self, ids: np.ndarray, state: Any) -> tuple[Any, Any]:
        return self._give(ids), None

    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[Any]:
        for start in range(0, ids.shape[1], chunk):
            yield self._give(ids[:, start : start + chunk])


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_losses_equal_a_direct_computation(as_torch: bool, chunk: int) -> None:
    if as_torch:
        pytest.importorskip("torch")
    model, teacher = Bigram(1, as_torch), Bigram(2, as_torch)
    row = np.random.default_rng(0).integers(0, 250, size=100).astype(np.int32)
    nll, kl, same = sequence_losses(model, teacher, row, chunk)
    assert nll.shape == (99,)
    for t in range(99):
        p = np.exp(teacher.table[row[t]].astype(np.float64))
        q = np.exp(model.table[row[t]].astype(np.float64))
        p, q = p / p.sum(), q / q.sum()
        assert nll[t] == pytest.approx(-math.log(q[row[t + 1]]), abs=2e-5)
        assert kl[t] == pytest.approx(float((p * np.log(p / q)).sum()), abs=2e-5)
        assert same[t] == (p.argmax() == q.argmax())


def test_a_model_against_itself_has_no_kl() -> None:
    row = np.arange(50, dtype=np.int32)
    _, kl, same = sequence_losses(Bigram(1), Bigram(1), row, 16)
    assert np.abs(kl).max() < 1e-12
    assert same.min() == 1
    _, kl, same = token_losses(Bigram(1)._give(row[None, :-1]), None, row[None, 1:])
    assert not kl.any()
    assert not same.any()


def test_buckets_split_the_positions(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\f\n".join([prose(400), prose(700)]), encoding="utf-8")
    model, teacher = Bigram(1), Bigram(2)
    report = perplexity(model, [path], length=2500, samples=3, teacher=teacher, chunk=256)
    assert [(b.begin, b.end, b.tokens) for b in report.buckets] == [
        (0, 1024, 3 * 1023),
        (1024, 2048, 3 * 1024),
        (2048, 2500, 3 * 452),
    ]
    rows = text_sequences([path], model.tokenizer, 2500, 3)
    losses = np.stack([sequence_losses(model, teacher, row, 2500) for row in rows])
    assert report.overall.nll == pytest.approx(losses[:, 0].mean())
    assert report.overall.perplexity == pytest.approx(math.exp(losses[:, 0].mean()))
    assert report.buckets[1].kl == pytest.approx(losses[:, 1, 1023:2047].mean())
    assert report.overall.tokens == sum(bucket.tokens for bucket in report.buckets)
    means, kls = losses[:, 0].mean(1), losses[:, 1].mean(1)
    # two degrees of freedom: t = 4.3027
    assert report.overall.low == pytest.approx(math.exp(means.mean() - 4.3027 * means.std(ddof=1) / 3**0.5))
    assert report.overall.high == pytest.approx(math.exp(means.mean() + 4.3027 * means.std(ddof=1) / 3**0.5))
    assert report.overall.kl_margin == pytest.approx(4.3027 * kls.std(ddof=1) / 3**0.5)
    single = perplexity(model, [path], length=2500, samples=1, teacher=teacher).overall
    assert single.low is single.high is single.kl_margin is None
    alone = perplexity(model, [path], length=300, samples=2)
    assert alone.overall.kl is alone.overall.agreement is None
    assert len(alone.buckets) == 1
    assert json.loads(json.dumps(alone.to_dict()))["task"] == "perplexity"
    with pytest.raises(LawcatError, match="less than one sequence"):
        perplexity(model, [path], length=60_000)
    with pytest.raises(LawcatError, match="at least 2 tokens"):
        perplexity(model, [path], length=1)
    with pytest.raises(LawcatError, match="at least one sequence"):
        perplexity(model, [path], samples=0)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042)])
def test_student_t_reference_values(freedom: int, quantile: float) -> None:
    assert _student_t(freedom) == pytest.approx(quantile, abs=6e-4)


def test_text_sequences_are_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(prose(50) + "\n\f\n" + prose(60), encoding="utf-8")
    model = Bigram(0)
    flat = text_sequences([path], model.tokenizer, 100, 1000).ravel()
    ids = [*model.tokenizer.encode(prose(50)).ids, 0, *model.tokenizer.encode(prose(60)).ids, 0]
    assert flat.tolist() == ids[: len(flat)]
    assert len(ids) - len(flat) < 100


def test_sampled_prose_follows_the_seed() -> None:
    first = sample_prose(Bigram(0), 600, seed=1)
    assert first == sample_prose(Bigram(0), 600, seed=1)
    assert first != sample_prose(Bigram(0), 600, seed=2)
    assert len(first) > 600
