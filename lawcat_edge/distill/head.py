"""The loss at the output head, with its gradient formed on the way: the head itself is never trained.

For one token with logits s, the teacher's logits t and the target y,

    kl = KL(softmax(t) || softmax(s))        ce = -log softmax(s)[y]
    d(a kl + b ce)/ds = (a + b) softmax(s) - a softmax(t) - b onehot(y)

so the gradient of the hidden state is ready after one pass over the logits, and nothing of the size of the
vocabulary is kept for the backward pass or formed twice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

LOSS_ROWS = 2048  # tokens whose logits exist at once: 2048 x 49152 float32 is 400 MB


def losses_and_gradient(
    student: Tensor, taught: Tensor | None, target: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N,V] of student and teacher (or None), target [N], weights a and b [N] of kl and ce.

    Returns kl [N] (0 without a teacher) and ce [N] in float32, and the gradient of sum(a kl + b ce) with
    respect to the student's logits, [N,V] in their dtype.
    """
    s = student.float().log_softmax(-1)
    ce = -s.gather(-1, target[:, None])[:, 0]
    onehot = torch.arange(s.shape[-1], device=s.device) == target[:, None]
    if taught is None:
        gradient = b[:, None] * (s.exp() - onehot.float())
        return torch.zeros_like(ce), ce, gradient.to(student.dtype)
    t = taught.float().log_softmax(-1)
    q, p = t.exp(), s.exp()
    gradient = a[:, None] * (p - q) + b[:, None] * (p - onehot.float())
    return (q * (t - s)).sum(-1), ce, gradient.to(student.dtype)


@functools.cache
def _compiled() -> Any:
    return torch.compile(losses_and_gradient, dynamic=True)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        head: nn.Linear,
        taught: Tensor | None,
        target: Tensor,
        a: Tensor,
        b: Tensor,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _compiled() if compiled else losses_and_gradient
        gradient = torch.empty_like(student)
        kl, ce = torch.empty_like(a), torch.empty_like(b)
        for start in range(0, len(target), LOSS_ROWS):
            part = slice(start, start + LOSS_ROWS)
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_()
                logits = head(hidden)
            other = None if taught is None else head(taught[part])
            kl[part], ce[part], d = rows(logits.detach(), other, target[part], a[part], b[part])
            (gradient[part],) = torch.autograd.grad(logits, hidden, d)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, ce)
        return (a * kl + b * ce).sum(), kl, ce

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * dloss, None, None, None, None, None, None


def head_loss(
    head: nn.Linear,
    student: Tensor,
    taught: Tensor | None,
    target: Tensor,
    a: Tensor,
    b: Tensor,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(a kl + b ce) over N tokens, differentiable in ``student`` alone; and kl [N], ce [N], detached.

    student, taught: final hidden states [N,D] (taught None: no teacher); target [N] ids; a, b [N] float32.
    """
    assert not head.weight.requires_grad, "the head's own gradient is not formed"
    taught = None if taught is None else taught.detach()
    return _HeadLoss.apply(student, head, taught, target, a, b, compiled)
