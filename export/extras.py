"""The files of a bundle beside the graphs: tokenizer and generation settings."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import fingerprint, read_bytes, read_json, write_json, write_text
from lawcat_edge.runtime.generate.sampling import sampling_defaults
from lawcat_edge.runtime.generate.text import MAX_TOKENIZER, load_tokenizer, special_tokens
from lawcat_edge.runtime.template.chat import ChatTemplate

MAX_TEMPLATE = 1 << 20


def copy_tokenizer(
    source: Path,
    target: Path,
    own: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> None:
    """tokenizer.json, chat_template.jinja where there is one, and generation_config.json.

    own, given: how tokens are chosen by the adapter and by the user, see ``sampling_settings``.
    """
    if not (source / "tokenizer.json").is_file():
        raise LawcatError(f"{source} has no tokenizer.json; save the teacher's fast tokenizer there.")
    # written without the indentation, which makes more than half of it
    tokenizer = read_json(source / "tokenizer.json", MAX_TOKENIZER)
    write_text(target / "tokenizer.json", json.dumps(tokenizer, separators=(",", ":"), ensure_ascii=False))
    settings = _optional(source / "tokenizer_config.json")
    template = _chat_template(source, settings)
    settings.pop("chat_template", None)  # has a file of its own, and of several the others are not used
    # onnxruntime-genai does not start without the class
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings, **special_tokens_of(source)}
    write_json(target / "tokenizer_config.json", settings)
    if template is not None:
        write_text(target / "chat_template.jinja", template)
    tokens = token_ids(source)
    settings = sampling_settings(_optional(source / "generation_config.json"), own, given)
    write_json(
        target / "generation_config.json",
        {"bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"], **settings},
    )


def sampling_settings(
    teacher: Mapping[str, Any], own: Mapping[str, Any] | None, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How tokens are chosen where a program says nothing: fields of a generation_config.json.

    own: the adapter's, which take the place of the teacher's, since a student is another model. given: single
    values of the user's; a temperature also says whether to sample at all. LawcatError for wrong values.
    """
    base = own or teacher
    kept = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "max_new_tokens")
    settings = {key: base[key] for key in kept if base.get(key) is not None}
    settings |= given or {}
    if given and "temperature" in given:
        settings["do_sample"] = given["temperature"] > 0
        if not settings["do_sample"]:
            del settings["temperature"]  # transformers takes none but positive ones
    sampling_defaults(settings, 0.0)
    return settings


def special_tokens_of(source: Path) -> dict[str, str]:
    """The special tokens of the tokenizer in the folder `source`, by name, its class's own included.

    transformers says which these are; what it cannot load has those that its settings name.
    """
    settings = sorted(source.glob("*.json"))
    return dict(_special_tokens(source, tuple(fingerprint(path) for path in settings)))


# Loading a tokenizer takes a second, and an export asks three times, before and after a calibration
@functools.lru_cache(maxsize=4)
def _special_tokens(source: Path, _: tuple[tuple[int, ...], ...]) -> dict[str, str]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    told = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of a class that does not fit tokenizer.json, which decides
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception:  # it raises whatever it stumbles over in a folder that is not quite as it should be
        return special_tokens(_optional(source / "tokenizer_config.json"))
    finally:
        logging.set_verbosity(told)
    named = tokenizer.special_tokens_map
    return {name: token for name, token in named.items() if isinstance(token, str)}


def token_ids(source: Path) -> dict[str, Any]:
    """{"bos": id or None, "eos": [ids]}: any id that ends a text for one of the teacher's files.

    A model may end its texts with what generation_config.json names and its turns with the tokenizer's end
    token, and a config.json may know of one of them alone.
    """
    configs = [_optional(source / name) for name in ("generation_config.json", "config.json")]
    tokenizer = load_tokenizer(read_bytes(source / "tokenizer.json", MAX_TOKENIZER))
    named = special_tokens_of(source)
    starts: list[Any] = [
        *(config.get("bos_token_id") for config in configs),
        _id_of(tokenizer, named.get("bos_token")),
    ]
    ends: list[Any] = []
    for config in configs:
        listed = config.get("eos_token_id")
        ends.extend(listed if isinstance(listed, list) else [listed])
    ends.append(_id_of(tokenizer, named.get("eos_token")))
    size = next((n for config in configs if type(n := config.get("vocab_size")) is int), 1 << 31)
    # Some files hold -1 or an id beyond the vocabulary for none.
    starts, ends = ([n for n in ids if type(n) is int and 0 <= n < size] for ids in (starts, ends))
    return {"bos": next(iter(starts), None), "eos": list(dict.fromkeys(ends))}


def _id_of(tokenizer: Any, token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def _chat_template(source: Path, settings: dict[str, Any]) -> str | None:
    """The teacher's chat template, compiled once to see that it can be; of several by name the default."""
    path, text = source / "chat_template.jinja", settings.get("chat_template")
    if path.is_file():
        try:
            text = read_bytes(path, MAX_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise LawcatError(f"{path} is not UTF-8 text; convert it to UTF-8 first.") from error
    elif isinstance(text, list):  # [{"name", "template"}, ...]
        path = source / "tokenizer_config.json"
        named = {item.get("name"): item.get("template") for item in text if isinstance(item, dict)}
        text = named.get("default")
    else:
        path = source / "tokenizer_config.json"
    if not isinstance(text, str):
        return None
    try:
        ChatTemplate(text)
    except LawcatError as error:
        reason = str(error).removesuffix("; export the bundle again.").removesuffix("; export it again.")
        raise LawcatError(
            f"{path}: {reason}; mend the template, or take it out to export without one."
        ) from error
    return text


def _optional(path: Path) -> dict[str, Any]:
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, dict) else {}
