"""Triton's convolution with its feature map in the interpreter, against plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")
from triton_interpreter import assert_close, is_interpreted, poisoned  # noqa: F401 (a fixture)

from lawcat_edge.ops import triton_primitives
from lawcat_edge.ops.conv import conv_feature, next_buffer
from lawcat_edge.ops.conv.naive import conv_feature_naive
from lawcat_edge.ops.conv.triton import conv_feature_triton, forward_kernel

pytestmark = pytest.mark.usefixtures("poisoned")
RATIO = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_the_kernels_run_in_the_interpreter():
    assert is_interpreted(forward_kernel)


def inputs(T, H=2, G=1, d=16, f=8, K=4, B=1, dtype=torch.float32):
    torch.manual_seed(T)
    x, buffer = torch.randn(B, T, G, d), torch.randn(B, H * d, K - 1)
    return x.to(dtype), torch.randn(H * d, K) / 2, torch.randn(H, d, f) * 2 / d**0.5, buffer.to(dtype)


def compare(args, ratio=None):
    exact = [a.double().requires_grad_() for a in args]
    mine = [a.clone().requires_grad_() for a in args]
    ref = conv_feature_naive(*exact)
    got = conv_feature_triton(*mine), next_buffer(mine[0], mine[3])
    weights = [torch.randn_like(o) for o in ref]
    torch.stack([(o * w).sum() for o, w in zip(ref, weights, strict=True)]).sum().backward()
    torch.stack([(o.double() * w).sum() for o, w in zip(got, weights, strict=True)]).sum().backward()
    bound = ratio or RATIO[args[0].dtype]
    for name, r, o in zip(("phi", "buffer"), ref, got, strict=True):
        assert_close(name, r, o, bound)
    for name, r, x in zip(("x", "taps", "W", "buffer"), exact, mine, strict=True):
        assert_close(f"d{name}", r.grad, x.grad, bound)


@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 63, 65, 130])
def test_lengths(T):
    compare(inputs(T, B=2))


@pytest.mark.parametrize(("d", "f"), [(16, 16), (24, 20), (64, 32), (128, 64), (80, 40)])
def test_widths(d, f):
    compare(inputs(19, d=d, f=f))


@pytest.mark.parametrize(("H", "G"), [(3, 3), (3, 1), (8, 1), (6, 2), (5, 5)])
def test_heads_and_groups(H, G):
    compare(inputs(18, H=H, G=G))


@pytest.mark.parametrize("K", [2, 3, 5])
def test_kernel_widths(K):
    compare(inputs(40, K=K))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    compare(inputs(70, dtype=dtype))


def test_split_products(monkeypatch):
    monkeypatch.setattr(triton_primitives, "ROUND_SPLIT", True)
    compare(inputs(70, d=64, f=32), ratio=1e-4)  # the interpreter cuts bfloat16 off, a GPU rounds it


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_large_logits_stay_finite(scale):
    x, taps, W, buffer = inputs(20)
    phi = conv_feature_triton(x * scale, taps, W, buffer)
    assert_close("phi", conv_feature_naive(*(a.double() for a in (x * scale, taps, W, buffer)))[0], phi, 1e-4)


def test_without_a_buffer_the_text_starts_here():
    x, taps, W, buffer = inputs(70)
    exact = [a.double().requires_grad_() for a in (x, taps, W)]
    mine = [a.clone().requires_grad_() for a in (x, taps, W)]
    ref = conv_feature_naive(exact[0], exact[1], exact[2], torch.zeros_like(buffer).double())[0]
    phi, after = conv_feature(mine[0], mine[1], mine[2], backend="triton")
    assert after is None
    assert_close("phi", ref, phi, 1e-6)
    weight = torch.randn_like(ref)
    (ref * weight).sum().backward()
    (phi * weight).sum().backward()
    for name, r, m in zip(("x", "taps", "W"), exact, mine, strict=True):
        assert_close(f"d{name}", r.grad, m.grad, 2e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_dispatcher_carries_the_buffer(backend):
    x, taps, W, buffer = inputs(10)
    ref, after = conv_feature_naive(x, taps, W, buffer)
    phi, mine = conv_feature(x, taps, W, buffer, backend=backend)
    assert_close("phi", ref, phi, 1e-6)
    torch.testing.assert_close(after, mine)
