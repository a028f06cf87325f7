"""What a GGUF file says of its model, read before the conversion: sizes, and whatever changes the function.

transformers converts the tensors and drops what it does not know: scaled rotary frequencies, a sliding
window, biases. It also makes up what is missing: random weights for a tensor, the sizes of a 7B model for a
size. So every key and every tensor is accounted for here: turned into an entry of config.json, known to
change nothing, or refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.families import FAMILIES
from lawcat_edge.runtime.engine.rotary import scaled_frequencies
from lawcat_edge.runtime.errors import LawcatError

SIZES = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "vocab_size",
)
HONOURED = {
    *SIZES,
    "context_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "attention.sliding_window",
    "attention.scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",  # says that the model was trained with the scaling, which changes nothing
    "tensor_data_layout",  # of the file that was converted; no program reads it
}
# Keys of other functions, with the values that leave this one as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufFile:
    """The checked header of a GGUF file.

    head_dim: width of a head, which transformers does not take over for every family.
    config: entries of config.json that transformers' conversion leaves out or makes up.
    """

    family: str
    head_dim: int
    config: dict[str, Any]


def read_gguf(file: Path) -> GgufFile:
    """Check a GGUF before it is converted; LawcatError where it is cut, incomplete, or of other functions."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        general = {
            name: _value(reader, name) for name in ("general.architecture", "general.type", "split.count")
        }
        family = str(general["general.architecture"] or "?")
        keys = {
            name.removeprefix(f"{family}."): _value(reader, name)
            for name in list(reader.fields)
            if name.startswith(f"{family}.")
        }
        tensors = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
        size = file.stat().st_size
        short = any(int(t.data_offset) + int(t.n_bytes) > size for t in reader.tensors)
        factors = next(
            (np.array(t.data, np.float64).ravel() for t in reader.tensors if t.name == "rope_freqs.weight"),
            None,
        )
    except Exception as error:  # the reader raises whatever numpy raises on bad bytes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LawcatError(f"{file} is no whole GGUF file ({reason}); download it again.") from error
    if short or not tensors:
        raise LawcatError(f"{file} is cut short: a tensor lies past its end; download it again.")
    if family not in FAMILIES:
        raise LawcatError(f"{file} is of the family {family!r}; supported are {', '.join(FAMILIES)}.")
    if general["general.type"] not in (None, "model"):
        raise LawcatError(f"{file} is no model but a {general['general.type']!r}; give the model's GGUF.")
    if general["split.count"] not in (None, 0, 1):
        raise LawcatError(f"{file} is one of {general['split.count']} parts; merge them into one file first.")
    sizes: list[Any] = [keys.get(name) for name in SIZES[:4]]
    D, layers, width, H = sizes
    sized = all(type(n) is int and n > 0 for n in (D, layers, width, H)) and layers <= len(tensors)
    G, d = keys.get("attention.head_count_kv") or H, keys.get("attention.key_length")
    d = d or (D // H if sized else 0)
    if not sized or type(G) is not int or type(d) is not int:
        raise LawcatError(f"{file} does not state the model's sizes as a GGUF should; get another one.")
    _check_tensors(file, family, keys, tensors, d)
    _check_keys(file, family, keys, d)
    return GgufFile(family, d, _config(file, family, keys, factors, d))


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return field.contents() if field else None


def _check_tensors(
    file: Path, family: str, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]], d: int
) -> None:
    D, layers, width, H = (keys[name] for name in SIZES[:4])
    G = keys.get("attention.head_count_kv") or H
    vocabulary = keys.get("vocab_size") or tensors.get("token_embd.weight", (0, 0))[-1]
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (D, vocabulary),
        "output_norm.weight": (D,),
    }
    block = {
        "attn_norm.weight": (D,), "attn_q.weight": (D, H * d), "attn_k.weight": (D, G * d),
        "attn_v.weight": (D, G * d), "attn_output.weight": (H * d, D), "ffn_norm.weight": (D,),
        "ffn_gate.weight": (D, width), "ffn_up.weight": (D, width), "ffn_down.weight": (width, D),
    }  # fmt: skip
    if family == "qwen2":
        block |= {"attn_q.bias": (H * d,), "attn_k.bias": (G * d,), "attn_v.bias": (G * d,)}
    if family == "qwen3":
        block |= {"attn_q_norm.weight": (d,), "attn_k_norm.weight": (d,)}
    for i in range(layers):
        wanted |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in wanted.items():
        if tensors.get(name) != shape:
            raise LawcatError(
                f"{file}: tensor {name!r} is {tensors.get(name)}, its sizes ask for {shape}; get it again."
            )
    optional = {"output.weight": (D, vocabulary), "rope_freqs.weight": (d // 2,)}
    for name, found in tensors.items():
        if name in wanted or name.endswith(".attn_rot_embd"):  # old files hold frequencies that nobody reads
            continue
        if optional.get(name) != found:
            raise LawcatError(
                f"{file}: tensor {name!r} {list(found)} is no part of a {family} model that can be "
                f"converted; take another teacher."
            )


def _check_keys(file: Path, family: str, keys: dict[str, Any], d: int) -> None:
    """Refuse by name what neither the conversion nor ``_config`` turns into the teacher's function."""
    allowed = {
        **NEUTRAL,
        "attention.value_length": (d,),
        "rope.dimension_count": (d,),
        "rope.scaling.attn_factor": (0.0, 1.0),
    }
    for name, value in keys.items():
        known = name in HONOURED if name not in allowed else value in allowed[name]
        if name == "attention.scale":
            known = value == 0 or (_is_number(value) and math.isclose(value, d**-0.5, rel_tol=1e-5))
        if not known:
            shown = repr(value) if len(repr(value)) < 40 else "set"
            raise LawcatError(
                f"{file}: {family}.{name} is {shown}, which cannot be converted; take another teacher."
            )


def _config(
    file: Path, family: str, keys: dict[str, Any], factors: np.ndarray | None, d: int
) -> dict[str, Any]:
    theta: Any = keys.get("rope.freq_base", 10000.0)  # what llama.cpp takes where a file says nothing
    eps: Any = keys.get("attention.layer_norm_rms_epsilon")
    for name, value in (("rope.freq_base", theta), ("attention.layer_norm_rms_epsilon", eps)):
        if not _is_number(value) or not value > 0:
            raise LawcatError(f"{file}: {family}.{name} is {value!r}, no positive number; get another one.")
    scaling = _scaling(file, family, keys)
    if factors is not None:
        found = _factors(file, factors, theta, d)
        if found and scaling:
            raise LawcatError(
                f"{file}: {family}.rope.scaling and rope_freqs.weight both scale; take another teacher."
            )
        scaling = scaling or found
    scaling = scaling or {"rope_type": "default"}
    config: dict[str, Any] = {"rope_parameters": {"rope_theta": float(theta), **scaling}, "head_dim": d}
    window = keys.get("attention.sliding_window")
    if window:
        if type(window) is not int or family not in ("llama", "mistral"):
            raise LawcatError(
                f"{file}: {family}.attention.sliding_window is {window!r}, and the file does not say "
                f"in which layers; give the model's folder instead."
            )
        # In GGUF a Mistral is a llama: the same tensors, and a window.
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    if window or family == "mistral":
        config["sliding_window"] = window or None
    return config


def _scaling(file: Path, family: str, keys: dict[str, Any]) -> dict[str, Any] | None:
    """``rope.scaling.*`` in transformers' terms; None where it changes nothing. Llama.cpp's defaults."""
    factor: Any = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    kind = keys.get("rope.scaling.type", "linear")
    if not _is_number(factor) or factor < 0:
        raise LawcatError(f"{file}: {family}.rope.scaling.factor is {factor!r}; get another one.")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    raise LawcatError(
        f"{file}: {family}.rope.scaling.type is {str(kind)[:40]!r}, which is not supported (linear is, and "
        f"the factors of Llama 3); take another teacher."
    )


def _factors(file: Path, factors: np.ndarray, theta: float, d: int) -> dict[str, Any] | None:
    """``rope_freqs.weight`` [d/2], which divide the frequencies, as the rope_scaling that they were made of.

    Llama 3 keeps fast waves (factor 1), stretches slow ones by ``factor``, and goes linearly in the frequency
    from one to the other. The published parameters are tried first, else that line is fitted.
    """
    frequencies = scaled_frequencies(d, theta, None)
    usable = np.isfinite(factors).all() and (factors >= 1 - 1e-5).all()
    largest = float(factors.max()) if usable else math.nan
    if usable and np.allclose(factors, 1, rtol=0, atol=1e-5):
        return None
    if usable and np.allclose(factors, largest, rtol=1e-5):
        return {"rope_type": "linear", "factor": largest}
    candidates = [LLAMA3] if usable else []
    share = (1 / factors - 1 / largest) / (1 - 1 / largest) if usable else factors
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() >= 2:
        slope, offset = np.polyfit(frequencies[between], share[between], 1)
        if slope > 0 > offset:
            high = 1 - 1 / offset  # of low = 1, since only their ratio shows
            original = round(2 * math.pi * slope * (high - 1))
            candidates.append(
                {
                    "low_freq_factor": 1.0,
                    "high_freq_factor": round(high, 3),
                    "original_max_position_embeddings": original,
                }
            )
    for values in candidates:
        scaling = {"rope_type": "llama3", "factor": largest, **values}
        try:
            stretched = frequencies / scaled_frequencies(d, theta, scaling)
        except ValueError:  # a fitted line that is none of Llama 3
            continue
        if np.allclose(factors, stretched, rtol=1e-4):
            return {"rope_type": "llama3", "factor": round(largest, 4), **values}
    raise LawcatError(
        f"{file}: rope_freqs.weight holds factors that are not those of Llama 3's rotary embedding; take "
        f"another teacher."
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
