"""What is stored for each layer, and from which of the teacher's and the adapter's tensors it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import products
from lawcat_edge.export.rotation import Rotation, rotation_of_down, rotation_of_values
from lawcat_edge.export.rounding import Rounder
from lawcat_edge.export.schemes import Linear, Scheme
from lawcat_edge.export.step import DecoderLayer, layer_module
from lawcat_edge.export.writer import DataWriter
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.weights import WeightSource

RounderOf = Callable[[str, Linear], Rounder | None]
_BLOCK_BYTES = 64 << 20  # of float32 rows that are in memory at once
_WORTH = 1024  # entries from which on half the bytes are worth a node


@dataclass(frozen=True)
class Layout:
    """Shapes of the fused products, and how their rows and the small tensors are put together."""

    geometry: Geometry
    config: LawcatConfig
    scheme: Scheme
    weights: WeightSource
    adapter: Mapping[str, np.ndarray]
    ranges: Mapping[str, products.Range] = field(default_factory=dict)
    """(low, high) of what static products read, by "layers.3/down"."""
    rounder_of: RounderOf | None = None
    """Chooses quantised values by more than the nearest; None for a product that it knows nothing of."""

    @cached_property
    def rotation(self) -> Rotation | None:
        return Rotation(self.geometry.hidden_size) if self.scheme.rotate else None

    @cached_property
    def value_rotation(self) -> np.ndarray | None:
        """Of each head's values [d,d], undone by o."""
        return rotation_of_values(self.geometry.head_dim) if self.scheme.rotate else None

    def down_rotation(self, layer: int) -> np.ndarray | None:
        """Of each block of the input of a layer's ``down``, undone by its weights."""
        return self._down_rotation if self.scheme.rotates_down(layer) else None

    @cached_property
    def _down_rotation(self) -> np.ndarray | None:
        return rotation_of_down(self.geometry.intermediate_size)

    @property
    def head_transform(self) -> bool:
        """Whether a tied head needs the final norm's gains in the rotated basis as a product of its own."""
        return self.rotation is not None and self.geometry.tie_embeddings

    @cached_property
    def _modules(self) -> dict[bool, DecoderLayer]:
        return {full: layer_module(self.geometry, self.config, full) for full in (False, True)}

    def module(self, layer: int) -> DecoderLayer:
        """The step form of a layer, which says what is stored for it."""
        return self._modules[self.config.full_attention(layer)]

    def shape(self, product: str, layer: int | None = None) -> tuple[int, int]:
        """(N, K) of a product of a layer, or of the head (None)."""
        if layer is None:
            return self.geometry.vocab_size, self.geometry.hidden_size
        N, K = self.module(layer).shapes()[f"{product}.weight"]
        return N, K

    def spec(self, product: str, layer: int | None = None) -> Linear:
        """The scheme's product; that of a tied head has a block that suits the embedding."""
        spec, g = self.scheme.linear(product, layer), self.geometry
        if spec.offsets:  # sums over blocks of the input leave no room for padding
            spec = spec.fitted(self.shape(product, layer)[1])
        return spec.fitted(g.hidden_size) if product == "head" and g.tie_embeddings else spec

    def rounder(self, path: str, spec: Linear) -> Rounder | None:
        """How the product at path ("layers.3/down", "head") gets its quantised values; None: to nearest."""
        return None if self.rounder_of is None or spec.kind == "fp32" else self.rounder_of(path, spec)

    @property
    def embedding_spec(self) -> Linear:
        return self.scheme.embedding.fitted(self.geometry.hidden_size)

    @property
    def shared_table(self) -> bool:
        return self.geometry.tie_embeddings and products.same_table(self.embedding_spec, self.spec("head"))

    def has_bias(self, product: str, layer: int) -> bool:
        return f"{product}.bias" in self.module(layer).shapes()

    # -- storing ---------------------------------------------------------------------------------------------

    def store_embedding(self, writer: DataWriter) -> None:
        shape = self.geometry.vocab_size, self.geometry.hidden_size
        rows = self._reading("model.embed_tokens.weight", None)
        spec = self.embedding_spec
        rounder = self.rounder("head", spec) if self.shared_table else None
        products.store(writer, spec, "embedding", rows, *shape, rounder)

    def store_head(self, writer: DataWriter) -> None:
        tied = self.geometry.tie_embeddings
        if self.rotation is not None and tied:
            gain = self._get("model.norm.weight")
            transform = self.rotation.columns(gain[:, None] * self.rotation.matrix)
            exact = self.spec("head").kind == "fp32"
            writer.array("head_transform", transform if exact else transform.astype(np.float16))
        if self.shared_table:
            return
        source = "model.embed_tokens.weight" if tied else "lm_head.weight"
        rows = self._reading(source, None if tied else "model.norm.weight")
        spec = self.spec("head")
        products.store(writer, spec, "head", rows, *self.shape("head"), self.rounder("head", spec))

    def store_layer(self, writer: DataWriter, i: int) -> None:
        self.store_linears(writer, i)
        for name, value in self._small(i).items():
            writer.array(f"layers.{i}.{name}", _exact(np.ascontiguousarray(value, np.float32)))

    def store_linears(self, writer: DataWriter, i: int) -> None:
        """The products of a layer alone, without its small tensors."""
        for product, make in self._linears.items():
            spec, shape = self.spec(product, i), self.shape(product, i)
            rounder = self.rounder(f"layers.{i}/{product}", spec)
            products.store(writer, spec, f"layers.{i}.{product}", make(i), *shape, rounder)

    def arrays(self, i: int) -> dict[str, np.ndarray]:
        """All tensors of a layer in float32, as ``step.DecoderLayer.forward`` takes them."""
        weights = {f"{name}.weight": np.concatenate(list(make(i))) for name, make in self._linears.items()}
        return weights | self._small(i)

    @property
    def _linears(self) -> dict[str, Callable[[int], Iterator[np.ndarray]]]:
        return {"qkv": self._qkv, "o": self._o, "gate_up": self._gate_up, "down": self._down}

    def store_first_norm(self, writer: DataWriter) -> None:
        writer.array("first_norm", self._gain("model.layers.0.input_layernorm.weight"))
        rotations = (self.down_rotation(i) for i in range(self.geometry.num_layers))
        if any(own is not None for own in rotations) and self._down_rotation is not None:
            writer.array("down_rotation", self._down_rotation)

    # -- rows of the fused products --------------------------------------------------------------------------

    def _qkv(self, i: int) -> Iterator[np.ndarray]:
        g, at = self.geometry, f"model.layers.{i}.self_attn."
        norm = f"model.layers.{i}.input_layernorm.weight"
        yield from self._reading(f"{at}q_proj.weight", norm)
        yield from self._reading(f"{at}k_proj.weight", norm)
        full, zero = self.config.full_attention(i), np.zeros((1, g.hidden_size), np.float32)
        for head in range(g.num_kv_heads):
            values = self._head(f"{at}v_proj.weight", head, norm)
            yield values if self.value_rotation is None else self.value_rotation.T @ values
            if not full and not self.config.window:
                yield zero  # its bias makes a column of ones
        if full:
            return
        if self.config.window:
            yield zero
        yield self._rotated(np.ascontiguousarray(self._new(i, "gate_a").T), norm)
        yield zero

    def _o(self, i: int) -> Iterator[np.ndarray]:
        return self._writing(f"model.layers.{i}.self_attn.o_proj.weight", self.value_rotation)

    def _gate_up(self, i: int) -> Iterator[np.ndarray]:
        norm = f"model.layers.{i}.post_attention_layernorm.weight"
        yield from self._reading(f"model.layers.{i}.mlp.gate_proj.weight", norm)
        yield from self._reading(f"model.layers.{i}.mlp.up_proj.weight", norm)

    def _down(self, i: int) -> Iterator[np.ndarray]:
        return self._writing(f"model.layers.{i}.mlp.down_proj.weight", self.down_rotation(i))

    def _reading(self, name: str, norm: str | None) -> Iterator[np.ndarray]:
        """Rows of a weight that reads the residual stream behind ``norm``."""
        for block in self._blocks(name):
            yield self._rotated(block, norm)

    def _rotated(self, block: np.ndarray, norm: str | None) -> np.ndarray:
        if self.rotation is None:
            return block
        return self.rotation.rows(block if norm is None else block * self._get(norm))

    def _writing(self, name: str, rotation: np.ndarray | None) -> Iterator[np.ndarray]:
        """Rows of a weight that adds to the residual stream.

        rotation: of the blocks of what it reads. Rotating the stream takes all rows at once.
        """
        blocks = self._blocks(name) if self.rotation is None else iter([self._get(name)])
        for rows in blocks:
            if rotation is not None:
                rows = (rows.reshape(len(rows), -1, len(rotation)) @ rotation).reshape(rows.shape)
            yield rows if self.rotation is None else np.ascontiguousarray(self.rotation.columns(rows))

    def _head(self, name: str, head: int, norm: str) -> np.ndarray:
        """The rows of one head of a weight that reads the residual stream behind ``norm``."""
        d = self.geometry.head_dim
        rows = self.weights.rows(name, head * d, (head + 1) * d)
        self._check(name, rows)
        return self._rotated(rows, norm)

    def _gain(self, norm: str) -> np.ndarray:
        """The gains of a norm as the graph applies them; rotated, they sit in the weights behind."""
        value = self._get(norm)
        return value if self.rotation is None else np.ones_like(value)

    def _shift(self, name: str) -> np.ndarray:
        """A bias that is added to the residual stream."""
        value = self._get(name)
        return value if self.rotation is None else self.rotation.rows(value)

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        count, width = self.weights.shape(name)
        step = max(1, _BLOCK_BYTES // (4 * width))
        for start in range(0, count, step):
            block = self.weights.rows(name, start, min(start + step, count))
            self._check(name, block)
            yield block

    # -- small tensors ---------------------------------------------------------------------------------------

    def _small(self, i: int) -> dict[str, np.ndarray]:
        g = self.geometry
        at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        last = i + 1 == g.num_layers
        following = "model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"
        small = {
            "norm_attn": self._gain(f"model.layers.{i}.post_attention_layernorm.weight"),
            "norm_next": self._gain(following),
        }
        if self.has_bias("qkv", i):
            small["qkv.bias"] = self._qkv_bias(i)
        if not self.config.full_attention(i):
            small |= self._linear_attention(i)
        if g.output_bias:
            small["o_bias"] = self._shift(f"{at}o_proj.bias")
        if g.mlp_bias:
            small["gate_up.bias"] = np.concatenate(
                [self._get(f"{mlp}{name}_proj.bias") for name in ("gate", "up")]
            )
            small["down_bias"] = self._shift(f"{mlp}down_proj.bias")
        if g.qk_norm:
            q, k = self._get(f"{at}q_norm.weight"), self._get(f"{at}k_norm.weight")
            small["qk_gamma"] = np.concatenate(
                [np.tile(q, (g.num_heads, 1)), np.tile(k, (g.num_kv_heads, 1))]
            )
        return small

    def _linear_attention(self, i: int) -> dict[str, np.ndarray]:
        W = self._new(i, "feature")  # [H,d,f], the same for q and k
        # the last row meets the latent that is always one
        gate = -np.concatenate([self._new(i, "gate_b"), self._new(i, "gate_bias")[None]])
        by_group = gate.reshape(len(gate), self.geometry.num_kv_heads, -1)
        tensors = {
            "conv_taps": np.concatenate([self._new(i, name) for name in ("conv_q", "conv_k")])[:, None],
            "feature": np.stack([W, -W], 1).swapaxes(2, 3),
            "gate_b": np.repeat(by_group, self.geometry.groups, 1).reshape(len(gate), -1),
        }
        if self.config.window:
            omega = self._new(i, "omega").astype(np.float64)
            tensors["window_scale"] = (1 + np.exp(np.minimum(-omega, 60)))[:, None]
        return tensors

    def _qkv_bias(self, i: int) -> np.ndarray:
        g, at, full = self.geometry, f"model.layers.{i}.self_attn.", self.config.full_attention(i)
        values = np.zeros((g.num_kv_heads, g.head_dim), np.float32)
        qk = np.zeros(g.query_width + g.kv_width, np.float32)
        if g.attention_bias:
            values = self._get(f"{at}v_proj.bias").reshape(values.shape)
            values = values if self.value_rotation is None else values @ self.value_rotation
            qk = np.concatenate([self._get(f"{at}{name}_proj.bias") for name in "qk"])
        if full:
            return np.concatenate([qk, values.reshape(-1)])
        one, latent = np.ones((g.num_kv_heads, 1), np.float32), np.zeros(self.config.gate_rank, np.float32)
        if self.config.window:
            return np.concatenate([qk, values.reshape(-1), one[0], latent, one[0]])
        return np.concatenate([qk, np.concatenate([values, one], 1).reshape(-1), latent, one[0]])

    def _new(self, i: int, name: str) -> np.ndarray:
        value = self.adapter[f"layers.{i}.{name}"]
        self._check(f"layers.{i}.{name}", value)
        return value

    def _get(self, name: str) -> np.ndarray:
        value = self.weights.get(name)
        self._check(name, value)
        return value

    @staticmethod
    def _check(name: str, value: np.ndarray) -> None:
        if not np.isfinite(value).all():
            raise LawcatError(f"{name} holds NaN or infinity; take other weights.")


def _exact(value: np.ndarray) -> np.ndarray:
    """In float16 where that loses nothing, as with an adapter that was saved so; else as it is."""
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    return half if value.size >= _WORTH and (half.astype(np.float32) == value).all() else value
