"""Windowed attention as one Triton kernel; its twin in PyTorch is `streamvid.kernels.windowed.reference`.

A program takes a tile of queries of one head through all runs of keys with an online softmax (flash attention). Every option
is compiled in or out. Inference only: there is no gradient.

With TRITON_INTERPRET=1 at the first import the kernel runs in Triton's interpreter on the CPU. That one truncates where
hardware rounds to bfloat16 and cannot multiply bfloat16 matrices, so there numbers are rounded by hand and kept in float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from streamvid.kernels.windowed import Attended, Part

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """Queries and keys of a step of one program, its warps, and steps that are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(dim: int, dtype: torch.dtype) -> Tile:
    """Tile for a head dimension and dtype; `benchmarks/attention.py --tune` tries others."""
    if INTERPRETED:
        return Tile(32, 32, 1, 1)
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2)
    return Tile(128, 64, 4 if dim <= 64 else 8, 3)


@triton.jit
def rounded(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """`x` in `dtype`; with EMULATE the same numbers in float32."""
    if EMULATE:
        if dtype == tl.bfloat16:  # to nearest, ties to even
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        else:
            y = x.to(dtype).to(tl.float32)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def _step(
    acc,
    top,
    total,
    q,
    wanted,
    tokens,
    valid,
    k,
    v,
    k_scale,
    v_scale,
    cos,
    sin,
    bias,
    importance,
    stride_kl,
    stride_vl,
    stride_sl,
    stride_cf,
    frame_tokens,
    D,
    log2_scale,
    scores_keys,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
    ROTATED: tl.constexpr,
    BIASED: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One tile of keys: the running maximum `top` (base 2), sum `total` and unnormalised output `acc`."""
    d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (d < D)[None, :]
    key = tl.load(k + tokens[:, None] * stride_kl + d[None, :], mask=inside, other=0.0)
    value = tl.load(v + tokens[:, None] * stride_vl + d[None, :], mask=inside, other=0.0)
    frame = tokens // frame_tokens
    if ROTATED:
        partner = tl.load(k + tokens[:, None] * stride_kl + (d ^ 1)[None, :], mask=inside, other=0.0)
        at = frame[:, None] * stride_cf + (d // 2)[None, :]
        c = tl.load(cos + at, mask=inside, other=0.0)
        s = tl.load(sin + at, mask=inside, other=0.0)
        s = tl.where((d % 2 == 0)[None, :], -s, s)
        key = key.to(tl.float32) * c + partner.to(tl.float32) * s
    if SCALED:
        value = value.to(tl.float32) * tl.load(v_scale + tokens * stride_sl, mask=valid, other=0.0)[:, None]
    if ROTATED or SCALED or EMULATE:
        key = rounded(key.to(tl.float32), DTYPE, EMULATE)
        value = rounded(value.to(tl.float32), DTYPE, EMULATE)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * log2_scale
    if SCALED:
        by = tl.load(k_scale + tokens * stride_sl, mask=valid, other=0.0)
        scores *= by[None, :]
    if IMPORTANCE:  # noqa: SIM102 (the outer one is decided in compilation)
        if scores_keys:
            product = tl.sum(key.to(tl.float32) * wanted[None, :], 1)
            if SCALED:
                product *= by
            tl.store(importance + tokens, product, mask=valid)
    if BIASED:
        added = tl.load(bias + frame, mask=valid, other=0.0) * 1.4426950408889634
        scores += added[None, :]
    scores = tl.where(valid[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no infinity minus infinity
    weights = tl.exp2(scores - finite[:, None])
    kept = tl.exp2(top - finite)
    total = total * kept + tl.sum(weights, 1)
    weights = rounded(weights, DTYPE, EMULATE)
    acc = acc * kept[:, None] + tl.dot(weights, value, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def window_kernel(
    q,
    k,
    v,
    out,
    lse,
    before,
    runs,
    k_scale,
    v_scale,
    cos,
    sin,
    bias,
    wanted,
    importance,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_sb,
    stride_sl,
    stride_sh,
    stride_rb,
    stride_bb,
    stride_cf,
    stride_ch,
    queries,
    stored,
    run_count,
    frame_tokens,
    log2_scale,
    D,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
    ROTATED: tl.constexpr,
    BIASED: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    CONTINUED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """A tile of queries of one head. `before` and `out` are contiguous `[B, L, H, D]`, `lse` is `[B, H, L]`."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < queries)[:, None] & (d < D)[None, :]
    q_tile = tl.load(
        q + b * stride_qb + h * stride_qh + rows[:, None] * stride_ql + d[None, :], mask=inside, other=0.0
    )
    if EMULATE:
        q_tile = q_tile.to(tl.float32)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    k_scale += b * stride_sb + h * stride_sh
    v_scale += b * stride_sb + h * stride_sh
    cos += h * stride_ch
    sin += h * stride_ch
    bias += b * stride_bb
    runs += b * stride_rb
    importance += (b * HEADS + h) * stored
    wanted_row = tl.load(wanted + (b * HEADS + h) * D + d, mask=d < D, other=0.0) if IMPORTANCE else d
    scores_keys = tl.program_id(0) == 0  # one program of a head is enough
    lse_at = lse + (b * HEADS + h) * queries + rows
    out_at = (b * queries + rows[:, None]) * (HEADS * D) + h * D + d[None, :]
    if CONTINUED:
        top = tl.load(lse_at, mask=rows < queries, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.load(before + out_at, mask=inside, other=0.0)
    else:
        top = tl.full([BLOCK_L], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_L], tl.float32)
        acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for run in range(run_count):
        first = tl.load(runs + 2 * run)
        count = tl.load(runs + 2 * run + 1)
        for start in range(0, count, BLOCK_S):
            column = start + tl.arange(0, BLOCK_S)
            acc, top, total = _step(
                acc, top, total, q_tile, wanted_row, first + column, column < count,
                k, v, k_scale, v_scale, cos, sin, bias, importance,
                stride_kl, stride_vl, stride_sl, stride_cf, frame_tokens, D, log2_scale, scores_keys,
                DTYPE, BLOCK_D, SCALED, ROTATED, BIASED, IMPORTANCE, EMULATE,
            )  # fmt: skip
    nothing = total == 0.0
    share = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + out_at, rounded(share, out.dtype.element_ty, EMULATE), mask=inside)
    sums = tl.where(
        nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * 0.6931471805599453
    )
    tl.store(lse_at, sums, mask=rows < queries)


def attend(
    q_BLHD: torch.Tensor,
    parts: Sequence[Part],
    importance_BHD: torch.Tensor | None = None,
    tiles: Tile | None = None,
) -> Attended:
    """`streamvid.kernels.windowed.windowed_attention`, one launch per part."""
    batch, queries, heads, _ = q_BLHD.shape
    q_BLHD = _rows(q_BLHD)
    lse = q_BLHD.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
    out = torch.zeros_like(q_BLHD, memory_format=torch.contiguous_format) if not parts else q_BLHD
    scored = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        before = out
        out = q_BLHD.new_empty(q_BLHD.shape, dtype=q_BLHD.dtype if last else torch.float32)
        importance = None
        if importance_BHD is not None:
            importance = lse.new_zeros(batch, heads, part.k_BSHD.shape[1])
        _launch(q_BLHD, part, out, lse, before, index > 0, importance_BHD, importance, tiles)
        if importance is not None:
            scored.append(importance.sum(1))
    return Attended(out, lse, scored if importance_BHD is not None else None)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With neighbouring channels in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(q, part: Part, out, lse, before, continued: bool, wanted, importance, tiles: Tile | None) -> None:
    batch, queries, heads, dim = q.shape
    k, v = _rows(part.k_BSHD), _rows(part.v_BSHD)
    scaled, rotated, biased = part.k_scale is not None, part.phase is not None, part.bias is not None
    k_scale, v_scale = (part.k_scale, part.v_scale) if scaled else (lse[..., None], lse[..., None])
    if scaled and k_scale.stride() != v_scale.stride():
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
    cos, sin = (x.contiguous() for x in part.phase) if rotated else (lse, lse)
    turns = heads == 1 or (rotated and cos.shape[1] > 1)  # whether heads turn differently
    bias = part.bias if biased else lse
    runs = part.runs.contiguous()
    step = tiles or tile(dim, q.dtype)
    grid = (triton.cdiv(queries, step.queries), batch * heads)
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        window_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            before,
            runs,
            k_scale,
            v_scale,
            cos,
            sin,
            bias,
            lse if wanted is None else wanted.float().contiguous(),
            lse if importance is None else importance,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *k_scale.stride()[:3],
            runs.stride(0) if runs.ndim == 3 else 0,
            bias.stride(0) if biased and bias.ndim == 2 else 0,
            cos.stride(0),
            cos.stride(1) if turns else 0,
            queries,
            k.shape[1],
            runs.shape[-2],
            part.frame_tokens,
            dim**-0.5 * 1.4426950408889634,
            dim,
            HEADS=heads,
            BLOCK_L=step.queries,
            BLOCK_S=step.keys,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            SCALED=scaled,
            ROTATED=rotated,
            BIASED=biased,
            IMPORTANCE=wanted is not None,
            CONTINUED=continued,
            EMULATE=INTERPRETED,
            num_warps=step.warps,
            num_stages=step.stages,
        )
