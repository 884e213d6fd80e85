"""What really happened in a stream: its shots, with pictures, and the script that would make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from streamvid.app import pictures

from streamvid.script import Script
from streamvid.script import Shot as ScriptShot

BETTER_PICTURE_AFTER = 1.4  # seconds: a switch needs a block or two to be seen


@dataclass
class Shot:
    """Media from `start` on, until the next shot.

    Attributes:
        policy: how the stream changed over to it; None for a start.
        receipt: number of the live prompt that asked for it, if one did.
    """

    number: int
    prompt: str
    start: float
    chunk: int
    policy: str | None = None
    receipt: int | None = None
    seed: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)
    pictured: float = field(default=-1.0, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "shot": self.number,
            "prompt": self.prompt,
            "start": self.start,
            "chunk": self.chunk,
            "policy": self.policy,
            "receipt": self.receipt,
        }


class History:
    """The shots so far.

    Args:
        parent: of a fork, whose shots come before.
    """

    def __init__(self, parent: History | None = None):
        self.shots: list[Shot] = [] if parent is None else [replace(shot) for shot in parent.shots]
        self._script_from: int = (
            0 if parent is None else parent._script_from
        )  # first shot since the last reset
        self._seed: int | None = None if parent is None else parent._seed
        self.expects_shot = not self.shots

    def add(self, shot: Shot | None, start: float, frames: np.ndarray) -> Shot | None:
        """A chunk that begins at `start`; `shot` where it begins one. Returns the shot whose picture is new."""
        if shot is not None:
            self.shots.append(shot)
            self.expects_shot = False
        current = self.shots[-1]
        if current.thumbnail is None or current.pictured < BETTER_PICTURE_AFTER <= start - current.start:
            current.thumbnail = pictures.thumbnail(frames[len(frames) // 2])
            current.pictured = start - current.start
            return current
        return None

    def reset(self, made: float, seed: int | None) -> None:
        """The stream starts anew with the next chunk, whose shot is still to come."""
        if self.shots and self.shots[-1].start >= made:
            self.shots.pop()
        self._script_from = len(self.shots)
        self._seed = self._seed if seed is None else seed
        self.expects_shot = True

    def script(self, made: float, seed: int, **settings: Any) -> Script:
        """The shots since the last reset; a start is second 0."""
        shots = self.shots[self._script_from :] or self.shots[-1:]
        ends = [shot.start for shot in shots[1:]] + [made]
        first = shots[0].start
        return Script(
            shots=tuple(
                ScriptShot(
                    prompt=" ".join(shot.prompt.split()),
                    start=round(shot.start - first, 6),
                    duration=round(end - shot.start, 6),
                    transition=shot.policy if number else None,
                    seed=shot.seed,
                    overrides=shot.overrides,
                )
                for number, (shot, end) in enumerate(zip(shots, ends, strict=True))
            ),
            seed=seed if self._seed is None else self._seed,
            **settings,
        )
