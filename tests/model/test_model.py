"""Conversion of every family: the teacher stays itself, the student is one function however it is split."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_teacher import make_teacher
from torch import Tensor

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import FAMILIES, Geometry
from lawcat_edge.model import LawcatModel, load_student
from lawcat_edge.parameters import initial_tensors, parameter_shapes
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import Teacher, resolve
from lawcat_edge.weights import tensor_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied, all biases": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    ),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 3}),
    "llama, linear rope": ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "linear"}}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "mistral, sliding": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.mktemp("teachers")

    @cache
    def teacher(name: str) -> Teacher:
        family, changes = TEACHERS[name]
        return resolve(make_teacher(base / name.replace(" ", ""), family, **changes))

    return teacher


def error(want: Tensor, got: Tensor) -> float:
    assert want.shape == got.shape
    return float((want.double() - got.double()).norm() / want.double().norm())


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(length))


def stir(model: LawcatModel) -> LawcatModel:
    """Move the new parameters away from their start, where convolution and gate hardly do anything."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.new_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_logits_are_those_of_transformers(teachers: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    teacher, ids = teachers(name), tokens(70)
    original = AutoModelForCausalLM.from_pretrained(teacher.folder, dtype=torch.float32).eval()
    model = load_student(teacher)
    with torch.no_grad():
        assert error(original(ids).logits, model.teacher_logits(ids)) < 1e-5
        assert error(original(ids).logits, model(ids)[0]) > 0.05  # the student is another function
    assert (model.lm_head.weight is model.embed_tokens.weight) == teacher.geometry.tie_embeddings
    # what the exporter will read: no bias or norm of the family is lost, and none is expected in vain
    assert set(teacher.weights().names()) == set(tensor_shapes(teacher.geometry))


@pytest.mark.parametrize("settings", [{}, {"window": 6, "rope": True, "conv_kernel": 5}])
@pytest.mark.parametrize("name", TEACHERS)
def test_student_is_the_same_in_any_split(teachers: Any, name: str, settings: dict[str, Any]) -> None:
    teacher, ids = teachers(name), tokens(90)
    model = stir(load_student(teacher, config=LawcatConfig(feature_dim=5, **settings)))

    def pieces(sizes: list[int]) -> Tensor:
        state, parts = model.empty_state(2), []
        for piece in ids.split(sizes, 1):
            logits, state = model(piece, state)
            parts.append(logits)
        assert state[0].seen == 90
        return torch.cat(parts, 1)

    with torch.no_grad():
        full, none = model(ids)
        assert none is None
        for sizes in ([90], [1, 2, 63, 24], [70, 20], [1] * 90):
            assert error(full, pieces(sizes)) < 1e-5, sizes


def test_conversion_is_seeded_and_leaves_the_generator_alone(teachers: Any) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = (load_student(teachers("llama"), seed=s).new_parameters() for s in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.1.feature"], other["layers.1.feature"])
    assert not torch.equal(first["layers.0.feature"], first["layers.1.feature"])
    assert first["layers.0.feature"].shape == (3, 16, 8)  # f is half the head width


@pytest.mark.parametrize("window", [0, 6])
def test_the_exporter_starts_from_the_same_numbers(teachers: Any, window: int) -> None:
    teacher, config = teachers("qwen3"), LawcatConfig(feature_dim=5, window=window)
    held = load_student(teacher, config=config).new_parameters()
    tensors = initial_tensors(teacher.geometry, config)
    assert {name: value.shape for name, value in tensors.items()} == parameter_shapes(
        teacher.geometry, config
    )
    assert set(held) == set(tensors)
    for name, value in tensors.items():
        assert np.array_equal(held[name].detach().numpy(), value), name
    assert ("layers.1.omega" in tensors) == bool(window)
    again = load_student(teacher, config=config, seed=7).new_parameters()
    assert np.array_equal(
        again["layers.1.gate_a"].detach().numpy(),
        initial_tensors(teacher.geometry, config, 7)["layers.1.gate_a"],
    )


def test_low_rank_updates_change_the_student_alone_and_by_alpha_over_rank(teachers: Any) -> None:
    teacher, ids = teachers("qwen2"), tokens(20)
    model, plain = load_student(teacher), load_student(teacher)
    with torch.no_grad():
        taught, start = model.teacher_logits(ids), model(ids)[0]
        model.add_lora(2, 6.0)
        assert error(start, model(ids)[0]) < 1e-6  # B starts at zero
        for name, parameter in model.lora_parameters().items():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
        assert error(start, model(ids)[0]) > 1e-2
        assert torch.equal(model.teacher_logits(ids), taught)
        low = model.lora_parameters()
        assert len(low) == 2 * 4 * 2
        for i, layer in enumerate(plain.layers):
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                a, b = (low[f"layers.{i}.{projection}.lora_{x}"] for x in "AB")
                getattr(layer.self_attn, projection).weight += 6.0 / 2 * b @ a
        assert error(plain(ids)[0], model(ids)[0]) < 1e-5


def test_an_adapter_brings_the_trained_student_back(teachers: Any) -> None:
    teacher, ids = teachers("mistral"), tokens(30)
    config = LawcatConfig(feature_dim=4, window=3)
    model = stir(load_student(teacher, config=config))
    model.add_lora(2, 4.0)
    with torch.no_grad():
        for parameter in model.lora_parameters().values():
            parameter.normal_(std=0.2)
    held = {name: p.detach().numpy() for name, p in model.adapter_parameters().items()}
    adapter = Adapter(config, teacher.geometry, "t", teacher.sha256, held, model.lora)
    assert {name: value.shape for name, value in held.items()} == adapter.expected_shapes()
    again = load_student(teacher, adapter)
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])
    assert not any(p.requires_grad for name, p in again.named_parameters() if "lora" not in name)


def test_an_adapter_that_does_not_fit_is_refused(teachers: Any) -> None:
    teacher = teachers("llama")
    model = load_student(teacher)
    held = {name: p.numpy() for name, p in model.new_parameters().items()}
    make = lambda tensors: Adapter(model.config, teacher.geometry, "t", teacher.sha256, tensors)  # noqa: E731
    with pytest.raises(LawcatError, match=r"'layers\.0\.conv_q' is on one side only"):
        model.load_adapter(make({n: v for n, v in held.items() if n != "layers.0.conv_q"}))
    with pytest.raises(
        LawcatError, match=r"'layers\.1\.feature' has shape \[1\], the model needs \[3, 16, 8\]"
    ):
        model.load_adapter(make({**held, "layers.1.feature": np.zeros(1, np.float32)}))


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        config.pop(name) if value is None else config.update({name: value})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mamba2"])
def test_an_unsupported_family_is_refused_by_name(tmp_path: Path, family: str) -> None:
    folder = edited(make_teacher(tmp_path / "t"), model_type=family)
    with pytest.raises(LawcatError) as caught:
        resolve(folder)
    assert family in str(caught.value)
    assert all(known in str(caught.value) for known in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "Activation 'gelu'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_hidden_layers": "two"}, "num_layers must be a whole number"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_key_value_heads": 2}, "no multiple"),
        ({"rms_norm_eps": "small"}, "wrong value"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "incomplete or wrong"),
        ({"rope_parameters": "none"}, "wrong value"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"head_dim": 15}, "must be even"),
    ],
)
def test_a_config_that_cannot_be_right_names_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edited(make_teacher(tmp_path / "t"), **changes)
    with pytest.raises(LawcatError, match=message) as caught:
        resolve(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_sliding_and_full_attention_is_refused(tmp_path: Path) -> None:
    folder = make_teacher(
        tmp_path / "t", "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    )
    with pytest.raises(LawcatError, match="mixes sliding and full attention"):
        resolve(folder)


def test_geometry_survives_json_and_refuses_what_is_not_one(teachers: Any) -> None:
    for name in TEACHERS:
        geometry = teachers(name).geometry
        assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    good = teachers("llama").geometry.to_dict()
    for bad, message in [
        ({**good, "colour": 3}, "'colour'"),
        ({k: v for k, v in good.items() if k != "vocab_size"}, "vocab_size"),
        ({**good, "rope_scaling": "x"}, "'x' is not supported"),
        ({**good, "qk_norm": 1}, "qk_norm"),
        ({**good, "family": "bert"}, "'bert'"),
        ([], "JSON object"),
    ]:
        with pytest.raises(LawcatError, match=message):
            Geometry.from_dict(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_lost_or_misshapen_weight_is_never_made_up(tmp_path: Path, fault: str) -> None:
    folder = make_teacher(tmp_path / "t")
    file, name = folder / "model.safetensors", "model.layers.1.self_attn.v_proj.weight"
    weights = load_file(file)
    lost = weights.pop(name)
    if fault == "shape":
        weights[name] = np.ascontiguousarray(lost[:-1])
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LawcatError, match=r"layers\.1\.self_attn\.v_proj\.weight"):
        load_student(resolve(folder))
