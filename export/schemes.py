"""Which tensor gets what: a scheme is a small table, built in or read from a JSON file.

    {"name": "mine",
     "products": {"qkv": {...}, "o": {...}, "gate_up": {...}, "down": {...}, "head": {...}},
     "embedding": {...},
     "rotate": true, "max_rel_err": 10, "max_kl": 0.5,
     "rounding": "gptq", "layers": {"0": {"down": {...}}}}

The last two may be left out: how weights are rounded ("nearest", which is the default, or "gptq", by what a
calibration text says matters), and entries of single layers that differ. An entry says how a linear layer is
stored and computed:

    {"kind": "fp32"}
    {"kind": "nbits", "bits": 8, "block": 64, "accuracy": 4}
        MatMulNBits: weights by block, 4 or 8 bits; activations float (accuracy 0) or int8 by block (4).
        "offsets": true (4 bits, block 32 or less) lets a block's 16 values lie off zero, a byte a block
    {"kind": "dynamic", "bits": 7}
        MatMulInteger: weights by column (7 bits are right without VNNI under any settings, see
        ``products``), activations int8 by row
    {"kind": "static", "bits": 7, "method": "minmax"}
        the same with one scale for all activations, from a range measured beforehand (``calibration.ranges``
        has the methods): two nodes instead of seven, and the product for processors that only multiply bytes

The embedding is ``fp32`` or ``nbits``; where it is tied to the head and both are of one kind, they share one
table. Gates, convolution, feature maps, norms and the state are float32 in every scheme: error in them
accumulates. ``rotate`` folds a rotation of the residual stream into the weights (see ``rotation``). The two
bounds fail an export whose logits are further from torch's than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from lawcat_edge.runtime import schema
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, user_path

_Name = Literal["qkv", "o", "gate_up", "down", "head"]
Kind = Literal["fp32", "nbits", "dynamic", "static"]
Method = Literal["minmax", "percentile", "entropy", "mse"]
Rounding = Literal["nearest", "gptq"]
Block = Literal[16, 32, 64, 128, 256]
LINEARS: tuple[str, ...] = get_args(_Name)
METHODS: tuple[str, ...] = get_args(Method)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


@dataclass(frozen=True)
class Linear:
    """How one kind of matrix product is stored and computed."""

    kind: Kind
    bits: Literal[4, 7, 8] = 8
    block: Block = 32
    accuracy: Literal[0, 4] = 4
    offsets: bool = False
    method: Method = "minmax"

    def __post_init__(self) -> None:
        schema.check_fields(self, _wrong_product)
        bits = (4, 8) if self.kind == "nbits" else (7, 8)
        if self.bits not in bits:
            raise _wrong_product("bits", f"must be one of {list(bits)} where it is {self.kind}")
        if self.offsets and (self.kind, self.bits) != ("nbits", 4):
            raise _wrong_product("offsets", "can be true only where it is nbits with 4 bits")

    @property
    def rotates_input(self) -> bool:
        """Whether as ``down`` it wants its input rotated (see ``rotation``).

        Blocks gain too little by it for three nodes: in 8 bits with SmolLM2-135M, a window of 128 and 1,024
        tokens of documentation, KL to float32 is 0.0037 with it and 0.0044 without.
        """
        return self.kind != "nbits"

    def fitted(self, width: int) -> Linear:
        """The same with the largest block that divides width (what has no room for padding)."""
        if self.kind != "nbits":
            return self
        fitting = [block for block in get_args(Block) if block <= self.block and width % block == 0]
        return replace(self, block=max(fitting)) if fitting else Linear("fp32")

    def to_dict(self) -> dict[str, Any]:
        keys = {
            "fp32": ("kind",),
            "dynamic": ("kind", "bits"),
            "static": ("kind", "bits", "method"),
            "nbits": ("kind", "bits", "block", "accuracy", *(("offsets",) if self.offsets else ())),
        }
        return {key: value for key, value in asdict(self).items() if key in keys[self.kind]}


@dataclass(frozen=True)
class Scheme:
    """A full table; ``max_rel_err`` and ``max_kl`` are the bounds of the verification against torch."""

    name: str
    linears: dict[str, Linear]
    embedding: Linear
    max_rel_err: float
    max_kl: float
    rotate: bool = False
    rounding: str = "nearest"
    layers: dict[int, dict[str, Linear]] = field(default_factory=dict)

    def linear(self, name: str, layer: int | None) -> Linear:
        """Of a layer, or of the head (None)."""
        own = self.layers.get(layer, {}) if layer is not None else {}
        return own.get(name, self.linears[name])

    def rotates_down(self, layer: int) -> bool:
        """Whether a layer's ``down`` has its input rotated as the model runs."""
        return self.rotate and self.linear("down", layer).rotates_input

    @property
    def exact(self) -> bool:
        """Whether no product is quantised."""
        return all(product.kind == "fp32" for product in self._all())

    @property
    def static(self) -> bool:
        """Whether any product needs the ranges of its activations."""
        return any(product.kind == "static" for product in self._all())

    def _all(self) -> Iterator[Linear]:
        yield from self.linears.values()
        for own in self.layers.values():
            yield from own.values()

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.name,
            "products": {name: product.to_dict() for name, product in self.linears.items()},
            "embedding": self.embedding.to_dict(),
            "max_rel_err": self.max_rel_err,
            "max_kl": self.max_kl,
            "rotate": self.rotate,
            "rounding": self.rounding,
        }
        if self.layers:
            data["layers"] = {
                str(i): {name: product.to_dict() for name, product in own.items()}
                for i, own in self.layers.items()
            }
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Scheme:
        """Check every field; LawcatError names the first that is wrong."""
        found = schema.convert(data, _Document, _wrong)
        products: dict[str, Linear] = {name: _linear(found.products[name]) for name in get_args(_Name)}
        embedding = _linear(found.embedding)
        if embedding.kind not in ("fp32", "nbits") or embedding.offsets:
            raise LawcatError("The embedding can be fp32 or nbits without offsets; change it in the scheme.")
        if products["head"].kind == "static" or products["head"].offsets:
            raise LawcatError("The head can be fp32, nbits without offsets or dynamic; change the scheme.")
        layers: dict[int, dict[str, Linear]] = {
            int(i): {name: _linear(product) for name, product in own.items()}
            for i, own in schema.convert(found.layers, _Layers, _wrong_layers).items()
        }
        bounds = found.max_rel_err, found.max_kl
        return cls(found.name, products, embedding, *bounds, found.rotate, found.rounding, layers)


_Bound = Annotated[float, Meta(gt=0.0, lt=1e6)]
_Products = Annotated[
    dict[_Name, dict[str, Any]],
    Meta(min_length=5, max_length=5, description=f"exactly {', '.join(LINEARS)}, each a product"),
]
_Layers = dict[
    Annotated[str, Meta(pattern=r"^[0-9]{1,5}\Z")],
    dict[Literal["qkv", "o", "gate_up", "down"], dict[str, Any]],
]


class _Document(Struct, forbid_unknown_fields=True):
    """The JSON of a scheme."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    products: _Products
    embedding: dict[str, Any]
    max_rel_err: _Bound
    max_kl: _Bound
    rotate: bool
    rounding: Rounding = "nearest"
    layers: Any = {}  # see _Layers


def _wrong(where: str, problem: str) -> LawcatError:
    keys = ", ".join(_Document.__struct_fields__)
    return LawcatError(f"The scheme's {where} {problem}; its keys are {keys}.")


def _wrong_product(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{where} of a product {problem}; change it in the scheme.")


def _wrong_layers(where: str, problem: str) -> LawcatError:
    return LawcatError('The scheme\'s layers are an object such as {"0": {"down": {"kind": "fp32"}}}.')


def _linear(data: dict[str, Any]) -> Linear:
    return schema.build(data, Linear, _wrong_product, "The entry")


def _table(
    name: str,
    body: Linear,
    head: Linear,
    bounds: tuple[float, float],
    rotate: bool,
    rounding: str = "nearest",
    **own: Linear,
) -> Scheme:
    products = {kind: own.get(kind, head if kind == "head" else body) for kind in LINEARS}
    return Scheme(name, products, head, *bounds, rotate, rounding)


_FP32 = Linear("fp32")
_INT8 = Linear("nbits", 8, 64)
_INT4 = Linear("nbits", 4, 32)
_INT4_OFFSETS = Linear("nbits", 4, 32, offsets=True)
_DYNAMIC = Linear("dynamic", 8)
_STATIC = Linear("static", 8)

# Bounds of the quantised ones only catch what is broken (a wrong tensor costs several nats): how much a
# scheme costs depends on the adapter, and few tokens with massive activations decide the worst position.
SCHEMES = {
    "fp32": _table("fp32", _FP32, _FP32, (5e-4, 1e-6), False),
    "int8": _table("int8", _INT8, _INT8, (10.0, 0.5), True),
    "int8-dynamic": _table("int8-dynamic", _DYNAMIC, _INT8, (10.0, 1.5), True, rounding="gptq"),
    "int8-static": _table("int8-static", _STATIC, _INT8, (10.0, 1.5), True, rounding="gptq", down=_INT8),
    # q, k and the gate, which steer the state, need 8 bits; the rest does with 4
    "int4": _table("int4", _INT4_OFFSETS, _INT4, (10.0, 3.0), False, qkv=_INT8, o=_INT4, rounding="gptq"),
}


def load_scheme(name: str, rounding: str | None = None) -> Scheme:
    """A built-in scheme by name, or one from a JSON file; with another rounding where one is given."""
    if rounding is not None and rounding not in ROUNDINGS:
        raise LawcatError(f"--rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}.")
    if name in SCHEMES:
        scheme = SCHEMES[name]
    elif user_path(name).is_file():
        scheme = Scheme.from_dict(read_json(user_path(name)))
    else:
        raise LawcatError(
            f"There is no scheme {name!r}; choose one of {', '.join(SCHEMES)} or give a JSON file."
        )
    return scheme if rounding is None else replace(scheme, rounding=rounding)
