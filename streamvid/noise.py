"""Where the sampler's noise comes from: siblings of one signature.

    noise = SeededNoise(seeds, frame_shape)
    noise(block, step, frames)     # [B, C, F, H, W]; step 0 is the initial noise, step i the re-noise before it

The default derives every draw from (seed, block, step): a resumed, forked, re-batched or distributed run sees the same
noise. `ReferenceNoise` draws in the order of the releases, for parity. `correlated` ties the frames of a block together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from streamvid.errors import UserError

NoiseSource = Callable[[int, int, int], torch.Tensor]
NOISE_ORDERS = ("seeded", "reference")


class SeededNoise:
    """Noise from (seed, block, step), one seed per video; drawn on the CPU so that devices agree.

    Args:
        seeds: one per batch element.
        frame_shape: `(C, H, W)` of a latent frame.
    """

    def __init__(self, seeds: Sequence[int], frame_shape: tuple[int, int, int]):
        self.seeds, self.frame_shape = list(seeds), frame_shape

    def __call__(self, block: int, step: int, frames: int) -> torch.Tensor:
        channels, height, width = self.frame_shape
        draws = []
        for seed in self.seeds:
            state = int(np.random.SeedSequence([seed, block, step]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(state >> 1)
            draws.append(torch.randn(channels, frames, height, width, generator=generator))
        return torch.stack(draws)

    def state_dict(self) -> dict[str, Any]:
        return {"seeds": self.seeds, "frame_shape": self.frame_shape}


class ReferenceNoise:
    """The releases' order: the whole clip's noise first, then one draw per block and step, all from one generator.

    The clip's length must be known and blocks come in order; the generator's state is part of the stream's. A block whose
    draws were made before (a retry) gets them again.
    """

    def __init__(self, seed: int, batch: int, frames: int, frame_shape: tuple[int, int, int], device="cpu"):
        channels, height, width = frame_shape
        self.seed, self.batch, self.frames, self.frame_shape, self.device = (
            seed,
            batch,
            frames,
            frame_shape,
            device,
        )
        self.generator = torch.Generator(device).manual_seed(seed)
        self.clip = torch.randn(
            batch, frames, channels, height, width, generator=self.generator, device=device
        ).transpose(1, 2)
        self.drawn: dict[tuple[int, int], torch.Tensor] = {}
        self.first_frame: dict[int, int] = {0: 0}

    def __call__(self, block: int, step: int, frames: int) -> torch.Tensor:
        start = self.first_frame[block]
        self.first_frame[block + 1] = start + frames
        if step == 0:
            return self.clip[:, :, start : start + frames]
        if (block, step) not in self.drawn:
            self.drawn = {key: value for key, value in self.drawn.items() if key[0] == block}
            draw = torch.randn(
                self.batch * frames, *self.frame_shape, generator=self.generator, device=self.device
            )
            self.drawn[block, step] = draw.unflatten(0, (self.batch, frames)).transpose(1, 2)
        return self.drawn[block, step]

    def state_dict(self) -> dict[str, Any]:
        origin = {
            "seed": self.seed,
            "batch": self.batch,
            "frames": self.frames,
            "frame_shape": self.frame_shape,
        }
        drawn, first_frame = dict(self.drawn), dict(self.first_frame)
        return {
            "origin": origin,
            "generator": self.generator.get_state(),
            "drawn": drawn,
            "first_frame": first_frame,
        }


def noise_source(
    noise: str | NoiseSource,
    seed: int | Sequence[int] | None,
    videos: int,
    frames: int | None,
    frame_shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
) -> NoiseSource:
    """The source that is meant: one of `NOISE_ORDERS`, or one at hand.

    Args:
        seed: one number (video i takes `seed + i`) or one per video; None: 0.
        frames: latent frames of the whole clip, which the releases' order draws at once.

    Raises:
        UserError: a seed is no whole number from 0, there are too many, or the order wants something else.
    """
    if callable(noise):
        return noise
    seed = 0 if seed is None else seed
    if noise == "seeded":
        seeds = [seed + i for i in range(videos)] if isinstance(seed, int) else list(seed)
        if not all(isinstance(number, int) and number >= 0 for number in seeds):
            raise UserError(f"seed = {seed} must be a whole number from 0, or a list of them")
        if len(seeds) != videos:
            raise UserError(
                f"seed = {seeds} has {len(seeds)} numbers for {videos} videos: give one per video"
            )
        return SeededNoise(seeds, frame_shape)
    if noise == "reference":
        if frames is None:
            raise UserError(
                "noise = 'reference' needs a known length: give blocks or a script with durations"
            )
        if not isinstance(seed, int):
            raise UserError(f"seed = {seed} must be one number with noise = 'reference'")
        return ReferenceNoise(seed, videos, frames, frame_shape, device)
    raise UserError(f"noise = {noise!r} is not known: choose one of {', '.join(NOISE_ORDERS)}")


def drawn_seed(
    generator: torch.Generator | Sequence[torch.Generator],
    seed: Any,
    noise: str | NoiseSource,
    videos: int,
) -> int | list[int]:
    """What generators draw in place of a seed: one number, or with one generator per video a number from each.

    Raises:
        UserError: there is a seed or a noise source too, or the generators are not as many as the videos.
    """
    if seed is not None or callable(noise):
        raise UserError("generator and seed or a noise source exclude each other: give one of them")
    one = isinstance(generator, torch.Generator)
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if not one and len(generators) != videos:
        raise UserError(
            f"generator has {len(generators)} generators for {videos} videos: give one, or one per video"
        )
    draws = [int(torch.randint(2**62, (), generator=source, device=source.device)) for source in generators]
    return draws[0] if one else draws


def noise_state(noise: NoiseSource) -> Any:
    """What `noise_from` makes an equal source of. A function of the caller's is handed on as it is."""
    return noise.state_dict() if isinstance(noise, (SeededNoise, ReferenceNoise)) else noise


def noise_from(state: Any, device: torch.device | str = "cpu") -> NoiseSource:
    """The source that goes on from a `noise_state`."""
    if not isinstance(state, Mapping):
        return state
    if "seeds" in state:
        return SeededNoise(state["seeds"], state["frame_shape"])
    noise = ReferenceNoise(**state["origin"], device=device)
    noise.generator.set_state(state["generator"].cpu())
    noise.drawn, noise.first_frame = dict(state["drawn"]), dict(state["first_frame"])
    return noise


def correlated(noise: NoiseSource, correlation: float) -> NoiseSource:
    """Noise whose neighbouring frames of a block have this correlation; each frame stays standard normal.

    A negative one brings fast changes into the noise (antiphase noise, FLEX, arXiv 2602.14027; the chain
    `n_f = c n_(f-1) + sqrt(1 - c^2) e_f` within a block is our form: it depends on seed, block and step alone).
    """
    if correlation == 0:
        return noise

    def chained(block: int, step: int, frames: int) -> torch.Tensor:
        fresh = noise(block, step, frames).unbind(2)
        chain = [fresh[0]]
        for draw in fresh[1:]:
            chain.append(correlation * chain[-1] + (1 - correlation**2) ** 0.5 * draw)
        return torch.stack(chain, 2)

    return chained
