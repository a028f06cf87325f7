"""A bundle inside transformers' pipelines, and ``optimum-cli export lawcat``, with the real packages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_hub import stand_in_hub
from tiny_bundle import build_tiny_bundle
from tiny_teacher import make_teacher
from transformers import AutoTokenizer, pipeline

from lawcat_edge.integrations import modeling
from lawcat_edge.integrations.modeling import CACHE, LawcatModelForCausalLM
from lawcat_edge.integrations.optimum_cli.register_lawcat import REGISTER_COMMANDS, LawcatExportCommand
from lawcat_edge.runtime import Bundle, LawcatError, Model

PROMPTS = ["The sea took a grey light", "Boats"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_bundle(tmp_path_factory.mktemp("optimum") / "b", window=2, rope=True)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [257]}')
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("optimum-teacher") / "t")


@pytest.fixture(scope="module")
def model(bundle: Path) -> LawcatModelForCausalLM:
    return LawcatModelForCausalLM.from_pretrained(bundle, threads=1, chunk=8)


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Any:
    return AutoTokenizer.from_pretrained(bundle, padding_side="left", pad_token="<|extra_0|>")


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[list[int]]:
    """What the runner writes."""
    runner = Model.load(bundle, threads=1)
    answers = [runner.generate(prompt, max_new_tokens=20, ignore_eos=True) for prompt in PROMPTS]
    for answer in answers:
        list(answer)
        assert len(set(answer.tokens)) > 3, "a text that repeats one token would prove little"
    return [answer.tokens for answer in answers]


def test_a_pipeline_writes_the_tokens_of_the_runner(
    model: Any,
    tokenizer: Any,
    expected: list[list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    got = pipe(PROMPTS, return_tensors=True, **GREEDY)
    assert [answer[0]["generated_token_ids"][-20:] for answer in got] == expected
    text = pipe(PROMPTS[0], return_full_text=False, **GREEDY)[0]["generated_text"]
    assert text == tokenizer.decode(expected[0])
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_is_the_texts_one_by_one(
    model: Any, tokenizer: Any, expected: list[list[int]], use_cache: bool
) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    got = model.generate(**batch, use_cache=use_cache, **GREEDY)
    assert got[:, -20:].tolist() == expected


def test_beams_carry_their_own_states(model: Any, tokenizer: Any) -> None:
    """Beams that trade places give what beams give that are read anew at every step."""
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with_state = model.generate(**batch, num_beams=3, **GREEDY)
    anew = model.generate(**batch, num_beams=3, use_cache=False, **GREEDY)
    assert with_state.tolist() == anew.tolist()
    assert with_state.tolist() != model.generate(**batch, **GREEDY).tolist()
    with pytest.raises(ValueError, match="stateful"):  # a state cannot go back
        model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), assistant_model=model, **GREEDY)


def test_logits_and_what_cannot_be_read(model: Any) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 21)))
    whole = model(ids).logits
    assert whole.shape == (2, 21, 260)
    engine = model.engine
    for row in range(2):
        wanted = engine.forward(ids[row : row + 1].numpy(), engine.new_state(), all_positions=True)[0]
        np.testing.assert_allclose(whole[row].numpy(), wanted, atol=1e-4)
    first = model(ids[:, :13])
    rest = model(ids[:, 13:], **{CACHE: first[CACHE]}, logits_to_keep=1)
    np.testing.assert_allclose(rest.logits[:, 0].numpy(), whole[:, -1].numpy(), atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(LawcatError, match="padding_side to left"):
        model(ids, attention_mask=mask)
    with pytest.raises(LawcatError, match="holds 2 sequences"):
        model(ids[:1], **{CACHE: first[CACHE]})
    with pytest.raises(LawcatError, match="on the CPU"):
        model.to("cuda")
    assert model.to("cpu") is model


def test_saved_and_loaded_again(
    model: Any, tokenizer: Any, expected: list[list[int]], tmp_path: Path
) -> None:
    signature = model.bundle.folder / "lawcat_bundle.json.sig"
    signature.write_bytes(b"s" * 64)
    model.save_pretrained(tmp_path / "copy")
    signature.unlink()
    assert (tmp_path / "copy" / signature.name).read_bytes() == b"s" * 64
    model.save_pretrained(tmp_path / "copy")  # replaces its like
    again = LawcatModelForCausalLM.from_pretrained(str(tmp_path / "copy"))
    assert again.bundle.sha256 == model.bundle.sha256
    got = again.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), **GREEDY)
    assert got[0, -20:].tolist() == expected[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(LawcatError, match="holds other files"):
        model.save_pretrained(tmp_path / "mine")
    with pytest.raises(LawcatError, match="no option 'export'"):
        LawcatModelForCausalLM.from_pretrained(tmp_path / "copy", export=True)


def test_a_name_that_is_no_folder_is_fetched_from_the_hub(bundle: Path, tmp_path: Path) -> None:
    with stand_in_hub() as hub:
        hub.add("someone/tiny", bundle)
        commit = hub.commit("someone/tiny")
        got = LawcatModelForCausalLM.from_pretrained("someone/tiny", revision=commit, cache_dir=tmp_path)
        assert got.bundle.folder.is_relative_to(tmp_path)
        assert got.bundle.sha256 == Bundle.open(bundle).sha256
        with pytest.raises(LawcatError, match="no model of this name"):
            LawcatModelForCausalLM.from_pretrained("someone/gone", cache_dir=tmp_path)
    assert modeling.LawcatBundleConfig.from_bundle(got.bundle).vocab_size == 260


def test_the_optimum_command_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = REGISTER_COMMANDS[0][1]
    assert parent.COMMAND.name == "export"
    parser = argparse.ArgumentParser()
    LawcatExportCommand(parser.add_subparsers(), command=LawcatExportCommand.COMMAND)

    def optimum(*words: str) -> None:
        arguments = parser.parse_args(["lawcat", *words])
        arguments.func(arguments).run()

    with pytest.raises(SystemExit) as stop:
        optimum("--model", "smollm2", "--scheme", "int9", str(tmp_path / "b"))
    assert stop.value.code == 2
    assert "There is no scheme 'int9'" in capsys.readouterr().err

    seen: list[list[str]] = []

    def run(words: list[str]) -> int:
        seen.append(words)
        return 0

    monkeypatch.setattr("lawcat_edge.cli.run", run)
    optimum("-m", "t", "--adapter", "a", "--ops", "ort,portable", "--no-verify", "--ort-format", "out")
    assert seen == [
        ["export", "t", "--out", "out", "--scheme", "int8", "--ops", "ort,portable", "--adapter", "a",
         "--ort-format", "--no-verify"]
    ]  # fmt: skip
    sampling = ["--temperature", "0.3", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.1"]
    sampling += ["--repetition-penalty", "1.15"]
    optimum("-m", "t", *sampling, "out")
    assert seen[-1] == ["export", "t", "--out", "out", "--scheme", "int8", "--ops", "ort,native", *sampling]


def test_the_optimum_command_writes_the_sampling_that_is_asked(teacher: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    LawcatExportCommand(parser.add_subparsers(), command=LawcatExportCommand.COMMAND)
    words = ["lawcat", "-m", str(teacher), "--scheme", "fp32", "--no-verify", "--top-k", "7"]
    arguments = parser.parse_args([*words, "--temperature", "0.25", str(tmp_path / "b")])
    arguments.func(arguments).run()
    options = Model.load(tmp_path / "b").sampling_defaults()
    assert (options.temperature, options.top_k) == (0.25, 7)
