"""Analytic 3D rotary position embedding: any integer or fractional temporal position, no table, no horizon.

Wan's convention: adjacent channel pairs (2i, 2i+1); the first pairs of a head turn with time, then height, then width; each
axis has its own frequencies theta^(-2j/d_axis). The angles are computed in float64 and the rotation in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

THETA = 10000.0
# Turns of a temporal band over the trained frames: fewer, and training saw too little of it; a whole one, and it saw all.
# FLEX splits bands into these two kinds; the bounds are ours.
UNDER_TRAINED_TURNS, TRAINED_TURNS = 0.5, 1.0


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, each `[L, 1, D/2]`, or `[L, H, D/2]` where heads turn differently."""

    cos: torch.Tensor
    sin: torch.Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs per axis (time, height, width) of a head, e.g. 22, 21, 21 of 128 channels."""
    pairs = head_dim // 2
    spatial = pairs // 3
    return pairs - 2 * spatial, spatial, spatial


@lru_cache(maxsize=64)
def _frequencies(pairs: int) -> torch.Tensor:
    # float64 on purpose: positions may reach 10^6 in a stream that runs for a day
    exponent = torch.arange(pairs, dtype=torch.float64) / pairs
    return THETA**-exponent


def temporal_frequencies(
    head_dim: int,
    heads: int = 1,
    trained_frames: int | None = None,
    interpolation: float = 1.0,
    head_jitter: float = 0.0,
) -> torch.Tensor:
    """Frequencies of the temporal axis, float64 `[1, pairs]`, or `[heads, pairs]` with a jitter.

    Args:
        trained_frames, interpolation: bands that made less than half a turn in training are slowed down by the factor
            `interpolation`, those that made a whole turn stay, and between the share changes linearly (frequency-aware
            modulation, FLEX, arXiv 2602.14027; the ramp is that of NTK-by-parts with these two bounds, our choice).
        head_jitter: heads get bases theta (1 + head_jitter u), u evenly spread in (-1, 1), so that they do not all come
            back to the sink's phase at once (LoL, arXiv 2601.16914, with a fixed spread for its random one).
    """
    pairs = axis_pairs(head_dim)[0]
    frequencies = _frequencies(pairs)[None]
    if head_jitter:
        spread = (torch.arange(heads, dtype=torch.float64) + 0.5) / heads * 2 - 1
        exponent = torch.arange(pairs, dtype=torch.float64) / pairs
        frequencies = (THETA * (1 + head_jitter * spread))[:, None] ** -exponent
    if trained_frames is not None and interpolation != 1.0:
        turns = trained_frames * frequencies / (2 * torch.pi)
        kept = ((turns - UNDER_TRAINED_TURNS) / (TRAINED_TURNS - UNDER_TRAINED_TURNS)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / interpolation)
    return frequencies


def rotation(
    positions: Sequence[float],
    height: int,
    width: int,
    head_dim: int,
    device: torch.device | str = "cpu",
    temporal: torch.Tensor | None = None,
) -> Rotation:
    """Rotation of the tokens of latent frames at temporal `positions`; tokens ordered (frame, row, column).

    Args:
        temporal: other frequencies of the temporal axis (`temporal_frequencies`).
    """
    time_pairs, height_pairs, width_pairs = axis_pairs(head_dim)
    temporal = _frequencies(time_pairs)[None] if temporal is None else temporal
    frames, heads = len(positions), temporal.shape[0]
    grid = (frames, height, width, heads)
    time = torch.tensor(positions, dtype=torch.float64)[:, None, None] * temporal  # F H' pairs
    row = torch.arange(height, dtype=torch.float64)[:, None] * _frequencies(height_pairs)
    column = torch.arange(width, dtype=torch.float64)[:, None] * _frequencies(width_pairs)
    angles = torch.cat(
        [
            time[:, None, None].expand(*grid, -1),
            row[None, :, None, None].expand(*grid, -1),
            column[None, None, :, None].expand(*grid, -1),
        ],
        dim=-1,
    ).reshape(frames * height * width, heads, head_dim // 2)
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def rotate(x_BLHD: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotate adjacent channel pairs of `x`; computed in float32 (float64 in float64), returned in the dtype of `x`."""
    precise = torch.promote_types(x_BLHD.dtype, torch.float32)
    pairs = torch.view_as_complex(x_BLHD.to(precise).unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.complex(by.cos, by.sin))
    return turned.flatten(-2).to(x_BLHD.dtype)
