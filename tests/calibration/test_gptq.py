"""Data-aware rounding against a float64 reference of its own, and that it lowers the error that it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exported import make_bundle, make_student

from lawcat_edge.calibration import gptq
from lawcat_edge.calibration.calibrate import basis_scheme, hessian_scheme
from lawcat_edge.calibration.gptq import DAMPING, Gptq, round_rows
from lawcat_edge.calibration.hessian import Hessians
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.rotation import rotation_of_down
from lawcat_edge.export.rounding import bounds, grid, nearest
from lawcat_edge.export.schemes import Linear
from lawcat_edge.runtime.errors import LawcatError

FOUR, EIGHT = Linear("nbits", 4, 16), Linear("nbits", 8, 16)
OFFSETS, COLUMN = Linear("nbits", 4, 16, offsets=True), Linear("static", 7)


def problem(K: int = 72, n: int = 21) -> tuple[np.ndarray, np.ndarray]:
    """Weights [n,K] and inputs [4000,K] whose channels are correlated and of very different sizes."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K))
    return rng.standard_normal((n, K)).astype(np.float32), rng.standard_normal((4000, K)) @ mixed


def blocks(rows: np.ndarray, spec: Linear) -> np.ndarray:
    block = spec.block if spec.kind == "nbits" else rows.shape[1]
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % block))).reshape(len(rows), -1, block)


def reference(weights: np.ndarray, hessian: np.ndarray, spec: Linear) -> np.ndarray:
    """The textbook form: one column at a time, each time the inverse of M over the columns still free."""
    values = blocks(weights, spec).astype(np.float64)
    n, count, block = values.shape
    M = np.zeros((count * block,) * 2)
    M[: len(hessian), : len(hessian)] = hessian
    diagonal = M.diagonal().copy()
    diagonal[: len(hessian)] += DAMPING * diagonal[: len(hessian)].mean()
    diagonal[len(hessian) :] = diagonal[: len(hessian)].mean()
    np.fill_diagonal(M, diagonal)
    found = grid(values.astype(np.float32), spec, diagonal.astype(np.float32).reshape(count, block))
    low, high = bounds(spec)
    left, quantised = values.reshape(n, -1), np.zeros((n, count * block))
    free = list(np.argsort(-diagonal, kind="stable"))
    while free:
        column, inverse = free[0], np.linalg.inv(M[np.ix_(free, free)])
        scale = found.scales[:, column // block].astype(np.float64)
        offset = 0 if found.offsets is None else found.offsets[:, column // block]
        quantised[:, column] = np.clip(np.rint(left[:, column] / scale - offset), low, high)
        error = left[:, column] - (quantised[:, column] + offset) * scale
        left[:, free] -= error[:, None] * inverse[0] / inverse[0, 0]
        free.pop(0)
    return quantised.reshape(n, count, block)


@pytest.mark.parametrize("spec", [FOUR, EIGHT, OFFSETS, COLUMN], ids=lambda spec: f"{spec.kind}{spec.bits}")
def test_quantised_values_are_those_of_the_textbook(spec: Linear) -> None:
    weights, x = problem()
    hessian = (x.T @ x / len(x)).astype(np.float32)
    found = round_rows(blocks(weights, spec), hessian, spec)
    known = reference(weights, hessian.astype(np.float64), spec)
    assert (found.quantised == known).mean() > 0.995  # float32 flips a tie now and then, and what follows it
    assert np.abs(found.quantised).max() <= 127


@pytest.mark.parametrize("spec", [FOUR, OFFSETS, COLUMN])
def test_the_output_is_closer_than_with_the_nearest(spec: Linear) -> None:
    weights, x = problem()
    values = blocks(weights, spec)

    def lost(back: np.ndarray) -> float:
        return float(np.square(x @ (back[:, : weights.shape[1]] - weights).T).mean())

    aware = lost(round_rows(values, (x.T @ x / len(x)).astype(np.float32), spec).values())
    assert aware < 0.5 * lost(nearest(values, spec).values())


def test_rows_may_come_in_any_blocks_of_rows() -> None:
    weights, x = problem()
    hessian = (x.T @ x / len(x)).astype(np.float32)
    state = gptq._Rounding(hessian, 80, FOUR)
    whole = state(blocks(weights, FOUR))
    parts = [state(blocks(weights[k : k + 5], FOUR)) for k in range(0, len(weights), 5)]
    assert (np.concatenate([part.quantised for part in parts]) == whole.quantised).mean() > 0.999
    assert (np.concatenate([part.scales for part in parts]) == whole.scales).all()


def test_an_input_never_seen_is_rounded_all_the_same() -> None:
    weights, x = problem()
    x[:, ::3] = 0
    found = round_rows(blocks(weights, FOUR), (x.T @ x / len(x)).astype(np.float32), FOUR)
    assert np.isfinite(found.quantised).all()
    zero = round_rows(blocks(weights, FOUR), np.zeros((72, 72), np.float32), FOUR)
    assert np.isfinite(zero.quantised).all()


def test_hessians_of_rotated_inputs_are_rotated_back() -> None:
    _, x = problem()
    matrix = rotation_of_down(72)
    assert matrix is not None
    rotated = (x.reshape(len(x), -1, len(matrix)) @ matrix).reshape(x.shape)
    back = gptq._rotated_back(rotated.T @ rotated, matrix.astype(np.float64))
    known = x.T @ x
    assert np.abs(back - known).max() < 1e-5 * np.abs(known).max()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hessians")
    teacher, model, adapter = make_student(folder / "t", config=LawcatConfig(feature_dim=8, window=4))
    make_bundle(teacher, model, adapter, folder / "b")
    return folder / "b"


def test_moments_in_small_groups_are_those_of_one_reading(bundle: Path) -> None:
    texts = np.random.default_rng(0).integers(0, 257, (2, 700))
    whole, small = Hessians(bundle, texts, 1), Hessians(bundle, texts, 1, chunk=100, budget=1)
    for path in whole.paths:
        known = whole.of(path)
        assert np.abs(small.of(path) - known).max() < 1e-4 * np.abs(known).max(), path
        assert (np.linalg.eigvalsh(known.astype(np.float64)) > -1e-4 * np.abs(known).max()).all()
    assert whole.readings == 1
    assert small.readings == len(whole.paths) == 9
    assert len(small._held) == 1  # memory is that of one product


@pytest.mark.parametrize("rotate", [False, True])
def test_hessians_read_in_8_bits_are_those_of_fp32(rotate: bool, tmp_path: Path) -> None:
    teacher, model, adapter = make_student(tmp_path / "t", config=LawcatConfig(feature_dim=8, window=4))
    texts = np.random.default_rng(0).integers(0, 257, (2, 600))
    for name, scheme in (("exact", basis_scheme(rotate)), ("fast", hessian_scheme(rotate))):
        make_bundle(teacher, model, adapter, tmp_path / name, scheme=scheme)
    exact, fast = (Hessians(tmp_path / name, texts, 1) for name in ("exact", "fast"))
    for path in exact.paths:
        known = exact.of(path)
        assert np.linalg.norm(fast.of(path) - known) < 0.05 * np.linalg.norm(known), path


def test_too_little_text_is_one_sentence(bundle: Path) -> None:
    with pytest.raises(LawcatError, match="holds 100 tokens, 1,024 are needed"):
        Hessians(bundle, np.zeros((1, 100), np.int64))


def test_the_identity_follows_text_and_bundle(bundle: Path) -> None:
    texts = np.zeros((2, 600), np.int64)
    one, same, other = (Gptq(Hessians(bundle, t)) for t in (texts, texts.copy(), texts + 1))
    assert one.sha256 == same.sha256 != other.sha256
