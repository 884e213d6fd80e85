"""Where the viewer is: generation is held back to this clock, or a prompt would be answered ten seconds later."""

from __future__ import annotations


class PlayoutClock:
    """Media time that is on the viewer's screen, in seconds.

    It runs by itself from the first chunk on and stops where nothing more is made; a player's reports set it right.
    Every method takes `now`, seconds of any monotonic clock.

    Args:
        start: media time of the first frame.
    """

    def __init__(self, start: float = 0.0):
        self.made = start
        self._at = start
        self._since: float | None = None  # None before the first chunk
        self._rate = 1.0
        self._held = False

    def position(self, now: float) -> float:
        """Media time that is shown."""
        if self._since is None or self._held:
            return self._at
        return min(self.made, self._at + self._rate * (now - self._since))

    def ahead(self, now: float) -> float:
        """Seconds that are made and not yet shown."""
        return self.made - self.position(now)

    def extend(self, made: float, now: float) -> None:
        """Media is there up to second `made`."""
        self._set(self.position(now), now)
        self.made = made

    def report(self, position: float, rate: float, now: float) -> None:
        """A player says what it shows, and how fast it plays (1 is real time)."""
        self._rate = min(max(rate, 0.1), 4.0)
        self._set(min(max(position, 0.0), self.made), now)

    def hold(self, now: float) -> None:
        """Paused."""
        self._set(self.position(now), now)
        self._held = True

    def release(self, now: float) -> None:
        """Plays on."""
        self._held = False
        self._set(self._at, now)

    def seconds_until(self, ahead: float, now: float) -> float | None:
        """Wait so long until at most `ahead` seconds are left; None while paused."""
        if self._held:
            return None
        return max(0.0, (self.ahead(now) - ahead) / self._rate)

    def _set(self, position: float, now: float) -> None:
        self._at, self._since = position, now
