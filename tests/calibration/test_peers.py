"""llama.cpp beside the schemes: what is asked of it (here a stand-in), and what is said without it."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_teacher import byte_tokenizer

from lawcat_edge.calibration.comparison import peers
from lawcat_edge.calibration.comparison.divergence import text_losses
from lawcat_edge.evaluate.lm import greedy
from lawcat_edge.runtime.errors import LawcatError

VOCABULARY = 257


class Llama:
    """As llama_cpp.Llama: a context that fills, and logits that say the next id is the last one plus one."""

    def __init__(self, path: str, n_ctx: int, logits_all: bool, **_: Any) -> None:
        assert logits_all
        self.n_tokens, self.scores = 0, np.full((n_ctx, VOCABULARY), np.nan, np.float32)

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens: list[int]) -> None:
        for token in tokens:
            self.scores[self.n_tokens] = 0
            self.scores[self.n_tokens, (token + 1) % VOCABULARY] = 9
            self.n_tokens += 1


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peers.GgufModel:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return peers.GgufModel(tmp_path / "x.gguf", tmp_path / "tokenizer.json", 64)


def test_a_gguf_reads_texts_and_answers(model: peers.GgufModel) -> None:
    losses = text_losses(model, None, np.arange(10, 60), chunk=7)
    assert losses.nll.shape == (49,)
    np.testing.assert_allclose(losses.nll, np.log1p(256 * np.exp(-9.0)), rtol=1e-5)
    start = model.tokenizer.encode("abc").ids
    said = greedy(model, np.array([start]), 3)[0]
    assert said == model.tokenizer.decode([start[-1] + k for k in (1, 2, 3)])
    assert greedy(model, np.array([start]), 3)[0] == said  # begun anew


def test_which_file_a_teacher_is(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert peers.teacher_gguf("anything", file) == file
    assert peers.teacher_gguf(str(file), None) == file
    with pytest.raises(LawcatError, match="name the file with --gguf"):
        peers.teacher_gguf(str(tmp_path), None)
    with pytest.raises(LawcatError, match="There is no GGUF file"):
        peers.teacher_gguf("smollm2", tmp_path / "absent.gguf")
    assert peers.gguf_rows(str(file))[-1] == "gguf-as-given"
    assert "gguf-as-given" not in peers.gguf_rows(str(tmp_path))


def test_without_llama_cpp_the_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert peers.requantise(file, tmp_path / "out", "gguf-as-given") == file
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LawcatError, match="run pip install llama-cpp-python"):
        peers.requantise(file, tmp_path / "out", "gguf-q8_0")


def test_a_failed_requantising_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantise(source: bytes, target: bytes, _: Any) -> int:
        Path(target.decode()).write_bytes(source)
        return failed

    stand_in = SimpleNamespace(
        llama_log_callback=lambda *_: None,
        llama_log_set=lambda *_: None,
        llama_model_quantize_default_params=ctypes.c_int,
        llama_model_quantize=quantise,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    monkeypatch.setattr(peers, "need_llama_cpp", lambda: None)
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    file.write_bytes(b"GGUF")
    failed = 1
    with pytest.raises(LawcatError, match=r"could not requantise model\.gguf"):
        peers.requantise(file, out, "gguf-q8_0")
    assert list(out.iterdir()) == []
    failed = 0
    made = peers.requantise(file, out, "gguf-q8_0")
    assert list(out.iterdir()) == [made]
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF2")
    assert peers.requantise(other, out, "gguf-q8_0") != made  # another source is not taken for this one
