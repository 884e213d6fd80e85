"""What happened in a stream, kept for everybody who listens, in whichever thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Bell:
    """Wakes coroutines from a worker thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def ring(self) -> None:
        """Something is new; thread-safe."""
        with self._lock:
            listeners = list(self._listeners.items())
        for event, loop in listeners:
            with suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(event.set)

    @contextmanager
    def listen(self) -> Iterator[asyncio.Event]:
        """An event that is set at every ring; the listener clears it."""
        event = asyncio.Event()
        with self._lock:
            self._listeners[event] = asyncio.get_running_loop()
        try:
            yield event
        finally:
            with self._lock:
                del self._listeners[event]

    @property
    def listeners(self) -> int:
        return len(self._listeners)


class EventLog:
    """The latest events of a stream, numbered, so that a listener who comes back misses nothing.

    Args:
        bell: rung at every event.
        keep: events that are kept.
    """

    def __init__(self, bell: Bell, keep: int = 1000):
        self._bell = bell
        self._lock = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=keep)
        self.next_number = 0

    def add(self, kind: str, **values: Any) -> None:
        """Append an event; `values` must be plain JSON."""
        with self._lock:
            self._events.append(
                {"number": self.next_number, "event": kind, "at": round(time.time(), 4), **values}
            )
            self.next_number += 1
        self._bell.ring()

    def since(self, number: int) -> list[dict[str, Any]]:
        """Events from `number` on that are still kept."""
        with self._lock:
            return [event for event in self._events if event["number"] >= number]
