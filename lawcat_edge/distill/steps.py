"""What one training step computes, as modules that DistributedDataParallel can wrap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lawcat_edge.model import LawcatModel

LOSS_ROWS = 2048  # tokens whose logits exist at once: 2048 x 49152 float32 is 400 MB


class TransferStep(nn.Module):
    """Stage 1, attention transfer: mean over layers of the squared error, times 1000."""

    def __init__(self, model: LawcatModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        layers = self.model.transfer_losses(ids)
        return layers.mean() * 1000, {"layers": layers.detach()}


class FinetuneStep(nn.Module):
    """Stage 2, low-rank fine-tuning: the student end to end against the teacher's logits and next tokens."""

    def __init__(self, model: LawcatModel, kl_weight: float, ce_weight: float) -> None:
        super().__init__()
        self.model, self.kl_weight, self.ce_weight = model, kl_weight, ce_weight

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B,T]; weight [B,T] of each token as a target of the cross-entropy (None: all 1)."""
        teacher = None
        if self.kl_weight:
            with torch.no_grad():
                teacher = self.model.teacher_hidden(ids)[:, :-1]
        student, _ = self.model.hidden(ids)
        targets = ids[:, 1:]
        weight = torch.ones_like(targets, dtype=torch.float32) if weight is None else weight[:, 1:].float()
        kl, ce = head_losses(self.model.lm_head, student[:, :-1], teacher, targets)
        kl, ce = kl.mean(), (ce * weight).sum() / weight.sum().clamp_min(1e-9)
        loss = self.kl_weight * kl + self.ce_weight * ce
        return loss, {"kl": kl.detach(), "ce": ce.detach()}


def head_losses(
    head: nn.Module, student: Tensor, teacher: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Per token: KL(teacher || student) (0 without a teacher) and cross-entropy, both [B,T] in float32.

    student and teacher are final hidden states [B,T,D]. Logits are formed a slice at a time and formed again
    in the backward pass, so memory does not grow with batch times vocabulary.
    """

    def rows(hidden: Tensor, taught: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        predicted = head(hidden).float().log_softmax(-1)
        ce = -predicted.gather(-1, target[:, None])[:, 0]
        if taught is None:
            return torch.zeros_like(ce), ce
        with torch.no_grad():
            wanted = head(taught).float().log_softmax(-1)
        return F.kl_div(predicted, wanted, log_target=True, reduction="none").sum(-1), ce

    flat, goal = student.flatten(0, 1), targets.flatten()
    taught = None if teacher is None else teacher.flatten(0, 1)
    kls, ces = [], []
    for start in range(0, len(goal), LOSS_ROWS):
        part = slice(start, start + LOSS_ROWS)
        args = (flat[part], None if taught is None else taught[part], goal[part])
        # a single slice fits, so its logits are kept: forming them again would cost an eighth of the step
        kl, ce = rows(*args) if len(goal) <= LOSS_ROWS else checkpoint(rows, *args, use_reentrant=False)
        kls.append(kl)
        ces.append(ce)
    return torch.cat(kls).view_as(targets), torch.cat(ces).view_as(targets)
