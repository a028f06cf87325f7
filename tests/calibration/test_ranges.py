"""Activation ranges: histograms that merge, and ranges on the recurrent graph that follow its state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import make_bundle, make_student

from lawcat_edge.calibration.histogram import BINS, Histogram
from lawcat_edge.calibration.ranges import Ranges, measure_ranges
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.schemes import METHODS
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError

TEXT = np.random.default_rng(0).integers(0, 257, (1, 3072))


def histogram(*pieces: np.ndarray) -> Histogram:
    found = Histogram()
    for piece in pieces:
        found.add(piece)
    return found


def same(a: Histogram, b: Histogram) -> bool:
    return (a.low, a.high, a.exponent) == (b.low, b.high, b.exponent) and (a.counts == b.counts).all()


@pytest.fixture(scope="module")
def values() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(4001).astype(np.float32) * scale for scale in (0.3, 40.0, 1.0)]


def test_pieces_in_any_order_and_merging_give_one_histogram(values: list[np.ndarray]) -> None:
    whole = histogram(np.concatenate(values))
    assert same(histogram(*values), whole)
    assert same(histogram(*values[::-1]), whole)
    left, right = histogram(values[0]), histogram(*values[1:])
    merged = left.copy()
    merged.merge(right)
    other = right.copy()
    other.merge(left)
    assert same(merged, whole)
    assert same(other, whole)
    assert whole.total == 3 * 4001
    assert same(left, histogram(values[0]))  # merging changed only the one merged into


def test_the_edge_of_the_range_is_counted() -> None:
    found = histogram(np.array([-1.0, 1.0, 0.0, 0.5]))
    assert found.total == 4
    assert found.exponent == 1
    assert histogram(np.zeros(3)).total == 3


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_the_bulk_and_all_but_minmax_cut_an_outlier(method: str) -> None:
    rng = np.random.default_rng(2)
    found = histogram(rng.standard_normal(200_000), np.array([60.0]))
    low, high = found.range(method, 0.999)
    assert low < -2
    assert high > 2
    if method == "minmax":
        assert high == 60
    else:
        assert high < 35, method


def test_percentile_and_mse_are_where_theory_puts_them() -> None:
    rng = np.random.default_rng(3)
    found = histogram(rng.standard_normal(1_000_000))
    low, high = found.range("percentile", 0.99)
    assert (low, high) == pytest.approx((-2.576, 2.576), abs=0.02)
    # the best bound for 8 bits of a normal variable is about 3.9 standard deviations
    assert found.range("mse")[1] == pytest.approx(3.9, abs=0.35)


def test_a_histogram_survives_json_and_refuses_damage(values: list[np.ndarray]) -> None:
    data = histogram(*values).to_dict()
    assert same(Histogram.from_dict(json.loads(json.dumps(data)), "x"), histogram(*values))
    for key, bad in (
        ("counts", []),
        ("counts", [-1]),
        ("first", BINS),
        ("low", float("nan")),
        ("high", 1e30),
        ("exponent", "3"),
        ("exponent", 1000),
    ):
        with pytest.raises(LawcatError, match="The range of 'x' is damaged"):
            Histogram.from_dict({**data, key: bad}, "x")


@pytest.fixture(scope="module", params=[0, 8], ids=["linear", "window"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A student that forgets slowly, so that its state grows for a thousand tokens."""
    folder = tmp_path_factory.mktemp("ranges")
    config = LawcatConfig(feature_dim=8, window=request.param)
    teacher, model, start = make_student(folder / "teacher", config=config)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("gate_bias"):
                parameter.fill_(4.0)
    tensors = {name: value.detach().numpy().copy() for name, value in model.adapter_parameters().items()}
    make_bundle(teacher, model, replace(start, tensors=tensors), folder / "bundle")
    return SimpleNamespace(folder=folder / "bundle", model=model)


def test_ranges_follow_the_state(bundle: SimpleNamespace) -> None:
    ranges = measure_ranges(bundle.folder, TEXT, threads=1)
    assert len(ranges.tensors) == 2 * 4 + 1 + 2
    assert ranges.tokens == TEXT.size
    # the state keeps growing long after the first segment, and a calibrator that forgets it sees less
    assert ranges.growth("state.0") > 1.3
    forgetful = measure_ranges(bundle.folder, TEXT, chunk=64, threads=1, keep_state=False)
    assert ranges.range("state.0")[1] > 1.5 * forgetful.range("state.0")[1]
    products = [name for name in ranges.tensors if not name.startswith("state")]
    assert any(ranges.range(name) != forgetful.range(name) for name in products)


def test_ranges_are_those_of_torch(bundle: SimpleNamespace) -> None:
    seen: dict[str, tuple[float, float]] = {}
    model = bundle.model
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(
                name, (inputs[0].min().item(), inputs[0].max().item())
            )
        )
        for name, module in (
            ("layers.0/qkv", model.layers[0].self_attn.q_proj),
            ("layers.1/o", model.layers[1].self_attn.o_proj),
            ("layers.1/down", model.layers[1].mlp.down_proj),
            ("head", model.lm_head),
        )
    ]
    with torch.no_grad():
        model(torch.from_numpy(TEXT))
    for hook in hooks:
        hook.remove()
    ranges = measure_ranges(bundle.folder, TEXT, threads=1)
    for name, expected in seen.items():
        assert ranges.range(name) == pytest.approx(expected, rel=1e-3), name


def test_chunks_do_not_matter_and_texts_merge(bundle: SimpleNamespace, tmp_path: Path) -> None:
    texts = np.random.default_rng(5).integers(0, 257, (2, 1024))
    both = measure_ranges(bundle.folder, texts, threads=1)
    first = measure_ranges(bundle.folder, texts[:1], chunk=100, threads=1)
    first.save(tmp_path / "first.json")
    merged = Ranges.load(tmp_path / "first.json")
    merged.check(Bundle.open(bundle.folder))
    merged.merge(measure_ranges(bundle.folder, texts[1:], threads=1))
    assert merged.tokens == both.tokens
    assert merged.texts == both.texts
    for name, histogram in both.tensors.items():
        if not name.startswith("state"):  # a state is seen once a chunk
            assert merged.tensors[name].total == histogram.total
            assert merged.range(name) == pytest.approx(both.range(name), rel=1e-4)
    with pytest.raises(LawcatError, match="saw the same text"):
        merged.merge(first)


def test_what_does_not_fit_is_refused(bundle: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(LawcatError, match="holds 100 tokens and needs 1,024; give more text"):
        measure_ranges(bundle.folder, TEXT[:, :100])
    ranges = measure_ranges(bundle.folder, TEXT[:, :1024], threads=1)
    ranges.measured_on["bundle_sha256"] = "0" * 64
    with pytest.raises(LawcatError, match="another graph than the bundle at hand; calibrate again"):
        ranges.check(Bundle.open(bundle.folder))
    with pytest.raises(LawcatError, match=r"no range of 'layers\.9/o'"):
        ranges.range("layers.9/o")
    with pytest.raises(LawcatError, match="Unknown method 'median'"):
        ranges.range("head", "median")
    (tmp_path / "x.json").write_text('{"format": 1}')
    with pytest.raises(LawcatError, match="holds no activation ranges of this version"):
        Ranges.load(tmp_path / "x.json")
