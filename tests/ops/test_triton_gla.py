"""Triton's kernels of the linear attention in its interpreter, against the quadratic reference in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from triton_interpreter import assert_close, is_interpreted, poisoned  # noqa: F401 (a fixture)

from lawcat_edge.ops import triton_primitives
from lawcat_edge.ops.gla import normalised_gla
from lawcat_edge.ops.gla.naive import gla_naive
from lawcat_edge.ops.gla.step import gla_step
from lawcat_edge.ops.gla.triton import gla_step_triton, gla_triton, gla_triton_normalised
from lawcat_edge.ops.gla.triton_kernels import step_kernel

pytestmark = pytest.mark.usefixtures("poisoned")
RATIO = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
OUTS, INS = ("n", "den", "S", "z"), ("q", "k", "v", "g", "S0", "z0")


def test_the_kernels_run_in_the_interpreter():
    assert is_interpreted(step_kernel)


def inputs(T, H=2, G=1, width=16, d=16, gates="usual", dtype=torch.float32, B=1, state=True, seed=0):
    torch.manual_seed(seed)
    q, k = (torch.randn(B, T, H, width).softmax(-1) for _ in range(2))
    v = torch.randn(B, T, G, d)
    low, high = {"usual": (-4.0, 4.0), "extreme": (-200.0, 20.0)}[gates]
    g = F.logsigmoid(torch.empty(B, T, G, width).uniform_(low, high)) / 16
    if gates == "extreme":
        g[:, ::3] *= 16  # down to -200 in one token
    S0, z0 = (torch.rand(B, H, width, d), torch.rand(B, H, width)) if state else (None, None)
    return *(x.to(dtype) for x in (q, k, v, g)), S0, z0


def compare(args: Any, eps: Any = None, ratio=None, ratio_grad=None):
    """Outputs, final state and every gradient, against the reference on the same (rounded) inputs."""
    B, _, H, width = args[0].shape
    d = args[2].shape[3]
    zeros: Any = (torch.zeros(B, H, width, d), torch.zeros(B, H, width))
    starts: list[Any] = [None] * 4 + list(zeros)
    exact: list[Any] = [
        (z if x is None else x).double().requires_grad_() for x, z in zip(args, starts, strict=True)
    ]
    ref: Any
    got: Any
    got_args: list[Any] = [None if x is None else x.clone().requires_grad_() for x in args]
    n, den, S, z = gla_naive(*exact)
    if eps is None:
        ref, got = (n, den, S, z), gla_triton(*got_args)
    else:
        ref, got = (n / (den[..., None] + eps), S, z), gla_triton_normalised(*got_args, eps)  # type: ignore[misc]
    weights = [torch.randn_like(o) for o in ref]
    torch.stack([(o * w).sum() for o, w in zip(ref, weights, strict=True)]).sum().backward()
    torch.stack([(o.double() * w).sum() for o, w in zip(got, weights, strict=True)]).sum().backward()
    ratio = ratio or RATIO[args[0].dtype]
    for name, r, o in zip(OUTS if eps is None else ("y", "S", "z"), ref, got, strict=True):
        assert_close(name, r, o, ratio)
    for name, r, x in zip(INS, exact, got_args, strict=True):
        if x is not None:
            assert_close(f"d{name}", r.grad, x.grad, ratio_grad or ratio)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 65, 130])
def test_lengths(T):
    compare(inputs(T, state=T != 63))


@pytest.mark.parametrize(("width", "d"), [(16, 128), (24, 20), (64, 64), (128, 16), (96, 80)])
def test_widths(width, d):
    compare(inputs(33, width=width, d=d))


@pytest.mark.parametrize(("H", "G"), [(3, 3), (3, 1), (5, 5), (8, 1), (6, 2)])
def test_heads_and_groups(H, G):
    compare(inputs(18, H=H, G=G, B=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [17, 65])
def test_extreme_gates(T, dtype):
    args = inputs(T, gates="extreme", dtype=dtype)
    # sums of g near -1000 have a rounding of 3e-5 in float32, whoever adds them
    compare(args, ratio=max(RATIO[dtype], 2e-5), ratio_grad=max(RATIO[dtype], 1e-4))


@pytest.mark.parametrize("g", [0.0, -60 / 63, -1.0, -200.0])
def test_gates_on_both_sides_of_the_mild_path(g):
    args = inputs(65, width=16)
    compare([*args[:3], torch.full_like(args[3], g), *args[4:]], ratio=2e-5, ratio_grad=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    compare(inputs(70, dtype=dtype))
    compare(inputs(70, dtype=dtype, seed=1), eps=1e-6)


@pytest.mark.parametrize("gates", ["usual", "extreme"])
def test_split_products(monkeypatch, gates):
    monkeypatch.setattr(triton_primitives, "ROUND_SPLIT", True)
    compare(inputs(70, gates=gates), ratio=1e-4)  # the interpreter cuts bfloat16 off, a GPU rounds it
    compare(inputs(70, gates=gates, seed=1), eps=1e-3, ratio=1e-4, ratio_grad=3e-4)


@pytest.mark.parametrize("T", [1, 17, 130])
def test_normalised(T):
    compare(inputs(T, H=3), eps=1e-3)
    # the first token's y is v whatever q is: the gradient that is left is a difference of equals
    compare(inputs(T, H=3, state=False), eps=1e-3, ratio_grad=2e-5)


@pytest.mark.parametrize("state", [True, False])
def test_many_chunks(state):
    compare(inputs(150, H=2, state=state))
    compare(inputs(150, H=2, state=state, dtype=torch.bfloat16), eps=1e-6)


@pytest.mark.parametrize("gates", ["usual", "extreme"])
@pytest.mark.parametrize("T", [60, 64, 65, 140])
def test_wide_heads_in_bfloat16(T, gates):
    """Chunks of 128 tokens, whose rows two programs share and whose keys each takes 32 at a time."""
    # the interpreter cuts bfloat16 off, and few channels of dz0 outlive a strong decay
    compare(inputs(T, width=128, d=128, H=1, gates=gates, dtype=torch.bfloat16), eps=1e-6, ratio_grad=5e-2)


def test_two_halves_make_a_whole():
    q, k, v, g, S0, z0 = inputs(100)
    whole = gla_triton(q, k, v, g, S0, z0)
    first = gla_triton(q[:, :41], k[:, :41], v[:, :41], g[:, :41], S0, z0)
    second = gla_triton(q[:, 41:], k[:, 41:], v[:, 41:], g[:, 41:], *first[2:])
    assert_close("n", whole[0], torch.cat([first[0], second[0]], 1), 1e-6)
    assert_close("S", whole[2], second[2], 1e-6)


@pytest.mark.parametrize("used", range(4))
def test_the_gradient_of_one_output_alone(used):
    args = [x.requires_grad_() for x in inputs(20)]
    exact = [x.detach().double().requires_grad_() for x in args]
    gla_triton(*args)[used].sum().backward()
    gla_naive(*exact)[used].sum().backward()
    for name, r, x in zip(INS, exact, args, strict=True):
        if r.grad is not None and r.grad.any():
            assert_close(f"d{name} of {OUTS[used]}", r.grad, x.grad, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "width", "d"), [(3, 1, 16, 16), (4, 4, 40, 48)])
def test_decoding_step(dtype, H, G, width, d):
    args = inputs(1, H=H, G=G, width=width, d=d, B=3, dtype=dtype)
    ref = gla_step(*(x.double() for x in args))
    for name, r, o in zip(OUTS, ref, gla_step_triton(*args), strict=True):
        assert_close(name, r, o, RATIO[dtype])
    y = (ref[0] / (ref[1][..., None] + 0.5), *ref[2:])
    q, k, v, g = args[:4]
    S = args[4].clone()
    n, _, S_new, z = gla_step_triton(q, k, v, g, S, args[5], eps=0.5, inplace=True)
    assert S_new is S
    for name, r, o in zip(("y", "S", "z"), y, (n, S, z), strict=True):
        assert_close(name, r, o, RATIO[dtype])


def test_the_dispatcher_decodes_and_prefills_alike():
    q, k, v, g, S0, z0 = inputs(1)
    with torch.no_grad():
        step = normalised_gla(q, k, v, g, S0, z0, eps=1e-6, backend="triton")
    walk = normalised_gla(q, k, v, g, S0, z0, eps=1e-6, backend="triton")
    plain = normalised_gla(q, k, v, g, S0, z0, eps=1e-6, backend="torch")
    for a, b, c in zip(step, walk, plain, strict=True):
        assert_close("step", c, a, 1e-6)
        assert_close("walk", c, b, 1e-6)


def test_agreement_with_fla_core():
    if not torch.cuda.is_available():
        pytest.skip("fla-core's chunk_gla runs on a GPU only; benchmarks/gpu_check.py compares there")
    pytest.importorskip("fla", reason="fla-core is not installed")
    pytest.skip("this process interprets; run benchmarks/gpu_check.py")
