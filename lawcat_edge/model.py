"""A language model that is teacher and student at once: the teacher's modules with LAWCAT attention.

A hybrid keeps softmax attention in the layers that its config names; all others are linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lawcat_edge.adapter import Adapter
from lawcat_edge.attention import LawcatAttention, LayerState
from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.lora import ATTENTION_TARGETS, LoraSettings
from lawcat_edge.rotary import Tables, rotary_tables
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.softmax_attention import KeyValueState, SoftmaxAttention, without_lora
from lawcat_edge.teacher import Teacher

State = LayerState | KeyValueState
"""What one layer remembers: constant in a linear-attention layer, up to the span in a full-attention one."""


class LawcatLayer(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, teacher: Any, geometry: Geometry, config: LawcatConfig, backend: str, layer: int, seed: int
    ) -> None:
        super().__init__()
        self.full = config.full_attention(layer)
        self.input_layernorm = teacher.input_layernorm
        self.self_attn: SoftmaxAttention = (
            SoftmaxAttention(teacher.self_attn, geometry, config.span)
            if self.full
            else LawcatAttention(teacher.self_attn, geometry, config, backend, layer, seed)
        )
        self.post_attention_layernorm = teacher.post_attention_layernorm
        self.mlp = teacher.mlp

    def feed_forward(self, x: Tensor, *, teacher: bool = False) -> Tensor:
        """x + down(silu(gate(norm x)) * up(norm x)), the SwiGLU of every supported family."""
        normed = self.post_attention_layernorm(x)
        gate, up, down = (
            without_lora(proj, teacher) for proj in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
        )
        return x + down(F.silu(gate(normed)) * up(normed))

    def read(self, x: Tensor, *, teacher: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What attention needs of hidden states x [B,T,D]: the normed x, and q, k, v."""
        normed = self.input_layernorm(x)
        return normed, *self.self_attn.project(normed, teacher=teacher)

    def write(self, x: Tensor, y: Tensor, *, teacher: bool = False) -> Tensor:
        """The layer's output, from its input x [B,T,D] and its attention y [B,T,H,d]."""
        return self.feed_forward(x + self.self_attn.out(y, teacher=teacher), teacher=teacher)

    def student(self, x: Tensor, rotary: Tables, state: State | None) -> tuple[Tensor, State | None]:
        y, after = self.self_attn.attend(*self.read(x), rotary, state)  # type: ignore[arg-type]
        return self.write(x, y), after

    def teacher(self, x: Tensor, rotary: Tables) -> Tensor:
        _, q, k, v = self.read(x, teacher=True)
        return self.write(x, self.self_attn.softmax(q, k, v, rotary), teacher=True)

    def transfer(self, x: Tensor, rotary: Tables) -> tuple[Tensor, Tensor]:
        """Teacher-forced step: the next hidden state, and the squared error of the student's attention.

        The student sees the teacher's hidden state and is compared before the output projection, so its
        gradient stays within the layer. A full-attention layer has nothing to learn here: its error is 0.
        """
        attn = self.self_attn
        if self.full:
            with torch.no_grad():
                return self.teacher(x, rotary), x.new_zeros((), dtype=torch.float32)
        with torch.no_grad():
            normed, q, k, v = self.read(x, teacher=True)
            target = attn.softmax(q, k, v, rotary)
            following = self.write(x, target, teacher=True)
        y, _ = attn.attend(normed, q, k, v, rotary, None)
        return following, F.mse_loss(y.float(), target.float())


class LawcatModel(nn.Module):
    """Student language model around a teacher's weights.

    ``forward`` runs the student from any state, ``teacher_hidden`` the teacher, ``transfer_losses`` both.
    """

    def __init__(
        self, hf_model: Any, geometry: Geometry, config: LawcatConfig, backend: str = "auto", seed: int = 0
    ) -> None:
        super().__init__()
        config.check_geometry(geometry)
        self.geometry, self.config, self.backend = geometry, config, backend
        self.embed_tokens = hf_model.model.embed_tokens
        self.layers: Any = nn.ModuleList(
            LawcatLayer(layer, geometry, config, backend, i, seed)
            for i, layer in enumerate(hf_model.model.layers)
        )
        self.norm = hf_model.model.norm
        self.lm_head = hf_model.lm_head
        self._rotary: dict[tuple[int, int, torch.device], Tables] = {}
        self.requires_grad_(False)

    # -- parameters ------------------------------------------------------------------------------------------

    def new_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"layers.{i}.{name}": parameter
            for i, layer in enumerate(self.layers)
            for name, parameter in layer.self_attn.new_parameters().items()
        }

    def compile_parts(self) -> None:
        """torch.compile what surrounds the kernels; all layers share one compilation."""
        self.compiled = True
        for layer in self.layers:
            layer.read, layer.write = torch.compile(layer.read), torch.compile(layer.write)
            layer.self_attn.softmax = torch.compile(layer.self_attn.softmax)
            if layer.full:
                layer.self_attn.full_attention = torch.compile(layer.self_attn.full_attention)
                continue
            layer.self_attn.log_decay = torch.compile(layer.self_attn.log_decay)
            if self.config.window:
                layer.self_attn.window = torch.compile(layer.self_attn.window)
                layer.self_attn.mix = torch.compile(layer.self_attn.mix)

    compiled = False

    # -- running ---------------------------------------------------------------------------------------------

    def empty_state(self, batch: int) -> list[State]:
        device = self.embed_tokens.weight.device
        return [layer.self_attn.empty_state(batch, device) for layer in self.layers]

    def rotary(self, start: int, length: int) -> Tables:
        key = (start, length, self.embed_tokens.weight.device)
        if key not in self._rotary:
            if len(self._rotary) > 8:
                self._rotary.clear()
            self._rotary[key] = rotary_tables(self.geometry, *key)
        return self._rotary[key]

    def hidden(
        self, input_ids: Tensor, state: list[State] | None = None
    ) -> tuple[Tensor, list[State] | None]:
        """Student's final hidden states [B,T,D], and the state after them when one was given."""
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(state[0].seen if state else 0, input_ids.shape[1])
        after: list[State] = []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer.student(x, rotary, None if state is None else state[i])
            after.append(layer_state)
        return self.norm(x), after if state is not None else None

    def forward(
        self, input_ids: Tensor, state: list[State] | None = None
    ) -> tuple[Tensor, list[State] | None]:
        """input_ids [B,T] -> logits [B,T,V], and the state after them when one was given."""
        x, state = self.hidden(input_ids, state)
        return self.lm_head(x), state

    def teacher_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(0, input_ids.shape[1])
        for layer in self.layers:
            x = layer.teacher(x, rotary)
        return self.norm(x)

    def teacher_logits(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.teacher_hidden(input_ids))

    def transfer_losses(self, input_ids: Tensor) -> Tensor:
        """Attention-transfer error of every layer [L] (before the factor 1000); 0 where attention stays."""
        with torch.no_grad():
            x = self.embed_tokens(input_ids)
            rotary = self.rotary(0, input_ids.shape[1])
        losses = []
        for layer in self.layers:
            x, loss = layer.transfer(x, rotary)
            losses.append(loss)
        return torch.stack(losses)

    # -- adapters --------------------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: float, targets: tuple[str, ...] = ATTENTION_TARGETS) -> None:
        """Low-rank updates on the target projections through peft; only these and the new parameters can
        train."""
        from peft import LoraConfig, inject_adapter_in_model

        scaled: Any = alpha  # peft writes int and means a number
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=scaled, target_modules=list(targets)), self)
        self.lora = LoraSettings(rank, alpha, targets)
        self.requires_grad_(False)
        for parameter in self.lora_parameters().values():
            parameter.requires_grad_(True)

    lora: LoraSettings | None = None

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """LoRA matrices by adapter tensor name: A [r, in], B [out, r]."""
        found: dict[str, nn.Parameter] = {}
        for i, layer in enumerate(self.layers):
            for name in self.lora.targets if self.lora else ():
                proj = getattr(layer.self_attn if name in ATTENTION_TARGETS else layer.mlp, name)
                found[f"layers.{i}.{name}.lora_A"] = proj.lora_A["default"].weight
                found[f"layers.{i}.{name}.lora_B"] = proj.lora_B["default"].weight
        return found

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {**self.new_parameters(), **self.lora_parameters()}

    def load_adapter(self, adapter: Adapter) -> None:
        if adapter.lora is not None and self.lora is None:
            self.add_lora(adapter.lora.rank, adapter.lora.alpha, adapter.lora.targets)
        parameters = self.adapter_parameters()
        if set(parameters) != set(adapter.tensors):
            odd = sorted(set(parameters) ^ set(adapter.tensors))[0]
            raise LawcatError(f"The adapter's tensors do not fit the model: {odd!r} is on one side only.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                value = torch.tensor(adapter.tensors[name])  # what is read from a file is not writable
                if value.shape != parameter.shape:
                    raise LawcatError(
                        f"Adapter tensor {name!r} has shape {list(value.shape)}, "
                        f"the model needs {list(parameter.shape)}."
                    )
                parameter.copy_(value)


def load_student(
    teacher: Teacher,
    adapter: Adapter | None = None,
    config: LawcatConfig | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> LawcatModel:
    """The teacher converted: with an adapter's trained parameters, or untrained from a config and a seed."""
    if adapter is not None:
        adapter.check_teacher(teacher)
        config = adapter.config
    config = config or LawcatConfig.for_geometry(teacher.geometry)
    hf_model = teacher.load_model()
    model = LawcatModel(hf_model, teacher.geometry, config, backend, seed)
    if adapter is not None:
        model.load_adapter(adapter)
    return model.eval()
