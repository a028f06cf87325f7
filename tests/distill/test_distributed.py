"""Distillation on two processes (gloo, CPU) gives what one with twice the batch gives, whatever happens.

Each launch is the real thing: ``accelerate launch`` around the command line, on a small random teacher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import make_teacher, write_corpus

from lawcat_edge.adapter import Adapter
from lawcat_edge.distill.run import distill
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.distill.steps import FinetuneStep
from lawcat_edge.model import load_student
from lawcat_edge.teacher import resolve

STEPS, LENGTH = 6, 480  # a passkey question takes 455 bytes
SETTINGS = DistillSettings(
    transfer_tokens=STEPS * 4 * LENGTH,
    finetune_tokens=STEPS * 4 * LENGTH,
    seq_len=LENGTH,
    finetune_seq_len=LENGTH,
    batch_size=4,
    window=4,
    ce_weight=0.5,
    # uneven weights: the mean over two processes is not the mean over all tokens by itself
    task_mix="text:0.5,passkey:0.5",
    answer_weight=5.0,
    precision="fp32",
    checkpoint_every=2,
)
COPIES, SHARDS = ["--multi_gpu"], ["--use_fsdp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    base = tmp_path_factory.mktemp("distributed")
    make_teacher(base / "teacher")
    write_corpus(base / "text.txt")
    distill(resolve(base / "teacher"), [base / "text.txt"], base / "whole", SETTINGS)
    return base


def launch(
    folder: Path, name: str, how: list[str], *options: str, kill: str = "::"
) -> subprocess.CompletedProcess[str]:
    """Two processes with half the batch each. kill: see launched.py."""
    settings = {**SETTINGS.to_dict(), "batch_size": 2}
    defaults = DistillSettings().to_dict()
    command = [sys.executable, "-m", "accelerate.commands.launch", *how]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(Path(__file__).parents[1] / "helpers" / "launched.py"),
    ]
    command += ["distill", str(folder / "teacher"), "--data", str(folder / "text.txt"), "--json", *options]
    command += ["--out", str(folder / name)]
    for key, value in settings.items():
        if value != defaults[key]:
            command += ["--set", f"{key}={value}"]
    environment = {**os.environ, "LAWCAT_TEST_KILL": kill, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def assert_same_adapter(folder: Path, name: str) -> None:
    whole, other = Adapter.load(folder / "whole"), Adapter.load(folder / name)
    untrained = load_student(resolve(folder / "teacher"), config=whole.config)
    for key, value in whole.tensors.items():
        np.testing.assert_allclose(other.tensors[key], value, rtol=0, atol=1e-5, err_msg=key)
        if key in untrained.new_parameters():  # and the runs have gone far enough for this to mean something
            start = untrained.new_parameters()[key].detach().numpy()
            assert np.abs(value - start).max() > 1e-3, key
    stages = [facts["tokens"] for facts in other.training["stages"].values()]
    assert stages == [STEPS * 4 * LENGTH] * 2
    losses = [
        [json.loads(line)["loss"] for line in (folder / run / "train_log.jsonl").read_text().splitlines()]
        for run in ("whole", name)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_one_process_finishes_it(folder: Path) -> None:
    ended = launch(folder, "two", COPIES, kill=f"1:finetune:{STEPS - 3}")
    assert ended.returncode == 1, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("Error")]
    assert said == [
        "Error: Another process of this run has ended, so this one stops; start the same command with "
        f"--resume ({folder / 'two.run' / 'checkpoint'})."
    ]
    assert ended.stdout == ""
    assert not (folder / "two").exists()
    state = json.loads((folder / "two.run" / "checkpoint" / "state.json").read_text())
    assert (state["progress"]["stage"], state["progress"]["step"]) == ("finetune", 2)
    text = [folder / "text.txt"]
    distill(resolve(folder / "teacher"), text, folder / "two", SETTINGS, resume=True)
    assert_same_adapter(folder, "two")


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("how", [COPIES, SHARDS], ids=["copies", "shards"])
def test_two_processes_go_on_where_one_stopped(folder: Path, how: list[str]) -> None:
    def kill(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == ("transfer", 3):
            raise Killed

    name = how[0].strip("-")
    text = [folder / "text.txt"]
    with pytest.raises(Killed):
        distill(resolve(folder / "teacher"), text, folder / name, SETTINGS, report=kill)
    done = launch(folder, name, how, "--resume")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout)["settings"]["batch_size"] == 2
    )  # one document: the main process alone prints
    assert done.stderr.count(f"finetune {STEPS}/{STEPS}") == 1
    assert_same_adapter(folder, name)


def test_losses_of_the_parts_of_a_batch_average_to_its_own(folder: Path) -> None:
    step = FinetuneStep(load_student(resolve(folder / "teacher")), 0.0, 1.0)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 257, (4, 40), generator=generator)
    weight = torch.rand(4, 40, generator=generator) * torch.tensor([1.0, 1.0, 9.0, 9.0])[:, None]
    norm = weight[:, 1:].sum() / 2
    with torch.no_grad():
        whole = float(step(ids, weight)[0])
        halves = [float(step(ids[i : i + 2], weight[i : i + 2], norm)[0]) for i in (0, 2)]
        unequal = [float(step(ids[i : i + 2], weight[i : i + 2])[0]) for i in (0, 2)]
    assert np.mean(halves) == pytest.approx(whole, rel=1e-6)
    assert np.mean(unequal) != pytest.approx(whole, rel=1e-3)
