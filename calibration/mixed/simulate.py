"""A scheme simulated in the torch student: any one tensor kind or layer of it, without exporting anything.

Weights are rounded by the exporter's own functions, activations as its products round them: by block (nbits,
accuracy 4), by row (dynamic) or not at all. Sums are float32 where the integer kernels are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lawcat_edge.export.products import same_table
from lawcat_edge.export.rotation import Rotation, head_turn, turn
from lawcat_edge.export.rounding import blocked, nearest
from lawcat_edge.export.schemes import PRODUCTS, Product, Scheme
from lawcat_edge.lora import ATTENTION_TARGETS
from lawcat_edge.model import LawcatModel

FP32 = Product("fp32")
_ROWS = 4096  # of a weight that are rounded at once


def rounded_weight(weight: Tensor, spec: Product) -> Tensor:
    """weight [N,K] as the product stores it, as floats."""
    if spec.kind == "fp32":
        return weight
    out = np.empty(tuple(weight.shape), np.float32)
    values = weight.detach().float().numpy()
    for at in range(0, len(values), _ROWS):
        rows = values[at : at + _ROWS]
        out[at : at + _ROWS] = nearest(blocked(rows, spec), spec).values()[:, : rows.shape[1]]
    return torch.from_numpy(out)


def rounded_activation(x: Tensor, spec: Product) -> Tensor:
    """x [..., K] as the product reads it."""
    if spec.kind in ("fp32", "static") or (spec.kind == "nbits" and spec.accuracy == 0):
        return x  # a static range is not known here
    width = x.shape[-1]
    block = width if spec.kind == "dynamic" else spec.block
    parts = F.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((parts / scale).round() * scale).flatten(-2)[..., :width]


def _blockwise(x: Tensor, turn: Tensor) -> Tensor:
    """Each block of the last axis of x times turn."""
    return (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)


class _Product(nn.Module):
    """A linear layer that can be set to any product. ``reads``: whether it rounds its own input (o and down;
    the others share one input, which the norm before them rounds), each block of it times ``turn`` first."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, reads: bool, turn: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.exact, self.bias, self.reads = weight.detach(), bias, reads
        self.turn = None if turn is None else torch.from_numpy(turn)
        self.weight, self.spec = self.exact, FP32

    def set(self, spec: Product) -> None:
        if spec.offsets:
            spec = spec.fitted(self.exact.shape[1])
        exact = self.exact
        if self.turn is not None and not spec.turned:  # its transpose undoes it
            exact = _blockwise(exact, self.turn.T)
        self.weight, self.spec = rounded_weight(exact, spec), spec

    def forward(self, x: Tensor) -> Tensor:
        if self.turn is not None and self.spec.turned:
            x = _blockwise(x, self.turn)
        return F.linear(rounded_activation(x, self.spec) if self.reads else x, self.weight, self.bias)


class _Norm(nn.Module):
    """A norm whose output is rounded for the products behind it; ``after`` [D,D] is applied first."""

    def __init__(self, norm: nn.Module, after: Tensor | None = None) -> None:
        super().__init__()
        self.norm, self.after, self.spec = norm, after, FP32

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return rounded_activation(x if self.after is None else x @ self.after, self.spec)


class Simulated:
    """A student whose products can be set one by one. Takes the model over: it is changed in place.

    rotate: in the basis of the exporter's rotation, as schemes with ``rotate`` are.
    """

    def __init__(self, model: LawcatModel, rotate: bool) -> None:
        self.model, self.rotate = model, rotate
        self.geometry = model.geometry
        self._rotation = Rotation(self.geometry.hidden_size) if rotate else None
        self.layers = [cast(Any, layer) for layer in model.layers]
        with torch.no_grad():
            self._merge_lora()
            self._fold()

    def _merge_lora(self) -> None:
        lora = self.model.lora
        for layer in self.layers if lora else ():
            assert lora is not None
            for name in lora.targets:
                owner = layer.self_attn if name in ATTENTION_TARGETS else layer.mlp
                old = getattr(owner, name)
                A, B = old.lora_A["default"].weight, old.lora_B["default"].weight
                old.base_layer.weight.add_(lora.scale * (B @ A))
                setattr(owner, name, old.base_layer)

    def _fold(self) -> None:
        model: Any = self.model
        embedding = model.embed_tokens.weight.detach().clone()
        tied = self.geometry.tie_embeddings
        head = embedding if tied else model.lm_head.weight
        after = None
        final = model.norm.weight.detach().clone()
        if self._rotation is not None:
            head = self._rows(head if tied else head * final)
            embedding = head if tied else self._rows(embedding)
            model.norm.weight.fill_(1)
            if tied:
                R = torch.from_numpy(self._rotation.matrix)
                after = R.T @ (final[:, None] * R)
        model.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=True)
        self._embedding = embedding
        self._head = model.lm_head = _Product(head, model.lm_head.bias, reads=False)
        model.norm = _Norm(model.norm, after)
        for layer in self.layers:
            self._fold_layer(layer)

    def _fold_layer(self, layer: Any) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        gains = layer.input_layernorm.weight.clone(), layer.post_attention_layernorm.weight.clone()
        reading = {(attn, name): gains[0] for name in ("q_proj", "k_proj", "v_proj")}
        reading |= {(mlp, name): gains[1] for name in ("gate_proj", "up_proj")}
        for (owner, name), gain in reading.items():
            old = getattr(owner, name)
            setattr(owner, name, _Product(self._reading(old.weight, gain), old.bias, reads=False))
        down = None
        if self._rotation is not None:
            values = torch.from_numpy(head_turn(self.geometry.head_dim))
            v, o = attn.v_proj, attn.o_proj  # what v turns, o turns back
            v.exact = v.weight = _blockwise(v.exact.T, values).T.contiguous()
            if v.bias is not None:
                v.bias = nn.Parameter(_blockwise(v.bias, values), requires_grad=False)
            o.weight.copy_(_blockwise(o.weight, values))
            down = turn(self.geometry.intermediate_size)
        if down is not None:
            mlp.down_proj.weight.copy_(_blockwise(mlp.down_proj.weight, torch.from_numpy(down)))
        for owner, name, own in ((attn, "o_proj", None), (mlp, "down_proj", down)):
            old = getattr(owner, name)
            bias = old.bias if old.bias is None else self._rows(old.bias)
            weight = self._rows(old.weight.T).T.contiguous()
            setattr(owner, name, _Product(weight, bias, reads=True, turn=own))
        if not layer.full:
            attn.gate_a.copy_(self._reading(attn.gate_a.T, gains[0]).T)
            layer.exact_gate = attn.gate_a.detach().clone()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            if self._rotation is not None:
                norm.weight.fill_(1)
        layer.input_layernorm = _Norm(layer.input_layernorm)
        layer.post_attention_layernorm = _Norm(layer.post_attention_layernorm)

    def _reading(self, weight: Tensor, gain: Tensor) -> Tensor:
        return weight.clone() if self._rotation is None else self._rows(weight * gain)

    def _rows(self, x: Tensor) -> Tensor:
        if self._rotation is None:
            return x
        return torch.from_numpy(self._rotation.rows(np.ascontiguousarray(x.detach().numpy())))

    # -- setting ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set(self, product: str, spec: Product, layers: Iterable[int] | None = None) -> None:
        """Set a kind of product, in all layers or in some. A tied embedding goes with the head it shares."""
        assert product in PRODUCTS, product
        if product == "head":
            spec = spec.fitted(self.geometry.hidden_size) if self.geometry.tie_embeddings else spec
            self._head.set(spec)
            self.model.norm.spec = spec
            shared = self.geometry.tie_embeddings and same_table(spec, spec)
            table = self._head.weight if shared else self._embedding
            self.model.embed_tokens.weight.data = table
            return
        for i in range(len(self.layers)) if layers is None else layers:
            layer = self.layers[i]
            attn, mlp = layer.self_attn, layer.mlp
            if product == "qkv":
                for module in (attn.q_proj, attn.k_proj, attn.v_proj):
                    module.set(spec)
                if not layer.full:
                    attn.gate_a.copy_(rounded_weight(layer.exact_gate.T.contiguous(), spec).T)
                layer.input_layernorm.spec = spec
            elif product == "o":
                attn.o_proj.set(spec)
            elif product == "gate_up":
                mlp.gate_proj.set(spec)
                mlp.up_proj.set(spec)
                layer.post_attention_layernorm.spec = spec
            else:
                mlp.down_proj.set(spec)

    def set_scheme(self, scheme: Scheme) -> None:
        assert scheme.rotate == self.rotate
        for product in PRODUCTS:
            self.set(product, scheme.products[product])
        for i, own in scheme.layers.items():
            for product, spec in own.items():
                self.set(product, spec, [i])

    def clear(self) -> None:
        """Everything fp32 again."""
        for product in PRODUCTS:
            self.set(product, FP32)
