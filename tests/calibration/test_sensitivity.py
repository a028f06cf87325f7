"""The simulated schemes against the exported ones, sensitivities, and the mixed schemes chosen from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import make_bundle, make_student

from lawcat_edge.calibration.comparison.rows import Row
from lawcat_edge.calibration.mixed import search, sensitivity
from lawcat_edge.calibration.mixed.simulate import Simulated, rounded_activation, rounded_weight
from lawcat_edge.config import LawcatConfig
from lawcat_edge.evaluate.lm import BundleModel
from lawcat_edge.export.schemes import SCHEMES, Product, Scheme
from lawcat_edge.losses import token_kl
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError

IDS = np.random.default_rng(0).integers(0, 257, (2, 120))
KINDS: dict[str, dict[str, dict[str, float]]] = {
    product: {
        "int8": {"kl": 0.001},
        "int8-dynamic": {"kl": 0.004},
        "int4": {"kl": 0.1 if product == "down" else 0.02},
    }
    for product in ("qkv", "o", "gate_up", "down", "head")
}


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS))[0].numpy()


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {}), ("llama", {"mlp_bias": True})],
)
def test_folding_changes_nothing(tmp_path: Path, family: str, changes: dict[str, Any], rotate: bool) -> None:
    _, model, _ = make_student(tmp_path, family, LawcatConfig(feature_dim=8, window=8), lora=4, **changes)
    before = logits_of(model)
    after = logits_of(Simulated(model, rotate).model)
    assert np.abs(after - before).max() < 2e-3 * np.abs(before).max()
    assert (after != before).any() or not rotate


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int4"])
def test_a_simulated_scheme_costs_what_the_exported_one_does(tmp_path: Path, name: str) -> None:
    teacher, model, adapter = make_student(tmp_path / "teacher")
    before = logits_of(model)
    make_bundle(teacher, model, adapter, tmp_path / "bundle", scheme=name)
    real = BundleModel(tmp_path / "bundle", threads=1)
    seen = np.concatenate(list(real.logits(IDS, 1000)))
    simulated = Simulated(model, SCHEMES[name].rotate)
    simulated.set_scheme(SCHEMES[name])
    mine = logits_of(simulated.model)
    flat = (-1, before.shape[-1])
    exported = token_kl(before.reshape(flat), seen.reshape(flat)).mean()
    expected = token_kl(before.reshape(flat), mine.reshape(flat)).mean()
    assert exported > 1e-6
    assert expected == pytest.approx(exported, rel=0.35)


def test_setting_one_kind_or_layer_and_clearing_it(tmp_path: Path) -> None:
    _, model, _ = make_student(tmp_path)
    simulated = Simulated(model, True)
    before = logits_of(simulated.model)
    seen = []
    for product, layers in (
        ("qkv", None),
        ("qkv", [1]),
        ("o", None),
        ("gate_up", None),
        ("down", None),
        ("head", None),
    ):
        simulated.set(product, Product("nbits", 4, 32), layers)
        seen.append(logits_of(simulated.model))
        assert (seen[-1] != before).any(), product
        simulated.clear()
        np.testing.assert_array_equal(logits_of(simulated.model), before)
    assert (seen[0] != seen[1]).any()


def test_rounding_of_activations() -> None:
    x = torch.tensor([[1.0, 0.001, 100.0, 0.3]])
    by_row = rounded_activation(x, Product("dynamic", 7))
    by_block = rounded_activation(x.repeat(1, 8), Product("nbits", 8, 16))
    assert by_row[0, 1] == 0
    assert abs(by_row[0, 0] - 1) <= 50 / 127
    assert by_block.shape == (1, 32)
    assert rounded_activation(x, Product("nbits", 8, 16, 0)) is x
    assert rounded_weight(x, Product("fp32")) is x


def test_sensitivities_resume_and_order(tmp_path: Path) -> None:
    _, model, _ = make_student(tmp_path)
    made: list[int] = []

    def make() -> Simulated:
        made.append(1)
        return Simulated(model, True)

    def measure() -> dict[str, Any]:
        row = Row(tmp_path / "sensitivity.json", "sensitivity", "sensitivity")
        return sensitivity.sensitivity(make, 2, IDS, row, "key", lambda *_: None)

    found = measure()
    for product, row in found["kinds"].items():
        assert 0 < row["int8"]["kl"] < row["int4"]["kl"], product
    assert "int8-dynamic" not in found["kinds"]["head"]
    assert len(found["layers"]) == 2
    assert measure() == found
    assert made == [1]  # the second time nothing was measured, and no model made
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
    assert scheme.products["down"] != Product("nbits", 4, 32)
    assert any(product.bits == 4 for product in scheme.products.values())
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    best = search.best_under(KINDS, sizes, sizes.of(scheme), True)
    assert best.products == scheme.products
    everything = search.best_under(KINDS, sizes, 1 << 40, True)
    assert {product.kind for product in everything.products.values()} == {"fp32"}


def test_a_promise_that_does_not_hold_is_lowered(sizes: search.Sizes) -> None:
    asked: list[Scheme] = []

    def twice(scheme: Scheme) -> float:
        asked.append(scheme)
        names = {Product(**value.__dict__): key for key, value in sensitivity.CHOICES.items()}
        return 2 * sum(KINDS[p][names[s]]["kl"] for p, s in scheme.products.items() if s.kind != "fp32")

    scheme = search.smallest(KINDS, sizes, 0.05, True, twice)
    assert len(asked) > 1
    assert twice(scheme) <= 0.05


def test_what_cannot_be_had_is_said(sizes: search.Sizes) -> None:
    with pytest.raises(LawcatError, match="No quantised scheme stays within a KL of 1e-09"):
        search.smallest(KINDS, sizes, 1e-9, True)
    with pytest.raises(LawcatError, match="must be above zero"):
        search.smallest(KINDS, sizes, 0.0, True)
    with pytest.raises(LawcatError, match=r"The smallest scheme takes .* MB, more than 0\.001 MB"):
        search.best_under(KINDS, sizes, 1000, True)
