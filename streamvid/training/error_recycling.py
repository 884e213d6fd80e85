"""Error recycling: a student's own earlier errors are put into clean clips, so that it learns to take them out again.

LongLive 2's teacher-forcing stage does this after Stable Video Infinity. Errors of x0, `predicted - clean`, and the errors
of the noise that follow from them, `(v_predicted - v)(1 - sigma)`, are kept per range of timesteps, block by block, and
drawn at random for the history, for the clip and for the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from streamvid.errors import UserError


@dataclass
class RecyclingOptions:
    """What is put in, and what is kept.

    Args:
        buckets, entries: ranges of timesteps, and errors kept per range.
        context, latent, noise: probability that a clip gets errors in its history, itself, its noise.
        clean: probability that it gets none of them.
        remember_clean: probability that a clip without errors is remembered.
        scale: factor on what is put in.
        warmup: clips that are remembered before any error is put in.
    """

    buckets: int = 50
    entries: int = 500
    context: float = 0.9
    latent: float = 0.9
    noise: float = 0.01
    clean: float = 0.2
    remember_clean: float = 0.1
    scale: float = 0.3
    warmup: int = 50


class ErrorBank(nn.Module):
    """Errors of blocks `[C, frames, H, W]` per range of timesteps; saved with the checkpoint."""

    latents: torch.Tensor
    noises: torch.Tensor
    filled: torch.Tensor
    seen: torch.Tensor

    def __init__(self, options: RecyclingOptions, latent_shape: Sequence[int], frames_per_block: int):
        super().__init__()
        if options.buckets < 1 or options.entries < 1:
            raise UserError("stage.recycling: buckets and entries must be at least 1")
        self.options, self.size = options, frames_per_block
        channels, height, width = latent_shape
        shape = (options.buckets, options.entries, channels, frames_per_block, height, width)
        for name in ("latents", "noises"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float16))
        self.register_buffer("filled", torch.zeros(options.buckets, dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.polluted = False  # whether the latest clips got errors

    def bucket(self, timestep: torch.Tensor) -> torch.Tensor:
        """Range of each timestep."""
        return (timestep / 1000 * self.options.buckets).long().clamp(0, self.options.buckets - 1)

    def inject(self, rng: np.random.Generator, clean, x_0, noise, timestep_BF):
        """History, clip and noise with errors, by chance."""
        options = self.options
        ready = int(self.seen) >= options.warmup and int(self.filled.sum()) > 0
        self.polluted = ready and rng.random() >= options.clean
        if not self.polluted:
            return clean, x_0, noise
        blocks = timestep_BF[:, :: self.size]
        if clean is not None and rng.random() < options.context:
            clean = clean + self._draw(rng, self.latents, self._random_buckets(rng, blocks))
        if rng.random() < options.latent:
            x_0 = x_0 + self._draw(rng, self.latents, self.bucket(blocks))
        if rng.random() < options.noise:
            noise = noise + self._draw(rng, self.noises, self.bucket(blocks))
        return clean, x_0, noise

    def _random_buckets(self, rng: np.random.Generator, blocks: torch.Tensor) -> torch.Tensor:
        known = torch.nonzero(self.filled.cpu()).flatten()
        return known[torch.from_numpy(rng.integers(len(known), size=tuple(blocks.shape)))]

    def _draw(self, rng: np.random.Generator, bank: torch.Tensor, buckets_BN: torch.Tensor) -> torch.Tensor:
        """A random error of each block's range, zeros where none is known; `[B, C, F, H, W]`."""
        buckets = buckets_BN.to(bank.device)
        filled = self.filled[buckets]
        place = torch.from_numpy(rng.random(tuple(buckets.shape), np.float32)).to(bank.device)
        errors = bank[buckets, (place * filled).long()].float()  # B N C f H W
        errors = errors * (filled > 0)[..., None, None, None, None] * self.options.scale
        return errors.transpose(1, 2).flatten(2, 3)

    @torch.no_grad()
    def remember(
        self, rng: np.random.Generator, error: torch.Tensor, sigma: torch.Tensor, timestep_BF
    ) -> None:
        """Keep the errors of a clip's x0; those of the noise follow: v' - v = -(x0' - x0) / sigma."""
        self.seen += 1
        warm = int(self.seen) > self.options.warmup and int(self.filled.sum()) > 0
        if warm and not self.polluted and rng.random() >= self.options.remember_clean:
            return
        noise_error = -error / sigma * (1 - sigma)
        buckets = self.bucket(timestep_BF[:, :: self.size])
        for row in range(error.shape[0]):
            for block, bucket in enumerate(buckets[row].tolist()):
                own = slice(block * self.size, (block + 1) * self.size)
                count = int(self.filled[bucket])
                place = count if count < self.options.entries else int(rng.integers(count))
                self.latents[bucket, place] = error[row, :, own].half()
                self.noises[bucket, place] = noise_error[row, :, own].half()
                self.filled[bucket] = min(count + 1, self.options.entries)
