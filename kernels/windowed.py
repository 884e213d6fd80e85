"""Attention of a block over its window, read where it lies: sink, ring and current block, in any order.

    attended = windowed_attention(q_BLHD, [Part(keys, values, runs)], backend="triton")

`reference` here is the plain PyTorch twin of the kernel (streamvid.kernels.windowed_triton): the same arguments, the same
numbers. A window in several buffers is several parts; the kernel takes them one after the other, each launch going on from
the log-sum-exp of the one before. `merge` joins parts that were attended apart (on several devices, say).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from streamvid.kernels.libraries import found

from streamvid.errors import UserError
from streamvid.rope import Rotation


class Part(NamedTuple):
    """Keys and values in one buffer, and which of them are attended.

    Attributes:
        k_BSHD, v_BSHD: a buffer of S tokens: the dtype of the queries, or int8 or float8 e4m3 with scales.
        runs: int32 `[N, 2]` or per batch element `[B, N, 2]`: first token and number of tokens; no token twice, any order,
            empty ones allowed (so that a captured graph may keep N).
        frame_tokens: tokens of a frame; frame f of the buffer is its tokens from `f * frame_tokens` on.
        bias: float32 `[frames]` or `[B, frames]` in the buffer's order, added to the scores: log-bias, logarithm of a decay.
        phase: turns the keys of every frame on load: cosine and sine, each float32 `[frames, 1 or H, D / 2]`.
        k_scale, v_scale: float32 `[B, S, H, 1]`, what the stored numbers are multiplied with (streamvid.kv_storage.Scaled).
    """

    k_BSHD: torch.Tensor
    v_BSHD: torch.Tensor
    runs: torch.Tensor
    frame_tokens: int = 1
    bias: torch.Tensor | None = None
    phase: Rotation | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


class Attended(NamedTuple):
    """What a block got from its window.

    Attributes:
        out_BLHD: of the queries' dtype; zero where nothing was attended.
        lse_BHL: float32, logarithm of the sum of exponentials of the scaled scores (natural; -inf over nothing).
        importance: of each part `[B, S]`, where asked for: the product of every attended key with the given queries, over
            all heads (`streamvid.compression.summed_importance`); zero for keys that are not attended.
    """

    out_BLHD: torch.Tensor
    lse_BHL: torch.Tensor
    importance: list[torch.Tensor] | None = None


def windowed_attention(
    q_BLHD: torch.Tensor,
    parts: Sequence[Part],
    importance_BHD: torch.Tensor | None = None,
    backend: str = "reference",
) -> Attended:
    """Softmax attention of all queries over the union of the parts.

    Args:
        importance_BHD: sum of the queries by which keys are scored (the current ones, or those of several blocks).
        backend: reference or triton.

    Raises:
        UserError: a backend of another name, or a part that does not fit the queries.
    """
    for part in parts:
        _check(q_BLHD, part)
    if backend == "reference":
        return reference(q_BLHD, parts, importance_BHD)
    if backend == "triton":
        from streamvid.kernels.windowed_triton import attend

        return attend(q_BLHD, parts, importance_BHD)
    raise UserError(f"windowed attention backend = {backend!r} is not known: choose reference or triton")


def _check(q_BLHD: torch.Tensor, part: Part) -> None:
    batch, _, heads, dim = q_BLHD.shape
    shape = (batch, part.k_BSHD.shape[1], heads, dim)
    if part.k_BSHD.shape != shape or part.v_BSHD.shape != shape:
        raise UserError(
            f"window part has keys {tuple(part.k_BSHD.shape)} and values {tuple(part.v_BSHD.shape)}, and the queries "
            f"{tuple(q_BLHD.shape)}: batch, heads and channels must be the same"
        )
    for name, stored, scale in (
        ("k_scale", part.k_BSHD, part.k_scale),
        ("v_scale", part.v_BSHD, part.v_scale),
    ):
        encoded = stored.dtype in (torch.int8, torch.float8_e4m3fn)
        if encoded != (scale is not None) or not (encoded or stored.dtype == q_BLHD.dtype):
            raise UserError(
                f"window part has {name[0]} of {stored.dtype} and {name} {'' if scale is None else 'not '}None: int8 and "
                f"float8_e4m3fn take a scale, anything else must be {q_BLHD.dtype}"
            )


def alive(part: Part) -> torch.Tensor:
    """Boolean `[1 or B, S]`: whether a token of the buffer is in one of the runs."""
    token = torch.arange(part.k_BSHD.shape[1], device=part.runs.device)
    runs = part.runs if part.runs.ndim == 3 else part.runs[None]
    first, count = runs[..., :1], runs[..., 1:]
    return ((token >= first) & (token < first + count)).any(1)


def reference(
    q_BLHD: torch.Tensor, parts: Sequence[Part], importance_BHD: torch.Tensor | None = None
) -> Attended:
    """The same in PyTorch: all scores written out, in float32 (float64 queries: in float64)."""
    precise = torch.promote_types(q_BLHD.dtype, torch.float32)
    scores, values, importance = [], [], []
    for part in parts:
        key, value = part.k_BSHD.to(precise), part.v_BSHD.to(precise)
        if part.k_scale is not None and part.v_scale is not None:
            key, value = key * part.k_scale, value * part.v_scale
        if part.phase is not None:
            cos, sin = (x.repeat_interleave(part.frame_tokens, 0)[: key.shape[1]] for x in part.phase)
            even, odd = key.unflatten(-1, (-1, 2)).unbind(-1)
            key = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        there = alive(part)
        score = torch.einsum("blhd,bshd->bhls", q_BLHD.to(precise), key) * q_BLHD.shape[-1] ** -0.5
        if part.bias is not None:
            bias = part.bias if part.bias.ndim == 2 else part.bias[None]
            score = score + bias.repeat_interleave(part.frame_tokens, 1)[:, None, None, : key.shape[1]]
        scores.append(score.masked_fill(~there[:, None, None], float("-inf")))
        values.append(value)
        if importance_BHD is not None:
            products = torch.einsum("bhd,bshd->bs", importance_BHD.to(precise), key)
            importance.append(products.masked_fill(~there, 0.0))
    joined = torch.cat(scores, -1)
    lse = joined.logsumexp(-1)
    weights = (joined - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = torch.einsum("bhls,bshd->blhd", weights, torch.cat(values, 1))
    return Attended(out.to(q_BLHD.dtype), lse, importance if importance_BHD is not None else None)


def merge(parts: Sequence[Attended]) -> Attended:
    """Attention over the union of windows that were attended apart (importance is left out)."""
    lse = torch.stack([part.lse_BHL for part in parts])
    total = lse.logsumexp(0)
    share = (lse - total.masked_fill(total == float("-inf"), 0.0)).exp().transpose(-1, -2)[..., None]
    out = (torch.stack([part.out_BLHD for part in parts]) * share).sum(0)
    return Attended(out.to(parts[0].out_BLHD.dtype), total)


# --- the kernel as an attention backend (streamvid.kernels.attention) ---------------------------------------------------


def dense(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """All keys, with a mask or bias of keys."""
    keys = k_BLHD.shape[1]
    bias = None
    if mask is not None:
        rows = mask.reshape(-1, mask.shape[-1]).expand(-1, keys)
        if rows.dtype == torch.bool:
            rows = torch.zeros_like(rows, dtype=torch.float32).masked_fill(~rows, float("-inf"))
        bias = rows.float()
        bias = bias if len(bias) > 1 else bias[0]
    runs = torch.tensor([[0, keys]], dtype=torch.int32, device=q_BLHD.device)
    return windowed_attention(q_BLHD, [Part(k_BLHD, v_BLHD, runs, bias=bias)], backend="triton").out_BLHD


def dense_refuses(q, k, v, mask=None) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no gradient"
    if mask is not None and any(size != 1 for size in mask.shape[:-1][-2:]):
        return "cannot attend with a mask that differs between queries or heads"
    return None if q.shape[-1] <= 128 else f"has heads of at most 128 channels, not {q.shape[-1]}"


def dense_missing() -> str | None:
    if not found("triton"):
        return "needs the package triton, which cannot be imported: pip install triton"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA or ROCm device, and PyTorch finds none: choose sdpa"
