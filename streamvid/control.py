"""What passes between a stream and those who steer it: what is asked for, receipts of prompts, the state as plain values."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

PENDING, APPLIED, REPLACED, DROPPED = "pending", "applied", "replaced", "dropped"


class Receipt:
    """What became of a live prompt.

    Attributes:
        prompts, policy: as accepted; policy None is the method's.
        accepted_at: `time.time()`.
        status: `pending`; `applied` once a chunk was made with it; `replaced` by a later prompt before that; `dropped` where
            the stream ended first.
        chunk, media_time, applied_at: index and first second of the first chunk made with it, and when that was finished.
    """

    def __init__(self, prompts: tuple[str, ...], policy: str | None):
        self.prompts, self.policy = prompts, policy
        self.accepted_at = time.time()
        self.status = PENDING
        self.chunk: int | None = None
        self.media_time: float | None = None
        self.applied_at: float | None = None
        self._settled = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is no longer pending; whether it was applied."""
        self._settled.wait(timeout)
        return self.status == APPLIED

    def apply(self, chunk: int, media_time: float) -> None:
        """For the stream: a chunk was made with it."""
        self.chunk, self.media_time, self.applied_at = chunk, media_time, time.time()
        self._settle(APPLIED)

    def give_up(self, status: str) -> None:
        """For the stream: it will not be applied."""
        self._settle(status)

    def _settle(self, status: str) -> None:
        if self.status == PENDING:
            self.status = status
            self._settled.set()


@dataclass(frozen=True)
class PromptChange:
    """A prompt to switch to at the next block."""

    prompts: tuple[str, ...]
    policy: str | None = None
    seed: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Restart:
    """Block 0 comes next; None leaves the noise its seed."""

    seed: int | None


class Mailbox:
    """What was asked of a stream, from any thread, until a block that takes it up is finished.

    Attributes:
        pending: the latest prompt with its receipt; restart: the latest reset.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pending: tuple[PromptChange, Receipt] | None = None
        self.restart: Restart | None = None
        self._taken: tuple[tuple[PromptChange, Receipt] | None, Restart | None] = None, None

    def prompt(self, change: PromptChange) -> Receipt:
        """Ask for a prompt; one that no block has taken up yet is replaced."""
        receipt = Receipt(change.prompts, change.policy)
        with self._lock:
            self._forget(REPLACED)
            self.pending = change, receipt
        return receipt

    def reset(self, restart: Restart) -> None:
        """Ask for block 0; it stands beside the prompt that waits."""
        with self._lock:  # or it could be lost to a block that finishes with an earlier one
            self.restart = restart

    def take(self) -> tuple[PromptChange | None, Restart | None]:
        """For a block that begins: what it shall be made with."""
        with self._lock:
            self._taken = self.pending, self.restart
        return self.pending and self.pending[0], self.restart

    def applied(self, chunk: int, media_time: float) -> None:
        """The block is finished; what came meanwhile is for the next."""
        with self._lock:
            (prompt, restart), self._taken = self._taken, (None, None)
            if prompt is not None:
                prompt[1].apply(chunk, media_time)
                self.pending = None if self.pending is prompt else self.pending
            self.restart = None if self.restart is restart else self.restart

    def failed(self) -> None:
        """The block failed: what it had taken still waits, unless a later prompt came meanwhile."""
        with self._lock:
            (prompt, _), self._taken = self._taken, (None, None)
            if prompt is not None and prompt is not self.pending:
                prompt[1].give_up(REPLACED)

    def drop(self) -> None:
        """The stream is over: what no block has taken up yet will not be applied."""
        with self._lock:
            self._forget(DROPPED)

    def _forget(self, status: str) -> None:
        if self.pending is not None and self.pending is not self._taken[0]:
            self.pending[1].give_up(status)
            self.pending = None

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            prompt, restart = self.pending and vars(self.pending[0]), self.restart and vars(self.restart)
            return {"prompt": prompt, "restart": restart}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Ask for the same, with a receipt of its own."""
        if state["prompt"] is not None:
            self.prompt(PromptChange(**state["prompt"]))
        self.restart = None if state["restart"] is None else Restart(**state["restart"])


@dataclass(frozen=True)
class StreamState:
    """A stream at one moment.

    Attributes:
        block: chunks made; media_time: seconds made.
        prompts: what the latest chunk was made with; pending: what the next one will be.
        attended: latent frames in the window; kv_bytes: of the context cache.
    """

    block: int
    media_time: float
    prompts: tuple[str, ...]
    pending: tuple[str, ...] | None
    method: str
    paused: bool
    closed: bool
    attended: tuple[int, ...]
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: what is inside happens whole."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no KeyboardInterrupt comes here
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
