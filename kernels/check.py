"""Attention backends and fused kernels against PyTorch in float64, on this machine: `streamvid kernels check`.

A backend may be off by 1e-5 of the largest output in float32, and in half precision by twice what PyTorch's own attention is
off (one rounding of the weights and one of the output at least), beside its declared slack; a fused kernel by twice what its
twin is. One that is further off is disabled for the process: a backend is an error then, a kernel is replaced by its twin.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from streamvid.kernels import companions
from streamvid.kernels.attention import AUTO, BACKENDS, disable, reference, unavailable
from streamvid.kernels.companions import PLAIN, Companions
from streamvid.kernels.problems import OPTIONS, Sizes, arguments, companion_errors, window_errors

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
TIMED_SIZES = Sizes(
    batch=1, frames=3, tokens=1560, heads=12, dim=128, layers=2
)  # of fused kernels: on a GPU only
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Check(NamedTuple):
    """What became of one backend.

    Attributes:
        verdict: right, wrong, or not here.
        error, allowed: the worst problem's, in shares of the largest output.
        milliseconds: of the timed problem, None where it was not timed.
        of_twin: the same of a fused kernel's twin.
        note: why it is not here, what it refuses, what is wrong.
    """

    name: str
    verdict: str
    error: float = 0.0
    allowed: float = 0.0
    milliseconds: float | None = None
    note: str = ""
    of_twin: float | None = None


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

    def measure() -> tuple[float, float]:
        difference = BACKENDS[name].attend(q, k, v, mask).double() - exact
        return float(difference.abs().amax() / exact.abs().amax()), 0.0

    off = _tried(f"attention backend = {name}", measure)[0]
    return off if off == off else float("inf")


def _tried(what: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """An error and that of a baseline; infinite where the kernel breaks."""
    try:
        return measure()
    except Exception as error:  # whatever a foreign library throws, it does not work here
        warnings.warn(f"{what}: {type(error).__name__}: {error}", stacklevel=3)
        return float("inf"), 0.0


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
        worst = max(worst, (error / allowed, allowed, label))
    for option in OPTIONS if name == "triton" else ():  # what the windowed attention can do beyond a backend
        label = f"windowed, {option}"
        error, baseline = _tried(label, partial(window_errors, option, Sizes(), device, dtype))
        allowed = max(ROUNDING[dtype], 2 * baseline)
        worst = max(worst, (error / allowed, allowed, label))
    note = f"refuses {', '.join(refused)}" if refused else ""
    if len(refused) == len(PROBLEMS):
        return Check(name, "not here", note=str(BACKENDS[name].refuses(*problem)))
    share, allowed, label = worst
    if share > 1:
        note = f"{label}: off by {share * allowed:.1e} of the largest output, allowed {allowed:.1e}"
        disable(name, f"is disabled, it computes something wrong here ({note}): choose another, or auto")
        return Check(name, "wrong", share * allowed, allowed, note=note)
    spent = None
    if timed and not (name == "triton" and _interpreted()):
        problem = tensors(TIMED.get(torch.device(device).type, TIMED["cpu"]), "", device, dtype)
        spent = milliseconds(BACKENDS[name].attend, problem, device)
    return Check(name, "right", share * allowed, allowed, spent, note)


def check_companion(name: str, device, dtype: torch.dtype, timed: bool = True) -> Check:
    """Compare one fused kernel with its twin, and let the twin serve if it is wrong."""
    reason = companions.unavailable(name)
    if reason:
        return Check(name, "not here", note=reason)
    told = f"fused kernel {name}"
    error, baseline = _tried(told, partial(companion_errors, name, Sizes(), device, dtype))
    allowed = max(ROUNDING[dtype], 2 * baseline)
    if not error <= allowed:
        note = f"off by {error:.1e} of the largest output, allowed {allowed:.1e}"
        companions.disable(name, f"is disabled, it computes something wrong here ({note}): its twin serves")
        return Check(name, "wrong", error, allowed, note=note)
    spent = of_twin = None
    if timed and torch.device(device).type == "cuda":
        problem = arguments(name, TIMED_SIZES, device, dtype)
        spent, of_twin = (
            milliseconds(f, problem, device) for f in (companions.kernel(name), getattr(PLAIN, name))
        )
    return Check(name, "right", error, allowed, spent, of_twin=of_twin)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def milliseconds(function: Callable, problem: Sequence[Any], device, repeats: int = 5) -> float:
    """The fastest of some runs."""
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function(*problem)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best * 1000


def check_all(device, dtype: torch.dtype, timed: bool = True) -> Iterator[Check]:
    """Every backend and every fused kernel, one after the other."""
    for name in BACKENDS:
        yield check_backend(name, device, dtype, timed)
    for name in Companions._fields:
        yield check_companion(name, device, dtype, timed)


def verify(name: str, device, dtype: torch.dtype) -> None:
    """Before a run: compare the backend called `name`, or all that `auto` may take, with the reference, and fused kernels.

    Raises:
        UserError: the backend named is wrong. One of `auto`'s that is wrong is left out, with a warning; so is a kernel.
    """
    if name == "triton" or torch.device(device).type == "cuda":
        verify_companions(device, dtype)
    for each in dict.fromkeys(sum(AUTO.values(), ())) if name == "auto" else [name]:
        result = check_backend(each, device, dtype, timed=False)
        if result.verdict == "wrong":
            told = f"attention backend = {each} {unavailable(each)}"
            if name != "auto":
                raise UserError(told)
            warnings.warn(told, stacklevel=2)


def verify_companions(device, dtype: torch.dtype) -> None:
    """Leave out the fused kernels that are wrong here, each with a warning."""
    for name in Companions._fields:
        if check_companion(name, device, dtype, timed=False).verdict == "wrong":
            warnings.warn(f"fused kernel {name} {companions.unavailable(name)}", stacklevel=2)


def report(results: Sequence[Check], device, dtype: torch.dtype) -> str:
    """A table of all results."""
    lines = [
        f"attention and fused kernels on {device} in {str(dtype).removeprefix('torch.')}, against float64"
    ]
    lines.append(f"  {'':17} {'':9} {'error':>8} {'allowed':>8} {'ms':>9} {'twin ms':>9}")
    for result in results:
        numbers = f"{result.error:8.1e} {result.allowed:8.1e}" if result.verdict != "not here" else " " * 17
        spent, of_twin = ("" if x is None else f"{x:.2f}" for x in (result.milliseconds, result.of_twin))
        row = f"  {result.name:17} {result.verdict:9} {numbers} {spent:>9} {of_twin:>9}  {result.note}"
        lines.append(row.rstrip())
    return "\n".join(lines)
