"""Rotary embedding in the half-split layout of Llama, as all supported families use it."""

from __future__ import annotations

import torch
from torch import Tensor

from lawcat_edge.families import Geometry

Tables = tuple[Tensor, Tensor]
"""cos and sin [T,d] at the positions of T tokens."""


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, d], cos and sin [T, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def rotate(x: Tensor, rotary: Tables) -> Tensor:
    """x [B,T,heads,d], rotary [T,d] each."""
    cos, sin = (part[:, None].to(x.dtype) for part in rotary)
    return rotate_pairs(x, cos, sin)


def rotary_tables(geometry: Geometry, start: int, length: int, device: torch.device) -> Tables:
    """cos and sin [length, d] at positions start.., in float64, so that late positions stay exact."""
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    inverse = torch.from_numpy(geometry.inv_freq()).to(device)
    angles = (positions[:, None] * inverse).repeat(1, 2)
    scale = geometry.attention_scaling
    return angles.cos() * scale, angles.sin() * scale


def local_tables(geometry: Geometry, length: int, like: Tensor) -> Tables:
    """The tables at positions 0.. of a stretch of text, in the type and on the device of ``like``.

    Scores depend on distances alone, so positions within the stretch serve as well as those within the text,
    and stay small however long the text is.
    """
    cos, sin = rotary_tables(geometry, 0, length, like.device)
    return cos.to(like.dtype), sin.to(like.dtype)
