"""How far predictions are from a text and from each other: nll, KL and agreement of every token, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 16  # of logits in the working buffers, which then stay in the cache


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−log p(target) of logits [n,V] and ids [n]: float64 [n]."""
    found = np.empty(len(logits))
    for at in range(0, len(logits), _ROWS):
        block = logits[at : at + _ROWS]
        top = block.max(-1, keepdims=True)
        total = np.exp(block - top).sum(-1, dtype=np.float64)
        chosen = np.take_along_axis(block, targets[at : at + _ROWS, None].astype(np.int64), -1)
        found[at : at + _ROWS] = np.log(total) - (chosen - top)[:, 0].astype(np.float64)
    return found


def token_kl(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference ‖ logits) of two arrays of logits [n,V]: float64 [n], never negative.

    With p the reference's probabilities and e the difference logits − reference less its mean under p, this
    is log Σ p exp(e) = log(1 + Σ p (exp(e) − 1 − e)), the mean of e being zero: all terms are positive, so
    that small values stay exact in float32.
    """
    found = np.empty(len(logits))
    for at in range(0, len(logits), _ROWS):
        known, mine = reference[at : at + _ROWS], logits[at : at + _ROWS]
        p, e = _centred(known, mine)
        if e.max() > 80:  # float32 would overflow
            p, e = _centred(known.astype(np.float64), mine.astype(np.float64))
        found[at : at + _ROWS] = np.log1p((p * (np.expm1(e) - e)).sum(-1, dtype=np.float64))
    return np.maximum(found, 0.0)


def _centred(known: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = np.exp(known - known.max(-1, keepdims=True))
    p /= p.sum(-1, dtype=np.float64, keepdims=True).astype(p.dtype)
    e = mine - known
    return p, e - (p * e).sum(-1, dtype=np.float64, keepdims=True).astype(e.dtype)


def kl_of_logs(reference: Tensor, mine: Tensor) -> Tensor:
    """KL(reference ‖ mine) of torch log-probabilities [..., V]: [...]."""
    return (reference.exp() * (reference - mine)).sum(-1)


def token_losses(logits: Any, reference: Any | None, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """Per token of logits [B,t,V] and targets [B,t]: nll, KL(reference ‖ logits) and top-1 agreement (0, 1),
    float64 [B,t] each. Without a reference the last two are zero.

    In torch on the device of the logits when all are tensors, else in numpy.
    """
    if not isinstance(logits, np.ndarray) and not isinstance(reference, np.ndarray):
        import torch

        predicted = logits.float().log_softmax(-1)
        wanted = torch.as_tensor(targets, dtype=torch.int64, device=logits.device)
        nll = -predicted.gather(-1, wanted[..., None])[..., 0]
        if reference is None:
            zeros = np.zeros(targets.shape)
            return nll.double().cpu().numpy(), zeros, zeros
        known = reference.to(logits.device).float().log_softmax(-1)
        same = predicted.argmax(-1) == known.argmax(-1)
        return tuple(x.double().cpu().numpy() for x in (nll, kl_of_logs(known, predicted), same))
    mine = to_numpy(logits).reshape(-1, logits.shape[-1])
    nll = token_nll(mine, targets.reshape(-1)).reshape(targets.shape)
    if reference is None:
        return nll, np.zeros(targets.shape), np.zeros(targets.shape)
    theirs = to_numpy(reference).reshape(mine.shape)
    same = (mine.argmax(-1) == theirs.argmax(-1)).astype(np.float64)
    return nll, token_kl(theirs, mine).reshape(targets.shape), same.reshape(targets.shape)


def to_numpy(array: Any) -> np.ndarray:
    """A numpy array, or a torch tensor of any device and type, as numpy."""
    return array if isinstance(array, np.ndarray) else array.detach().float().cpu().numpy()
