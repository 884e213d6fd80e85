"""A stream: one live generation with all of its mutable state. Everything else holds weights only.

    stream = pipe.stream("a fox walks [5s] | it snows [10s]")
    for chunk in stream:            # pull-based: the consumer sets the pace
        show(chunk.frames)
        stream.prompt("night falls")        # takes effect at the next block

    other = stream.fork()                   # goes on from the same moment, independently
    stream.save("fox.stream")               # pipe.load_stream("fox.stream") goes on from there, in another process

A chunk commits whole or not at all: an exception leaves the stream at the previous chunk, and `next` tries again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamvid.chunk import Chunk, Clock
from streamvid.context import ContextCache
from streamvid.control import Mailbox, PromptChange, Receipt, Restart, StreamState, uninterrupted
from streamvid.decoding import VaeState, decode_to_bytes, decoder_state
from streamvid.direction import Blend, BlockSetup, Director, PromptKeys
from streamvid.errors import UserError
from streamvid.given import encode_frames
from streamvid.joint_context import JointContext, room_for
from streamvid.methods import Method
from streamvid.noise import (
    NoiseSource,
    ReferenceNoise,
    SeededNoise,
    correlated,
    noise_from,
    noise_state,
)
from streamvid.sampler import BlockInputs, TimeTable
from streamvid.saving import options_of
from streamvid.stream_file import new_stream, save_stream, settings_of
from streamvid.switching import SwitchPolicy, switch_policy
from streamvid.timeline import Timeline
from streamvid.transformer import PromptKV
from streamvid.window import BlockPlan, plan_from, plan_state

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline


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
        decode_pixels: False leaves the chunks without pixels; their times stay what they would be. A method with `reencode`
            needs them in any case.
        context_pass: `separate`, a forward of its own after each block; `joint`, with the first denoising step of the next
            block (streamvid.joint_context), equal up to rounding; `auto`, the faster of the two where both can be.
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
        context_pass: str = "auto",
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
        self.latent_size, self.attention = latent_size, attention
        self.decode_pixels = decode_pixels or method.reencode
        device, dtype = pipe.transformer.device, pipe.transformer.dtype
        self.prompt_keys = PromptKeys(pipe, device, dtype)
        self.director = Director(pipe, method, timeline, self.prompt_keys)
        self.steps = self.director.steps(method.denoising_steps)
        self.sampler = method.new_sampler()
        with _plain_tensors():
            self.cache = ContextCache(
                method.window_options(levels=len(self.steps)),
                layers=config.num_layers,
                heads=config.num_attention_heads,
                head_dim=config.attention_head_dim,
                grid=pipe.transformer.token_grid(*latent_size),
                latent_shape=(config.in_channels, *latent_size),
                batch=len(first.prompts),
                dtype=dtype,
                device=device,
                attention=attention,
                **method.cache_options(),
            )
        self.context_pass = context_pass
        with _plain_tensors():
            self.room = room_for(self.cache, self.method, self.context_pass)
        self.unwritten: BlockPlan | None = (
            None  # plan of the latest block, whose clean keys have yet to be written
        )
        self.told: PromptKV | None = None  # what that block was told, if it was made here
        self.times: TimeTable | None = TimeTable(pipe.transformer)
        self.block = 0
        self.frames_shown = 0
        self.decoder: VaeState = decoder_state(pipe.decoder)
        self.noise = noise
        self.origin = noise_state(noise)  # where a reset goes back to
        self.given: torch.Tensor | None = None
        self.shown: torch.Tensor | None = None  # last pixels of the latest latent frames, with `reencode`
        self.current = first
        self.blend: Blend | None = None
        self.mailbox = Mailbox()
        self._running = threading.Event()  # not while paused
        self._running.set()
        self._making = threading.RLock()  # held while a block is made
        self._busy = False
        self._closed = False
        self._place = self._where()
        for shot in timeline.shots if timeline is not None else ():
            # an impossible one is refused now, not in minutes
            self.director.after(self._setup, self.director.change_to(shot, len(first.prompts)), 0)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def begin_with(self, latents_BCFHW: torch.Tensor) -> None:
        """Before the first block: go on from given clean latents, whole blocks of them; also after every `reset`.

        They become the blocks before block 0: written into the window by context passes under the first prompt, as if the
        stream had made them, and shown to the decoder, so that the first chunk goes on where they end. (Where a full window
        is compressed, the clean frames' queries choose the tokens: there are no noisy ones.)
        """
        with self.between_chunks(), _plain_tensors():
            self.given = latents_BCFHW.clone()
            self._show_given(self._inputs(self._setup, self.prompt_keys.of_prompts(self.current.prompts)))
            self._place = self._where()

    def _show_given(self, inputs: BlockInputs) -> None:
        if self.given is None:
            return
        blocks = self.given.to(self.cache.keys).split(self.method.frames_per_block, 2)
        self.cache.planner.next_block = -len(blocks)
        for latents in blocks:
            plan = self.cache.planner.plan()
            self.cache.begin(plan)
            self.cache.commit(self.sampler.context_pass(inputs, plan, latents), latents)
        self._decode_past(self.given)

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
        receipt = self.mailbox.prompt(PromptChange(prompts, policy))
        if self._ended:
            self.mailbox.drop()
        return receipt

    def cut(self, text: str | list[str] | None = None) -> Receipt:
        """Begin a new scene at the next block, under another prompt or the current one."""
        return self.prompt(list(self.current.prompts) if text is None else text, "cut")

    def reset(self, seed: int | None = None) -> None:
        """Start again from block 0 at the next block, under the current prompt; thread-safe, also after the stream's end.

        A script starts again with its first shot. The noise is that of the first time, or of `seed`.
        """
        if seed is not None:
            if not isinstance(seed, int) or seed < 0:
                raise UserError(f"seed = {seed} must be a whole number from 0")
            if not isinstance(self.noise, SeededNoise):
                raise UserError("seed of a reset needs noise = seeded: leave it out")
        self.mailbox.reset(Restart(seed))

    def fork(self) -> VideoStream:
        """An independent continuation from the latest chunk, with its own copy of all state; thread-safe.

        What was asked for and has not been applied yet is asked of both. A noise function of the caller's is shared.
        """
        with self.between_chunks(), _plain_tensors():
            twin = new_stream(self.pipe, settings_of(self))
            twin.load_state_dict(self.state_dict())
            twin.mailbox.load_state_dict(self.mailbox.state_dict())
        return twin

    def save(self, path: str | Path, mode: str = "exact") -> Path:
        """Write the stream to a file, which `StreamVidPipeline.load_stream` goes on from; thread-safe, atomic.

        Args:
            mode: `exact` goes on bit for bit, with the same model on the same device; the file holds keys, values and the
                decoder's memory. `compact` holds clean latents, sinks of averages, noise and script, and the rest is made
                anew from them on load: the video goes on in the same scene, not bit for bit (`ContextCache.rebuild`).
        """
        return save_stream(self, path, mode)

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
        self.mailbox.drop()

    def state(self) -> StreamState:
        """Where the stream is: after its latest chunk, also while the next one is in the making."""
        block, frames_shown, prompts, attended = self._place
        pending = self.mailbox.pending
        return StreamState(
            block,
            frames_shown / self.fps,
            prompts,
            None if pending is None else pending[0].prompts,
            self.method.name,
            not self._running.is_set(),
            self._closed,
            attended,
            self.cache.bytes,
        )

    def _where(self) -> tuple[int, int, tuple[str, ...], tuple[int, ...]]:
        return self.block, self.frames_shown, self.current.prompts, tuple(self.cache.planner.live_frames)

    @property
    def _ended(self) -> bool:
        over = self.blocks is not None and self.block >= self.blocks and self.mailbox.restart is None
        return self._closed or over

    def __next__(self) -> Chunk:
        if not self._ended:
            self._running.wait()
        with self.between_chunks(), _plain_tensors():
            if self._ended:
                self.mailbox.drop()
                raise StopIteration
            self._busy = True
            try:
                return self._whole_chunk()
            finally:
                self._busy = False

    def _whole_chunk(self) -> Chunk:
        undo: list[Callable[[], None]] = []
        try:
            return self._next_chunk(undo)
        except BaseException:
            with uninterrupted():
                for back in undo[::-1]:
                    back()
                self.mailbox.failed()
            raise

    def _next_chunk(self, undo: list[Callable[[], None]]) -> Chunk:
        """Make a block and commit it. `undo` takes what brings back what was changed before the commit."""
        clock = Clock()
        setup, prompt_kv, events = self._set_up(clock, undo)
        inputs = self._inputs(setup, prompt_kv)
        with clock.stage("context"):
            inputs = self._take_along(inputs, setup, undo)
        with clock.stage("denoise"):
            self.cache.reencoded = self._reencoded()
            plan, latents = self.sampler.denoise(inputs)
        committed = plan
        if self.room is None:
            with clock.stage("context"):
                committed = self.sampler.context_pass(inputs, plan, latents)
        with clock.stage("decode"):
            decoder = setup.decoder.fork()
            videos = self._pixels(latents, decoder)
        chunk = Chunk(
            index=self.block,
            videos=videos,
            latents=latents,
            first_frame=self.frames_shown,
            media_time=self.frames_shown / self.fps,
            prompt=setup.current.prompts[0],
            timings=clock.read(),
            events=events,
            attended=plan.attended,
            new_scene=setup.new_scene,
        )
        with uninterrupted():
            # nothing but what `undo` brings back has changed what the next block is computed from
            self.cache.commit(committed, latents)
            if self.room is not None:
                self.unwritten, self.told = plan, prompt_kv
            self.sampler.commit()
            self._move_on(chunk, setup, decoder)
            undo.clear()
        return chunk

    def _move_on(self, chunk: Chunk, setup: BlockSetup, decoder: VaeState) -> None:
        """The chunk is the latest one."""
        ratio = self.pipe.temporal_ratio
        self.frames_shown += ratio * chunk.latents.shape[2] - (0 if setup.decoder.started else ratio - 1)
        self.block += 1
        self.current, self.noise, self.steps = setup.current, setup.noise, setup.steps
        self.blend, self.decoder, self.shown = setup.blend, decoder, self._last_pixels(chunk.videos)
        self._place = self._where()
        self.mailbox.applied(chunk.index, chunk.media_time)

    def _set_up(
        self, clock: Clock, undo: list[Callable[[], None]]
    ) -> tuple[BlockSetup, PromptKV, tuple[str, ...]]:
        """Do what was asked for: what the next block is made with, its prompt's keys and values, and what happened."""
        pending, restart = self.mailbox.take()
        events: tuple[str, ...] = ()
        if restart is not None:
            undo.append(partial(self.load_state_dict, {**self.state_dict(), "cache": self.cache.snapshot()}))
            self._begin_again(restart)
            events = ("reset",)
        change = self.director.change(self.block, self.current, pending)
        with clock.stage("switch"):
            setup = self.director.after(self._setup, change, self.block)
            setup = replace(setup, new_scene=restart is not None)
            prompt_kv = self.prompt_keys.of_block(setup, self.block)
            if restart is not None:  # under the prompt that block 0 is made with
                self._show_given(self._inputs(setup, prompt_kv))
                setup = replace(setup, decoder=self.decoder)
            if change is not None and self.block > 0:
                name = change.policy or self.method.transition
                policy = switch_policy(name)
                undo.append(partial(self.cache.load_state_dict, self.cache.snapshot()))
                undo.append(partial(setattr, self, "unwritten", self.unwritten))
                self._write_context(policy)
                policy.apply(self.cache, lambda plan: self._context_pass(plan, prompt_kv))
                events = (*events, f"switch:{name}")
                if policy.restarts_decoder:
                    setup = replace(setup, decoder=decoder_state(self.pipe.decoder), new_scene=True)
        return setup, prompt_kv, events

    def _take_along(
        self, inputs: BlockInputs, setup: BlockSetup, undo: list[Callable[[], None]]
    ) -> BlockInputs:
        """The latest block's context pass goes with the first step of this one, if both are told the same."""
        if self.unwritten is None or self.room is None:
            return inputs
        if setup.blend is not None and setup.blend.share(self.block - 1) < 1:
            self._write_context()
            return inputs
        joint = JointContext(self.cache, self.unwritten, self.method.context_timestep, self.room)
        undo.append(joint.restore)
        return replace(inputs, joint=joint)

    def _write_context(self, policy: SwitchPolicy | None = None) -> None:
        """The latest block's context pass, if it has yet to be made and the policy leaves a use for it."""
        plan = self.unwritten
        if plan is not None and not (policy is not None and policy.forgets(self.cache.planner, plan)):
            self.cache.begin(plan)
            prompt_kv = self.told or self.prompt_keys.of_block(self._setup, self.block - 1)
            self._inputs(self._setup, prompt_kv).context_pass(self.cache.clean_latents(plan))
        self.unwritten = None

    def _begin_again(self, restart: Restart) -> None:
        """Block 0 comes next, under the current prompt."""
        self.unwritten = None
        self.noise = noise_from(self.origin, self.pipe.transformer.device)
        if restart.seed is not None and isinstance(self.noise, SeededNoise):
            seeds = [restart.seed + i for i in range(len(self.current.prompts))]
            self.noise = SeededNoise(seeds, self.noise.frame_shape)
            self.origin = noise_state(self.noise)
        self.cache.clear()
        self.sampler.load_state_dict(self.method.new_sampler().state_dict())
        self.decoder = decoder_state(self.pipe.decoder)
        self.steps = self.director.steps(self.method.denoising_steps)
        self.block, self.frames_shown, self.blend, self.shown = 0, 0, None, None

    # --- state ------------------------------------------------------------------------------------------------------

    @contextmanager
    def between_chunks(self) -> Iterator[None]:
        """Wait until no block is in the making, and let none begin meanwhile."""
        with self._making:
            if self._busy:
                raise UserError(
                    "stream cannot be forked or saved from within one of its blocks: do it between two chunks"
                )
            yield

    def state_dict(self, compact: bool = False) -> dict[str, Any]:
        """Everything that a block changes (streamvid.saving); `compact`: that cannot be made anew from clean latents."""
        blend = self.blend
        return {
            "block": self.block,
            "frames_shown": self.frames_shown,
            "current": options_of(self.current),
            "steps": self.steps,
            "noise": noise_state(self.noise),
            "origin": self.origin,
            "given": self.given,
            "blend": blend and {"old": blend.old, "new": blend.new, "start": blend.start},
            "cache": self.cache.state_dict(compact),
            "unwritten": None if compact or self.unwritten is None else plan_state(self.unwritten),
            "sampler": self.sampler.state_dict(),
            "decoder": None if compact else self.decoder.state_dict(),
            "shown": None if compact else self.shown,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a stream with the same settings."""
        with _plain_tensors():
            self.block, self.frames_shown, self.steps = state["block"], state["frames_shown"], state["steps"]
            self.current = PromptChange(**state["current"])
            self.noise = noise_from(state["noise"], self.pipe.transformer.device)
            self.origin, self.given = state["origin"], state["given"]
            policy = switch_policy(self.current.policy or self.method.transition)
            self.blend = None if state["blend"] is None else Blend(**state["blend"], policy=policy)
            self.cache.load_state_dict(state["cache"])
            unwritten = state.get("unwritten")
            self.unwritten, self.told = None if unwritten is None else plan_from(unwritten), None
            self.sampler.load_state_dict(state["sampler"])
            self.decoder, self.shown = decoder_state(self.pipe.decoder), state.get("shown")
            if state["decoder"] is not None:
                self.decoder.load_state_dict(state["decoder"])
            elif self.cache.planner.next_frame > 0:
                self._rebuild()
            self._place = self._where()

    def _rebuild(self) -> None:
        """Keys, values and the decoder's memory, from the clean latents of a compact state."""
        told = self.prompt_keys.told(self._setup, self.block - 1)
        prompt_kv = self.pipe.transformer.prompt_kv(told)
        self.cache.rebuild(lambda plan: self._context_pass(plan, prompt_kv))
        self._decode_past(self.cache.latest_latents())

    # --- parts of a block -------------------------------------------------------------------------------------------

    @property
    def _setup(self) -> BlockSetup:
        """What the latest block was made with."""
        return BlockSetup(self.current, self.noise, self.steps, self.decoder, self.blend)

    def _inputs(self, setup: BlockSetup, prompt_kv: PromptKV) -> BlockInputs:
        return BlockInputs(
            self.pipe.transformer,
            self.pipe.scheduler,
            setup.steps,
            prompt_kv,
            self.cache,
            correlated(setup.noise, self.method.noise_correlation),
            self.blocks,
            self.method.context_timestep,
            setup.new_scene,
            times=self.times,
        )

    def _context_pass(self, plan, prompt_kv: PromptKV) -> None:
        """Replay a plan's clean latents at t = 0, rewriting their keys and values (`cache.begin` was called)."""
        self._inputs(self._setup, prompt_kv).context_pass(self.cache.clean_latents(plan))

    def _decode_past(self, latents_BCFHW: torch.Tensor) -> None:
        """Show the decoder the latents of a scene that come before the next block."""
        self.decoder, self.shown = decoder_state(self.pipe.decoder), None
        for latents in latents_BCFHW.split(self.method.frames_per_block, 2):
            self.shown = self._last_pixels(self._pixels(latents, self.decoder))

    def _last_pixels(self, videos_BTHWC: np.ndarray) -> torch.Tensor | None:
        """`shown` once these frames are shown too."""
        if not self.method.reencode:
            return None
        last = torch.from_numpy(videos_BTHWC[:, :: -self.pipe.temporal_ratio][:, ::-1].copy())
        latest = last if self.shown is None else torch.cat([self.shown, last], 1)
        return latest[:, -(self.method.window - self.method.frames_per_block) :]

    def _reencoded(self) -> tuple[int, torch.Tensor] | None:
        """The oldest frame that the next block's past is written from, and latents `[B, C, H, W]` of its last pixels as a
        picture: nothing that the latents of an endless stream could have taken on survives in it (Krea)."""
        planner, method = self.cache.planner, self.method
        frame = planner.next_frame - (method.window - method.frames_per_block)
        if self.shown is None or frame <= planner.scene_start:  # a scene's first frame is a picture already
            return None
        picture = self.shown[:, frame - planner.next_frame][:, None].numpy()
        return frame, encode_frames(self.pipe.vae, picture)[:, :, 0]

    def _pixels(self, latents_BCFHW: torch.Tensor, decoder: VaeState) -> np.ndarray:
        if not self.decode_pixels:
            decoder.started = True
            return np.zeros((latents_BCFHW.shape[0], 0, 0, 0, 3), np.uint8)
        return decode_to_bytes(self.pipe.decoder, latents_BCFHW, decoder)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and no tensors that only `torch.inference_mode` may write to, whatever the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield
