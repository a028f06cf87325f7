"""The bench of mixed graphs against bundles, sensitivities, and the mixed schemes chosen from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import make_bundle, make_student

from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.comparison.rows import Row
from lawcat_edge.calibration.mixed import search, sensitivity
from lawcat_edge.calibration.mixed.bench import FP32, Bench
from lawcat_edge.config import LawcatConfig
from lawcat_edge.evaluate.lm import BundleModel
from lawcat_edge.export.schemes import SCHEMES, Linear, Scheme
from lawcat_edge.losses import token_kl
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.student import Student
from lawcat_edge.teacher import Teacher

IDS = np.random.default_rng(0).integers(0, 257, (2, 120))
KINDS: dict[str, dict[str, dict[str, float]]] = {
    product: {
        "int8": {"kl": 0.001},
        "int8-dynamic": {"kl": 0.004},
        "int4": {"kl": 0.1 if product == "down" else 0.02},
    }
    for product in ("qkv", "o", "gate_up", "down", "head")
}


def bench_of(
    folder: Path, teacher: Teacher, adapter: Adapter, choices: dict[str, Linear], rotate: bool
) -> Bench:
    return Bench(Student.of(teacher, adapter), folder, IDS, choices, rotate, threads=1)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {}), ("llama", {"mlp_bias": True})],
)
def test_the_fp32_graph_is_the_student(
    tmp_path: Path, family: str, changes: dict[str, Any], rotate: bool
) -> None:
    config = LawcatConfig(feature_dim=8, window=8)
    teacher, model, adapter = make_student(tmp_path / "t", family, config, lora=4, **changes)
    with torch.no_grad():
        before = model(torch.from_numpy(IDS))[0].numpy()
    bench = bench_of(tmp_path / "bench", teacher, adapter, {}, rotate)
    after = bench.logits(bench.uniform(FP32))
    assert np.abs(after - before).max() < 2e-3 * np.abs(before).max()
    assert (after != before).any() or not rotate


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int4"])
def test_a_graph_of_the_bench_computes_what_the_bundle_does(tmp_path: Path, name: str) -> None:
    teacher, model, adapter = make_student(tmp_path / "teacher")
    scheme = SCHEMES[name]
    make_bundle(teacher, model, adapter, tmp_path / "bundle", scheme=name)
    make_bundle(
        teacher, model, adapter, tmp_path / "exact", scheme=replace(SCHEMES["fp32"], rotate=scheme.rotate)
    )
    seen, before = (
        np.concatenate(list(BundleModel(tmp_path / folder, threads=1, flavour="ort").logits(IDS, 1000)))
        for folder in ("bundle", "exact")
    )
    kinds = {str(i): product for i, product in enumerate(dict.fromkeys(scheme.linears.values()))}
    bench = bench_of(tmp_path / "bench", teacher, adapter, kinds, scheme.rotate)
    np.testing.assert_allclose(bench.logits(scheme), seen, atol=1e-5 * np.abs(seen).max())
    flat = (-1, before.shape[-1])
    exported = token_kl(before.reshape(flat), seen.reshape(flat)).mean()
    assert exported > 1e-6
    assert bench.kl(scheme)["kl"] == pytest.approx(exported, rel=0.01)


def test_one_kind_or_layer_alone_and_nothing_of_it_stays(tmp_path: Path) -> None:
    teacher, _, adapter = make_student(tmp_path / "t")
    four = Linear("nbits", 4, 32)
    bench = bench_of(tmp_path / "bench", teacher, adapter, {"int4": four}, True)
    base = bench.uniform(FP32)
    before = bench.logits(base)
    seen = []
    for product, layers in (
        ("qkv", None),
        ("qkv", (1,)),
        ("o", None),
        ("gate_up", None),
        ("down", None),
        ("head", None),
    ):
        seen.append(bench.logits(sensitivity.only(base, product, four, layers)))
        assert (seen[-1] != before).any(), product
        np.testing.assert_array_equal(bench.logits(base), before)
    assert (seen[0] != seen[1]).any()
    bench.remove()
    assert not (tmp_path / "bench").exists()


def test_sensitivities_resume_and_order(tmp_path: Path) -> None:
    teacher, _, adapter = make_student(tmp_path / "t")

    def measure() -> tuple[dict[str, Any], bool]:
        row = Row(tmp_path / "sensitivity.json", "sensitivity", "sensitivity")
        bench = bench_of(tmp_path / "bench", teacher, adapter, sensitivity.CHOICES, True)
        base = bench.uniform(FP32)
        found = sensitivity.sensitivity(bench.kl, base, 2, row, "key", lambda *_: None)
        stored = (tmp_path / "bench").exists()
        bench.remove()
        return found, stored

    found, stored = measure()
    assert stored
    for product, row in found["kinds"].items():
        assert 0 < row["int8"]["kl"] < row["int4"]["kl"], product
    assert "int8-dynamic" not in found["kinds"]["head"]
    assert len(found["layers"]) == 2
    assert measure() == (found, False)  # the second time nothing was measured, and no graph made
    assert "| gate_up |" in sensitivity.markdown(found)
    assert sensitivity.draw(found).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_size_of_a_scheme_is_known_before_it_exists(tmp_path: Path, name: str, tie: bool) -> None:
    teacher, model, adapter = make_student(tmp_path / "teacher", tie_word_embeddings=tie)
    totals = {}
    for scheme in ("fp32", name):
        make_bundle(teacher, model, adapter, tmp_path / scheme, scheme=scheme)
        data = Bundle.open(tmp_path / scheme).manifest.files["model.onnx.data"]
        totals[scheme] = data["size"]
    sizes = search.Sizes.of_bundle(teacher.geometry, adapter.config, SCHEMES["fp32"], totals["fp32"])
    assert sizes.of(SCHEMES["fp32"]) == totals["fp32"]
    # tensors start at multiples of 4096 at most, which only counts in a model this small
    assert abs(sizes.of(SCHEMES[name]) - totals[name]) < 0.02 * totals["fp32"]


@pytest.fixture
def sizes(tmp_path: Path) -> search.Sizes:
    teacher, _, adapter = make_student(tmp_path)
    return search.Sizes(teacher.geometry, adapter.config, 1000)


def test_the_smallest_within_a_kl_and_the_best_under_a_size_agree(sizes: search.Sizes) -> None:
    scheme = search.smallest(KINDS, sizes, 0.05, True)
    assert scheme.linears["down"] != Linear("nbits", 4, 32)
    assert any(product.bits == 4 for product in scheme.linears.values())
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    best = search.best_under(KINDS, sizes, sizes.of(scheme), True)
    assert best.linears == scheme.linears
    everything = search.best_under(KINDS, sizes, 1 << 40, True)
    assert {product.kind for product in everything.linears.values()} == {"fp32"}


def test_a_promise_that_does_not_hold_is_lowered(sizes: search.Sizes) -> None:
    asked: list[Scheme] = []

    def twice(scheme: Scheme) -> dict[str, float]:
        asked.append(scheme)
        names = {Linear(**value.__dict__): key for key, value in sensitivity.CHOICES.items()}
        cost = sum(KINDS[p][names[s]]["kl"] for p, s in scheme.linears.items() if s.kind != "fp32")
        return {"kl": 2 * cost}

    scheme = search.smallest(KINDS, sizes, 0.05, True, twice)
    assert len(asked) > 1
    assert twice(scheme)["kl"] <= 0.05


def test_what_cannot_be_had_is_said(sizes: search.Sizes) -> None:
    with pytest.raises(LawcatError, match="No quantised scheme stays within a KL of 1e-09"):
        search.smallest(KINDS, sizes, 1e-9, True)
    with pytest.raises(LawcatError, match="must be above zero"):
        search.smallest(KINDS, sizes, 0.0, True)
    with pytest.raises(LawcatError, match=r"The smallest scheme takes .* MB, more than 0\.001 MB"):
        search.best_under(KINDS, sizes, 1000, True)
