"""The main job on the real teacher: convert, export, replay against torch, generate. Marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import run_demo

from lawcat_edge.adapter import GENERAL, Adapter
from lawcat_edge.cli import run
from lawcat_edge.model import load_student
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.teacher import resolve

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ADAPTER = GENERAL
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundles(demo, tmp_path_factory):
    fp32 = tmp_path_factory.mktemp("main") / "fp32"
    assert run(["export", "smollm2", "--adapter", str(ADAPTER), "--scheme", "fp32", "--out", str(fp32)]) == 0
    return {"fp32": fp32, "int8": demo[0] / "bundle"}


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return load_student(resolve("smollm2"), Adapter.load(ADAPTER))


def pieces_through(engine, ids, pieces):
    state, parts, start = engine.new_state(1), [], 0
    for length in pieces:
        parts.append(
            np.array(engine.forward(ids[None, start : start + length], state, all_positions=True)[0])
        )
        start += length
    assert start == len(ids)
    return np.concatenate(parts)


def test_onnx_gives_torchs_logits_over_512_tokens_in_uneven_pieces(bundles, student):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(bundles["fp32"] / "tokenizer.json"))
    ids = np.array(tokenizer.encode(TEXT).ids[:512], np.int64)
    with torch.inference_mode():
        reference = student(torch.from_numpy(ids)[None])[0][0].numpy()
    pieces = [1, 7, 64, 1, 100, 2, 256, 81]
    fp32 = pieces_through(Engine(Bundle.open(bundles["fp32"])), ids, pieces)
    assert np.linalg.norm(fp32 - reference) / np.linalg.norm(reference) < 1e-4
    int8 = pieces_through(Engine(Bundle.open(bundles["int8"])), ids, pieces)
    log = torch.from_numpy(reference).double().log_softmax(-1)
    other = torch.from_numpy(int8).double().log_softmax(-1)
    kl = float((log.exp() * (log - other)).sum(-1).mean())
    assert kl < 0.05  # 0.014 on the verification text: README.md
    assert (reference.argmax(-1) == int8.argmax(-1)).mean() > 0.85


def test_the_bundle_verifies_answers_and_names_its_source(bundles, capfd):
    bundle = str(bundles["int8"])
    assert run(["verify", bundle, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["ok"]
    arguments = [
        "generate",
        bundle,
        "--chat",
        "--prompt",
        "What is a lighthouse for?",
        "--max-new-tokens",
        "24",
    ]
    assert run([*arguments, "--temperature", "0", "--json"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert run([*arguments, "--temperature", "0", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == first["text"]
    assert len(first["text"].split()) >= 3
    manifest = Bundle.open(bundles["int8"]).manifest
    assert manifest.source["adapter_sha256"] == Adapter.load(ADAPTER).sha256
    assert manifest.source["teacher_sha256"] == resolve("smollm2").sha256


def test_demo_runs_anywhere_and_reuses_what_is_there(demo):
    place, first = demo
    second, said = run_demo(place)
    assert first["answer"] == second["answer"] != ""
    assert "from a former run" in said
    assert first["bundle_bytes"] < 0.35 * first["teacher_bytes"]


def test_an_adapter_of_another_teacher_is_refused(tmp_path, capfd):
    from tiny_teacher import make_teacher

    other = make_teacher(tmp_path / "other")
    assert run(["export", str(other), "--adapter", str(ADAPTER), "--out", str(tmp_path / "b")]) == 2
    error = capfd.readouterr().err
    assert "belongs to the teacher" in error
    assert not (tmp_path / "b").exists()
