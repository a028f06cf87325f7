"""The files of a bundle beside the graphs: tokenizer, generation settings, genai_config.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json, write_text


def copy_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json, chat_template.jinja and generation_config.json, the last two where there are any."""
    if not (source / "tokenizer.json").is_file():
        raise LawcatError(f"{source} has no tokenizer.json; save the teacher's fast tokenizer there.")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "chat_template.jinja").is_file():
        template = _optional(source / "tokenizer_config.json").get("chat_template")
        if isinstance(template, str):
            write_text(target / "chat_template.jinja", template)
    tokens = token_ids(source)
    settings = _optional(source / "generation_config.json")
    kept = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "max_new_tokens")
    settings = {key: settings[key] for key in kept if settings.get(key) is not None}
    write_json(
        target / "generation_config.json",
        {"bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"], **settings},
    )


def token_ids(source: Path) -> dict[str, Any]:
    """{"bos": id or None, "eos": [ids]} from generation_config.json, else config.json."""
    result: dict[str, Any] = {"bos": None, "eos": []}
    for file in ("config.json", "generation_config.json"):
        data = _optional(source / file)
        if isinstance(data.get("bos_token_id"), int):
            result["bos"] = data["bos_token_id"]
        eos = data.get("eos_token_id")
        if eos is not None:
            result["eos"] = [int(t) for t in (eos if isinstance(eos, list) else [eos])]
    return result


def genai_config(geometry: Geometry, config: LawcatConfig, tokens: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai needs to run model.onnx as it is.

    It has no notion of ``window_fill`` or of rotary inputs, so a bundle with a window or with a rotary linear
    branch runs in this project's own runner only.
    """
    eos = tokens["eos"] or [0]
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokens["bos"] if tokens["bos"] is not None else eos[0],
            "eos_token_id": eos,
            "pad_token_id": eos[0],
            "vocab_size": geometry.vocab_size,
            "context_length": 1 << 20,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "lawcat-edge", "provider_options": []},
                "hidden_size": geometry.hidden_size,
                "num_hidden_layers": geometry.num_layers,
                "num_attention_heads": geometry.num_heads,
                "num_key_value_heads": geometry.num_kv_heads,
                "head_size": geometry.head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "past_conv_names": "past_key_values.%d.conv_state",
                    "past_recurrent_names": "past_key_values.%d.recurrent_state",
                },
                "outputs": {
                    "logits": "logits",
                    "present_conv_names": "present.%d.conv_state",
                    "present_recurrent_names": "present.%d.recurrent_state",
                },
            },
        },
        "search": {"max_length": 8192, "do_sample": False, "past_present_share_buffer": False},
    }


def _optional(path: Path) -> dict[str, Any]:
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, dict) else {}
