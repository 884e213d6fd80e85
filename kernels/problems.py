"""Problems to compare fused kernels with their PyTorch twins on: for `streamvid kernels check` and for tests.

A kernel is measured against its twin in float64, which gets the very numbers that the kernel gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from streamvid.kernels import companions, windowed
from streamvid.kernels.companions import Meetings
from streamvid.kernels.windowed import Part
from torch.utils._pytree import tree_leaves, tree_map

from streamvid.kv_storage import codecs
from streamvid.rope import Rotation, rotation


class Sizes(NamedTuple):
    """Of a problem: videos, latent frames of a block, tokens of a frame, heads, channels of a head, layers."""

    batch: int = 2
    frames: int = 3
    tokens: int = 7
    heads: int = 2
    dim: int = 20
    layers: int = 2


class Numbers:
    """Reproducible random tensors."""

    def __init__(self, device, dtype: torch.dtype, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, *numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def turn(self, rows: int, heads: int, dim: int) -> Rotation:
        angle = self(rows, heads, dim // 2, dtype=torch.float32)
        return Rotation(angle.cos(), angle.sin())


def arguments(name: str, sizes: Sizes, device, dtype: torch.dtype) -> tuple:
    """Arguments of the companion called `name` (streamvid.kernels.companions)."""
    batch, frames, tokens, heads, dim, layers = sizes
    number = Numbers(device, dtype)
    length, width = frames * tokens, heads * dim
    rows = [number(batch, length, width) for _ in range(3)]
    if name == "modulated_norm":
        return rows[0], number(batch, frames, width), number(batch, frames, width), 1e-6
    if name == "gated_sum":
        return rows[0], rows[1], number(batch, frames, width)
    if name == "norm_rotate_write":
        slots = number.integers(*(slot if slot != 1 else -1 for slot in reversed(range(frames))))
        turns = number.turn(length, 1, dim), number.turn(length, 1, dim)
        buffers = number(batch, length + tokens, heads, dim), number(batch, length + tokens, heads, dim)
        return *rows, (number(width), number(width)), 1e-6, turns, buffers, slots
    if name == "fuse_sink":
        sinks, evicted = 2, 3

        def pair(count: int, kind: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (layers, batch, count * tokens, heads, dim)
            return number(*shape, dtype=kind), number(*shape, dtype=kind)

        meetings = Meetings(
            pair(evicted),
            pair(sinks, torch.float32),
            (0, 2, 3),
            (2, 0, 1),
            number(evicted, batch, 2, dtype=torch.float32).sigmoid(),
            number.turn(evicted * tokens, 1, dim),
        )
        at = number.turn(sinks * tokens, 1, dim)
        return pair(sinks, torch.float32), meetings, pair(4), at, (True, False)
    raise KeyError(name)


def window(option: str, sizes: Sizes, device, dtype: torch.dtype) -> tuple[torch.Tensor, list[Part]]:
    """Queries of a block and a window with one option of the windowed attention, one of `OPTIONS`."""
    batch, frames, tokens, heads, dim, _ = sizes
    number = Numbers(device, dtype)
    q = number(batch, frames * tokens, heads, dim)
    past = 4
    k, v = (number(batch, past * tokens, heads, dim) for _ in range(2))
    live = number.integers(2 * tokens, tokens, 0, tokens).view(2, 2)
    part = Part(k, v, live, tokens)
    of_frames = number(past, dtype=torch.float32)
    if option in ("int8", "fp8"):
        (k, k_scale), (v, v_scale) = (codecs(option)[0].encode(x) for x in (k, v))
        part = Part(k, v, live, tokens, k_scale=k_scale, v_scale=v_scale)
    changes: dict[str, Any] = {
        "bias": {"bias": of_frames},
        "gain": {"gain": of_frames.sigmoid()},
        "phase": {"phase": rotation([2.0, 0.5, 7.0, 1.0], 1, 1, dim, device)},
        "ragged": {"runs": torch.stack([live, live.flip(0).clamp(max=tokens - 1)][:batch])},
    }
    part = part._replace(**changes.get(option, {}))
    own = Part(*(number(batch, frames * tokens, heads, dim) for _ in range(2)), live[1:] + 0)
    return q, [part, own] if option == "parts" else [part]


OPTIONS = ("plain", "parts", "ragged", "bias", "gain", "phase", "int8", "fp8")


def wide(tree: Any) -> Any:
    """Half and single precision as float64; what is encoded stays."""
    return tree_map(
        lambda x: (
            x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and x.itemsize > 1 else x
        ),
        tree,
    )


def results(function: Callable, given: tuple) -> list[torch.Tensor]:
    """What a function returns, and its arguments afterwards: it may have written to them."""
    given = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, given)
    returned = function(*given)
    numbers = [x for x in tree_leaves((returned, given)) if isinstance(x, torch.Tensor)]
    return [x for x in numbers if x.is_floating_point() and x.itemsize > 1]


def off(function: Callable, exact: list[torch.Tensor], given: tuple) -> float:
    """Largest difference of a function's results, each in shares of its largest number; infinite where there is none."""
    worst = 0.0
    for got, expected in zip(results(function, given), exact, strict=True):
        there = expected.isfinite()
        largest = expected[there].abs().amax().clamp_min(1e-30)
        error = (got.double() - expected)[there].abs().amax() / largest
        if not torch.equal(there, got.isfinite()) or error != error:
            return float("inf")
        worst = max(worst, float(error))
    return worst


def companion_errors(name: str, sizes: Sizes, device, dtype: torch.dtype) -> tuple[float, float]:
    """How far the kernel called `name` is off, and how far its twin in the same precision."""
    given, twin = arguments(name, sizes, device, dtype), getattr(companions.PLAIN, name)
    exact = results(twin, wide(given))
    return off(companions.kernel(name), exact, given), off(twin, exact, given)


def window_errors(option: str, sizes: Sizes, device, dtype: torch.dtype) -> tuple[float, float]:
    """How far the windowed attention with an option is off, and how far its twin; output, log-sum-exp and importance."""
    q, parts = window(option, sizes, device, dtype)
    given = q, parts, q.float().sum(1).to(dtype)

    def attend(backend: str) -> Callable:
        return lambda *each: windowed.windowed_attention(*each, backend=backend)

    exact = results(attend("reference"), wide(given))
    return off(attend("triton"), exact, given), off(attend("reference"), exact, given)
