"""The companions of attention as Triton kernels; names, arguments and meaning are those of `streamvid.kernels.companions`.

Every kernel is bound by memory: a program loads some rows of the model width once, computes in float32 and stores them.
Pairs of channels that turn together are split and joined in registers.

In Triton's interpreter a program takes many rows at once, because a program costs it more than a number does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from streamvid.kernels.companions import KeyValue, Meetings
from streamvid.kernels.windowed_triton import INTERPRETED, device_of, rounded, turned

from streamvid.rope import Rotation


def _grid(rows: int, width: int) -> tuple[int, int, int]:
    """Rows of a program, its padded width, its warps: some eight numbers per thread and row."""
    padded = triton.next_power_of_2(width)
    if INTERPRETED:
        return triton.next_power_of_2(min(rows, 64)), padded, 1
    return (4 if padded <= 512 else 1), padded, min(8, max(1, padded // 256))


@triton.jit
def modulated_norm_kernel(
    x, shift, scale, out, stride_xb, stride_xl, stride_tb, stride_tf, stride_cb, stride_cf, length, tokens, eps,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (c < C)[None, :]
    number = tl.load(x + b * stride_xb + row[:, None] * stride_xl + c[None, :], mask=inside, other=0.0)
    number = number.to(tl.float32)
    centred = tl.where(inside, number - tl.sum(number, 1)[:, None] / C, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)[:, None]
    frame = (row // tokens)[:, None]
    factor = tl.load(scale + b * stride_cb + frame * stride_cf + c[None, :], mask=inside, other=0.0)
    added = tl.load(shift + b * stride_tb + frame * stride_tf + c[None, :], mask=inside, other=0.0)
    y = normed * (1 + factor.to(tl.float32)) + added.to(tl.float32)
    at = out + (b * length + row[:, None]) * C + c[None, :]
    tl.store(at, rounded(y, out.dtype.element_ty, EMULATE), mask=inside)


def modulated_norm(x_BLC, shift_BFC, scale_BFC, eps: float) -> torch.Tensor:
    x, shift, scale = (_rows(t) for t in (x_BLC, shift_BFC, scale_BFC))
    batch, length, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, padded, warps = _grid(length, width)
    with device_of(x):
        modulated_norm_kernel[triton.cdiv(length, rows), batch](
            x, shift, scale, out, *x.stride()[:2], *shift.stride()[:2], *scale.stride()[:2], length,
            length // shift.shape[1], eps, C=width, ROWS=rows, WIDTH=padded, EMULATE=INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit
def gated_sum_kernel(
    x, y, gate, out, stride_xb, stride_xl, stride_yb, stride_yl, stride_gb, stride_gf, length, tokens,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (c < C)[None, :]
    old = tl.load(x + b * stride_xb + row[:, None] * stride_xl + c[None, :], mask=inside, other=0.0)
    new = tl.load(y + b * stride_yb + row[:, None] * stride_yl + c[None, :], mask=inside, other=0.0)
    at = gate + b * stride_gb + (row // tokens)[:, None] * stride_gf + c[None, :]
    share = tl.load(at, mask=inside, other=0.0)
    total = old.to(tl.float32) + new.to(tl.float32) * share.to(tl.float32)
    at = out + (b * length + row[:, None]) * C + c[None, :]
    tl.store(at, rounded(total, out.dtype.element_ty, EMULATE), mask=inside)


def gated_sum(x_BLC, y_BLC, gate_BFC) -> torch.Tensor:
    x, y, gate = (_rows(t) for t in (x_BLC, y_BLC, gate_BFC))
    batch, length, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, padded, warps = _grid(length, width)
    with device_of(x):
        gated_sum_kernel[triton.cdiv(length, rows), batch](
            x, y, gate, out, *x.stride()[:2], *y.stride()[:2], *gate.stride()[:2], length, length // gate.shape[1],
            C=width, ROWS=rows, WIDTH=padded, EMULATE=INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit
def _angles(cos, sin, row, stride_l, stride_h, inside, D: tl.constexpr, PAIRS: tl.constexpr):
    """Cosine and sine of every pair of channels of some tokens, `[rows, PAIRS]`."""
    pair = tl.arange(0, PAIRS)
    at = row[:, None] * stride_l + (pair // (D // 2) * stride_h + pair % (D // 2))[None, :]
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _normed(
    x, weight, cos, sin, row, stride_xl, stride_rl, stride_rh, inside, pairs_inside, eps,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """RMS norm of some rows, scaled and turned."""
    c = tl.arange(0, WIDTH)
    number = tl.load(x + row[:, None] * stride_xl + c[None, :], mask=inside, other=0.0).to(tl.float32)
    number *= tl.rsqrt(tl.sum(number * number, 1) / C + eps)[:, None]
    number *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    cosine, sine = _angles(cos, sin, row, stride_rl, stride_rh, pairs_inside, D, WIDTH // 2)
    return turned(number, cosine, sine, ROWS, WIDTH)


@triton.jit
def norm_rotate_write_kernel(
    q, k, v, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, q_out, keys, values, slots,
    stride_qb, stride_ql, stride_kb, stride_kl, stride_vb, stride_vl, stride_sb, stride_sl, stride_tb, stride_tl,
    stride_rl, stride_rh, length, tokens, eps,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    exists = row < length
    inside = exists[:, None] & (c < C)[None, :]
    pairs_inside = exists[:, None] & (tl.arange(0, WIDTH // 2) < C // 2)[None, :]
    query = _normed(
        q + b * stride_qb, q_weight, q_cos, q_sin, row, stride_ql, stride_rl, stride_rh, inside, pairs_inside, eps,
        C, D, ROWS, WIDTH,
    )  # fmt: skip
    at = q_out + (b * length + row[:, None]) * C + c[None, :]
    tl.store(at, rounded(query, q_out.dtype.element_ty, EMULATE), mask=inside)
    slot = tl.load(slots + row // tokens, mask=exists, other=-1)
    written = inside & (slot >= 0)[:, None]
    to = (slot * tokens + row % tokens).to(tl.int64)[:, None]
    key = _normed(
        k + b * stride_kb, k_weight, k_cos, k_sin, row, stride_kl, stride_rl, stride_rh, inside, pairs_inside, eps,
        C, D, ROWS, WIDTH,
    )  # fmt: skip
    at = keys + b * stride_sb + to * stride_sl + c[None, :]
    tl.store(at, rounded(key, keys.dtype.element_ty, EMULATE), mask=written)
    value = tl.load(v + b * stride_vb + row[:, None] * stride_vl + c[None, :], mask=inside, other=0.0)
    at = values + b * stride_tb + to * stride_tl + c[None, :]
    tl.store(at, rounded(value.to(tl.float32), values.dtype.element_ty, EMULATE), mask=written)


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
    q, k, v = (_rows(t) for t in (q_BLC, k_BLC, v_BLC))
    keys, values = into
    batch, length, width = q.shape
    heads, dim = keys.shape[2:]
    out = torch.empty(batch, length, heads, dim, dtype=q.dtype, device=q.device)
    angles = [x.contiguous() for turn in turns for x in turn]
    rows, padded, warps = _grid(length, width)
    with device_of(q):
        norm_rotate_write_kernel[triton.cdiv(length, rows), batch](
            q, k, v, *weights, *angles, out, keys, values, slots,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
            angles[0].stride(0), _head_stride(angles[0], heads), length, length // len(slots), eps,
            C=width, D=dim, ROWS=rows, WIDTH=padded, EMULATE=INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit
def fuse_sink_kernel(
    average_k, average_v, mixed_k, mixed_v, evicted_k, evicted_v, stored_k, stored_v,
    starts, evicted, shares, back_cos, back_sin, cos, sin, placed,
    stride_an, stride_ab, stride_al, stride_en, stride_eb, stride_el, stride_sn, stride_sb, stride_sl,
    stride_bl, stride_bh, stride_rl, stride_rh, batch, tokens,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MIXED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sink frame, in one layer of one video."""
    KIND: tl.constexpr = average_k.dtype.element_ty
    sink = tl.program_id(1)
    n = (tl.program_id(2) // batch).to(tl.int64)
    b = (tl.program_id(2) % batch).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    inside = (row < tokens)[:, None] & (c < C)[None, :]
    pairs_inside = (row < tokens)[:, None] & (tl.arange(0, WIDTH // 2) < C // 2)[None, :]
    own = sink * tokens + row
    at = n * stride_an + b * stride_ab + own[:, None] * stride_al + c[None, :]
    key = tl.load(average_k + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(average_v + at, mask=inside, other=0.0).to(tl.float32)
    if MIXED:
        for meeting in range(tl.load(starts + sink), tl.load(starts + sink + 1)):
            old = tl.load(shares + (meeting * batch + b) * 2)
            new = tl.load(shares + (meeting * batch + b) * 2 + 1)
            token = tl.load(evicted + meeting) * tokens + row
            out = n * stride_en + b * stride_eb + token[:, None] * stride_el + c[None, :]
            gone = tl.load(evicted_k + out, mask=inside, other=0.0).to(tl.float32)
            cosine, sine = _angles(
                back_cos, back_sin, meeting * tokens + row, stride_bl, stride_bh, pairs_inside, D, WIDTH // 2
            )
            gone = rounded(turned(gone, cosine, sine, ROWS, WIDTH), KIND, EMULATE).to(tl.float32)
            key = rounded(key * old, KIND, EMULATE).to(tl.float32) + gone * new
            key = rounded(key, KIND, EMULATE).to(tl.float32)
            gone = tl.load(evicted_v + out, mask=inside, other=0.0).to(tl.float32)
            value = rounded(value * old, KIND, EMULATE).to(tl.float32) + gone * new
            value = rounded(value, KIND, EMULATE).to(tl.float32)
        tl.store(mixed_k + at, rounded(key, mixed_k.dtype.element_ty, EMULATE), mask=inside)
        tl.store(mixed_v + at, rounded(value, mixed_v.dtype.element_ty, EMULATE), mask=inside)
    shown = inside & (tl.load(placed + sink) != 0)
    cosine, sine = _angles(cos, sin, own, stride_rl, stride_rh, pairs_inside, D, WIDTH // 2)
    key = turned(key, cosine, sine, ROWS, WIDTH)
    at = n * stride_sn + b * stride_sb + own[:, None] * stride_sl + c[None, :]
    tl.store(stored_k + at, rounded(key, stored_k.dtype.element_ty, EMULATE), mask=shown)
    tl.store(stored_v + at, rounded(value, stored_v.dtype.element_ty, EMULATE), mask=shown)


def fuse_sink(
    average: KeyValue, meetings: Meetings | None, stored: KeyValue, at: Rotation, placed: Sequence[bool]
) -> None:
    layers, batch, length, heads, dim = average[0].shape
    tokens = length // len(placed)
    angles = [x.contiguous() for x in at]
    met = meetings or Meetings(average, average, (), (), angles[0], at)  # a stand-in that is not read
    starts, evicted, shown = (
        torch.tensor(list(numbers), dtype=torch.int32, device=angles[0].device)
        for numbers in (met.starts, met.evicted, placed)
    )
    back = [x.contiguous() for x in met.back]
    rows, padded, warps = _grid(tokens, heads * dim)
    with device_of(average[0]):
        fuse_sink_kernel[triton.cdiv(tokens, rows), len(placed), layers * batch](
            *average, *met.mixed, *met.buffer, *stored, starts, evicted, met.shares, *back, *angles, shown,
            *average[0].stride()[:3], *met.buffer[0].stride()[:3], *stored[0].stride()[:3],
            back[0].stride(0), _head_stride(back[0], heads), angles[0].stride(0), _head_stride(angles[0], heads),
            batch, tokens, C=heads * dim, D=dim, ROWS=rows, WIDTH=padded, MIXED=meetings is not None,
            EMULATE=INTERPRETED, num_warps=warps,
        )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With neighbouring channels in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _head_stride(angles: torch.Tensor, heads: int) -> int:
    """0 where one rotation holds for all heads."""
    return angles.stride(1) if angles.shape[1] == heads > 1 else 0
