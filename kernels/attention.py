"""Attention over `[B, L, H, D]` tensors and the choice of its backend.

Every backend computes the same function as `reference`; which keys are attended is decided by the caller, who passes just
those (or a mask). A backend never ignores an argument: one that cannot serve a call raises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from streamvid.errors import UserError

AttentionFunction = Callable[..., torch.Tensor]


def reference(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """Softmax attention written out: two matrix products. Scores are normalised in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def sdpa(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    if mask is not None and mask.ndim < 2:  # it wants at least [Lq, Lk]
        mask = mask[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


BACKENDS: dict[str, AttentionFunction] = {"sdpa": sdpa, "reference": reference}


def attention_backend(name: str = "auto") -> AttentionFunction:
    """The attention function called `name`; `auto` picks for this machine.

    Each function takes queries `[B, Lq, H, D]`, keys and values `[B, Lk, H, D]` and a mask that broadcasts to
    `[B, H, Lq, Lk]`, boolean (true = attend) or of numbers that are added to the scores, and returns `[B, Lq, H, D]`.
    """
    if name == "auto":
        return sdpa
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"attention backend = {name!r} is not known: choose one of {known}")
    return BACKENDS[name]
