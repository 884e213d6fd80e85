"""How the subject and the camera move, in blocks of 12 frames (0.75 s)."""

from __future__ import annotations

import math
from dataclasses import dataclass

FRAMES_PER_BLOCK = 12
SCROLL_PER_BLOCK = 48.0  # units that the ground passes under a rolling subject; also the period of its marks
TURN_PER_BLOCK = {"ball": 180.0, "cube": 90.0, "cone": 120.0, "star": 144.0, "heart": 180.0, "ring": 180.0}
BOUNCE_HEIGHT = 34.0
FLOAT_HEIGHT = 22.0
BOB_HEIGHT = 4.0
CIRCLE_RADIUS = 14.0


@dataclass(frozen=True)
class Pose:
    """Where the subject is and how it holds itself.

    aside and height (of its lowest point above the ground) in units, angle clockwise in degrees, squash = its
    height relative to its rest height, gaze = where the eyes look, within the unit circle, y down.
    """

    aside: float = 0.0
    height: float = 0.0
    angle: float = 0.0
    squash: float = 1.0
    gaze: tuple[float, float] = (0.0, 0.0)


def pose_at(motion: str, shape: str, time: float) -> Pose:
    """Pose `time` blocks after the motion started; every motion starts at rest or near it."""
    if motion == "stands still":
        return Pose()
    if motion in ("rolls left", "rolls right"):
        direction = camera_speed(motion) / SCROLL_PER_BLOCK
        return Pose(angle=direction * TURN_PER_BLOCK[shape] * time, gaze=(direction, 0.0))
    if motion == "bounces":
        height = BOUNCE_HEIGHT * abs(math.sin(math.pi * time))
        return Pose(height=height, squash=0.84 + 0.16 * min(1.0, height / 8), gaze=(0.0, -0.8))
    if motion == "floats":
        return Pose(height=FLOAT_HEIGHT + BOB_HEIGHT * math.sin(math.pi * time), gaze=(0.0, 0.9))
    if motion == "circles":
        sine, cosine = math.sin(math.pi * time), math.cos(math.pi * time)
        return Pose(aside=CIRCLE_RADIUS * sine, height=CIRCLE_RADIUS * (1 - cosine), gaze=(cosine, -sine))
    raise ValueError(f"unknown motion {motion!r}")


def blend_position(old: Pose, new: Pose, share: float) -> tuple[Pose, Pose]:
    """Both poses moved to one common place between them, so that a cross-fade shows one subject, not two."""
    aside = old.aside + (new.aside - old.aside) * share
    height = old.height + (new.height - old.height) * share
    squash = old.squash + (new.squash - old.squash) * share
    return (
        Pose(aside, height, old.angle, squash, old.gaze),
        Pose(aside, height, new.angle, squash, new.gaze),
    )


def camera_speed(motion: str) -> float:
    """Units that the camera moves to the right per block: it follows a rolling subject."""
    return {"rolls left": -SCROLL_PER_BLOCK, "rolls right": SCROLL_PER_BLOCK}.get(motion, 0.0)
