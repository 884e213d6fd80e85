"""What the next block of a stream is made with: shots of the script, live prompts, seeds, levels, prompts on their way.

Nothing here changes a stream: it takes a `BlockSetup` for its own when the block is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from streamvid.control import PromptChange
from streamvid.decoding import VaeState
from streamvid.errors import UserError
from streamvid.methods import SHOT_OPTION_NAMES, Method
from streamvid.noise import NoiseSource, SeededNoise
from streamvid.switching import SwitchPolicy, switch_policy
from streamvid.timeline import Timeline, TimelineShot
from streamvid.transformer import PromptKV

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline


@dataclass(frozen=True)
class Blend:
    """A prompt change spread over several blocks: from which embedding to which, since which block."""

    old: torch.Tensor
    new: torch.Tensor
    start: int
    policy: SwitchPolicy

    def share(self, block: int) -> float:
        """How much of the new prompt `block` is told."""
        return (block - self.start + 1) / self.policy.blocks

    def embedding(self, block: int) -> torch.Tensor:
        """What `block` is told."""
        share = self.share(block)
        return self.new if share >= 1 else self.policy.mix(self.old, self.new, share)


@dataclass(frozen=True)
class BlockSetup:
    """What a block is made with.

    Attributes:
        current: prompts, one per video, and where they came from.
        steps: timestep and sigma of every denoising step.
        decoder: its memory before the block.
        new_scene: the block begins a video of its own.
    """

    current: PromptChange
    noise: NoiseSource
    steps: tuple[tuple[float, float], ...]
    decoder: VaeState
    blend: Blend | None = None
    new_scene: bool = False


class PromptKeys:
    """Embeddings of prompts, and their cross-attention keys and values; those of the latest prompts are kept."""

    def __init__(self, pipe: StreamVidPipeline, device: torch.device | str, dtype: torch.dtype):
        self.pipe, self.device, self.dtype = pipe, device, dtype
        self.latest: tuple[tuple[str, ...], torch.Tensor, PromptKV] | None = None

    def embedding(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """`[B, text_len, D]`."""
        if self.latest is not None and self.latest[0] == prompts:
            return self.latest[1]
        return self.pipe.encode_prompt(list(prompts)).to(self.device, self.dtype)

    def of_prompts(self, prompts: tuple[str, ...]) -> PromptKV:
        """Keys and values of prompts, computed once while they stay the same."""
        if self.latest is None or self.latest[0] != prompts:
            embeddings = self.embedding(prompts)
            self.latest = (prompts, embeddings, self.pipe.transformer.prompt_kv(embeddings))
        return self.latest[2]

    def told(self, setup: BlockSetup, block: int) -> torch.Tensor:
        """The embedding that `block` is told."""
        return setup.blend.embedding(block) if setup.blend else self.embedding(setup.current.prompts)

    def of_block(self, setup: BlockSetup, block: int) -> PromptKV:
        """Keys and values of what `block` is told."""
        if setup.blend is not None and setup.blend.share(block) < 1:
            return self.pipe.transformer.prompt_kv(setup.blend.embedding(block))
        return self.of_prompts(setup.current.prompts)


class Director:
    """Says what a stream's next block is made with."""

    def __init__(
        self, pipe: StreamVidPipeline, method: Method, timeline: Timeline | None, prompt_keys: PromptKeys
    ):
        self.pipe, self.method, self.timeline, self.prompt_keys = pipe, method, timeline, prompt_keys

    def change(self, block: int, current: PromptChange, pending: PromptChange | None) -> PromptChange | None:
        """The change at `block`: a shot that starts there, or a live prompt, which replaces the words of a shot only."""
        scripted = None
        if self.timeline is not None:
            shot = self.timeline.shot_of_block(block)
            scripted = self.change_to(shot, len(current.prompts)) if shot.first_block == block else None
        if pending is None:
            return scripted
        base = scripted or replace(current, policy=None)
        return replace(base, prompts=pending.prompts, policy=pending.policy or base.policy)

    def change_to(self, shot: TimelineShot, videos: int) -> PromptChange:
        """What a shot asks of so many videos."""
        prompts = self.pipe.check_prompts(shot.prompt) * videos
        return PromptChange(prompts, shot.transition, shot.seed, shot.overrides)

    def after(self, setup: BlockSetup, change: PromptChange | None, block: int) -> BlockSetup:
        """What `block` is made with, when the block before it was made with `setup`.

        Raises:
            UserError: the change is one that the stream cannot make.
        """
        if change is None:
            return setup
        policy = switch_policy(change.policy or self.method.transition)
        noise = setup.noise if change.seed is None else _reseeded(setup.noise, change.seed)
        steps = self._steps_of_shot(change, len(setup.steps))
        blend = None
        if policy.blocks > 1 and block > 0:
            told = self.prompt_keys.told(setup, block - 1)
            blend = Blend(told, self.prompt_keys.embedding(change.prompts), block, policy)
        return replace(setup, current=change, noise=noise, steps=steps, blend=blend)

    def _steps_of_shot(self, change: PromptChange, levels: int) -> tuple[tuple[float, float], ...]:
        """Denoising steps under a shot's overrides; the stream has so many `levels` now."""
        for name in change.overrides:
            if name not in SHOT_OPTION_NAMES:
                raise UserError(
                    f"overrides.{name} cannot change within a stream: a shot may override {', '.join(SHOT_OPTION_NAMES)}"
                )
        steps = self.steps(self.method.with_overrides(change.overrides).denoising_steps)
        if len(steps) != levels and self.method.sampler == "rolling":
            raise UserError(
                f"denoising_steps of a shot has {len(steps)} levels, and with sampler = rolling each of the stream's "
                f"{levels} has its block in the window: give as many"
            )
        return steps

    def steps(self, levels: tuple[float, ...] | None) -> tuple[tuple[float, float], ...]:
        """Timestep and sigma of every denoising step."""
        scheduler = self.pipe.scheduler
        if self.method.solver == "unipc":
            return scheduler.unsnapped(levels or scheduler.config.denoising_steps)
        timesteps = scheduler.steps if levels is None else scheduler.warped(levels)
        return tuple((t, float(scheduler.sigma(torch.tensor(t)))) for t in timesteps)


def _reseeded(noise: NoiseSource, seed: int) -> SeededNoise:
    """The noise of a shot with a seed of its own."""
    if not isinstance(noise, SeededNoise):
        raise UserError("seed of a shot needs noise = seeded: the reference draw order has one seed only")
    return SeededNoise([seed + i for i in range(len(noise.seeds))], noise.frame_shape)
