"""One LAWCAT layer against a quadratic reference in float64 that is written here from the formulas alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lawcat_edge.attention import LawcatAttention, LayerState
from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.rotary import rotary_tables

D, d, f = 12, 8, 3
THETA = 100.0  # so small that every pair turns noticeably within a test

# name: (H, G, attention biases, q/k norm, config)
CASES: dict[str, Any] = {
    "plain": (3, 1, False, False, {}),
    "grouped": (4, 2, False, False, {}),
    "ungrouped": (2, 2, False, False, {"conv_kernel": 5}),
    "two taps": (2, 1, False, False, {"conv_kernel": 2}),
    "biases": (4, 2, True, False, {}),
    "norms": (4, 2, False, True, {}),
    "rope": (4, 2, False, False, {"rope": True}),
    "window": (4, 2, True, True, {"window": 5}),
    "window of one": (2, 1, False, False, {"window": 1}),
    "wide window, rope": (2, 1, False, False, {"window": 70, "rope": True, "conv_kernel": 5}),
}
GATES = {"usual": (-4.0, 4.0, 16.0), "open": (20.0, 20.0, 16.0), "extreme": (-200.0, 20.0, 1.0)}


def make_layer(case: str, gates: str = "usual", dtype: torch.dtype = torch.float64) -> Any:
    H, G, biases, norms, changes = CASES[case]
    low, high, divisor = GATES[gates]
    torch.manual_seed(0)
    linear = lambda n_in, n_out, bias: nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64)  # noqa: E731
    teacher = SimpleNamespace(
        q_proj=linear(D, H * d, biases),
        k_proj=linear(D, G * d, biases),
        v_proj=linear(D, G * d, biases),
        o_proj=linear(H * d, D, biases),
        q_norm=nn.RMSNorm(d, eps=1e-5, dtype=torch.float64),
        k_norm=nn.RMSNorm(d, eps=1e-5, dtype=torch.float64),
    )
    geometry = Geometry(
        family="qwen3",
        hidden_size=D,
        num_layers=1,
        num_heads=H,
        num_kv_heads=G,
        head_dim=d,
        intermediate_size=4,
        vocab_size=4,
        tie_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=THETA,
        attention_bias=biases,
        qk_norm=norms,
    )
    settings: dict[str, Any] = {
        "feature_dim": f,
        "gate_rank": 2,
        "gate_divisor": divisor,
        "eps": 1e-3,
        **changes,
    }
    config = LawcatConfig(**settings)
    layer = LawcatAttention(teacher, geometry, config).double()
    with torch.no_grad():  # nothing at its starting value, where a term that is left out would not show
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        layer.gate_bias.copy_(torch.empty_like(layer.gate_bias).uniform_(low, high))
    return layer.to(dtype)


def make_state(layer: Any, seen: int, batch: int = 2) -> Any:
    """A state as some text could have left it; slots of the window that are not filled hold rubbish."""
    torch.manual_seed(1)
    H, G, c = layer.geometry.num_heads, layer.geometry.num_kv_heads, layer.config
    return LayerState(
        conv=torch.randn(batch, 2 * H * d, c.conv_kernel - 1, dtype=torch.float64),
        recurrent=torch.rand(batch, H, 2 * f, d + 1, dtype=torch.float64),
        window_key=torch.randn(batch, G, c.window - 1, d, dtype=torch.float64) if c.window else None,
        window_value=torch.randn(batch, G, c.window - 1, d, dtype=torch.float64) if c.window else None,
        seen=seen,
    )


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [B,T,h,d]; the pair (x_i, x_{i+d/2}) turns by position * theta^(-2i/d)."""
    angle = positions[:, None] * torch.tensor([THETA ** (-2 * i / d) for i in range(d // 2)], dtype=x.dtype)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def reference(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """lawcat.md, every pair of tokens formed explicitly; one head and one tap after another."""
    c, H, G = layer.config, layer.geometry.num_heads, layer.geometry.num_kv_heads
    B, T, w, r = x.shape[0], x.shape[1], c.window, c.conv_kernel - 1
    positions = torch.arange(state.seen, state.seen + T, dtype=x.dtype)

    def projected(proj: nn.Linear, norm: Any, heads: int) -> Tensor:
        y = (x @ proj.weight.T + (torch.zeros(()) if proj.bias is None else proj.bias)).view(B, T, heads, d)
        return y if norm is None else y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    q = projected(layer.q_proj, layer.q_norm, H)
    k = projected(layer.k_proj, layer.k_norm, G)
    v = projected(layer.v_proj, None, G)
    ql, kl = (rotated(q, positions), rotated(k, positions)) if c.rope else (q, k)
    g = -torch.log1p(torch.exp(-(x @ layer.gate_a @ layer.gate_b + layer.gate_bias))) / c.gate_divisor
    g = g.view(B, T, G, 2 * f)

    def features(heads: Tensor, taps: Tensor, past: Tensor, h: int) -> tuple[Tensor, Tensor]:
        line = torch.cat([past.transpose(1, 2), heads], 1)  # [B, r+T, d]
        mixed = sum(line[:, j : j + T] * taps[:, j] for j in range(r + 1)) @ layer.feature[h]
        return torch.cat([mixed.softmax(-1), (-mixed).softmax(-1)], -1), line[:, T:].transpose(1, 2)

    outs, buffers_q, buffers_k, states = [], [], [], []
    age = torch.arange(T)[:, None] - torch.arange(T)
    for h in range(H):
        own, channels = h // (H // G), slice(h * d, (h + 1) * d)
        past_q, past_k = state.conv[:, : H * d][:, channels], state.conv[:, H * d :][:, channels]
        phi_q, last_q = features(ql[:, :, h], layer.conv_q[channels], past_q, h)
        phi_k, last_k = features(kl[:, :, own], layer.conv_k[channels], past_k, h)
        b = g[:, :, own].cumsum(1)  # [B,T,F]
        lag = (b[:, :, None] - b[:, None]).masked_fill((age < 0)[..., None], -math.inf)
        weight = torch.einsum("btf,bjf,btjf->btj", phi_q, phi_k, lag.exp())
        ones = torch.cat([v[:, :, own], torch.ones(B, T, 1, dtype=x.dtype)], -1)
        nz = weight @ ones + (phi_q * b.exp()) @ state.recurrent[:, h]
        to_end = phi_k * (b[:, -1:] - b).exp()
        states.append(b[:, -1].exp()[..., None] * state.recurrent[:, h] + to_end.transpose(1, 2) @ ones)
        n, z = nz[..., :d], nz[..., d:]
        if w:
            filled = min(state.seen, w - 1)
            key = torch.cat([state.window_key[:, own, w - 1 - filled :], k[:, :, own]], 1)
            value = torch.cat([state.window_value[:, own, w - 1 - filled :], v[:, :, own]], 1)
            at = torch.arange(state.seen - filled, state.seen + T, dtype=x.dtype)
            s = rotated(q[:, :, [h]], positions)[:, :, 0] @ rotated(key[:, :, None], at)[:, :, 0].transpose(
                1, 2
            )
            distance = positions[:, None] - at
            s = (s / d**0.5).masked_fill((distance < 0) | (distance >= w), -math.inf)
            e = (s - s.amax(-1, keepdim=True)).exp()
            share = 1 / (1 + torch.exp(-layer.omega[h]))
            n, z = n + share * e @ value, z + share * e.sum(-1, keepdim=True)
        outs.append(n / (z + c.eps))
        buffers_q.append(last_q)
        buffers_k.append(last_k)
    after = LayerState(torch.cat(buffers_q + buffers_k, 1), torch.stack(states, 1), seen=state.seen + T)
    if w:
        after.window_key = torch.cat([state.window_key, k.transpose(1, 2)], 2)[:, :, T:]
        after.window_value = torch.cat([state.window_value, v.transpose(1, 2)], 2)[:, :, T:]
    return torch.stack(outs, 2), after


def run(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    rotary = rotary_tables(layer.geometry, state.seen, x.shape[1], x.device)
    return layer.attend(x, *layer.project(x), rotary, state)


def in_pieces(layer: Any, x: Tensor, state: Any, sizes: list[int]) -> tuple[Tensor, Any]:
    parts = []
    for piece in x.split(sizes, 1):
        y, state = run(layer, piece, state)
        parts.append(y)
    return torch.cat(parts, 1), state


def tensors(y: Tensor, state: Any) -> dict[str, Tensor]:
    named = {"y": y, **{n: v for n, v in vars(state).items() if isinstance(v, Tensor) and v.numel()}}
    return {"S": named["recurrent"][..., :-1], "z": named.pop("recurrent")[..., -1], **named}


def assert_close(what: str, want: dict[str, Tensor], got: dict[str, Tensor], ratio: float) -> None:
    """Root mean square error over the root mean square of the reference, tensor by tensor."""
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].shape == got[name].shape, f"{what} {name}"
        size = want[name].double().norm().clamp_min(1e-30)
        error = (got[name].double() - want[name].double()).norm() / size
        assert error < ratio, f"{what}, {name}: {error:.1e} is not below {ratio:.0e}"


def cast(state: Any, dtype: torch.dtype) -> Any:
    parts: dict[str, Any] = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in vars(state).items()}
    return LayerState(**parts)


def inputs(T: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize("seen", [0, 2, 37])
@pytest.mark.parametrize("case", CASES)
def test_float64_layer_is_the_reference(case: str, seen: int) -> None:
    layer = make_layer(case)
    state, x = make_state(layer, seen), inputs(23)
    with torch.no_grad():
        y, after = run(layer, x, state)
        assert_close(case, tensors(*reference(layer, x, state)), tensors(y, after), 1e-12)
    assert after.seen == seen + 23


@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 1000])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("case", ["grouped", "rope", "window", "wide window, rope"])
def test_float32_whole_pieces_and_steps_are_the_reference(case: str, gates: str, T: int) -> None:
    batch = 1 if T == 1000 else 2
    exact = make_layer(case, gates, torch.float32).double()  # the very float32 parameters
    layer = make_layer(case, gates, torch.float32)
    x, state = inputs(T, batch).float(), cast(make_state(exact, 3, batch), torch.float32)
    with torch.no_grad():
        want = tensors(*reference(exact, x.double(), cast(state, torch.float64)))
        assert_close("whole", want, tensors(*run(layer, x, state)), 1e-5)
        for sizes in uneven(T):
            assert_close(f"pieces {sizes}", want, tensors(*in_pieces(layer, x, state, sizes)), 1e-5)
        if T < 1000 or gates == "extreme":
            assert_close("steps", want, tensors(*in_pieces(layer, x, state, [1] * T)), 1e-5)


def uneven(T: int) -> list[list[int]]:
    """Splits that cut chunks, windows and convolutions in all sorts of places."""
    generator = torch.Generator().manual_seed(T)
    splits = []
    for longest in (3, 20, 300):
        sizes: list[int] = []
        while sum(sizes) < T:
            sizes.append(min(int(torch.randint(1, longest, (1,), generator=generator)), T - sum(sizes)))
        splits.append(sizes)
    return splits[1:] if T == 1000 else splits


def test_without_a_state_the_text_starts_from_nothing() -> None:
    for case in CASES:
        layer, x = make_layer(case, dtype=torch.float32), inputs(20).float()
        with torch.no_grad():
            rotary = rotary_tables(layer.geometry, 0, 20, x.device)
            bare, none = layer.attend(x, *layer.project(x), rotary, None)
            full, _ = run(layer, x, layer.empty_state(2, x.device))
        assert none is None
        torch.testing.assert_close(bare, full, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [1, 7, 65])
@pytest.mark.parametrize(
    ("case", "gates"),
    [(case, "usual") for case in CASES] + [("grouped", "extreme"), ("window", "extreme"), ("rope", "open")],
)
def test_gradients_are_those_of_the_reference(case: str, gates: str, T: int) -> None:
    layer = make_layer(case, gates)

    def gradients(form: Any) -> dict[str, Any]:
        layer.zero_grad()
        x, state = inputs(T).requires_grad_(), make_state(layer, 37)
        sources: dict[str, Any] = {"x": x, "conv": state.conv, "recurrent": state.recurrent}
        if layer.config.window > 1:
            sources |= {"window_key": state.window_key, "window_value": state.window_value}
        for tensor in sources.values():
            tensor.requires_grad_()
        outs = tensors(*form(layer, x, state))
        torch.manual_seed(5)
        torch.stack(
            [(out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outs.values()]
        ).sum().backward()
        grads = {name: tensor.grad for name, tensor in sources.items()}
        grads |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert set(layer.new_parameters()) <= set(grads)
        return grads

    want = gradients(reference)
    assert_close(f"{case} d", want, gradients(run), 1e-9)
    for grad in gradients(lambda layer, x, state: in_pieces(layer, x, state, uneven(T)[1])).items():
        assert_close(f"{case} pieces d", {grad[0]: want[grad[0]]}, dict([grad]), 1e-9)


@pytest.mark.parametrize("case", ["grouped", "window", "wide window, rope"])
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    """Of the function as it runs: the reference above could leave the same path out of the gradient."""
    layer, x = make_layer(case), inputs(9, 1).requires_grad_()
    parameters = [p.requires_grad_() for p in layer.parameters()]
    torch.manual_seed(6)

    def loss() -> Tensor:
        y, _ = run(layer, x, make_state(layer, 3, 1))
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()

    grads = torch.autograd.grad(loss(), [x, *parameters], allow_unused=True)
    for tensor, grad in zip([x, *parameters], grads, strict=True):
        if grad is None:
            continue
        direction = torch.randn(tensor.shape, dtype=tensor.dtype)
        with torch.no_grad():
            tensor += 1e-6 * direction
            up = loss()
            tensor -= 2e-6 * direction
            down = loss()
            tensor += 1e-6 * direction
        assert float((grad * direction).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-5, abs=1e-7)


def test_float32_gradients_stay_finite_and_close_with_extreme_gates() -> None:
    for case in ("grouped", "window"):
        grads = []
        for dtype in (torch.float64, torch.float32):
            layer = make_layer(case, "extreme", torch.float32).to(dtype)
            x = inputs(130).to(dtype).requires_grad_()
            y, _ = run(layer, x, cast(make_state(layer, 37), dtype))
            y.square().sum().backward()
            grads.append(
                {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
            )
        assert_close(case, grads[0], grads[1], 2e-4)


def test_the_start_is_the_published_one() -> None:
    torch.manual_seed(0)
    trained = make_layer("window")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    teacher = SimpleNamespace(**{name: getattr(trained, name) for name in names})
    layer = LawcatAttention(teacher, trained.geometry, LawcatConfig(feature_dim=f, window=5))
    for taps in (layer.conv_q, layer.conv_k):
        assert taps.shape == (4 * d, 4)
        assert torch.equal(taps[0], torch.tensor([0.001, 0.001, 0.001, 1.0]))
    assert layer.conv_q is not layer.conv_k
    assert not layer.gate_bias.any()
    for part in (layer.gate_a, layer.gate_b):
        assert 0.004 < float(part.detach().std()) < 0.008
    # half-life of 16 tokens: exp(g) ** 16 = 1/2
    decay = layer.log_decay(torch.zeros(1, 1, D))
    torch.testing.assert_close(decay.exp() ** 16, torch.full_like(decay, 0.5))
    assert decay.shape == (1, 1, 2, 2 * f)


def test_teacher_s_attention_is_plain_softmax() -> None:
    for limit in (None, 4):
        layer = make_layer("grouped")
        object.__setattr__(layer.geometry, "sliding_window", limit)
        x, positions = inputs(11), torch.arange(11, dtype=torch.float64)
        with torch.no_grad():
            q, k, v = layer.project(x)
            got = layer.softmax(q, k, v, rotary_tables(layer.geometry, 0, 11, x.device))
            q, k = rotated(q, positions), rotated(k, positions).repeat_interleave(2, 2)
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
            age = torch.arange(11)[:, None] - torch.arange(11)
            scores = scores.masked_fill((age < 0) | (age >= (limit or 99)), -math.inf)
            want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.repeat_interleave(2, 2))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_log_decay_stays_float32_under_autocast() -> None:
    layer, x = make_layer("grouped", dtype=torch.float32), inputs(9).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decay = layer.log_decay(x)
    assert decay.dtype == torch.float32
    with torch.no_grad():
        want = F.logsigmoid(x @ layer.gate_a @ layer.gate_b + layer.gate_bias).view(2, 9, 2, 2 * f) / 16
    torch.testing.assert_close(decay, want)
