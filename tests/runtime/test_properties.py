"""Properties over made-up inputs: streamed text, stop strings, snapshots, samplers at their edges."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_bundle import tiny_tokenizer

from lawcat_edge.runtime.bundle.manifest import StateTensor, state_bytes
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.sampling import Sampler, SamplingOptions
from lawcat_edge.runtime.generate.snapshot import Snapshot
from lawcat_edge.runtime.generate.text import Detokenizer, StopStrings, Tokenizer

STATE = (StateTensor("a", "b", (2, 3)), StateTensor("c", "d", (1, "tokens", 4), "window"))
SPANS = {"window": Span(3)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer().to_str().encode(), 260)


@given(st.text(max_size=60))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_comes_back_in_pieces_as_it_went_in(tokenizer: Tokenizer, text: str) -> None:
    pieces = Detokenizer(tokenizer)
    parts = [pieces.push(token) for token in tokenizer.encode(text)]
    assert "".join([*parts, pieces.flush()]) == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@given(st.lists(st.integers(0, 259), max_size=60), st.integers(0, 60))
@settings(deadline=None)
def test_any_tokens_stream_to_the_text_of_all(tokenizer: Tokenizer, ids: list[int], cut: int) -> None:
    """Invalid bytes too; and a stream that begins within the text gives exactly the rest of it."""
    pieces = Detokenizer(tokenizer)
    assert "".join([*(pieces.push(token) for token in ids), pieces.flush()]) == tokenizer.decode(ids)
    head = ids[:cut]
    if not tokenizer.decode(head).endswith("\ufffd"):
        rest = Detokenizer(tokenizer, context=head)
        tail = "".join([*(rest.push(token) for token in ids[cut:]), rest.flush()])
        assert tokenizer.decode(head) + tail == tokenizer.decode(ids)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], data: Any) -> None:
    whole = StopStrings(stops)
    expected = whole.push(text) + whole.flush()
    if not any(stop in text for stop in stops):
        assert (expected, whole.found) == (text, None)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = StopStrings(stops)
    parts = [pieces.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(parts) + pieces.flush() == expected
    assert pieces.found == whole.found
    if whole.found is not None:
        assert text.startswith(expected + whole.found)


def bundle(sha256: str = "0" * 64) -> Any:
    manifest = SimpleNamespace(
        state=STATE,
        state_bytes=lambda tokens=None: state_bytes(STATE, SPANS, tokens),
        kept=lambda buffer, tokens: SPANS[buffer].kept(tokens),
        vocab_size=100,
    )
    return SimpleNamespace(manifest=manifest, sha256=sha256, folder="bundle")


def _kept(tokens: list[int], unread: int) -> int:
    return min(max(0, len(tokens) - unread), 2)


SNAPSHOTS = st.builds(
    lambda tokens, unread, numbers, extra: Snapshot(
        "0" * 64,
        array("I", tokens),
        max(0, len(tokens) - unread),
        [numbers[:6].reshape(2, 3), numbers[6 : 6 + 4 * _kept(tokens, unread)].reshape(1, -1, 4)],
        extra,
    ),
    st.lists(st.integers(0, 99), max_size=20),
    st.integers(0, 3),
    hnp.arrays(np.float32, 14, elements=NUMBERS),
    st.dictionaries(st.text(max_size=5), JSON, max_size=3),
)


@given(SNAPSHOTS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_snapshot_comes_back_whole(tmp_path: Path, made: Snapshot) -> None:
    assert made.save(tmp_path / "s") == (tmp_path / "s").stat().st_size
    found = Snapshot.load(tmp_path / "s", bundle())
    assert (found.tokens, found.fed, found.extra) == (made.tokens, made.fed, made.extra)
    for got, want in zip(found.tensors, made.tensors, strict=True):
        assert got.tobytes() == want.tobytes()
    with pytest.raises(LawcatError, match="another bundle"):
        Snapshot.load(tmp_path / "s", bundle("1" * 64))


@given(SNAPSHOTS, st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damaged_snapshot_is_taken(tmp_path: Path, made: Snapshot, data: Any) -> None:
    made.save(tmp_path / "s")
    content = bytearray((tmp_path / "s").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:at]
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(LawcatError, match=str(tmp_path / "s")):
        Snapshot.load(tmp_path / "s", bundle())


@given(
    hnp.arrays(np.float32, 30, elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 1e-6, 0.7, 100.0]),
        top_k=st.integers(0, 40),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.sampled_from([0.01, 1.0, 1.3, 100.0]),
        seed=st.integers(0, (1 << 63) - 1),
    ),
    st.lists(st.integers(0, 29), max_size=10),
    st.integers(0, 1 << 20),
)
@settings(deadline=None)
def test_a_sampler_always_chooses_a_token_of_the_vocabulary(
    logits: np.ndarray, options: SamplingOptions, seen: list[int], position: int
) -> None:
    """Logits at the very edge of float32 and options at the edges of their ranges."""
    sampler = Sampler(options, 30, logprobs=3)
    sampler.observe(seen)
    choice = sampler.choose(logits, position)
    assert 0 <= choice.token < 30
    assert choice.logprob <= 1e-9
    assert not np.isnan(choice.logprob)
    assert len(choice.top) == 3
    again = Sampler(options, 30, logprobs=3)
    again.observe(seen)
    assert again.choose(logits, position) == choice
