"""What a stream tells those who steer it: receipts of prompts, and its state as plain values."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
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
