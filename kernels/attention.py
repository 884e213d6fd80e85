"""Attention over `[B, L, H, D]` tensors and the choice of its backend.

Every backend computes the same function as `reference`; which keys are attended is decided by the caller, who passes just
those (or a mask). A backend never ignores an argument: one that cannot serve a call says why.

| name | runs on | masks | install |
|---|---|---|---|
| sdpa | everything | any | part of PyTorch |
| tiled | CPU, bfloat16 | none | part of PyTorch (streamvid.kernels.tiled) |
| flex | CPU (unfused), CUDA (compiled) | any | part of PyTorch |
| triton | CUDA, ROCm; CPU in Triton's interpreter | of keys | `streamvid[kernels]` (streamvid.kernels.windowed) |
| flash | CUDA, half precision | none | flash-attn 2, 3 (Hopper) or 4 (Blackwell) |
| sage | CUDA, half precision, approximate (INT8) | none | sageattention |
| xformers | CUDA | any | `streamvid[xformers]` |
| reference | everything | any | written out in PyTorch |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from streamvid.kernels import libraries, windowed
from streamvid.kernels.libraries import AttentionFunction, reference, sdpa
from streamvid.kernels.tiled import tiled, tiled_missing, tiled_pays, tiled_refuses

from streamvid.errors import UserError

__all__ = ["AUTO", "BACKENDS", "Backend", "attention_backend", "disable", "reference", "sdpa", "unavailable"]


def _never(*arguments) -> None:
    return None


def _always(*arguments) -> bool:
    return True


class Backend(NamedTuple):
    """An attention function and what it cannot do.

    Attributes:
        attend: the function (see `attention_backend`).
        missing: why it cannot run on this machine and what to install, or None.
        refuses: `(q, k, v, mask)` to why it cannot serve this call, or None.
        slack: error in shares of the largest output that belongs to the method itself (more roundings).
        pays: `(q, k, v, mask)` to whether `auto` should take it for this call.
    """

    attend: AttentionFunction
    missing: Callable[[], str | None] = _never
    refuses: Callable[..., str | None] = _never
    slack: float = 0.0
    pays: Callable[..., bool] = _always


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(sdpa),
    # beside weights and outputs it rounds the scaled query
    "tiled": Backend(tiled, tiled_missing, tiled_refuses, slack=2**-9, pays=tiled_pays),
    "flex": Backend(libraries.flex),
    "triton": Backend(windowed.dense, windowed.dense_missing, windowed.dense_refuses),
    "flash": Backend(libraries.flash, libraries.flash_missing, libraries.flash_refuses),
    "sage": Backend(libraries.sage, libraries.sage_missing, libraries.sage_refuses, slack=0.05),
    "xformers": Backend(libraries.xformers, libraries.xformers_missing, libraries.xformers_refuses),
    "reference": Backend(reference),
}

# what `auto` tries, in this order
AUTO = {
    "cpu": ("tiled", "sdpa", "reference"),
    "cuda": ("flash", "sdpa", "reference"),
    "cuda with a mask": ("sdpa", "reference"),
}

_disabled: dict[str, str] = {}  # name -> why; for the life of the process


def disable(name: str, reason: str) -> None:
    """Take a backend out: it was seen to compute something wrong (streamvid.kernels.check)."""
    _disabled[name] = reason


def unavailable(name: str) -> str | None:
    """Why the backend called `name` cannot be used here and what to install, or None."""
    return _disabled.get(name) or BACKENDS[name].missing()


def attention_backend(name: str = "auto") -> AttentionFunction:
    """The attention function called `name`; `auto` picks by device and problem, call by call.

    Each function takes queries `[B, Lq, H, D]`, keys and values `[B, Lk, H, D]` and a mask that broadcasts to
    `[B, H, Lq, Lk]`, boolean (true = attend) or of numbers that are added to the scores, and returns `[B, Lq, H, D]`.

    Raises:
        UserError: there is no such backend, or it cannot be used here; a call of the function: it cannot serve this call.
    """
    if name == "auto":
        return auto
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"attention backend = {name!r} is not known: choose one of {known}")
    reason = unavailable(name)
    if reason:
        raise UserError(f"attention backend = {name} {reason}")
    backend = BACKENDS[name]
    return backend.attend if backend.refuses is _never else partial(_forced, name)


def _forced(name: str, q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    reason = BACKENDS[name].refuses(q_BLHD, k_BLHD, v_BLHD, mask)
    if reason:
        raise UserError(f"attention backend = {name} {reason}: choose another, or auto")
    return BACKENDS[name].attend(q_BLHD, k_BLHD, v_BLHD, mask)


def auto(q_BLHD, k_BLHD, v_BLHD, mask=None) -> torch.Tensor:
    """The first backend of `AUTO` that can serve the call and pays."""
    return BACKENDS[chosen(q_BLHD, k_BLHD, v_BLHD, mask)].attend(q_BLHD, k_BLHD, v_BLHD, mask)


def chosen(q_BLHD, k_BLHD, v_BLHD, mask=None) -> str:
    """Name of the backend that `auto` takes."""
    kind = "cpu" if not q_BLHD.is_cuda else "cuda" if mask is None else "cuda with a mask"
    call = q_BLHD, k_BLHD, v_BLHD, mask
    for name in AUTO[kind]:
        backend = BACKENDS[name]
        if backend.pays(*call) and unavailable(name) is None and backend.refuses(*call) is None:
            return name
    raise UserError("attention backend = auto has none left: see `streamvid kernels check`")
