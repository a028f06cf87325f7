"""Distillation on a small random teacher: it learns, it resumes to the bit, and it stops on a bad loss."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_teacher import byte_tokenizer, make_teacher, write_corpus

from lawcat_edge.adapter import Adapter
from lawcat_edge.distill import train
from lawcat_edge.distill.head import head_loss
from lawcat_edge.distill.run import distill
from lawcat_edge.distill.sample import sample_teacher
from lawcat_edge.distill.settings import DistillSettings, load_recipe, recipe_names
from lawcat_edge.distill.steps import FinetuneStep, TransferStep
from lawcat_edge.lora import LoraSettings
from lawcat_edge.model import load_student
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import resolve

SMALL = DistillSettings(
    transfer_tokens=64 * 8,
    finetune_tokens=64 * 8,
    seq_len=64,
    finetune_seq_len=64,
    window=4,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("distill")
    make_teacher(base / "teacher")
    write_corpus(base / "text.txt")
    return base


def run(folder, name, settings, **options):
    return distill(resolve(folder / "teacher"), [folder / "text.txt"], folder / name, settings, **options)


def test_both_stages_learn_and_write_a_whole_adapter(folder):
    records: list = []
    changes: dict[str, float] = {"transfer_tokens": 64 * 100, "finetune_tokens": 64 * 60, "window": 0}
    changes |= {"lr_lora": 1e-2, "ce_weight": 1.0, "kl_weight": 0.0}
    settings = SMALL.with_changes(changes)
    adapter = run(folder, "learn", settings, report=records.append)
    for stage, share in (("transfer", 0.8), ("finetune", 0.9)):
        losses = [r["loss"] for r in records if r["stage"] == stage]
        assert np.mean(losses[-8:]) < share * np.mean(losses[:4]), stage
    loaded = Adapter.load(folder / "learn")
    assert loaded.sha256 == adapter.sha256
    assert loaded.lora == LoraSettings(8, 16.0)
    assert loaded.training["stages"]["transfer"]["tokens"] == 64 * 100
    log = [json.loads(line) for line in (folder / "learn" / "train_log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in log] == [r["loss"] for r in records]
    assert (folder / "learn" / "train_log.png").read_bytes().startswith(b"\x89PNG")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [("transfer", 5), ("transfer", 8), ("finetune", 4)])
def test_resume_gives_the_same_bits(folder, stop):
    whole = run(folder, "whole", SMALL)

    def kill(record):
        if (record["stage"], record["step"]) == stop:
            raise Killed

    shutil.rmtree(folder / "cut.run", ignore_errors=True)
    shutil.rmtree(folder / "cut", ignore_errors=True)
    with pytest.raises(Killed):
        run(folder, "cut", SMALL, report=kill)
    assert not (folder / "cut").exists()
    resumed = run(folder, "cut", SMALL, resume=True)
    for name, value in whole.tensors.items():
        assert np.array_equal(value, resumed.tensors[name]), name
    lines = (folder / "cut" / "train_log.jsonl").read_text().splitlines()
    assert [(json.loads(line)["stage"], json.loads(line)["step"]) for line in lines] == [
        (stage, step) for stage in ("transfer", "finetune") for step in range(1, 9)
    ]


def test_resume_refuses_other_settings(folder):
    run(folder, "other", SMALL)
    with pytest.raises(LawcatError, match="lr_lora"):
        run(folder, "other", SMALL.with_changes({"lr_lora": 0.5}), resume=True)
    with pytest.raises(LawcatError, match="took 1 sequences a step, this run would take 2; set --batch-size"):
        run(folder, "other", SMALL.with_changes({"batch_size": 2}), resume=True)
    with pytest.raises(LawcatError, match="no checkpoint"):
        run(folder, "never", SMALL, resume=True)


def test_a_nan_stops_with_the_layer_and_keeps_the_checkpoint(folder, monkeypatch):
    real = TransferStep.forward

    calls = []

    def poisoned(self, ids, *others):
        calls.append(ids)
        if len(calls) == 5:
            with torch.no_grad():
                self.model.layers[1].self_attn.conv_k.fill_(float("nan"))
        return real(self, ids, *others)

    monkeypatch.setattr(TransferStep, "forward", poisoned)
    with pytest.raises(train.Diverged, match="layer 1") as caught:
        run(folder, "nan", SMALL)
    assert caught.value.exit_code == 1
    state = json.loads((folder / "nan.run" / "checkpoint" / "state.json").read_text())
    assert state["progress"]["step"] == 3
    assert not (folder / "nan").exists()


def test_an_exploding_loss_stops(folder, monkeypatch):
    monkeypatch.setattr(train, "EXPLODED", 1.5)
    monkeypatch.setattr(train, "LEAST_BEST", {"transfer": 0.0, "finetune": 0.0})
    monkeypatch.setattr(train, "SMOOTHING", 0.5)
    with pytest.raises(train.Diverged, match="finetune"):
        run(
            folder,
            "boom",
            SMALL.with_changes({"lr_lora": 900.0, "lr_new": 50.0, "finetune_tokens": 64 * 60, "clip": 0}),
        )


def test_a_batch_of_the_harder_task_is_no_explosion(folder, monkeypatch):
    def uneven(self, ids, weight=None, norm=None):
        easy = len(steps) % 20 < 10
        steps.append(easy)
        loss = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0 + (0.005 if easy else 4.0)
        return loss, {"kl": loss.detach()}

    steps: list[bool] = []
    monkeypatch.setattr(FinetuneStep, "forward", uneven)
    run(folder, "uneven", SMALL.with_changes({"finetune_tokens": 64 * 40}))
    assert len(steps) == 40


def test_transfer_gradients_stay_in_their_layer(folder):
    model = load_student(resolve(folder / "teacher"))
    for parameter in model.new_parameters().values():
        parameter.requires_grad_(True)
    ids = torch.randint(0, 257, (2, 33))
    losses = model.transfer_losses(ids)
    losses[0].backward()
    for name, parameter in model.new_parameters().items():
        moved = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moved == name.startswith("layers.0."), name


def test_losses_match_a_direct_computation(folder):
    model = load_student(resolve(folder / "teacher"))
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(3))
    weight = torch.rand(2, 40)
    with torch.no_grad():
        loss, parts = FinetuneStep(model, 0.7, 0.3)(ids, weight)
        taught = model.teacher_logits(ids)[:, :-1].double().log_softmax(-1)
        student = model(ids)[0][:, :-1].double().log_softmax(-1)
    kl = (taught.exp() * (taught - student)).sum(-1)
    kl = (kl * weight[:, 1:]).sum() / weight[:, 1:].sum()
    ce = -student.gather(-1, ids[:, 1:, None])[..., 0]
    ce = (ce * weight[:, 1:]).sum() / weight[:, 1:].sum()
    assert float(parts["kl"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(parts["ce"]) == pytest.approx(float(ce), rel=1e-4)
    assert float(loss) == pytest.approx(float(0.7 * kl + 0.3 * ce), rel=1e-4)


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("rows", [7, 4096])
def test_the_head_loss_and_its_gradient_match_autograd(folder, monkeypatch, rows, with_teacher):
    monkeypatch.setattr("lawcat_edge.distill.head.LOSS_ROWS", rows)
    head = load_student(resolve(folder / "teacher")).lm_head
    torch.manual_seed(5)
    hidden = (torch.randn(60, 48) * 3).requires_grad_()
    taught = torch.randn(60, 48) * 3 if with_teacher else None
    target, a, b = torch.randint(0, 257, (60,)), torch.rand(60), torch.rand(60)
    loss, kl, ce = head_loss(head, hidden, taught, target, a, b)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)

    exact, weight = hidden.detach().double().requires_grad_(), head.weight.double()
    student = (exact @ weight.T).log_softmax(-1)
    wanted_ce = -student.gather(-1, target[:, None])[:, 0]
    wanted_kl = torch.zeros(60, dtype=torch.float64)
    if taught is not None:
        teacher = (taught.double() @ weight.T).log_softmax(-1)
        wanted_kl = (teacher.exp() * (teacher - student)).sum(-1)
    wanted = (a * wanted_kl + b * wanted_ce).sum()
    (wanted_gradient,) = torch.autograd.grad(3 * wanted, exact)
    for got, ref in ((kl, wanted_kl), (ce, wanted_ce), (gradient, wanted_gradient), (loss, wanted)):
        torch.testing.assert_close(got.double(), ref, rtol=1e-4, atol=1e-5)


def test_every_recipe_loads():
    assert recipe_names() == ["general", "general-window", "hybrid", "passkey"]
    for name in recipe_names():
        load_recipe(name)
    with pytest.raises(LawcatError, match="general-window"):
        load_recipe("nonsense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 100}, "larger than a training sequence"),
        ({"stage": "third"}, "stage"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "needs a loss"),
        ({"colour": 3}, "Unknown setting"),
        ({"lora_rank": 0}, "lora_rank"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changes, message):
    with pytest.raises(LawcatError, match=message):
        SMALL.with_changes(changes)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": 5})])
def test_sampling_follows_the_teacher_s_own_attention(tmp_path, family, changes):
    model = load_student(resolve(make_teacher(tmp_path / family, family, **changes)))
    prompts = torch.randint(1, 257, (3, 7), generator=torch.Generator().manual_seed(2))
    likeliest = sample_teacher(model, prompts.tolist(), 24, seed=0, top_p=0.0)
    assert torch.equal(likeliest[:, :7], prompts)
    with torch.no_grad():
        assert torch.equal(model.teacher_logits(likeliest)[:, 6:-1].argmax(-1), likeliest[:, 7:])


def test_teacher_text_is_sampled_once_and_used(folder):
    settings = SMALL.with_changes(
        {"task_mix": "text:0.5,teacher:0.5", "teacher_tokens": 1000, "stage": "transfer"}
    )
    run(folder, "own", settings)
    samples = np.load(folder / "own.run" / "teacher_samples.npy", allow_pickle=False)
    assert samples.shape == (1, 1024)
    assert len(set(samples[0].tolist())) > 20


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_conversations_are_read_as_the_teacher_writes_them(folder, tmp_path, monkeypatch, place):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    facts: dict = {"eos_token": {"content": "<|endoftext|>"}, "model_max_length": 10**30}
    if place == "chat_template.jinja":
        (tmp_path / "teacher" / place).write_text(source)
    else:
        facts["chat_template"] = [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": source},
        ]
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(facts))
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    line = json.dumps({"messages": talk}) + "\n"
    (tmp_path / "chat.jsonl").write_text(line * 200)
    seen = []
    real = TransferStep.forward

    def watch(self, ids, *others):
        seen.append(ids)
        return real(self, ids, *others)

    monkeypatch.setattr(TransferStep, "forward", watch)
    settings = SMALL.with_changes({"stage": "transfer", "transfer_tokens": 64})
    distill(resolve(tmp_path / "teacher"), [tmp_path / "chat.jsonl"], tmp_path / "out", settings)
    text = byte_tokenizer().decode(seen[0][0].tolist(), skip_special_tokens=False)
    assert "Here.<|endoftext|><|endoftext|>[user] Where?<|endoftext|>[assistant] Here." in text
