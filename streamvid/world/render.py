"""Render the diorama: frames at 16 per second as a pure function of shots, scenery and frame index."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np

from streamvid.world.backdrop import draw_backdrop
from streamvid.world.motion import FRAMES_PER_BLOCK, Pose, blend_position, camera_speed, pose_at
from streamvid.world.scene import Scene, Scenery
from streamvid.world.subject import draw_subject
from streamvid.world.weather import add_weather

FRAMES_PER_SECOND = 16
FADE_FRAMES = 8

Shots = Sequence[tuple[int, Scene]]  # (first frame, scene), first frames rising from 0


def _check(shots: Shots) -> None:
    starts = [start for start, _ in shots]
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        raise ValueError(f"shots must start at frame 0 and at rising frames after it, not at {starts}")


def _shot_index(shots: Shots, frame: int) -> int:
    """Which shot the frame belongs to."""
    return max(index for index, (start, _) in enumerate(shots) if start <= frame)


def camera_position(shots: Shots, frame: int) -> float:
    """Camera position in units: the sum of its speed over all frames before this one."""
    position = 0.0
    for index, (start, scene) in enumerate(shots):
        stop = shots[index + 1][0] if index + 1 < len(shots) else frame
        position += camera_speed(scene.motion) / FRAMES_PER_BLOCK * max(0, min(stop, frame) - start)
    return position


def _pose(shots: Shots, scenery: Scenery, index: int, frame: int) -> Pose:
    """Pose of shot `index` at a frame. A motion goes on through a switch that does not change it; a new one
    starts at its beginning, and only the motion of the first shot starts at scenery.phase."""
    scene = shots[index][1]
    first = index
    while first > 0 and shots[first - 1][1].motion == scene.motion:
        first -= 1
    time = (frame - shots[first][0]) / FRAMES_PER_BLOCK + (scenery.phase if first == 0 else 0.0)
    return pose_at(scene.motion, scene.shape, time)


def _draw(
    scene: Scene, scenery: Scenery, pose: Pose, frame: int, camera: float, size: int, subject: bool
) -> np.ndarray:
    canvas = draw_backdrop(scene, scenery, frame, camera, size)
    if subject:
        draw_subject(canvas, scene, scenery, pose)
    return add_weather(canvas.picture(), scene.weather, scene.sky, frame)


def render_frame(
    shots: Shots, scenery: Scenery, frame: int, size: int = 128, subject: bool = True
) -> np.ndarray:
    """One RGB picture [size, size, 3] uint8, without its subject if told so.

    At a switch the old and the new scene cross-fade over FADE_FRAMES frames, both with the subject at one
    common place that moves from the old motion to the new. Shots should last FADE_FRAMES frames or more: a
    shorter one is cut where the next begins.
    """
    _check(shots)
    if frame < 0:
        raise ValueError(f"frame is {frame}; it must be 0 or more")
    index = _shot_index(shots, frame)
    start, scene = shots[index]
    camera = camera_position(shots, frame)
    pose = _pose(shots, scenery, index, frame)
    if index == 0 or frame >= start + FADE_FRAMES:
        return _draw(scene, scenery, pose, frame, camera, size, subject)
    share = (frame - start + 1) / (FADE_FRAMES + 1)
    old_pose, new_pose = blend_position(_pose(shots, scenery, index - 1, frame), pose, share)
    old = _draw(shots[index - 1][1], scenery, old_pose, frame, camera, size, subject)
    new = _draw(scene, scenery, new_pose, frame, camera, size, subject)
    return cv2.addWeighted(old, 1 - share, new, share, 0.0)


def render_clip(
    shots: Shots,
    scenery: Scenery,
    num_frames: int,
    size: int = 128,
    first_frame: int = 0,
    subject: bool = True,
) -> np.ndarray:
    """Frames first_frame ... first_frame + num_frames - 1 as an RGB array [T, size, size, 3] uint8."""
    clip = np.empty((num_frames, size, size, 3), np.uint8)
    for index in range(num_frames):
        clip[index] = render_frame(shots, scenery, first_frame + index, size, subject)
    return clip
