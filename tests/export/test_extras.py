"""End and start tokens and the chat template of a teacher in its bundle: as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, CONVERSATIONS
from exported import make_bundle, make_student
from tiny_teacher import make_teacher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from lawcat_edge.cli import run
from lawcat_edge.export.extras import copy_tokenizer, sampling_settings, token_ids
from lawcat_edge.runtime import LawcatError, Model
from lawcat_edge.runtime.generate.sampling import SamplingOptions, sampling_defaults
from lawcat_edge.runtime.generate.text import special_tokens
from lawcat_edge.runtime.template.chat import ChatTemplate

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]  # ids 0 to 4
NAMED = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if unk_token %}{{ unk_token }}{% endif %}{{ pad_token }}"
)
CHAT = CONVERSATIONS["several turns"][0]


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_folder(
    folder: Path, config: dict[str, Any], settings: dict[str, Any] | None, generation: Any = None
) -> Path:
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    texts = {"config.json": {"model_type": "llama", "vocab_size": 261, **config}}
    texts |= {} if settings is None else {"tokenizer_config.json": settings}
    texts |= {} if generation is None else {"generation_config.json": generation}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Any]] = {
    "the configs name another end": ({"eos_token_id": 0}, {"eos_token": "<|im_end|>"}, None),
    "the config names none": ({"eos_token_id": None}, {"eos_token": "<|im_end|>"}, None),
    "a list whose first is another": (
        {"eos_token_id": [0, 2]}, {"eos_token": "<|im_end|>", "bos_token": "<s>"}, None,
    ),
    "generation names more": (
        {"eos_token_id": 0, "bos_token_id": 1}, {"eos_token": "</s>"}, {"eos_token_id": [2, 4]},
    ),
    "a start that only the tokenizer knows": (
        {"bos_token_id": None, "eos_token_id": 4}, {"eos_token": "</s>", "bos_token": "<s>"}, None,
    ),
    "no start in the tokenizer": (
        {"bos_token_id": 0, "eos_token_id": 2}, {"eos_token": "<|im_end|>", "bos_token": None}, None,
    ),
    "tokens as objects": (
        {}, {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}, "pad_token": "<s>"}, None,
    ),
    "those of a class": ({}, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}, None),
    "no settings": ({"bos_token_id": 3, "eos_token_id": 4}, None, None),
    "ids that are none": ({"eos_token_id": [-1, 2, 10_000]}, {"eos_token": "<|im_end|>"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_end_counts_and_templates_get_the_tokenizers_own(tmp_path: Path, name: str) -> None:
    config, settings, generation = CASES[name]
    folder = make_folder(tmp_path / "teacher", config, settings, generation)
    (folder / "chat_template.jinja").write_text(NAMED)
    theirs = AutoTokenizer.from_pretrained(folder)
    ends = {theirs.eos_token_id}
    for source in (config, generation or {}):
        counted = GenerationConfig(**source).eos_token_id
        ends |= set(counted) if isinstance(counted, list) else {counted}
    tokens = token_ids(folder)
    assert set(tokens["eos"]) == {end for end in ends if end is not None and 0 <= end < 261}
    if theirs.bos_token_id is not None and config.get("bos_token_id") is None:
        assert tokens["bos"] == theirs.bos_token_id
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    copy_tokenizer(folder, bundle)
    named = special_tokens(json.loads((bundle / "tokenizer_config.json").read_text()))
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate((bundle / "chat_template.jinja").read_text(), named).render(CHAT) == expected
    # Programs that open the bundle with transformers find the same.
    assert AutoTokenizer.from_pretrained(bundle).special_tokens_map == theirs.special_tokens_map


def test_of_several_templates_by_name_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    folder = make_folder(tmp_path / "teacher", {}, {"eos_token": "</s>", "chat_template": templates})
    (tmp_path / "bundle").mkdir()
    copy_tokenizer(folder, tmp_path / "bundle")
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
    ours = ChatTemplate((tmp_path / "bundle" / "chat_template.jinja").read_text(encoding="utf-8"))
    assert ours.render(CHAT, add_generation_prompt=False) == expected


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_cannot_be_compiled_is_refused_by_the_export(tmp_path: Path, place: str) -> None:
    broken = "{% for m in messages %}{{ m.content }}"
    inside = {"chat_template": broken} if place == "tokenizer_config.json" else {}
    folder = make_folder(tmp_path / "teacher", {}, {"eos_token": "</s>", **inside})
    if not inside:
        (folder / place).write_text(broken)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(LawcatError, match=rf"{place}: The chat template is not valid: .*; mend the template"):
        copy_tokenizer(folder, tmp_path / "bundle")


def test_a_bundle_ends_where_its_tokenizer_ends(tmp_path: Path) -> None:
    teacher, model, adapter = make_student(tmp_path / "teacher", vocab_size=261)
    folder = teacher.folder
    write_tokenizer(folder)
    (folder / "generation_config.json").unlink()
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    make_bundle(teacher, model, adapter, tmp_path / "bundle")
    loaded = Model.load(tmp_path / "bundle", threads=1)
    assert loaded.eos == {0, 2}
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert loaded.template.render(CHAT) == expected


def test_a_bundle_samples_by_default_as_its_teacher_says(tmp_path: Path) -> None:
    settings = {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
        "do_sample": True, "eos_token_id": [2, 4], "transformers_version": "5.0.0",
    }  # fmt: skip
    folder = make_folder(tmp_path / "teacher", {}, None, settings)
    (tmp_path / "bundle").mkdir()
    copy_tokenizer(folder, tmp_path / "bundle")
    theirs = GenerationConfig.from_pretrained(folder)
    ours = sampling_defaults(json.loads((tmp_path / "bundle" / "generation_config.json").read_text()), 0.0)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_an_adapters_sampling_takes_the_teachers_place_and_the_user_has_the_last_word(tmp_path: Path) -> None:
    teacher = {"temperature": 0.6, "top_p": 0.95, "do_sample": True}
    own = {"do_sample": True, "temperature": 0.4, "min_p": 0.1, "repetition_penalty": 1.1, "note": "x"}
    made = sampling_settings(teacher, own, None)
    assert made == {key: value for key, value in own.items() if key != "note"}  # no top_p
    assert sampling_settings(teacher, {}, None) == teacher
    assert sampling_settings(teacher, own, {"min_p": 0.0})["min_p"] == 0.0
    warm = sampling_defaults(sampling_settings({}, {}, {"temperature": 0.8}), 0.0)
    assert (warm.temperature, warm.repetition_penalty) == (0.8, 1.0)
    greedy = sampling_settings(teacher, own, {"temperature": 0.0})
    assert sampling_defaults(greedy, 1.0).temperature == 0
    GenerationConfig(**greedy).validate()
    for wrong in ({"top_p": 2}, {"min_p": "much"}, {"temperature": -1}):
        with pytest.raises(LawcatError, match=rf"generation_config\.json: {next(iter(wrong))} must be"):
            sampling_settings(wrong, None, None)


def test_export_writes_the_sampling_that_the_options_ask_for(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    out = tmp_path / "bundle"
    export = ["export", str(teacher), "--scheme", "fp32", "--no-verify", "--out", str(out)]
    assert run([*export, "--temperature", "0.4", "--min-p", "0.1", "--repetition-penalty", "1.15"]) == 0
    found = Model.load(out, threads=1).sampling_defaults()
    assert found == SamplingOptions(temperature=0.4, min_p=0.1, repetition_penalty=1.15)
    assert run([*export, "--top-p", "3"]) == 2
