"""A running stream: its worker thread, play-out, receipts, shots and recording."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from streamvid.app import memory
from streamvid.app.engine import Opening
from streamvid.app.events import Bell, EventLog
from streamvid.app.history import History, Shot
from streamvid.app.limits import Limits
from streamvid.app.metrics import Metrics
from streamvid.app.playout import PlayoutClock
from streamvid.app.recording import Part, Recording
from streamvid.app.turns import Turns

from streamvid.control import PENDING
from streamvid.errors import UserError
from streamvid.script import Script

logger = logging.getLogger(__name__)

QUEUED, RUNNING, PAUSED, ENDED = "queued", "running", "paused", "ended"
RAW_CHUNKS = 4  # kept as pixels, for viewers without H.264
SPEED_CHUNKS = 8
COMMAND_SECONDS = 60  # the longest that a caller waits for the chunk in the making


class StreamEnded(UserError):
    """Steering a stream that is over."""


class Busy(UserError):
    """There is no room, or no time, for it now."""


class GivenUp(Exception):
    """The stream was closed while a block was in the making."""


@dataclass
class LivePrompt:
    """A prompt on its way: the engine's receipt, and where it landed in this stream's own time."""

    number: int
    text: str
    receipt: Any
    told: str = PENDING
    chunk: int | None = None
    media_time: float | None = None

    def to_dict(self) -> dict[str, Any]:
        receipt = self.receipt
        return {
            "receipt": self.number,
            "text": self.text,
            "policy": receipt.policy,
            "status": receipt.status,
            "accepted_at": receipt.accepted_at,
            "applied_at": receipt.applied_at,
            "chunk": self.chunk,
            "media_time": self.media_time,
        }


@dataclass(frozen=True)
class Past:
    """What a fork goes on from: a copy of the engine's stream between two chunks, and what had happened until then."""

    stream: Any
    made: float
    chunks: int
    history: History
    film: list[Part]


class LiveStream:
    """One stream on its way to viewers, held back to their play-out.

    Args:
        name: secret that its owner steers it by.
        opening: what to stream.
        turns: shared by all streams of the machine.
        folder: its own, made by the caller; recordings and saved files go there.
        limits, metrics: of the server.
        ended: called once, from the worker, when it is over.
        past: of a fork, whose time goes on from there.
    """

    def __init__(
        self,
        name: str,
        opening: Opening,
        turns: Turns,
        folder: Path,
        limits: Limits,
        metrics: Metrics,
        ended: Callable[[LiveStream], None],
        past: Past | None = None,
    ):
        self.name, self.opening, self.folder, self.limits, self.metrics = (
            name,
            opening,
            folder,
            limits,
            metrics,
        )
        self._turns, self._ended = turns, ended
        self.start = past.made if past else 0.0
        self.first_chunk = past.chunks if past else 0
        self.history: History = past.history if past else History()
        self.clock: PlayoutClock = PlayoutClock(self.start)
        self.recording = Recording(folder / "video.mp4", opening.fps, self.start, past.film if past else ())
        self.bell = Bell()
        self.events = EventLog(self.bell)
        self.raw: deque[tuple[int, float, np.ndarray]] = deque(maxlen=RAW_CHUNKS)
        self.status, self.reason, self.message = QUEUED, "", ""
        self.ahead = opening.ahead or limits.ahead_seconds
        self.linger = limits.linger_seconds if opening.linger is None else opening.linger
        self.chunks: int = self.first_chunk
        self.prompts: deque[LivePrompt] = deque(maxlen=500)
        self.last_chunk: dict[str, Any] = {}
        self.in_memory = False  # whether it holds caches
        self.viewers = 0
        self.was_watched = False
        self.touched = self.steered = time.monotonic()
        self._prompt_count = 0
        self._speeds: deque[tuple[float, float]] = deque(maxlen=SPEED_CHUNKS)
        self._stream: Any = None
        self._change = threading.Condition()
        self._commands: deque[tuple[Callable[[], Any], Future]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=f"stream-{name[:6]}", daemon=True)

    # --- steering, from any thread ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Begin to generate."""
        if self.status == QUEUED and not self._stopping:
            self.status = RUNNING
            self._thread.start()

    def prompt(self, text: str, policy: str | None = None) -> LivePrompt:
        """Switch at the next block."""
        with self._change:
            stream = self._running_stream()
            receipt = stream.prompt(text, policy)
            self._prompt_count += 1
            prompt = LivePrompt(self._prompt_count, text, receipt)
            self.prompts.append(prompt)
            self.events.add("receipt", **prompt.to_dict())
        self.steered = time.monotonic()
        self._tell_receipts()
        return prompt

    def cut(self, text: str | None = None) -> LivePrompt:
        """Begin a new scene at the next block."""
        return self.prompt(self.current_prompt if text is None else text, "cut")

    def pause(self) -> None:
        """Neither generation nor play-out moves until `resume`."""
        with self._change:
            self._running_stream()
            if self.status == RUNNING:
                self.status = PAUSED
                self.clock.hold(time.monotonic())
                self.events.add("paused")
        self.steered = time.monotonic()

    def resume(self) -> None:
        """Go on after a pause."""
        with self._change:
            self._running_stream()
            if self.status == PAUSED:
                self.status = RUNNING
                self.clock.release(time.monotonic())
                self.events.add("resumed")
            self._change.notify_all()
        self.steered = time.monotonic()

    def reset(self, seed: int | None = None) -> None:
        """Start anew under the current prompt; viewers see the stream go on in time."""

        def action() -> None:
            self._stream.reset(seed)
            self.history.reset(self.clock.made, seed)
            self.events.add("reset", media_time=self.clock.made)
            self._tell_receipts()

        self.between_chunks(action)

    def save(self, path: Path, mode: str) -> None:
        """Write the stream's state to a file."""
        self.between_chunks(lambda: self._stream.save(path, mode=mode))

    def fork(self) -> Past:
        """What a second continuation from the latest chunk on needs."""

        def action() -> Past:
            history, film = History(self.history), self.recording.parts
            return Past(self._stream.fork(), self.clock.made, self.chunks, history, film)

        return self.between_chunks(action)

    def report(self, position: float, rate: float) -> None:
        """A player says where it is."""
        with self._change:
            if self.status == RUNNING:
                self.clock.report(position, rate, time.monotonic())
                self._change.notify_all()

    def between_chunks(self, action: Callable[[], Any]) -> Any:
        """Let the worker do something when no chunk is in the making, and wait for it."""
        future: Future = Future()
        with self._change:
            self._running_stream()
            self._commands.append((action, future))
            self._change.notify_all()
        self.steered = time.monotonic()
        try:
            return future.result(COMMAND_SECONDS)
        except TimeoutError:
            if not future.cancel():  # it is being done
                return future.result()
            raise Busy(
                f"the chunk in the making takes longer than {COMMAND_SECONDS:g} s: pause the stream, or try again"
            ) from None

    def close(self, reason: str = "closed") -> None:
        """End it; returns at once, the worker frees everything after the denoising step in the making."""
        with self._change:
            if self._stopping or self.status == ENDED:
                return
            self._stopping, self.reason = True, reason
            waiting = self.status == QUEUED
            self._change.notify_all()
        if waiting:
            self._end(reason, "")

    # --- what is known ----------------------------------------------------------------------------------------------

    @property
    def current_prompt(self) -> str:
        return self.history.shots[-1].prompt if self.history.shots else ""

    @property
    def speed(self) -> float | None:
        """Media seconds made per second of work, lately; below 1 play-out cannot keep up."""
        seconds, work = (
            (sum(column) for column in zip(*self._speeds, strict=True)) if self._speeds else (0, 0)
        )
        return seconds / work if work else None

    @property
    def kv_bytes(self) -> int:
        stream = self._stream
        return 0 if stream is None else stream.state().kv_bytes

    def script(self) -> Script:
        """What really happened, as a script that makes the same video again."""
        opening = self.opening
        return self.history.script(
            self.clock.made,
            title=opening.title,
            method=opening.method,
            height=opening.height,
            width=opening.width,
            fps=opening.fps,
            seed=opening.seed,
            overrides=opening.options,
        )

    def state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        now, opening = time.monotonic(), self.opening
        return {
            "stream": self.name,
            "status": self.status,
            "reason": self.reason,
            "message": self.message,
            "prompt": self.current_prompt,
            "pending": next((p.text for p in reversed(self.prompts) if p.receipt.status == PENDING), None),
            "method": opening.method,
            "options": dict(opening.options),
            "seed": opening.seed,
            "height": opening.height,
            "width": opening.width,
            "fps": opening.fps,
            "title": opening.title,
            "start": self.start,
            "chunks": self.chunks,
            "made": self.clock.made,
            "position": self.clock.position(now),
            "ahead": self.clock.ahead(now),
            "ahead_limit": self.ahead,
            "speed": self.speed,
            "kv_bytes": self.kv_bytes,
            "codec": self.recording.codec,
            "shots": [shot.to_dict() for shot in self.history.shots],
            "receipts": [prompt.to_dict() for prompt in self.prompts],
        }

    # --- the worker -------------------------------------------------------------------------------------------------

    def _running_stream(self) -> Any:
        """The engine's stream; `_change` is held."""
        if self.status == QUEUED:
            raise StreamEnded("the stream still waits in the queue: steer it once it has started")
        if self._stopping or self.status == ENDED:
            raise StreamEnded(f"the stream has ended ({self.reason}): start another one")
        if self._stream is None:
            self._change.wait_for(lambda: self._stream is not None or self.status == ENDED, COMMAND_SECONDS)
            if self._stream is None:
                raise StreamEnded(f"the stream has ended ({self.reason}): start another one")
        return self._stream

    def _work(self) -> None:
        reason, message = "", ""
        try:
            stream = self.opening.open()
            stream.sampler.on_step_end = self._go_on
            with self._change:
                self._stream, self.in_memory = stream, True
                self._change.notify_all()
            del stream
            self.events.add("started", start=self.start)
            while self._wait():
                if self.clock.made - self.start >= self.limits.stream_seconds:
                    reason = "too long"
                    break
                self._make()
        except StopIteration:
            reason = "finished"
        except GivenUp:
            pass
        except UserError as error:
            reason, message = "error", str(error)
        except Exception:
            logger.exception("stream failed")
            reason, message = "error", "the stream failed: the server's log says why"
        self._end(reason or self.reason, message)

    def _wait(self) -> bool:
        """Obey commands and wait until a chunk is wanted; False when the stream is to end."""
        while True:
            with self._change:
                while not self._stopping and not self._commands:
                    seconds = self.clock.seconds_until(self.ahead, time.monotonic())
                    if seconds == 0:
                        return True
                    self._change.wait(seconds)
                if self._stopping:
                    return False
                action, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

    def _go_on(self, timestep: Any, latents: Any) -> Any:
        """After every denoising step: nobody waits for the rest of a block that nobody will see."""
        if self._stopping:
            raise GivenUp
        return latents

    def _make(self) -> None:
        began = time.monotonic()
        with self._turns.turn(began + self.clock.ahead(began)):
            self._go_on(None, None)  # it may have been closed while it waited
            chunk = next(self._stream)
        made = time.monotonic()
        piece = self.recording.add(chunk.frames)
        now = time.monotonic()
        self._speeds.append((piece.seconds, now - began))
        timings = {name: round(seconds, 5) for name, seconds in chunk.timings.items()}
        timings |= {"encode": round(now - made, 5), "wait": round(made - began - timings.get("total", 0), 5)}
        with self._change:
            self.raw.append((self.chunks, piece.start, chunk.frames))
            self.clock.extend(piece.start + piece.seconds, now)
            self._apply_prompts(piece.start)
        shot = self.history.add(self._shot_of(chunk, piece.start), piece.start, chunk.frames)
        self.metrics.chunk(len(chunk.frames), timings)
        self.last_chunk = {
            "chunk": self.chunks,
            "media_time": piece.start,
            "seconds": piece.seconds,
            "frames": len(chunk.frames),
            "prompt": chunk.prompt,
            "events": list(chunk.events),
            "timings": timings,
            "attended": list(chunk.attended),
            "kv_bytes": self.kv_bytes,
            "speed": self.speed,
            "ahead": self.clock.ahead(now),
            "shot": self.history.shots[-1].number,
        }
        self.chunks += 1
        if shot is not None:
            self.events.add("shot", **shot.to_dict())
        self.events.add("chunk", **self.last_chunk)
        self._tell_receipts()

    def _shot_of(self, chunk: Any, start: float) -> Shot | None:
        """The shot that begins with this chunk, if one does."""
        switch = next((event.split(":", 1)[1] for event in chunk.events if event.startswith("switch:")), None)
        if switch is None and not self.history.expects_shot:
            return None
        applied = next((p for p in reversed(self.prompts) if p.chunk == self.chunks), None)
        timeline = getattr(self._stream, "timeline", None)
        planned = None
        if timeline is not None and applied is None and chunk.index < timeline.blocks:
            planned = timeline.shot_of_block(chunk.index)
        return Shot(
            number=len(self.history.shots),
            prompt=chunk.prompt,
            start=start,
            chunk=self.chunks,
            policy=switch,
            receipt=applied.number if applied else None,
            seed=planned.seed if planned else None,
            overrides=dict(planned.overrides) if planned else {},
        )

    def _apply_prompts(self, start: float) -> None:
        for prompt in self.prompts:
            if prompt.chunk is None and prompt.receipt.status == "applied":
                prompt.chunk, prompt.media_time = self.chunks, start

    def _tell_receipts(self) -> None:
        """Events for the receipts whose status is news."""
        with self._change:
            news = [prompt for prompt in self.prompts if prompt.receipt.status != prompt.told]
            for prompt in news:
                prompt.told = prompt.receipt.status
        for prompt in news:
            self.metrics.prompt(prompt.receipt)
            self.events.add("receipt", **prompt.to_dict())

    def _end(self, reason: str, message: str) -> None:
        with self._change:
            stream, self._stream = self._stream, None
            self.opening = replace(self.opening, open=opened)  # it may hold a stream, too
            self.status, self.reason, self.message = ENDED, reason, message
            commands, self._commands = list(self._commands), deque()
            self.raw.clear()
            self.touched = time.monotonic()
            self.clock.hold(self.touched)
            self._change.notify_all()
        if stream is not None:
            stream.close()
        del stream
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(StreamEnded(f"the stream has ended ({reason}): start another one"))
        self.recording.close()
        self._tell_receipts()
        self.events.add("ended", reason=reason, message=message)
        memory.give_back()
        self.in_memory = False
        self._ended(self)

    def join(self, seconds: float | None = None) -> None:
        """Wait until the worker has ended; `close` was called."""
        if self._thread.ident is not None:
            self._thread.join(seconds)


def opened() -> Any:
    """In place of an opening that was used."""
    raise AssertionError("a stream is opened once")
