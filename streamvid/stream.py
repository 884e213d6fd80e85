"""A stream: one live generation with all of its mutable state. Everything else holds weights only.

    stream = pipe.stream("a fox walks [5s] | it snows [10s]")
    for chunk in stream:            # pull-based: the consumer sets the pace
        show(chunk.frames)
        stream.prompt("night falls")        # takes effect at the next block

A chunk commits whole or not at all: an exception leaves the stream at the previous chunk, and `next` tries again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamvid.context import CacheSnapshot, ContextCache
from streamvid.control import DROPPED, REPLACED, Receipt, StreamState
from streamvid.decoding import VaeState, decode_to_bytes, decoder_state
from streamvid.errors import UserError
from streamvid.methods import SHOT_OPTION_NAMES, Method
from streamvid.noise import NoiseSource, ReferenceNoise, SeededNoise, correlated
from streamvid.sampler import BlockInputs
from streamvid.switching import SwitchPolicy, switch_policy
from streamvid.transformer import PromptKV

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
    from streamvid.script import Timeline, TimelineShot


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


@dataclass(frozen=True)
class PromptChange:
    """A prompt to switch to at the next block."""

    prompts: tuple[str, ...]
    policy: str | None = None
    seed: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


class VideoStream:
    """An iterator of chunks. Made by `StreamVidPipeline.stream`.

    Args:
        pipe: the pipeline whose weights are used.
        method: how blocks are made.
        first: prompts (one per video) and options of the first block.
        latent_size: latent rows and columns.
        noise: noise source.
        fps: frames per second of the video.
        timeline: shots of a script; the stream ends with it.
        blocks: end after so many blocks at the latest; None: with the timeline, and without one never.
        attention: name of the attention backend.
        decode_pixels: False leaves the chunks without pixels; their times stay what they would be.
    """

    def __init__(
        self,
        pipe: StreamVidPipeline,
        method: Method,
        first: PromptChange,
        latent_size: tuple[int, int],
        noise: NoiseSource,
        fps: float,
        timeline: Timeline | None = None,
        blocks: int | None = None,
        attention: str = "auto",
        decode_pixels: bool = True,
    ):
        if method.sampler == "rolling" and isinstance(noise, ReferenceNoise):
            raise UserError(
                "noise = 'reference' draws block after block, and sampler = rolling asks for several at once: "
                "take noise = 'seeded'"
            )
        self.pipe, self.method, self.fps, self.timeline = pipe, method, fps, timeline
        lengths = [n for n in (blocks, timeline.blocks if timeline is not None else None) if n is not None]
        self.blocks = min(lengths, default=None)
        config = pipe.transformer.config
        self.steps = self._steps(method.denoising_steps)
        self.sampler = method.new_sampler()
        self.cache = ContextCache(
            method.window_options(levels=len(self.steps)),
            layers=config.num_layers,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            grid=pipe.transformer.token_grid(*latent_size),
            latent_shape=(config.in_channels, *latent_size),
            batch=len(first.prompts),
            dtype=pipe.transformer.dtype,
            device=pipe.transformer.device,
            attention=attention,
            **method.cache_options(),
        )
        self.block = 0
        self.frames_shown = 0
        self.decode_pixels = decode_pixels
        self.decoder: VaeState = decoder_state(pipe.decoder)
        self.noise = noise
        self.current = first
        self.blend: _Blend | None = None
        self._prompt_kv: tuple[tuple[str, ...], torch.Tensor, PromptKV] | None = None
        self._pending: tuple[PromptChange, Receipt] | None = None
        self._taken: tuple[PromptChange, Receipt] | None = None  # by the block in the making
        self._running = threading.Event()  # not while paused
        self._running.set()
        self._lock = threading.Lock()
        self._closed = False
        for shot in (
            timeline.shots if timeline is not None else ()
        ):  # an impossible one is refused now, not in minutes
            self._after(self._change_to(shot))

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def prompt(self, text: str | list[str], policy: str | None = None) -> Receipt:
        """Switch to another prompt at the next block; thread-safe, the last call before the block wins.

        Args:
            text: the prompt, or one per video of the batch.
            policy: name of a switch policy; None takes the method's.

        Returns:
            A receipt that tells when it was applied, and at which chunk.
        """
        prompts = self.pipe.check_prompts(text)
        videos = len(self.current.prompts)
        if len(prompts) not in (1, videos):
            raise UserError(
                f"prompt has {len(prompts)} texts for {videos} videos: give one for all or one each"
            )
        if len(prompts) != videos:
            prompts = prompts * videos
        if policy is not None:
            switch_policy(policy)
        receipt = Receipt(prompts, policy)
        with self._lock:
            self._forget_pending(REPLACED)
            self._pending = PromptChange(prompts, policy), receipt
            if self._ended:
                self._forget_pending(DROPPED)
        return receipt

    def cut(self, text: str | list[str] | None = None) -> Receipt:
        """Begin a new scene at the next block, under another prompt or the current one."""
        return self.prompt(list(self.current.prompts) if text is None else text, "cut")

    def pause(self) -> None:
        """`next` waits from the next block on, until `resume` or `close`; thread-safe."""
        self._running.clear()

    def resume(self) -> None:
        """Go on after a pause."""
        self._running.set()

    def close(self) -> None:
        """End the stream: `next` raises StopIteration from now on, also one that waits in a pause."""
        self._closed = True
        self._running.set()
        with self._lock:
            self._forget_pending(DROPPED)

    def state(self) -> StreamState:
        """Where the stream is."""
        pending = self._pending
        return StreamState(
            self.block,
            self.frames_shown / self.fps,
            self.current.prompts,
            None if pending is None else pending[0].prompts,
            self.method.name,
            not self._running.is_set(),
            self._closed,
            tuple(self.cache.planner.live_frames),
            self.cache.bytes,
        )

    @property
    def _ended(self) -> bool:
        return self._closed or (self.blocks is not None and self.block >= self.blocks)

    def _forget_pending(self, status: str) -> None:
        """What no block has taken up yet will not be applied."""
        if self._pending is not None and self._pending is not self._taken:
            self._pending[1].give_up(status)
            self._pending = None

    def __next__(self) -> Chunk:
        self._running.wait()
        if self._ended:
            with self._lock:
                self._forget_pending(DROPPED)
            raise StopIteration
        undo = _Undo()
        try:
            return self._next_chunk(undo)
        except BaseException:
            if undo.snapshot is not None:
                self.cache.restore(undo.snapshot)
            with self._lock:
                taken, self._taken = self._taken, None
                if taken is not None and taken is not self._pending:  # a later prompt came meanwhile
                    taken[1].give_up(REPLACED)
            raise

    @torch.no_grad()
    def _next_chunk(self, undo: _Undo) -> Chunk:
        clock = _Clock()
        with self._lock:
            pending = self._taken = self._pending
        change = self._change(None if pending is None else pending[0])
        events: tuple[str, ...] = ()
        with clock.stage("switch"):
            state = self._after(change)
            prompt_kv = self._prompt_keys(state)
            if change is not None and self.block > 0:
                name = change.policy or self.method.transition
                policy = switch_policy(name)
                undo.snapshot = self.cache.snapshot()
                policy.apply(self.cache, lambda plan: self._context_pass(plan, prompt_kv))
                events = (f"switch:{name}",)
                if policy.restarts_decoder:
                    state = replace(state, decoder=decoder_state(self.pipe.decoder), new_scene=True)
        inputs = self._inputs(state, prompt_kv)
        with clock.stage("denoise"):
            plan, latents = self.sampler.denoise(inputs)
        with clock.stage("context"):
            committed = self.sampler.context_pass(inputs, plan, latents)
        with clock.stage("decode"):
            decoder = state.decoder.fork()
            videos = self._pixels(latents, decoder)
        ratio = self.pipe.temporal_ratio
        shown = ratio * latents.shape[2] - (0 if state.decoder.started else ratio - 1)
        chunk = Chunk(
            index=self.block,
            videos=videos,
            latents=latents,
            first_frame=self.frames_shown,
            media_time=self.frames_shown / self.fps,
            prompt=state.current.prompts[0],
            timings=clock.read(),
            events=events,
            attended=plan.attended,
            new_scene=state.new_scene,
        )
        # commit: nothing above changed what the next block is computed from
        self.cache.commit(committed, latents)
        self.sampler.commit()
        self.current, self.noise, self.steps, self.decoder = state.current, state.noise, state.steps, decoder
        self.blend = state.blend
        self.block += 1
        self.frames_shown += shown
        with self._lock:
            if pending is not None:  # one that came meanwhile is for the next block
                pending[1].apply(chunk.index, chunk.media_time)
                self._pending = None if self._pending is pending else self._pending
            self._taken = None
        return chunk

    # --- parts of a block -------------------------------------------------------------------------------------------

    def _change(self, pending: PromptChange | None) -> PromptChange | None:
        """The change at this block: a shot that starts here, or a live prompt, which replaces the words of a shot only."""
        scripted = None
        if self.timeline is not None:
            shot = self.timeline.shot_of_block(self.block)
            scripted = self._change_to(shot) if shot.first_block == self.block else None
        if pending is None:
            return scripted
        base = scripted or replace(self.current, policy=None)
        return replace(base, prompts=pending.prompts, policy=pending.policy or base.policy)

    def _change_to(self, shot: TimelineShot) -> PromptChange:
        prompts = self.pipe.check_prompts(shot.prompt) * len(self.current.prompts)
        return PromptChange(prompts, shot.transition, shot.seed, shot.overrides)

    def _after(self, change: PromptChange | None) -> _Next:
        """What the next block is made with."""
        state = _Next(self.current, self.noise, self.steps, self.decoder, self.blend)
        if change is None:
            return state
        policy = switch_policy(change.policy or self.method.transition)
        for name in change.overrides:
            if name not in SHOT_OPTION_NAMES:
                raise UserError(
                    f"overrides.{name} cannot change within a stream: a shot may override {', '.join(SHOT_OPTION_NAMES)}"
                )
        levels = self.method.with_overrides(change.overrides).denoising_steps
        noise = self.noise
        if change.seed is not None:
            if not isinstance(noise, SeededNoise):
                raise UserError(
                    "seed of a shot needs noise = seeded: the reference draw order has one seed only"
                )
            noise = SeededNoise([change.seed + i for i in range(len(noise.seeds))], noise.frame_shape)
        steps = self._steps(levels)
        if len(steps) != len(self.steps) and self.method.sampler == "rolling":
            raise UserError(
                f"denoising_steps of a shot has {len(steps)} levels, and with sampler = rolling each of the stream's "
                f"{len(self.steps)} has its block in the window: give as many"
            )
        blend = None
        if policy.blocks > 1 and self.block > 0:
            blend = _Blend(self._told(), self._encode(change.prompts), self.block, policy)
        return replace(state, current=change, noise=noise, steps=steps, blend=blend)

    def _steps(self, levels: tuple[float, ...] | None) -> tuple[tuple[float, float], ...]:
        """Timestep and sigma of every denoising step."""
        scheduler = self.pipe.scheduler
        if self.method.solver == "unipc":
            return scheduler.unsnapped(levels or scheduler.config.denoising_steps)
        timesteps = scheduler.steps if levels is None else scheduler.warped(levels)
        return tuple((t, float(scheduler.sigma(torch.tensor(t)))) for t in timesteps)

    def _prompt_keys(self, state: _Next) -> PromptKV:
        """Cross-attention keys and values of the next block, computed once per prompt."""
        if state.blend is not None and state.blend.share(self.block) < 1:
            return self.pipe.transformer.prompt_kv(state.blend.embedding(self.block))
        return self._keys_of(state.current.prompts)

    def _keys_of(self, prompts: tuple[str, ...]) -> PromptKV:
        if self._prompt_kv is None or self._prompt_kv[0] != prompts:
            embeddings = self._encode(prompts)
            self._prompt_kv = (prompts, embeddings, self.pipe.transformer.prompt_kv(embeddings))
        return self._prompt_kv[2]

    def _encode(self, prompts: tuple[str, ...]) -> torch.Tensor:
        if self._prompt_kv is not None and self._prompt_kv[0] == prompts:
            return self._prompt_kv[1]
        return self.pipe.encode_prompt(list(prompts)).to(self.cache.keys)

    def _told(self) -> torch.Tensor:
        """The embedding that the latest block was told."""
        if self.blend is not None:
            return self.blend.embedding(self.block - 1)
        return self._encode(self.current.prompts)

    def _inputs(self, state: _Next, prompt_kv: PromptKV) -> BlockInputs:
        return BlockInputs(
            self.pipe.transformer,
            self.pipe.scheduler,
            state.steps,
            prompt_kv,
            self.cache,
            correlated(state.noise, self.method.noise_correlation),
            self.blocks,
            self.method.context_timestep,
            state.new_scene,
        )

    def _context_pass(self, plan, prompt_kv: PromptKV) -> None:
        """Replay a plan's clean latents at t = 0, rewriting their keys and values (`cache.begin` was called)."""
        state = _Next(self.current, self.noise, self.steps, self.decoder, self.blend)
        self._inputs(state, prompt_kv).context_pass(self.cache.clean_latents(plan))

    def _pixels(self, latents_BCFHW: torch.Tensor, decoder: VaeState) -> np.ndarray:
        if not self.decode_pixels:
            decoder.started = True
            return np.zeros((latents_BCFHW.shape[0], 0, 0, 0, 3), np.uint8)
        return decode_to_bytes(self.pipe.decoder, latents_BCFHW, decoder)


@dataclass(frozen=True)
class _Next:
    """What a block is made with; becomes the stream's state when the block is done."""

    current: PromptChange
    noise: NoiseSource
    steps: tuple[tuple[float, float], ...]
    decoder: VaeState
    blend: _Blend | None = None
    new_scene: bool = False


@dataclass(frozen=True)
class _Blend:
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


@dataclass
class _Undo:
    """The cache before a prompt switch touched it, to go back to if the block fails."""

    snapshot: CacheSnapshot | None = None


class _Clock:
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
