"""Attention functions of PyTorch and of libraries: siblings of one signature.

    o_BLHD = function(q_BLHD, k_BLHD, v_BLHD, mask=None)

Beside those that not every machine or call can have stand `NAME_missing()` and `NAME_refuses(q, k, v, mask)`: why not, as
the rest of a sentence, or None.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

AttentionFunction = Callable[..., torch.Tensor]


def reference(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """Softmax attention written out: two matrix products. Scores and their sums are float32, of float64 tensors float64."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(precise) @ k.to(precise).transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def sdpa(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    if mask is not None and mask.ndim < 2:  # it wants at least [Lq, Lk]
        mask = mask[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def flex(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """PyTorch's `flex_attention`, with the mask as its score function; on CUDA compiled into one kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    change = None
    if mask is not None:
        table = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

        def change(score, batch, head, query, key):
            entry = table[batch, head, query, key]
            return torch.where(entry, score, float("-inf")) if table.dtype == torch.bool else score + entry

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return _flex(q.is_cuda)(q, k, v, score_mod=change).transpose(1, 2)


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


# --- libraries that have to be installed ------------------------------------------------------------------------------


@cache
def found(module: str) -> bool:
    """Whether a module can be imported; one that is installed for another PyTorch cannot."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def _gpu_library(module: str, package: str) -> str | None:
    if not found(module):
        return f"needs the package {package}, which cannot be imported: pip install {package}"
    return None if torch.cuda.is_available() else "needs a CUDA device, and PyTorch finds none: choose sdpa"


def _half_on_gpu(q, mask, largest_head: int) -> str | None:
    if mask is not None:
        return "cannot attend with a mask or bias"
    if not q.is_cuda:
        return f"runs on CUDA and the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not in {str(q.dtype).removeprefix('torch.')}"
    return None if q.shape[-1] <= largest_head else f"has heads of at most {largest_head} channels"


# generation of flash attention -> the module that has it, the package, the least CUDA capability it is made for
FLASH = {
    4: ("flash_attn.cute", "flash-attn-4", (10, 0)),
    3: ("flash_attn_interface", "flash-attn-3", (9, 0)),
    2: ("flash_attn", "flash-attn", (8, 0)),
}


def flash_generation() -> int | None:
    """The newest generation that is installed and made for this device; 3 is for Hopper alone."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    for generation, (module, _, least) in FLASH.items():
        if capability >= least and not (generation == 3 and capability[0] != 9) and found(module):
            return generation
    return None


def flash_missing() -> str | None:
    if not torch.cuda.is_available():
        return _gpu_library("flash_attn", "flash-attn") or "needs a CUDA device"
    if flash_generation() is None:
        return "needs flash attention for this device, which cannot be imported: pip install flash-attn"
    return None


def flash_refuses(q, k, v, mask=None) -> str | None:
    return _half_on_gpu(q, mask, 256)


def flash(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """Flash attention 2, 3 or 4 (arXiv 2307.08691, 2407.08608)."""
    module, *_ = FLASH[flash_generation() or 2]
    output = importlib.import_module(module).flash_attn_func(q_BLHD, k_BLHD, v_BLHD)
    return output[0] if isinstance(output, tuple) else output  # 3 and 4 may return the log-sum-exp too


def sage_missing() -> str | None:
    return _gpu_library("sageattention", "sageattention")


def sage_refuses(q, k, v, mask=None) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no gradient"
    return _half_on_gpu(q, mask, 128)


def sage(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """SageAttention (arXiv 2410.02367): scores from INT8 keys and queries, so approximate."""
    return importlib.import_module("sageattention").sageattn(
        q_BLHD, k_BLHD, v_BLHD, tensor_layout="NHD", is_causal=False
    )


def xformers_missing() -> str | None:
    return _gpu_library("xformers.ops", "xformers")


def xformers_refuses(q, k, v, mask=None) -> str | None:
    return None if q.is_cuda else f"runs on CUDA and the tensors are on {q.device}"


def xformers(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """xFormers' memory-efficient attention."""
    bias = None
    if mask is not None:
        batch, queries, heads, _ = q_BLHD.shape
        keys = k_BLHD.shape[1]
        # its kernels want rows that start at multiples of 8 numbers
        bias = q_BLHD.new_zeros(batch, heads, queries, -(-keys // 8) * 8)[..., :keys]
        if mask.dtype == torch.bool:
            bias.masked_fill_(~mask, float("-inf"))
        else:
            bias.add_(mask)
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    return attend(q_BLHD, k_BLHD, v_BLHD, attn_bias=bias)
