"""Chunks: what a stream yields."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Chunk:
    """The pixel frames of one block.

    Attributes:
        index: block number, from 0.
        videos: uint8 `[B, T, H, W, 3]`, one video per batch element.
        latents: clean latents `[B, C, F, H, W]`, normalised.
        first_frame, media_time: of the chunk's first pixel frame, counted from the start of the stream, in frames and s.
        prompt: what the block was made with (the first of a batch).
        timings: seconds spent per stage: switch, denoise, context, decode, total.
        events: what happened before the block, e.g. `switch:recache`.
        attended: latent frames of the block's window.
        new_scene: whether the chunk begins a video of its own (after a cut).
    """

    index: int
    videos: np.ndarray
    latents: torch.Tensor
    first_frame: int
    media_time: float
    prompt: str
    timings: Mapping[str, float]
    events: tuple[str, ...] = ()
    attended: tuple[int, ...] = ()
    new_scene: bool = False

    @property
    def frames(self) -> np.ndarray:
        """Frames of the first video, uint8 `[T, H, W, 3]`."""
        return self.videos[0]


class Clock:
    """Seconds per stage of one chunk."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def read(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self.began}
