"""A slice of the corruption suite (tests/tools/mutate.py): what is damaged is refused by name, or usable."""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path

import mutate
import mutations
import pytest
import whole

SLICE = {"bundle": 90, "snapshot": 40, "ranges": 30, "adapter": 50, "safetensors": 40}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> mutations.Whole:
    folder = tmp_path_factory.mktemp("whole")
    whole.build(folder, [*SLICE])
    return mutations.Whole(folder)


@pytest.mark.parametrize("kind", SLICE)
def test_damaged_artefacts_end_well(built: mutations.Whole, tmp_path: Path, kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = [
        # From the end of the full run's numbers, so that both together see more.
        mutate.attempt(built, kind, number, tmp_path / str(number))
        for number in (-1, *range(10_000, 10_000 + SLICE[kind]))
    ]
    assert results[0]["outcome"] == "usable"
    failed = [result for result in results if result["outcome"] == "FAILED"]
    assert not failed, failed
    assert sum(result["outcome"] == "refused" for result in results) > len(results) / 2
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mutate.MEGABYTES * 1024


def test_the_suite_notices_what_is_not_refused(built: mutations.Whole, tmp_path: Path) -> None:
    """With a reader that takes everything, or one that stumbles, the suite must fail."""
    careless = mutations.Kind(mutations.make_bundle, lambda whole, place: None)
    stumbling = mutations.Kind(mutations.make_bundle, lambda whole, place: [][0])
    for name, kind in (("careless", careless), ("stumbling", stumbling)):
        mutations.KINDS[name] = kind
        try:
            results = [mutate.attempt(built, name, n, tmp_path / f"{name}{n}") for n in range(12)]
        finally:
            del mutations.KINDS[name]
        assert any(result["outcome"] == "FAILED" for result in results)


def test_damage_always_changes_the_bytes() -> None:
    rng = random.Random(0)
    assert all(mutations.damage(rng, b"some bytes")[0] != b"some bytes" for _ in range(500))
