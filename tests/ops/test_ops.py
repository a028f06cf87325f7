"""The torch forms of the two operators against the quadratic reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from lawcat_edge.ops.backend import check_triton, choose
from lawcat_edge.ops.conv import conv_feature
from lawcat_edge.ops.conv.naive import causal_conv
from lawcat_edge.ops.gla import gated_linear_attention, normalised_gla
from lawcat_edge.ops.gla.chunk import gla_chunk
from lawcat_edge.ops.gla.naive import gla_naive
from lawcat_edge.ops.gla.step import gla_step
from lawcat_edge.runtime.errors import LawcatError

NAMES = ("q", "k", "v", "g", "S0", "z0")


def assert_close(name: str, ref: torch.Tensor, got: torch.Tensor, ratio: float) -> None:
    """Root mean square error over the root mean square of the reference."""
    assert got.shape == ref.shape, name
    error = (got.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)
    assert error < ratio, f"{name}: {error:.2e} is not below {ratio:.0e}"


def inputs(T, H=3, G=1, width=8, d=5, gates="usual", state=True, seed=0):
    torch.manual_seed(seed)
    B = 2
    q, k = (torch.rand(B, T, H, width, dtype=torch.float64).softmax(-1) for _ in range(2))
    v = torch.randn(B, T, G, d, dtype=torch.float64)
    low, high = {"usual": (-4.0, 4.0), "extreme": (-200.0, 20.0)}[gates]
    g = F.logsigmoid(torch.empty(B, T, G, width, dtype=torch.float64).uniform_(low, high)) / 16
    if gates == "extreme":
        g[:, ::3] *= 16  # down to -200 in one token
    scale = 1.0 if state else 0.0
    S0 = scale * torch.rand(B, H, width, d, dtype=torch.float64)
    z0 = scale * torch.rand(B, H, width, dtype=torch.float64)
    return q, k, v, g, S0, z0


def gradients(form, args, weights):
    args = [x.clone().requires_grad_() for x in args]
    outs = form(*args)
    torch.stack([(o * w).sum() for o, w in zip(outs, weights, strict=True)]).sum().backward()
    return outs, [x.grad for x in args]


@pytest.mark.parametrize("gates", ["usual", "extreme"])
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 1000])
def test_chunk_and_step_agree_with_the_reference(T, gates):
    small = {"H": 2, "width": 3, "d": 2} if T == 1000 else {}
    args = inputs(T, gates=gates, state=T != 63, **small)
    ref = gla_naive(*args)
    for form in (gla_chunk, gla_step):
        for name, r, o in zip(("n", "den", "S", "z"), ref, form(*args), strict=True):
            assert_close(f"{form.__name__} {name}", r, o, 1e-9)


@pytest.mark.parametrize("gates", ["usual", "extreme"])
@pytest.mark.parametrize("T", [1, 7, 65])
def test_gradients_of_chunk_and_step_agree_with_the_reference(T, gates):
    args = inputs(T, gates=gates)
    weights = [torch.randn_like(o) for o in gla_naive(*args)]
    _, ref = gradients(gla_naive, args, weights)
    for form in (gla_chunk, gla_step):
        _, got = gradients(form, args, weights)
        for name, r, o in zip(NAMES, ref, got, strict=True):
            assert_close(f"{form.__name__} d{name}", r, o, 1e-8)


@pytest.mark.parametrize("gates", ["usual", "extreme"])
def test_float32_chunk_stays_close_and_finite(gates):
    args = inputs(130, gates=gates)
    weights = [torch.randn_like(o) for o in gla_naive(*args)]
    ref, ref_grads = gradients(gla_naive, args, weights)
    got, grads = gradients(gla_chunk, [x.float() for x in args], [w.float() for w in weights])
    for name, r, o in zip(("n", "den", "S", "z"), ref, got, strict=True):
        assert_close(name, r, o, 1e-5)
    for name, r, o in zip(NAMES, ref_grads, grads, strict=True):
        assert_close(f"d{name}", r, o, 1e-4)


@pytest.mark.parametrize(("H", "G"), [(1, 1), (6, 3), (8, 1)])
def test_grouped_heads_read_their_own_value_head(H, G):
    q, k, v, g, S0, z0 = inputs(9, H=H, G=G)
    wide_v, wide_g = (x.repeat_interleave(H // G, 2) for x in (v, g))
    for r, o in zip(gla_naive(q, k, wide_v, wide_g, S0, z0), gla_chunk(q, k, v, g, S0, z0), strict=True):
        assert_close("grouped", r, o, 1e-10)


def test_two_halves_make_a_whole():
    q, k, v, g, S0, z0 = inputs(100)
    whole = gated_linear_attention(q, k, v, g, S0, z0)
    first = gated_linear_attention(q[:, :41], k[:, :41], v[:, :41], g[:, :41], S0, z0)
    second = gated_linear_attention(q[:, 41:], k[:, 41:], v[:, 41:], g[:, 41:], *first[2:])
    assert_close("n", whole[0], torch.cat([first[0], second[0]], 1), 1e-10)
    assert_close("S", whole[2], second[2], 1e-10)


def test_the_normalised_form_divides_and_starts_from_zero():
    q, k, v, g, S0, z0 = inputs(20, state=False)
    n, den, S, z = gla_naive(q, k, v, g, S0, z0)
    y, S1, z1 = normalised_gla(q, k, v, g, eps=1e-3)
    assert_close("y", n / (den[..., None] + 1e-3), y, 1e-10)
    assert_close("S", S, S1, 1e-10)
    assert_close("z", z, z1, 1e-10)


def test_the_normalised_output_is_a_mean_of_values():
    q, k, v, g, _, _ = inputs(50)
    y, _, _ = normalised_gla(q, k, torch.full_like(v, 3.0), g, eps=1e-12)
    assert_close("y", torch.full_like(y, 3.0), y, 1e-8)


def test_convolution_is_torch_s_own():
    torch.manual_seed(0)
    x, taps = torch.randn(2, 11, 6), torch.randn(6, 4)
    y, after = causal_conv(x, taps, torch.zeros(2, 6, 3))
    ref = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), taps[:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(y, ref)
    torch.testing.assert_close(after, x[:, -3:].transpose(1, 2))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_conv_feature_in_parts_is_the_whole(cut):
    torch.manual_seed(1)
    x, taps, W = torch.randn(2, 9, 1, 6), torch.randn(3 * 6, 4), torch.randn(3, 6, 4)
    start = torch.zeros(2, 3 * 6, 3)
    whole, after = conv_feature(x, taps, W, start)
    torch.testing.assert_close(conv_feature(x, taps, W)[0], whole)
    first, buffer = conv_feature(x[:, :cut], taps, W, start)
    second, last = conv_feature(x[:, cut:], taps, W, buffer)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, after)
    torch.testing.assert_close(whole.sum(-1), torch.full((2, 9, 3), 2.0))  # each half sums to one


def test_backend_choice():
    x = torch.zeros(1)
    assert choose("auto", x) == "torch"
    assert choose("torch", x) == "torch"
    with pytest.raises(LawcatError, match=r"Unknown backend 'cuda'; choose one of auto, triton, torch\."):
        choose("cuda", x)


def test_triton_asked_for_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("lawcat_edge.ops.backend.triton_available", lambda: True)
    with pytest.raises(LawcatError, match="needs a CUDA device; choose --backend auto or torch"):
        choose("triton", torch.zeros(1))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [(torch.zeros(2, 129), "up to 128, not 129"), (torch.zeros(2, dtype=torch.float64), "float64")],
)
def test_triton_refuses_what_its_kernels_do_not_hold(tensor, said):
    with pytest.raises(LawcatError, match=f"{said}.*choose --backend torch"):
        check_triton(tensor)


def test_triton_asked_for_and_missing(monkeypatch):
    monkeypatch.setattr("lawcat_edge.ops.backend.triton_available", lambda: False)
    with pytest.raises(LawcatError, match=r"install lawcat-edge\[triton\] or choose --backend torch"):
        choose("triton", torch.zeros(1))
