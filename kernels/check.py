"""Attention backends against the reference in float64, on this machine: `streamvid kernels check`.

A backend may be off by 1e-5 of the largest output in float32, and in half precision by twice what PyTorch's own attention is
off (one rounding of the weights and one of the output at least), beside its declared slack. One that is further off is
disabled for the process.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from streamvid.kernels.attention import AUTO, BACKENDS, disable, reference, unavailable

from streamvid.errors import UserError

# batch, queries, keys, heads, channels of a head, what the mask tells apart
PROBLEMS: dict[str, tuple[int, int, int, int, int, str]] = {
    "first block": (1, 24, 24, 2, 64, ""),
    "window": (2, 33, 75, 2, 128, ""),
    "dead keys": (2, 24, 70, 1, 24, "dead keys"),
    "bias on keys": (1, 24, 70, 2, 64, "bias on keys"),
    "queries and keys": (1, 40, 40, 2, 32, "queries and keys"),
}
# a block of 3 frames against a window of 12: at 480 x 832 on a GPU, something that a CPU does at once elsewhere
TIMED = {"cuda": (1, 4680, 18720, 12, 128), "cpu": (1, 192, 768, 4, 64)}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Check(NamedTuple):
    """What became of one backend.

    Attributes:
        verdict: right, wrong, or not here.
        error, allowed: the worst problem's, in shares of the largest output.
        milliseconds: of the timed problem, None where it was not timed.
        note: why it is not here, what it refuses, what is wrong.
    """

    name: str
    verdict: str
    error: float = 0.0
    allowed: float = 0.0
    milliseconds: float | None = None
    note: str = ""


def tensors(shape: Sequence[int], mask: str, device, dtype) -> tuple[Any, ...]:
    """Queries, keys, values and mask of a problem."""
    batch, queries, keys, heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q, k, v = normal(batch, queries, heads, dim), *(normal(batch, keys, heads, dim) for _ in range(2))
    made = {
        "": lambda: None,
        "dead keys": lambda: torch.arange(keys, device=device) % 5 > 1,
        "bias on keys": lambda: normal(keys),
        "queries and keys": lambda: torch.ones(queries, keys, dtype=torch.bool, device=device).tril(),
    }
    return q, k, v, made[mask]()


def relative_error(name: str, problem: Sequence[Any]) -> float:
    """Largest difference to float64, in shares of the largest output; infinite where there is no number or no result."""
    q, k, v, mask = problem
    wide = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    exact = reference(q.double(), k.double(), v.double(), wide)
    try:
        difference = BACKENDS[name].attend(q, k, v, mask).double() - exact
    except Exception as error:  # whatever a foreign library throws, the backend does not work here
        warnings.warn(f"attention backend = {name}: {type(error).__name__}: {error}", stacklevel=2)
        return float("inf")
    off = float(difference.abs().amax() / exact.abs().amax())
    return off if off == off else float("inf")


def check_backend(name: str, device, dtype: torch.dtype, timed: bool = True) -> Check:
    """Compare one backend with the reference on all problems that it does not refuse, and disable it if it is wrong."""
    reason = unavailable(name)
    if reason:
        return Check(name, "not here", note=reason)
    refused, worst = [], (0.0, 0.0, "")
    for label, (*shape, mask) in PROBLEMS.items():
        problem = tensors(shape, mask, device, dtype)
        if BACKENDS[name].refuses(*problem):
            refused.append(label)
            continue
        baseline = 0.0 if name in ("sdpa", "reference") else 2 * relative_error("sdpa", problem)
        allowed = max(ROUNDING[dtype], baseline if baseline < 0.1 else 0.0) + BACKENDS[name].slack
        error = relative_error(name, problem)
        if error / allowed >= worst[0]:
            worst = (error / allowed, allowed, label)
    note = f"refuses {', '.join(refused)}" if refused else ""
    if len(refused) == len(PROBLEMS):
        return Check(name, "not here", note=str(BACKENDS[name].refuses(*problem)))
    share, allowed, label = worst
    if share > 1:
        note = f"{label}: off by {share * allowed:.1e} of the largest output, allowed {allowed:.1e}"
        disable(name, f"is disabled, it computes something wrong here ({note}): choose another, or auto")
        return Check(name, "wrong", share * allowed, allowed, note=note)
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    spent = milliseconds(name, device, dtype) if timed and not interpreted else None
    return Check(name, "right", share * allowed, allowed, spent, note)


def milliseconds(name: str, device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Of the timed problem, the fastest of some runs."""
    kind = torch.device(device).type
    problem = tensors(TIMED.get(kind, TIMED["cpu"]), "", device, dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        BACKENDS[name].attend(*problem)
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best * 1000


def check_all(device, dtype: torch.dtype, timed: bool = True) -> Iterator[Check]:
    """Every backend, one after the other."""
    for name in BACKENDS:
        yield check_backend(name, device, dtype, timed)


def verify(name: str, device, dtype: torch.dtype) -> None:
    """Before a run: compare the backend called `name`, or all that `auto` may take, with the reference.

    Raises:
        UserError: the backend named is wrong. One of `auto`'s that is wrong is left out, with a warning.
    """
    for each in dict.fromkeys(sum(AUTO.values(), ())) if name == "auto" else [name]:
        result = check_backend(each, device, dtype, timed=False)
        if result.verdict == "wrong":
            told = f"attention backend = {each} {unavailable(each)}"
            if name != "auto":
                raise UserError(told)
            warnings.warn(told, stacklevel=2)


def report(results: Sequence[Check], device, dtype: torch.dtype) -> str:
    """A table of all results."""
    lines = [f"attention on {device} in {str(dtype).removeprefix('torch.')}, against float64"]
    lines.append(f"  {'backend':10} {'':9} {'error':>8} {'allowed':>8} {'ms':>9}")
    for result in results:
        numbers = f"{result.error:8.1e} {result.allowed:8.1e}" if result.verdict != "not here" else " " * 17
        spent = "" if result.milliseconds is None else f"{result.milliseconds:.2f}"
        lines.append(f"  {result.name:10} {result.verdict:9} {numbers} {spent:>9}  {result.note}".rstrip())
    return "\n".join(lines)
