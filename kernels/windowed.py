"""Attention of a block over its window, read where it lies: sink, ring and current block, in any order.

    attended = windowed_attention(q_BLHD, [Part(keys, values, runs)], backend="triton")

`reference` here is the plain PyTorch twin of the kernel (streamvid.kernels.windowed_triton): the same arguments, the same
numbers. A window in several buffers is several parts; the kernel takes them one after the other, each launch going on from
the log-sum-exp of the one before. `merge` joins parts that were attended apart (on several devices, say).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from streamvid.kernels.libraries import found

from streamvid.errors import UserError
from streamvid.rope import Rotation, rotate


class Part(NamedTuple):
    """Keys and values in one buffer, and which of them are attended.

    Attributes:
        k_BSHD, v_BSHD: a buffer of S tokens: the dtype of the queries, or int8 or float8 e4m3 with scales.
        runs: int32 `[N, 2]` or per batch element `[B, N, 2]`: first token and number of tokens; no token twice, any order,
            empty ones allowed (so that a captured graph may keep N).
        frame_tokens: tokens of a frame; frame f of the buffer is its tokens from `f * frame_tokens` on.
        bias: float32 `[frames]` or `[B, frames]` in the buffer's order, added to the scores: log-bias, logarithm of a decay.
        gain: the same, multiplies the scores before (UltraViCo's decay of far frames).
        phase: turns the keys of every frame on load: cosine and sine, each float32 `[frames, 1 or H, D / 2]`. As of bias and
            gain, those behind the last attended frame may be missing.
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
    gain: torch.Tensor | None = None


class Attended(NamedTuple):
    """What a block got from its window.

    Attributes:
        out_BLHD: of the queries' dtype; zero where nothing was attended.
        lse_BHL: float32, logarithm of the sum of exponentials of the scaled scores (natural; -inf over nothing).
        importance: where asked for, `key_importance`.
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
        UserError: a backend of another name, or what it cannot do, or a part that does not fit the queries.
    """
    for part in parts:
        _check(q_BLHD, part)
    attended = _implementation(backend, q_BLHD).attend(q_BLHD, parts)
    if importance_BHD is None:
        return attended
    return attended._replace(importance=key_importance(importance_BHD, parts, backend))


def key_importance(
    queries_BHD: torch.Tensor, parts: Sequence[Part], backend: str = "reference"
) -> list[torch.Tensor]:
    """Product of every attended key with the given queries, over all heads, float32 `[B, S]` of each part.

    This is what participative compression ranks tokens by (`streamvid.compression.summed_importance`). Bias and gain do not
    count; zero for keys that are not attended.
    """
    for part in parts:
        _check(queries_BHD[:, None], part)
    return _implementation(backend, queries_BHD).importance(queries_BHD, parts)


def _implementation(backend: str, queries: torch.Tensor) -> Any:
    """Functions `attend` and `importance`."""
    if backend == "reference":
        return SimpleNamespace(attend=reference, importance=reference_importance)
    if backend != "triton":
        raise UserError(f"windowed attention backend = {backend!r} is not known: choose reference or triton")
    reason = kernel_refuses(queries)
    if reason:
        raise UserError(f"windowed attention backend = triton {reason}: choose reference")
    from streamvid.kernels import windowed_triton

    return windowed_triton


def kernel_refuses(*tensors: torch.Tensor) -> str | None:
    """Why the kernel cannot take these queries (or queries, keys and values), or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "has no gradient"
    q = tensors[0]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, bfloat16 or float16, not in {str(q.dtype).removeprefix('torch.')}"
    return None if q.shape[-1] <= 128 else f"has heads of at most 128 channels, not {q.shape[-1]}"


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


def reference(q_BLHD: torch.Tensor, parts: Sequence[Part]) -> Attended:
    """The same in PyTorch: all scores written out, in float32 (float64 queries: in float64)."""
    precise = torch.promote_types(q_BLHD.dtype, torch.float32)
    query = q_BLHD.to(precise) * q_BLHD.shape[-1] ** -0.5
    scores, values = [], []
    for part in parts:
        value = part.v_BSHD.to(precise)
        values.append(value if part.v_scale is None else value * part.v_scale)
        score = torch.einsum("blhd,bshd->bhls", query, _keys(part, precise))
        if part.gain is not None:
            score = score * _per_token(part.gain, part)
        if part.bias is not None:
            score = score + _per_token(part.bias, part)
        scores.append(score.masked_fill(~alive(part)[:, None, None], float("-inf")))
    if not parts:
        nothing = query.new_full(q_BLHD.shape[:3], float("-inf"), dtype=torch.float32).transpose(1, 2)
        return Attended(torch.zeros_like(q_BLHD), nothing)
    joined = torch.cat(scores, -1)
    lse = joined.logsumexp(-1)
    weights = (joined - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = torch.einsum("bhls,bshd->blhd", weights, torch.cat(values, 1))
    return Attended(out.to(q_BLHD.dtype), lse)


def reference_importance(queries_BHD: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """`key_importance` in PyTorch."""
    precise = torch.promote_types(queries_BHD.dtype, torch.float32)
    return [
        torch.einsum("bhd,bshd->bs", queries_BHD.to(precise), _keys(part, precise)).masked_fill(
            ~alive(part), 0
        )
        for part in parts
    ]


def _keys(part: Part, dtype: torch.dtype) -> torch.Tensor:
    """Decoded and turned, `[B, S, H, D]`."""
    key = part.k_BSHD.to(dtype)
    if part.k_scale is not None:
        key = key * part.k_scale
    if part.phase is not None:
        key = rotate(key, Rotation(*(_per_token(x, part, 0) for x in part.phase)))
    return key


def _per_token(of_frames: torch.Tensor, part: Part, axis: int = -1) -> torch.Tensor:
    """Numbers of frames `[frames, ...]` for every token; those of the last axis `[1 or B, 1, 1, S]`."""
    frame = torch.arange(part.k_BSHD.shape[1], device=of_frames.device) // part.frame_tokens
    rows = of_frames.index_select(axis, frame.clamp(max=of_frames.shape[axis] - 1))
    return rows if axis == 0 else rows.view(-1, 1, 1, rows.shape[-1])


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
    if mask is not None and any(size != 1 for size in mask.shape[:-1][-2:]):
        return "cannot attend with a mask that differs between queries or heads"
    return kernel_refuses(q, k, v)


def dense_missing() -> str | None:
    if not found("triton"):
        return "needs the package triton, which cannot be imported: pip install triton"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA or ROCm device, and PyTorch finds none: choose sdpa"
