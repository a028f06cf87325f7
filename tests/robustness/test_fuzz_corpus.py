"""Every input that a fuzz run (tests/tools/fuzz.py) kept ends in an answer or in LawcatError."""

from __future__ import annotations

from pathlib import Path

import fuzz
import fuzz_targets
import pytest

CORPUS = Path(__file__).parents[1] / "fuzz_corpus"


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_every_kept_input_is_taken_or_refused(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    taken = [fuzz_targets.run(name, path.read_bytes()) for path in inputs]
    assert any(taken) or name == "adapter_config"  # its tensors are of another hash
    assert len(taken) >= 1


def test_the_targets_of_the_fuzzer_are_those_of_the_replay() -> None:
    assert set(fuzz.NAMES) == set(fuzz_targets.TARGETS)
