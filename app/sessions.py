"""All streams of a server: who runs, who waits, who is forgotten.

A session is one person's seat: the streams that stand side by side in one tab. So many sessions run at once as the limits
say, the others wait in order. A stream is steered by its name, a secret that only its maker was told.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamvid.app.engine import Opening, StreamRequest
from streamvid.app.limits import Limits
from streamvid.app.live import ENDED, PAUSED, QUEUED, RUNNING, Busy, LiveStream, Past
from streamvid.app.metrics import Metrics
from streamvid.app.turns import Turns

from streamvid.errors import UserError

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60  # for the last chunk of a slow model
LOOK_SECONDS = 0.2  # between two looks for streams that nobody watches
FIRST_LOOK_SECONDS = 10  # from its creation to the first connection of a page
FINISHED_SECONDS = 600  # an ended stream can be exported for so long


class NotFound(UserError):
    """No stream of that name."""


@dataclass(eq=False)
class Session:
    """Streams that share one seat."""

    streams: list[LiveStream] = field(default_factory=list)
    admitted: bool = False

    @property
    def alive(self) -> list[LiveStream]:
        return [stream for stream in self.streams if stream.status != ENDED]


class Studio:
    """The registry of streams.

    Args:
        engine: makes streams (`PipelineEngine`, or anything with its `prepare`, `load`, `check_prompt`, `describe` and
            `at_once`).
        limits: of the server.
        workspace: folder for recordings, emptied of what this studio wrote at `close`; None makes a temporary one.
    """

    def __init__(self, engine: Any, limits: Limits, workspace: Path | None = None):
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.workspace = workspace or Path(tempfile.mkdtemp(prefix="streamvid-"))
        self._turns = Turns(engine.at_once)
        self._lock = threading.RLock()
        self._streams: dict[str, tuple[LiveStream, Session]] = {}
        self._queue: deque[Session] = deque()
        self._sessions: list[Session] = []  # admitted ones with a living stream
        self._leaving: set[LiveStream] = set()  # removed, but still in its last chunk
        self._closed = threading.Event()
        threading.Thread(target=self._look_after, name="studio", daemon=True).start()

    # --- starting ---------------------------------------------------------------------------------------------------

    def create(self, request: StreamRequest, beside: str | None = None) -> LiveStream:
        """Start a stream or let it wait; `beside` puts it into the session of another one.

        Raises:
            UserError: the request cannot be made. Busy: the queue is full, or the session is. NotFound: no such `beside`.
        """
        return self._enter(self.engine.prepare(request), beside)

    def resume_saved(self, file: Path, linger: float | None = None) -> LiveStream:
        """Go on with a saved stream."""
        return self._enter(replace(self.engine.load(file), linger=linger), None)

    def fork(self, name: str, linger: float | None = None) -> LiveStream:
        """A second continuation of a stream from its latest chunk on, in the same session."""
        parent, session = self._entry(name)
        self._check_room(session)
        past = parent.fork()
        opening = replace(parent.opening, open=lambda: past.stream, linger=linger or parent.opening.linger)
        return self._enter(opening, name, past)

    def _enter(
        self,
        opening: Opening,
        beside: str | None,
        past: Past | None = None,
    ) -> LiveStream:
        with self._lock:
            if beside is not None:
                session = self._entry(beside)[1]
                self._check_room(session)
            else:
                session = Session()
                if not self._has_seat() and len(self._queue) >= self.limits.queue:
                    self.metrics.refused.inc()
                    raise Busy("the queue is full: try again in a minute")
            name = secrets.token_hex(12)
            folder = self._folder(name)
            stream = LiveStream(
                name,
                opening,
                self._turns,
                folder,
                self.limits,
                self.metrics,
                self._stream_ended,
                past,
            )
            self._streams[name] = stream, session
            session.streams.append(stream)
            if session.admitted:
                self._start(stream)
            elif session not in self._queue:
                self._queue.append(session)
                self._admit()
        return stream

    def _check_room(self, session: Session) -> None:
        if len(session.alive) >= self.limits.streams_per_session:
            raise Busy(
                f"this session has {len(session.alive)} streams already: close one of them before starting another"
            )

    def _has_seat(self) -> bool:
        return len(self._sessions) < self.limits.sessions and not self._queue

    def _admit(self) -> None:
        """Seat those who wait, in order; `_lock` is held."""
        self._sessions = [session for session in self._sessions if session.alive]
        self._queue = deque(session for session in self._queue if session.alive)
        while self._queue and len(self._sessions) < self.limits.sessions:
            session = self._queue.popleft()
            session.admitted = True
            self._sessions.append(session)
            for stream in session.alive:
                self._start(stream)
        for place, session in enumerate(self._queue, start=1):
            for stream in session.alive:
                stream.events.add("queued", place=place, length=len(self._queue))

    def _start(self, stream: LiveStream) -> None:
        self.metrics.started.inc()
        stream.run()

    # --- finding and ending -----------------------------------------------------------------------------------------

    def get(self, name: str) -> LiveStream:
        """The stream of that name; being asked for keeps it alive."""
        stream = self._entry(name)[0]
        stream.touched = time.monotonic()
        return stream

    def place(self, stream: LiveStream) -> int | None:
        """Place in the queue, from 1; None where it does not wait."""
        with self._lock:
            places = (i for i, session in enumerate(self._queue, start=1) if stream in session.streams)
            return next(places, None)

    def remove(self, name: str) -> None:
        """End a stream and forget it with all its files."""
        stream = self._entry(name)[0]
        stream.close()
        with self._lock:
            self._streams.pop(name, None)
            self._leaving.add(stream)
        threading.Thread(target=self._clear, args=(stream,), daemon=True).start()

    def counts(self) -> dict[str, int]:
        """Streams by status, those whose caches are in memory, those who wait, open connections."""
        with self._lock:
            streams = [stream for stream, _ in self._streams.values()]
            in_memory = sum(stream.in_memory for stream in {*streams, *self._leaving})
            waiting = len(self._queue)
        by_status = dict.fromkeys((QUEUED, RUNNING, PAUSED, ENDED), 0)
        for stream in streams:
            by_status[stream.status] += 1
        viewers = sum(stream.viewers for stream in streams)
        return {**by_status, "in_memory": in_memory, "waiting_sessions": waiting, "viewers": viewers}

    def metrics_text(self) -> bytes:
        """For Prometheus."""
        counts = self.counts()
        for status in (QUEUED, RUNNING, PAUSED, ENDED):
            self.metrics.streams.labels(status).set(counts[status])
        self.metrics.in_memory.set(counts["in_memory"])
        self.metrics.viewers.set(counts["viewers"])
        with self._lock:
            streams = [stream for stream, _ in self._streams.values()]
        self.metrics.kv_bytes.set(sum(stream.kv_bytes for stream in streams))
        return self.metrics.text()

    def close(self) -> None:
        """End everything, wait for the chunks in the making, and delete the workspace."""
        self._closed.set()
        with self._lock:
            streams = [stream for stream, _ in self._streams.values()]
            self._streams.clear()
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join(CLOSE_SECONDS)
        shutil.rmtree(self.workspace, ignore_errors=True)

    def _entry(self, name: str) -> tuple[LiveStream, Session]:
        with self._lock:
            if name not in self._streams:
                raise NotFound(f"stream {name[:40]!r} does not exist (any more): start another one")
            return self._streams[name]

    def _folder(self, name: str) -> Path:
        folder = self.workspace / name
        folder.mkdir(parents=True)
        return folder

    def _stream_ended(self, stream: LiveStream) -> None:
        self.metrics.ended.labels(stream.reason).inc()
        with self._lock:
            self._admit()

    def _clear(self, stream: LiveStream) -> None:
        """Delete a stream's files once its worker has written the last one."""
        stream.join()
        shutil.rmtree(stream.folder, ignore_errors=True)
        with self._lock:
            self._leaving.discard(stream)

    def _look_after(self) -> None:
        """End streams that nobody watches, that nobody steers, and forget those that ended long ago."""
        while not self._closed.wait(LOOK_SECONDS):
            now = time.monotonic()
            with self._lock:
                streams = list(self._streams.values())
            for stream, _ in streams:
                alone = 0.0 if stream.viewers and stream.status != ENDED else now - stream.touched
                if alone > patience(stream):
                    self._forget(stream.name)
                elif (
                    stream.status in (RUNNING, PAUSED)
                    and not stream.opening.scripted
                    and now - stream.steered > self.limits.idle_seconds
                ):
                    stream.close("idle")

    def _forget(self, name: str) -> None:
        try:
            self.remove(name)
        except NotFound:
            pass
        except Exception:
            logger.exception("a stream could not be removed")


def patience(stream: LiveStream) -> float:
    """Seconds that a stream waits for somebody to look at it."""
    if not stream.was_watched:
        return max(stream.linger, FIRST_LOOK_SECONDS)
    if stream.status == ENDED and (
        stream.viewers or stream.linger >= 5
    ):  # a tab stays connected until it goes
        return max(stream.linger, FINISHED_SECONDS)
    return stream.linger
