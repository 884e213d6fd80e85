"""Whose chunk is made next: one at a time, the stream that runs dry first goes first."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is given to the most urgent waiter (earliest deadline first), not to the fastest thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, int, threading.Event]] = []
        self._numbers = itertools.count()
        self._taken = False

    @contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """Wait for the turn; `deadline` is when this stream has nothing left to show, on a clock that all share."""
        with self._lock:
            waits = self._taken
            if waits:
                mine = threading.Event()
                heapq.heappush(self._waiting, (deadline, next(self._numbers), mine))
            self._taken = True
        if waits:
            mine.wait()
        try:
            yield
        finally:
            with self._lock:
                if self._waiting:
                    heapq.heappop(self._waiting)[2].set()
                else:
                    self._taken = False
