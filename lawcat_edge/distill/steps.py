"""What one training step computes, as modules that DistributedDataParallel can wrap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lawcat_edge.distill.head import head_loss
from lawcat_edge.model import LawcatModel


class TransferStep(nn.Module):
    """Stage 1, attention transfer: mean over linear-attention layers of the squared error, times 1000."""

    def __init__(self, model: LawcatModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, weight: Tensor | None = None, norm: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        layers = self.model.transfer_losses(ids)
        linear = sum(not layer.full for layer in self.model.layers)
        return layers.sum() / linear * 1000, {"layers": layers.detach()}


class FinetuneStep(nn.Module):
    """Stage 2, low-rank fine-tuning: the student end to end against the teacher's logits and next tokens."""

    def __init__(self, model: LawcatModel, kl_weight: float, ce_weight: float) -> None:
        super().__init__()
        self.model, self.kl_weight, self.ce_weight = model, kl_weight, ce_weight

    def forward(
        self, ids: Tensor, weight: Tensor | None = None, norm: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B,T]; weight [B,T] of each token as a target, in KL and cross-entropy (None: all 1).

        norm: what the weighted losses are divided by; None: the sum of these weights. A step of
        several batches or processes gives each the mean sum over all, so that their losses average to that
        of one large batch, in which heavy tokens need not be spread evenly.
        """
        teacher = None
        if self.kl_weight:
            with torch.no_grad():
                teacher = self.model.teacher_hidden(ids)[:, :-1]
        student, _ = self.model.hidden(ids)
        targets = ids[:, 1:]
        weight = target_weights(ids, weight)
        shares = weight / (weight.sum() if norm is None else norm).clamp_min(1e-9)
        loss, kl, ce = head_loss(
            self.model.lm_head,
            student[:, :-1].flatten(0, 1),
            None if teacher is None else teacher.flatten(0, 1),
            targets.flatten(),
            (self.kl_weight * shares).flatten(),
            (self.ce_weight * shares).flatten(),
            compiled=self.model.compiled,
        )
        flat = shares.flatten()
        return loss, {"kl": (kl * flat).sum(), "ce": (ce * flat).sum()}


def target_weights(ids: Tensor, weight: Tensor | None) -> Tensor:
    """Loss weights of the tokens that are predicted, all but the first: [B,T-1] in float32."""
    if weight is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.float32)
    return weight[:, 1:].float()
