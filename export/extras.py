"""The files of a bundle beside the graphs: tokenizer and generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json, write_text
from lawcat_edge.runtime.text import MAX_TOKENIZER


def copy_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json, chat_template.jinja and generation_config.json, the last two where there are any."""
    if not (source / "tokenizer.json").is_file():
        raise LawcatError(f"{source} has no tokenizer.json; save the teacher's fast tokenizer there.")
    # written without the indentation, which makes more than half of it
    tokenizer = read_json(source / "tokenizer.json", MAX_TOKENIZER)
    write_text(target / "tokenizer.json", json.dumps(tokenizer, separators=(",", ":"), ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer_config.json").is_file():  # onnxruntime-genai does not start without one
        write_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
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


def _optional(path: Path) -> dict[str, Any]:
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, dict) else {}
