"""Where self-forcing gets its clips: short rollouts made anew, rolling windows, or long streams chunk by chunk.

A teacher knows clips of one length, whose first latent frame is a still picture. So at most `supervised` latent frames are
judged at once, and where they come from the middle of a stream, the first of them is replaced by the encoding of its last
picture as a still (Self Forcing's release); it and its block get no gradient.

Streaming long tuning (LongLive, section 3.3): a stream lives over several steps. Each phase makes its next chunk against the
cache as it is, only the chunk has gradient, and it is judged together with `overlap` frames before it. Prompts switch at the
beginning of a chunk by the very policy of inference. The state of a live stream is in no checkpoint: `at_rest` tells the
trainer to wait until it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from streamvid.decoding import decode, decoder_state, encode, encoder_state
from streamvid.errors import UserError
from streamvid.methods import Method
from streamvid.noise import SeededNoise
from streamvid.training.rollout import Rolled, RolloutStream

if TYPE_CHECKING:
    from streamvid.training.self_forcing import SelfForcingStage

EXITS = ("random", "last")


@dataclass
class RolloutOptions:
    """How clips are rolled out.

    Args:
        frames: latent frames of a rollout, or of a stream with `streaming`.
        supervised: latent frames judged at once.
        overlap: how many of them come before a chunk of a stream, or have no gradient at the start of a longer rollout.
        streaming: streams live over several steps.
        exit: after which step of the sampler a block is taken: random, or the last.
        exit_per_block: every block draws its own instead of one for all.
        straight_through: gradient also through finished blocks' keys and values, as in the releases.
        rolling_share: of a rolling method's clips, how many are rolled by windows; the others block by block.
        switch_share: of streams, how many change their prompt once, or as often as the prompt set's lines say.
        still_frames: the still at the start of a clip comes from a decoder that follows so many latent frames before it;
            0: the whole stream.
    """

    frames: int = 21
    supervised: int = 21
    overlap: int = 3
    streaming: bool = False
    exit: str = "random"
    exit_per_block: bool = False
    straight_through: bool = False
    rolling_share: float = 0.5
    switch_share: float = 1.0
    still_frames: int = 0

    def check(self, frames_per_block: int, sampler: str) -> None:
        """Whether blocks fill the clips.

        Raises:
            UserError: they do not, or options exclude each other.
        """
        for name in ("frames", "supervised", *(("overlap",) if self.frames > self.supervised else ())):
            if getattr(self, name) < 1 or getattr(self, name) % frames_per_block:
                raise UserError(
                    f"rollout.{name} = {getattr(self, name)} must be a positive multiple of "
                    f"frames_per_block = {frames_per_block}"
                )
        if self.exit not in EXITS:
            raise UserError(f"rollout.exit = {self.exit!r} is not known: choose one of {', '.join(EXITS)}")
        if self.supervised > self.frames or self.overlap >= self.supervised:
            raise UserError(
                f"rollout.overlap < supervised <= frames must hold, not {self.overlap}, {self.supervised}, {self.frames}"
            )
        if self.streaming and sampler == "rolling":
            raise UserError(
                "rollout.streaming goes chunk by chunk, which excludes a method with sampler = rolling"
            )


@dataclass(frozen=True)
class Clip:
    """What is judged: latents `[B, C, F, H, W]`, which frames learn `[F]`, the prompts, the index of the exit step."""

    latents: torch.Tensor
    mask: torch.Tensor
    prompts: list[str]
    exit_step: int
    new_frames: int


class ClipStart:
    """Makes frames from the middle of a stream a legal clip: follows the stream with the decoder.

    Args:
        frames: only so many latent frames before a still are decoded, as the beginning of a stream; 0: all.
    """

    def __init__(self, vae: AutoencoderKLWan, frames: int = 0):
        self.vae, self.state, self.frames = vae, decoder_state(vae), frames

    @torch.no_grad()
    def still(self, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """The last picture of the next frames of the stream, encoded as the first latent frame of a clip."""
        latents = latents_BCFHW.detach().to(self.vae.dtype)
        if self.frames and latents.shape[2] > self.frames:
            latents, self.state = latents[:, :, -self.frames :], decoder_state(self.vae)
        pixels = decode(self.vae, latents, self.state, None)
        picture = pixels[:, :, -1:].contiguous()
        return encode(self.vae, picture, encoder_state(self.vae), None).to(latents_BCFHW.dtype)


@dataclass
class LongStream:
    """A stream of streaming long tuning.

    Attributes:
        prompts: that it goes through; switches: chunk -> index of the prompt that begins there.
        undecoded: latents `[B, C, F, H, W]` that the decoder has not followed yet, up to the last finished frame.
    """

    stream: RolloutStream
    start: ClipStart
    prompts: list[list[str]]
    switches: dict[int, int]
    chunk: int = 0
    undecoded: torch.Tensor | None = None
    told: list[str] = field(default_factory=list)


class ClipSource:
    """Makes the clips of a self-forcing stage."""

    def __init__(self, stage: SelfForcingStage, options: RolloutOptions):
        self._stage = [stage]  # in a list: a module must not hold its parent
        self.options = options
        options.check(stage.method.frames_per_block, stage.method.sampler)
        self.streams: dict[int, LongStream] = {}

    @property
    def stage(self) -> SelfForcingStage:
        return self._stage[0]

    def at_rest(self) -> bool:
        return not self.streams

    def roll(self, batch: dict[str, Any]) -> Clip:
        """The clip of a batch, with gradient in its generator phase."""
        if self.options.streaming:
            return self._next_chunk(batch)
        o, shared = self.options, batch["shared"]
        size = self.stage.method.frames_per_block
        graded = batch["phase"] == "generator"
        prompts = [row[0] for row in batch["prompts"]]
        method = self.stage.method
        by_windows = method.sampler == "rolling" and shared.random() < o.rolling_share
        if not by_windows:
            method = replace(method, sampler="few_step", micro_steps=1, context_window="same")
        stream = self._stream(method, prompts, batch["seeds"], o.frames // size)
        if by_windows:
            joint = stream.cache.options.joint_blocks * method.micro_steps
            rolled, exit_step = stream.roll_windows(int(shared.integers(joint)), graded), -1
        else:
            exits = self._exits(shared, len(stream.steps), o.frames // size)
            rolled = stream.roll(exits, o.supervised // size if graded else 0)
            exit_step = exits[-1]
        latents, mask = rolled.latents, rolled.graded
        if o.frames > o.supervised:
            first = o.frames - o.supervised
            still = ClipStart(self.stage.vae, o.still_frames).still(latents[:, :, : first + 1])
            latents = torch.cat([still, latents[:, :, first + 1 :]], 2)
            mask = torch.arange(o.supervised) >= o.overlap
        return Clip(latents, mask, prompts, exit_step, o.supervised)

    def pixels(self, clip: Clip) -> torch.Tensor:
        """The clip's pictures `[B, 3, T, H, W]` in [-1, 1], without gradient."""
        vae = self.stage.vae
        with torch.no_grad():
            return decode(vae, clip.latents.detach().to(vae.dtype), decoder_state(vae), None)

    def _stream(
        self, method: Method, prompts: Sequence[str], seeds: Sequence[int], blocks: int
    ) -> RolloutStream:
        stage = self.stage
        return RolloutStream(
            stage.transformer,
            stage.scheduler,
            stage.encode,
            method,
            prompts,
            stage.latent_shape[1:],
            SeededNoise(seeds, stage.latent_shape),
            blocks,
            self.options.straight_through,
            stage.options.attention,
        )

    def _exits(self, shared: np.random.Generator, steps: int, blocks: int) -> list[int]:
        if self.options.exit == "last":
            return [steps - 1] * blocks
        if self.options.exit_per_block:
            return shared.integers(steps, size=blocks).tolist()
        return [int(shared.integers(steps))] * blocks

    # --- long streams -------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Of a whole stream: the first has `supervised` new frames, the others `supervised - overlap`."""
        o = self.options
        return 1 + (o.frames - o.supervised) // (o.supervised - o.overlap)

    def _begin(self, batch: dict[str, Any]) -> LongStream:
        o, rng = self.options, np.random.default_rng(batch["seeds"])
        prompts = [list(row) for row in batch["prompts"]]
        switching = self.chunks > 1 and batch["shared"].random() < o.switch_share
        count = max(len(row) for row in prompts) - 1 or 1
        at = batch["shared"].choice(np.arange(1, self.chunks), min(count, self.chunks - 1), replace=False)
        switches = {int(chunk): index for index, chunk in enumerate(sorted(at), 1)} if switching else {}
        for row in prompts:
            while len(row) <= len(switches):  # a set without switches: any other prompt
                row.append(self.stage.prompts[int(rng.integers(len(self.stage.prompts)))][0])
        size = self.stage.method.frames_per_block
        first = [row[0] for row in prompts]
        stream = self._stream(self.stage.method, first, batch["seeds"], o.frames // size)
        start = ClipStart(self.stage.vae, o.still_frames)
        return LongStream(stream, start, prompts, switches, told=first)

    def _next_chunk(self, batch: dict[str, Any]) -> Clip:
        o, number = self.options, batch["number"]
        if number not in self.streams:
            self.streams[number] = self._begin(batch)
        long = self.streams[number]
        if long.chunk in long.switches:
            long.told = [row[long.switches[long.chunk]] for row in long.prompts]
            long.stream.prompt(long.told)
        new = o.supervised if long.chunk == 0 else o.supervised - o.overlap
        blocks = new // self.stage.method.frames_per_block
        exits = self._exits(batch["shared"], len(long.stream.steps), blocks)
        rolled = long.stream.roll(exits, blocks if batch["phase"] == "generator" else 0)
        clip = Clip(*self._supervised(long, rolled), long.told, exits[-1], new)
        long.chunk += 1
        if long.chunk == self.chunks:
            del self.streams[number]
        return clip

    def _supervised(self, long: LongStream, rolled: Rolled) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk with the frames before it, and which of them learn."""
        if long.undecoded is None:
            long.undecoded = rolled.latents.detach()
            return rolled.latents, torch.ones(rolled.latents.shape[2], dtype=torch.bool)
        overlap = self.options.overlap
        before = long.undecoded
        still = long.start.still(before[:, :, : before.shape[2] - overlap + 1])
        past = before[:, :, before.shape[2] - overlap + 1 :]
        long.undecoded = torch.cat([past, rolled.latents.detach()], 2)
        latents = torch.cat([still, past, rolled.latents], 2)
        return latents, torch.arange(latents.shape[2]) >= overlap
