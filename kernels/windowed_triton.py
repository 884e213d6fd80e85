"""Windowed attention as one Triton kernel; its twin in PyTorch is `streamvid.kernels.windowed.reference`.

A program takes a tile of queries of one head through all runs of keys with an online softmax (flash attention). Every option
is compiled in or out. Inference only: there is no gradient.

With TRITON_INTERPRET=1 at the first import the kernel runs in Triton's interpreter on the CPU. That one truncates where
hardware rounds to bfloat16 and cannot multiply bfloat16 matrices, so there numbers are rounded by hand and kept in float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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


def tile(dim: int, dtype: torch.dtype, rotated: bool = False) -> Tile:
    """Tile for a head dimension and dtype; `benchmarks/attention.py --tune` tries others.

    Chosen without a GPU by what the compiler says for sm_90: no spilled register, at most 227 KB of shared memory. Angles
    are loaded ahead too, so rotated keys leave room for fewer steps.
    """
    if INTERPRETED:
        return Tile(32, 32, 1, 1)
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2)
    return Tile(128, 64, 4 if dim <= 64 else 8, 2 if rotated else 3)


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
def turned(x, c, s, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of channels, every pair (even, odd) turned."""
    even, odd = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROWS, WIDTH])


@triton.jit
def _key(
    k, tokens, frame, valid, cos, sin, stride_kl, stride_cf,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Some keys of one head as they are stored, or turned in float32."""
    d = tl.arange(0, BLOCK_D)
    at = tokens.to(tl.int64)[:, None] * stride_kl + d[None, :]
    key = tl.load(k + at, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if ROTATED:
        pair = tl.arange(0, BLOCK_D // 2)
        at = frame[:, None] * stride_cf + pair[None, :]
        inside = valid[:, None] & (pair < D // 2)[None, :]
        c = tl.load(cos + at, mask=inside, other=0.0)
        s = tl.load(sin + at, mask=inside, other=0.0)
        key = turned(key.to(tl.float32), c, s, BLOCK_S, BLOCK_D)
    return key


@triton.jit
def _step(
    acc, top, total, q, tokens, valid, k, v, k_scale, v_scale, cos, sin, bias, gain,
    stride_kl, stride_vl, stride_sl, stride_cf, frame_tokens, log2_scale,
    DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    SCALED: tl.constexpr, ROTATED: tl.constexpr, BIASED: tl.constexpr, GAINED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum `top` (base 2), sum `total` and unnormalised output `acc`."""
    d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (d < D)[None, :]
    frame = tokens // frame_tokens
    key = _key(k, tokens, frame, valid, cos, sin, stride_kl, stride_cf, D, BLOCK_S, BLOCK_D, ROTATED)
    value = tl.load(v + tokens.to(tl.int64)[:, None] * stride_vl + d[None, :], mask=inside, other=0.0)
    if SCALED:
        at = tokens * stride_sl
        value = value.to(tl.float32) * tl.load(v_scale + at, mask=valid, other=0.0)[:, None]
    if ROTATED or SCALED or EMULATE:
        key = rounded(key.to(tl.float32), DTYPE, EMULATE)
        value = rounded(value.to(tl.float32), DTYPE, EMULATE)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * log2_scale
    if SCALED:
        scores *= tl.load(k_scale + at, mask=valid, other=0.0)[None, :]
    if GAINED:
        scores *= tl.load(gain + frame, mask=valid, other=0.0)[None, :]
    if BIASED:
        scores += (tl.load(bias + frame, mask=valid, other=0.0) * 1.4426950408889634)[None, :]
    if TAIL:
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
    q, k, v, out, lse, before, runs, k_scale, v_scale, cos, sin, bias, gain,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_sb, stride_sl, stride_sh, stride_rb, stride_bb, stride_gb, stride_cf, stride_ch,
    queries, run_count, frame_tokens, log2_scale,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr, ROTATED: tl.constexpr, BIASED: tl.constexpr, GAINED: tl.constexpr,
    CONTINUED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
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
    gain += b * stride_gb
    runs += b * stride_rb
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
        whole = count // BLOCK_S * BLOCK_S
        for TAIL in tl.static_range(2):  # tiles that are full ask no question of their keys
            for start in range(whole * TAIL, whole + (count - whole) * TAIL, BLOCK_S):
                column = start + tl.arange(0, BLOCK_S)
                valid = column < count if TAIL else tl.full([BLOCK_S], True, tl.int1)
                acc, top, total = _step(
                    acc, top, total, q_tile, first + column, valid, k, v, k_scale, v_scale, cos, sin, bias, gain,
                    stride_kl, stride_vl, stride_sl, stride_cf, frame_tokens, log2_scale,
                    DTYPE, D, BLOCK_S, BLOCK_D, TAIL, SCALED, ROTATED, BIASED, GAINED, EMULATE,
                )  # fmt: skip
    nothing = total == 0.0
    share = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + out_at, rounded(share, out.dtype.element_ty, EMULATE), mask=inside)
    sums = tl.where(
        nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * 0.6931471805599453
    )
    tl.store(lse_at, sums, mask=rows < queries)


@triton.jit
def importance_kernel(
    wanted, k, runs, k_scale, cos, sin, importance,
    stride_kb, stride_kl, stride_kh, stride_sb, stride_sl, stride_sh, stride_rb, stride_cf, stride_ch,
    stored, run_count, frame_tokens,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Some tiles of keys of one video, every run dealt out among the programs. `wanted` is `[B, H, D]`."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    for run in range(run_count):
        first = tl.load(runs + b * stride_rb + 2 * run)
        count = tl.load(runs + b * stride_rb + 2 * run + 1)
        for start in range(tl.program_id(0) * BLOCK_S, count, tl.num_programs(0) * BLOCK_S):
            column = start + tl.arange(0, BLOCK_S)
            valid = column < count
            tokens = first + column
            product = tl.zeros([BLOCK_S], tl.float32)
            for h in range(HEADS):
                key = _key(
                    k + b * stride_kb + h * stride_kh, tokens, tokens // frame_tokens, valid,
                    cos + h * stride_ch, sin + h * stride_ch, stride_kl, stride_cf, D, BLOCK_S, BLOCK_D, ROTATED,
                )  # fmt: skip
                row = tl.load(wanted + (b * HEADS + h) * D + d, mask=d < D, other=0.0)
                of_head = tl.sum(key.to(tl.float32) * row[None, :], 1)
                if SCALED:
                    at = k_scale + b * stride_sb + h * stride_sh + tokens * stride_sl
                    of_head *= tl.load(at, mask=valid, other=0.0)
                product += of_head
            tl.store(importance + b * stored + tokens, product, mask=valid)


def attend(q_BLHD: torch.Tensor, parts: Sequence[Part], tiles: Tile | None = None) -> Attended:
    """`streamvid.kernels.windowed.windowed_attention`, one launch per part, each going on from the one before."""
    batch, queries, heads, _ = q_BLHD.shape
    q_BLHD = _rows(q_BLHD)
    lse = q_BLHD.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
    out = torch.zeros(q_BLHD.shape, dtype=q_BLHD.dtype, device=q_BLHD.device) if not parts else q_BLHD
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        before, out = (
            out,
            q_BLHD.new_empty(q_BLHD.shape, dtype=q_BLHD.dtype if last else torch.float32),
        )
        step = tiles or tile(q_BLHD.shape[-1], q_BLHD.dtype, part.phase is not None)
        _attend_part(q_BLHD, part, out, lse, before, index > 0, step)
    return Attended(out, lse)


def _attend_part(q, part: Part, out, lse, before, continued: bool, step: Tile) -> None:
    batch, queries, heads, dim = q.shape
    k, v, facts = _rows(part.k_BSHD), _rows(part.v_BSHD), _facts(part, lse)
    bias, gain = (lse if x is None else x for x in (part.bias, part.gain))
    with device_of(q):
        window_kernel[triton.cdiv(queries, step.queries), batch * heads](
            q, k, v, out, lse, before, facts.runs, facts.k_scale, facts.v_scale, facts.cos, facts.sin, bias, gain,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *facts.k_scale.stride()[:3], facts.stride_rb,
            _batch_stride(part.bias), _batch_stride(part.gain), facts.cos.stride(0), facts.stride_ch,
            queries, facts.runs.shape[-2], part.frame_tokens, dim**-0.5 * 1.4426950408889634,
            D=dim, HEADS=heads, BLOCK_L=step.queries, BLOCK_S=step.keys, BLOCK_D=max(16, triton.next_power_of_2(dim)),
            SCALED=part.k_scale is not None, ROTATED=part.phase is not None, BIASED=part.bias is not None,
            GAINED=part.gain is not None, CONTINUED=continued, EMULATE=INTERPRETED,
            num_warps=step.warps, num_stages=step.stages,
        )  # fmt: skip


def importance(queries_BHD: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """`streamvid.kernels.windowed.key_importance`, one launch per part."""
    batch, heads, dim = queries_BHD.shape
    wanted, found = queries_BHD.float().contiguous(), []
    for part in parts:
        k, facts = _rows(part.k_BSHD), _facts(part, wanted)
        products = wanted.new_zeros(batch, k.shape[1])
        tiles = triton.cdiv(k.shape[1], 32)
        with device_of(wanted):
            importance_kernel[1 if INTERPRETED else tiles, batch](
                wanted, k, facts.runs, facts.k_scale, facts.cos, facts.sin, products,
                *k.stride()[:3], *facts.k_scale.stride()[:3], facts.stride_rb, facts.cos.stride(0), facts.stride_ch,
                k.shape[1], facts.runs.shape[-2], part.frame_tokens, D=dim, HEADS=heads, BLOCK_S=32,
                BLOCK_D=max(16, triton.next_power_of_2(dim)), SCALED=part.k_scale is not None,
                ROTATED=part.phase is not None,
            )  # fmt: skip
        found.append(products)
    return found


class _Facts(NamedTuple):
    """Of a part, as both kernels read it; tensors that are not there have a stand-in that is not read."""

    runs: torch.Tensor
    stride_rb: int
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    stride_ch: int


def _facts(part: Part, stand_in: torch.Tensor) -> _Facts:
    runs = part.runs.contiguous()
    k_scale, v_scale = part.k_scale, part.v_scale
    if k_scale is None or v_scale is None:
        k_scale = v_scale = stand_in[..., None]
    elif k_scale.stride() != v_scale.stride():
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
    cos = sin = stand_in
    turns = False  # whether heads turn differently
    if part.phase is not None:
        cos, sin = (x.contiguous() for x in part.phase)
        turns = cos.shape[1] > 1
    by_video = runs.stride(0) if runs.ndim == 3 else 0
    return _Facts(runs, by_video, k_scale, v_scale, cos, sin, cos.stride(1) if turns else 0)


def _batch_stride(rows: torch.Tensor | None) -> int:
    return rows.stride(0) if rows is not None and rows.ndim == 2 else 0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With neighbouring channels in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
