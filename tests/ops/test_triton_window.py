"""The window's Triton kernels in the interpreter, against every pair of tokens in float64."""

import pytest
import torch

pytest.importorskip("triton")
from triton_interpreter import assert_close, is_interpreted, poisoned  # noqa: F401 (a fixture)

from lawcat_edge.ops.window.naive import window_naive
from lawcat_edge.ops.window.triton import forward_kernel, window_triton

pytestmark = pytest.mark.usefixtures("poisoned")
RATIO = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_the_kernels_run_in_the_interpreter():
    assert is_interpreted(forward_kernel)


def compare(T, window, H=2, G=1, d=16, B=1, dtype=torch.float32, sharp=1.0, ratio=None):
    torch.manual_seed(T)
    args = [(torch.randn(B, T, heads, d) * sharp).to(dtype) for heads in (H, G, G)]
    exact = [a.double().requires_grad_() for a in args]
    mine = [a.clone().requires_grad_() for a in args]
    ref, got = (
        window_naive(exact[0], exact[1], exact[2], window),
        window_triton(mine[0], mine[1], mine[2], window),
    )
    weights = [torch.randn_like(o) for o in ref]
    torch.stack([(o * w).sum() for o, w in zip(ref, weights, strict=True)]).sum().backward()
    torch.stack([(o.double() * w).sum() for o, w in zip(got, weights, strict=True)]).sum().backward()
    ratio = ratio or RATIO[dtype]
    for name, r, o in zip(("N", "Z"), ref, got, strict=True):
        assert_close(name, r, o, ratio, least=1.0)
    for name, r, x in zip(("q", "k", "v"), exact, mine, strict=True):
        # a text of one token has no gradient at all: what rounding leaves of it is held against 1
        assert_close(f"d{name}", r.grad, x.grad, 4 * ratio, least=1.0)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130, 200])
def test_lengths(T):
    compare(T, 37, B=2)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 128, 129, 500])
def test_windows(window):
    compare(150, window)


@pytest.mark.parametrize(("H", "G"), [(3, 3), (3, 1), (6, 2), (9, 3)])
def test_heads_and_groups(H, G):
    compare(70, 20, H=H, G=G)


@pytest.mark.parametrize("d", [8, 24, 64, 80, 128])
def test_widths(d):
    compare(70, 20, d=d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    compare(100, 30, dtype=dtype, H=4, G=2)


def test_scores_far_apart_stay_finite():
    compare(100, 40, sharp=12.0, ratio=5e-5)  # scores of several hundred, which float32 rounds to 3e-5
