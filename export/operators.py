"""The operators of the step form, registered with torch: they run, they trace, they become ONNX nodes.

Every operator has a real implementation in torch, which is what the tests hold against
``lawcat_edge.attention``; one for shapes alone, which tracing calls; and one that writes its nodes, for
``torch.onnx.export(custom_translation_table=translations())``. The nodes are those of onnxruntime
(com.microsoft, all known to 1.25.1); other flavours are made from them by ``flavours``.

Letters as in ``lawcat_edge.attention``; C slots of a buffer of keys or values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MS = "com.microsoft"
_library = torch.library.Library("lawcat", "DEF")
_translations: list[tuple[str, Callable[..., Any]]] = []


def register(
    schema: str, real: Callable[..., Any], shapes: Callable[..., Any], nodes: Callable[..., Any]
) -> Any:
    """Define ``lawcat::<schema>`` with its three sides, and return it."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lawcat::{name}", shapes, lib=_library)
    _translations.append((name, nodes))
    return getattr(torch.ops.lawcat, name)


def translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` needs to know these operators."""
    return {getattr(torch.ops.lawcat, name).default: nodes for name, nodes in _translations}


def node(
    op: str, inputs: Sequence[Any], outputs: int = 1, domain: str = MS, version: int = 1, **attributes: Any
) -> Any:
    """Record one ONNX node; its output, or a tuple of them. Inputs may be None where an operator allows."""
    import onnxscript
    from onnx import defs

    # Types do not matter here, since the graph is checked by onnxruntime; how many there are does.
    parameter = defs.OpSchema.FormalParameter
    optional = defs.OpSchema.FormalParameterOption.Optional
    kinds = {int: "INT", float: "FLOAT", str: "STRING", list: "INTS"}
    schema = defs.OpSchema(
        op,
        domain,
        version,
        inputs=[parameter(f"i{n}", f"T{n}", param_option=optional) for n in range(len(inputs))],
        outputs=[parameter(f"o{n}", "R") for n in range(outputs)],
        type_constraints=[(name, _TYPES, "") for name in [*(f"T{n}" for n in range(len(inputs))), "R"]],
        attributes=[
            defs.OpSchema.Attribute(name, getattr(defs.OpSchema.AttrType, kinds[type(value)]), required=False)
            for name, value in attributes.items()
        ],
    )
    opset = onnxscript.values.Opset(domain, version)
    return onnxscript.values.Op(opset, op, schema)(*inputs, **attributes)


_TYPES = ["tensor(float)", "tensor(int32)", "tensor(int64)"]


# -- products, norms, activations ----------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return F.linear(x, weight, bias)


# Which product it becomes is decided later, by the scheme: the stitcher replaces this node.
linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str name) -> Tensor",
    _linear,
    lambda x, weight, bias, name: x.new_empty(*x.shape[:-1], weight.shape[0]),
    lambda x, weight, bias, name: node("Linear", [x, weight, bias], domain="lawcat", name=name),
)


def rms(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gamma


rms_norm = register(
    "rms_norm(Tensor x, Tensor gamma, float eps) -> Tensor",
    rms,
    lambda x, gamma, eps: torch.empty_like(x),
    # an operator of onnxruntime's that has no domain of its own
    lambda x, gamma, eps: node(
        "SimplifiedLayerNormalization", [x, gamma], domain="", axis=-1, epsilon=float(eps)
    ),
)


def _skip_norm(
    x: Tensor, update: Tensor, gamma: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + update if bias is None else x + update + bias
    return rms(total, gamma, eps), total


def _skip_norm_nodes(x: Any, update: Any, gamma: Any, bias: Any, eps: float) -> Any:
    inputs = [x, update, gamma] if bias is None else [x, update, gamma, bias]
    normed, _, _, total = node("SkipSimplifiedLayerNormalization", inputs, 4, epsilon=float(eps))
    return normed, total


skip_norm = register(
    "skip_norm(Tensor x, Tensor update, Tensor gamma, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _skip_norm,
    lambda x, update, gamma, bias, eps: (torch.empty_like(x), torch.empty_like(x)),
    _skip_norm_nodes,
)
silu = register(
    "silu(Tensor x) -> Tensor",
    F.silu,
    torch.empty_like,
    lambda x: node("QuickGelu", [x], alpha=1.0),
)
# torch's own has a threshold, which its exporter writes out
softplus = register(
    "softplus(Tensor x) -> Tensor",
    lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    torch.empty_like,
    lambda x: node("Softplus", [x], domain="", version=22),
)


def _reshaped(shape: Sequence[int], target: Sequence[int]) -> list[int]:
    sizes = [size if keep == 0 else keep for keep, size in zip(target, [*shape, *[1] * 8], strict=False)]
    known = 1
    for size in sizes:
        known = known if isinstance(size, int) and size == -1 else known * size
    total = 1
    for size in shape:
        total = total * size
    return [total // known if isinstance(size, int) and size == -1 else size for size in sizes]


def _reshape_nodes(x: Any, target: Sequence[int]) -> Any:
    import onnxscript

    return node("Reshape", [x, onnxscript.opset23.Constant(value_ints=list(target))], domain="", version=21)


# One node with a constant target, in which 0 keeps a size and -1 is what is left; torch's own computes it.
reshape = register(
    "reshape(Tensor x, int[] target) -> Tensor",
    lambda x, target: x.reshape(_reshaped(x.shape, target)).clone(),
    lambda x, target: x.new_empty(_reshaped(x.shape, target)),
    _reshape_nodes,
)


# -- rotary embedding ----------------------------------------------------------------------------------------


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., T, d] by tables [.., T, d/2]: number i of a head rotates with number i + d/2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _rotary(x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    heads = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return _rotated(heads, cos[position_ids][:, None], sin[position_ids][:, None]).transpose(1, 2).flatten(2)


rotary = register(
    "rotary(Tensor x, Tensor position_ids, Tensor cos, Tensor sin, int num_heads) -> Tensor",
    _rotary,
    lambda x, position_ids, cos, sin, num_heads: torch.empty_like(x),
    lambda x, position_ids, cos, sin, num_heads: node(
        "RotaryEmbedding",
        [x, position_ids, cos, sin],
        num_heads=num_heads,
        rotary_embedding_dim=2 * int(cos.shape[1]),
    ),
)


# -- attention -----------------------------------------------------------------------------------------------


def _causal_conv(x: Tensor, taps: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    padded = torch.cat([past, x], 2)
    return F.conv1d(padded, taps, groups=taps.shape[0]), padded[..., x.shape[2] :].clone()


# x [B,C,T], taps [C,1,K], past [B,C,K-1]
causal_conv = register(
    "causal_conv(Tensor x, Tensor taps, Tensor past) -> (Tensor, Tensor)",
    _causal_conv,
    lambda x, taps, past: (torch.empty_like(x), torch.empty_like(past)),
    lambda x, taps, past: node("CausalConvWithState", [x, taps, None, past], 2, ndim=1),
)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, past: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    H = past.shape[1]
    q, k, v, decay = (x.unflatten(-1, (H, -1)) for x in (q, k, v, decay))
    S, rows = past.clone(), []
    for t in range(q.shape[1]):
        S = S * decay[:, t].exp()[..., None] + k[:, t][..., None] * v[:, t][:, :, None]
        rows.append(torch.einsum("bhf,bhfe->bhe", q[:, t], S))
    return torch.stack(rows, 1).flatten(2), S


# q, k, decay [B,T,HF], v [B,T,H(d+1)], past [B,H,F,d+1]
linear_attention = register(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor past, Tensor decay) -> (Tensor, Tensor)",
    _linear_attention,
    lambda q, k, v, past, decay: (torch.empty_like(v), torch.empty_like(past)),
    lambda q, k, v, past, decay: node(
        "LinearAttention",
        [q, k, v, past, decay],
        2,
        update_rule="gated",
        q_num_heads=int(past.shape[1]),
        kv_num_heads=int(past.shape[1]),
        scale=1.0,
    ),
)


def _softmax_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    num_heads: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T = q.shape[:2]
    G, C, d = past_key.shape[1:]
    if k is None or v is None:
        q, k, v = q.split([num_heads * d, G * d, G * d], -1)
    cos, sin = cos[position_ids][:, None], sin[position_ids][:, None]
    q = _rotated(q.unflatten(-1, (num_heads, d)).transpose(1, 2), cos, sin)
    k = _rotated(k.unflatten(-1, (G, d)).transpose(1, 2), cos, sin)
    v = v.unflatten(-1, (G, d)).transpose(1, 2)
    slot = seqlens_k[:, None].long() + 1 - T + torch.arange(T)  # [B,T]
    index = slot[:, None, :, None].expand(B, G, T, d)
    key, value = past_key.scatter(2, index, k), past_value.scatter(2, index, v)
    scores = q @ key.repeat_interleave(num_heads // G, 1).transpose(2, 3) * d**-0.5
    age = slot[..., None] - torch.arange(C)  # [B,T,C]
    hidden = (age < 0) | (age >= (C if span < 0 else span))
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    out = weights @ value.repeat_interleave(num_heads // G, 1)
    return out.transpose(1, 2).flatten(2), key, value, weights.amax(-1, keepdim=True)


def _shapes_of_attention(
    q: Tensor, k: Tensor | None, v: Any, past_key: Tensor, past_value: Tensor, *rest: Any
) -> Any:
    num_heads, d = rest[-2], past_key.shape[-1]
    out = q.new_empty(*q.shape[:2], num_heads * d)
    top = q.new_empty(q.shape[0], num_heads, q.shape[1], 1)
    return out, torch.empty_like(past_key), torch.empty_like(past_value), top


def _attention_nodes(outputs: int, *inputs: Any) -> Any:
    *tensors, num_heads, span = inputs
    q, k, v, key, value, seqlens_k, total, cos, sin, position_ids = tensors
    d = int(key.shape[3])
    attributes: dict[str, Any] = {"qk_output": 2} if outputs == 4 else {}  # the weights
    return node(
        "GroupQueryAttention",
        [q, k, v, key, value, seqlens_k, total, cos, sin, position_ids],
        outputs,
        num_heads=num_heads,
        kv_num_heads=int(key.shape[1]),
        local_window_size=span,
        do_rotary=1,
        scale=d**-0.5,
        **attributes,
    )


def _window_nodes(*inputs: Any) -> Any:
    import onnxscript

    out, key, value, weights = _attention_nodes(4, *inputs)
    axis = onnxscript.opset23.Constant(value_ints=[-1])
    return out, key, value, node("ReduceMax", [weights, axis], domain="", version=20, keepdims=1)


_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor past_key, Tensor past_value, Tensor seqlens_k, Tensor total, "
    "Tensor cos, Tensor sin, Tensor position_ids, int num_heads, int span"
)
# Causal softmax attention over the last ``span`` tokens, itself included, or over all (-1). q [B,T,Hd], k and
# v [B,T,Gd], or all in q and the others None; buffers [B,G,C,d] in which the rows of these T tokens go to the
# slots up to seqlens_k [B]; total is the largest of these and one. Tokens are rotated by rows position_ids
# [B,T] of the tables cos and sin [R,d/2], R >= total. Returns [B,T,Hd] and the buffers.
group_query_attention = register(
    f"group_query_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    lambda *inputs: _softmax_attention(*inputs)[:3],
    lambda *inputs: _shapes_of_attention(*inputs)[:3],
    lambda *inputs: _attention_nodes(3, *inputs),
)
# The same, and the largest weight of every row, [B,H,T,1]: one over the sum of weights that are scaled by it.
scaled_attention = register(
    f"scaled_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _softmax_attention,
    _shapes_of_attention,
    _window_nodes,
)
