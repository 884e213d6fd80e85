"""What surrounds attention in a transformer block, each in one pass over memory: Triton kernels beside their PyTorch twins.

    fused = companions(attention, device)           # a table of functions: `PLAIN`, or the kernels that are right here
    y_BLC = fused.modulated_norm(x_BLC, shift_BFC, scale_BFC, eps)

The functions here are the twins; the kernels (streamvid.kernels.companions_triton) have the same names and arguments. They
compute in float32 and round once, where the twins round after every operation. They have no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from streamvid.kernels.libraries import found

from streamvid.rope import Rotation, rotate

KeyValue = tuple[torch.Tensor, torch.Tensor]


class Meetings(NamedTuple):
    """Which evicted frames are averaged into which frames of a sink, in this order.

    Attributes:
        buffer: keys and values with the evicted frames, keys rotated.
        mixed: takes the new averages.
        starts: sink frame s meets those from `starts[s]` to `starts[s + 1]`.
        evicted: of all meetings, index of the evicted frame in its buffer.
        shares: float32 `[n, B, 2]`: of the average, and of the evicted frame.
        back: turns an evicted frame's keys back to no rotation, each `[n * T, 1 or H, D / 2]`.
    """

    buffer: KeyValue
    mixed: KeyValue
    starts: Sequence[int]
    evicted: Sequence[int]
    shares: torch.Tensor
    back: Rotation


def modulated_norm(x_BLC, shift_BFC, scale_BFC, eps: float) -> torch.Tensor:
    """Layer norm without weights, then `x * (1 + scale) + shift` with one shift and scale per latent frame."""
    x = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=eps).unflatten(1, (shift_BFC.shape[1], -1))
    return (x * (1 + scale_BFC[:, :, None]) + shift_BFC[:, :, None]).flatten(1, 2)


def gated_sum(x_BLC, y_BLC, gate_BFC) -> torch.Tensor:
    """`x + y * gate` with one gate per latent frame."""
    y = y_BLC.unflatten(1, (gate_BFC.shape[1], -1)) * gate_BFC[:, :, None]
    return x_BLC + y.flatten(1, 2)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32 (float64 tensors: in float64), cast back before it is scaled, as in the release."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(precise), x.shape[-1:], eps=eps).to(x.dtype)


def norm_rotate_write(
    q_BLC: torch.Tensor,
    k_BLC: torch.Tensor,
    v_BLC: torch.Tensor,
    weights: KeyValue,
    eps: float,
    turns: tuple[Rotation, Rotation],
    into: KeyValue,
    slots: torch.Tensor,
) -> torch.Tensor:
    """RMS norm of queries and keys over the model width, rotation, and the block's keys and values into their slots.

    Args:
        weights: of the norms of q and k.
        turns: rotation of the queries and of the keys.
        into: keys and values `[B, S, H, D]`.
        slots: int32 `[F]`: where a frame of the block is written, in frames of the buffer; below 0: nowhere.

    Returns:
        The rotated queries `[B, L, H, D]`.
    """
    heads, tokens = into[0].shape[2], k_BLC.shape[1] // len(slots)
    query, key = (
        rotate((rms_norm(x, eps) * w).unflatten(-1, (heads, -1)), by)
        for x, w, by in zip((q_BLC, k_BLC), weights, turns, strict=True)
    )
    at = (slots[:, None] * tokens + torch.arange(tokens, device=slots.device)).flatten()
    written = at >= 0
    for buffer, new in zip(into, (key, v_BLC.unflatten(-1, (heads, -1))), strict=True):
        buffer[:, at[written]] = new[:, written].to(buffer.dtype)
    return query


def fuse_sink(
    average: KeyValue, meetings: Meetings | None, stored: KeyValue, at: Rotation, placed: Sequence[bool]
) -> None:
    """Average evicted frames into the sink and write it where attention reads it: `share * average + share * evicted`.

    All tensors of keys and values are `[N, B, tokens, H, D]` of N layers. Averages are of keys before rotation; products and
    sums are rounded to their dtype, so that in bfloat16 a decay near 1 does nothing, as in the release.

    Args:
        average: what the sink's frames are; tokens of S frames.
        stored: buffer whose first S frames are the sink; its keys are rotated by `at`, `[S * T, 1 or H, D / 2]`.
        placed: which of the sink's frames are written to `stored`.
    """
    tokens = average[0].shape[2] // len(placed)
    kind = average[0].dtype

    def frame(x: torch.Tensor, index) -> torch.Tensor:
        return x[:, :, index * tokens : (index + 1) * tokens]

    for sink, place in enumerate(placed):
        key, value = (frame(x, sink) for x in average)
        if meetings is not None:
            for n in range(*meetings.starts[sink : sink + 2]):
                old, new = meetings.shares[n, ..., None, None, None].unbind(1)
                by = Rotation(*(x[n * tokens : (n + 1) * tokens] for x in meetings.back))
                gone_k, gone_v = (frame(x, meetings.evicted[n]).to(kind) for x in meetings.buffer)
                key = ((key * old).to(kind) + rotate(gone_k, by) * new).to(kind)
                value = ((value * old).to(kind) + gone_v * new).to(kind)
            frame(meetings.mixed[0], sink).copy_(key)
            frame(meetings.mixed[1], sink).copy_(value)
        if place:
            by = Rotation(*(x[sink * tokens : (sink + 1) * tokens] for x in at))
            frame(stored[0], sink).copy_(rotate(key, by))
            frame(stored[1], sink).copy_(value)


class Companions(NamedTuple):
    """One function of every name above."""

    modulated_norm: Callable[..., torch.Tensor] = modulated_norm
    gated_sum: Callable[..., torch.Tensor] = gated_sum
    norm_rotate_write: Callable[..., torch.Tensor] = norm_rotate_write
    fuse_sink: Callable[..., None] = fuse_sink


PLAIN = Companions()

_disabled: dict[str, str] = {}  # name -> why; for the life of the process


def disable(name: str, reason: str) -> None:
    """Take a kernel out: it was seen to compute something wrong (streamvid.kernels.check); its twin serves."""
    _disabled[name] = reason


def unavailable(name: str) -> str | None:
    """Why the kernel called `name` cannot be used here, or None."""
    if name in _disabled:
        return _disabled[name]
    if not found("triton"):
        return "needs the package triton, which cannot be imported: pip install triton"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA or ROCm device, and PyTorch finds none"


def kernel(name: str) -> Callable:
    """The Triton kernel called `name`; there is no check of whether it can run."""
    from streamvid.kernels import companions_triton

    return getattr(companions_triton, name)


def companions(attention: str, device: torch.device | str) -> Companions:
    """The functions that a stream with this attention backend takes on a device.

    On CUDA they are the kernels, unless attention = reference asks for nothing fused; elsewhere they are, in Triton's
    interpreter, with attention = triton. On CUDA each is compared with its twin at first. A kernel that cannot run or is
    wrong leaves its place to the twin.
    """
    cuda = torch.device(device).type == "cuda"
    if attention == "reference" or not (cuda or attention == "triton"):
        return PLAIN
    if cuda:
        _verify(torch.device(device))
    return Companions(*(_one(name) for name in Companions._fields))


@cache
def _verify(device: torch.device) -> None:
    from streamvid.kernels.check import verify_companions

    verify_companions(device, torch.bfloat16)


def _one(name: str) -> Callable:
    twin = getattr(PLAIN, name)
    if unavailable(name):
        return twin
    fused = kernel(name)

    def choose(*arguments):
        # compiled graphs fuse the twin by themselves; training needs a gradient
        tensors = (x for x in arguments if isinstance(x, torch.Tensor))
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return (twin if graded or torch.compiler.is_compiling() else fused)(*arguments)

    return choose
