"""Attention in bfloat16 on a CPU, tile by tile, made of oneDNN's matrix products: for large windows.

PyTorch's own attention for CPUs reaches a third of the rate of a large product: its scores leave the product before they
become weights. Here both happen in one. oneDNN can apply the logistic function within a product, in float32, and below -8 it
is the exponential function for all that bfloat16 can tell: `1 / (1 + exp(-x)) = exp(x) (1 - exp(x) + ...)`. A softmax may
subtract any number from all scores of a query, and the one subtracted here, the product's bias, leaves them below -8. So
keys are the rows of a product and queries its columns; neither scores nor a running maximum are ever written.

No score is larger than the norms of its query and key allow. Heads in which that may be too much for this, because small
weights would underflow or the rounding of a scaled query would tell, are left to PyTorch.
"""

from __future__ import annotations

import math

import torch
from streamvid.kernels.libraries import sdpa

QUERIES, KEYS = 400, 2048  # at most, of a tile: as measured; its weights, 1.6 MB, stay in a cache
BELOW = 8.0  # exp(-8) is less than half a unit of bfloat16's last place
# Scores lie between plus and minus the bound, so a query's largest is above -2 bound - BELOW: far from -87, the logarithm of
# the smallest normal number.
LARGEST = 30.0
# Of heads whose scale is no power of two, in shares of sqrt(D), where unit RMS norms are 1: up to here another rounding of
# the query, times the scale, leaves the error below twice that of rounding weights and outputs.
LARGEST_ROUNDED = 2.0


def tiled_missing() -> str | None:
    if torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported():
        return None
    return "needs a CPU with products in bfloat16 (AVX512-BF16) and a PyTorch with oneDNN: choose sdpa"


def tiled_refuses(q, k, v, mask=None) -> str | None:
    if mask is not None:
        return "cannot attend with a mask or bias"
    if q.device.type != "cpu":
        return f"runs on the CPU and the tensors are on {q.device}"
    if q.dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {str(q.dtype).removeprefix('torch.')}"
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return "has no gradient" if graded else None


def tiled_pays(q, k, v, mask=None) -> bool:
    """Whether it is faster than PyTorch's attention (`python -m benchmarks.attention --tiled`)."""
    return k.shape[1] >= 1024 and q.shape[1] * k.shape[1] * q.shape[-1] >= 2**27


def tiled(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """Softmax attention over all keys."""
    out_BLHD = torch.empty_like(q_BLHD)
    for batch in range(q_BLHD.shape[0]):
        for head in range(q_BLHD.shape[2]):
            here = slice(batch, batch + 1), slice(None), slice(head, head + 1)
            query, key, value, out = (x[here] for x in (q_BLHD, k_BLHD, v_BLHD, out_BLHD))
            if not _one_head(*(x[0, :, 0] for x in (query, key, value, out))):
                out.copy_(sdpa(query, key, value))
    return out_BLHD


def _one_head(query_LD, key_SD, value_SD, out_LD) -> bool:
    """Attend into `out_LD`, unless scores may be too large for it."""
    scale = query_LD.shape[-1] ** -0.5
    exact = math.log2(scale).is_integer()
    bound_L = scale * _norms(query_LD) * _norms(key_SD).amax()
    if not float(bound_L.amax()) <= min(LARGEST, math.inf if exact else LARGEST_ROUNDED / scale):
        return False
    bias_L = -(1.01 * bound_L + BELOW).bfloat16()  # rounding, too, stays below
    keys = [key.contiguous() for key in _tiles(key_SD, KEYS)]
    values = [value.T.contiguous() for value in _tiles(value_SD, KEYS)]
    for query, bias, out in zip(*(_tiles(x, QUERIES) for x in (query_LD, bias_L, out_LD)), strict=True):
        out.copy_(_tile(query * scale, keys, values, bias).T)
    return True


def _norms(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _tiles(x: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    """Rows in tiles of about the same size: products like multiples of 16."""
    each = -(-len(x) // -(-len(x) // most))
    return x.split(-(-each // 16) * 16)


def _tile(query_LD, keys, values, bias_L) -> torch.Tensor:
    """Attention `[D, L]` of scaled queries over tiles of keys `[S, D]` and values `[D, S]`."""
    attended = total = torch.zeros(1)
    for key, value in zip(keys, values, strict=True):
        weight_SL = torch.ops.mkldnn._linear_pointwise(key, query_LD, bias_L, "sigmoid", [], "")
        # several sums: each is rounded, so that together they are nearer than one
        total = total + torch.stack([some.sum(0) for some in weight_SL.chunk(8)]).sum(0, dtype=torch.float32)
        attended = attended + (value @ weight_SL).float()
    return attended / total
