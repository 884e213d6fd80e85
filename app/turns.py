"""Whose chunk is made next: few at a time, the stream that runs dry first goes first."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock with `at_once` places, given to the most urgent waiter (earliest deadline first), not to the fastest thread."""

    def __init__(self, at_once: int = 1) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, int, threading.Event]] = []
        self._numbers = itertools.count()
        self._free = at_once

    @contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """Wait for the turn; `deadline` is when this stream has nothing left to show, on a clock that all share."""
        with self._lock:
            waits = self._free == 0
            if waits:
                mine = threading.Event()
                heapq.heappush(self._waiting, (deadline, next(self._numbers), mine))
            else:
                self._free -= 1
        if waits:
            mine.wait()
        try:
            yield
        finally:
            with self._lock:
                if self._waiting:
                    heapq.heappop(self._waiting)[2].set()
                else:
                    self._free += 1
