"""The subject: one of six shapes with an outline, light from the upper left, two eyes and a shadow."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from streamvid.world import palette
from streamvid.world.canvas import Canvas
from streamvid.world.motion import Pose
from streamvid.world.palette import Colour, shade
from streamvid.world.scene import Scene, Scenery

GROUND_Y = 109.0  # y of the point where the subject touches the ground
RADIUS = {"small": 15.0, "large": 26.0}
CUBE_DEPTH = np.array([0.34, -0.3])  # from the cube's front to its back, relative to its radius
RING_HOLE = 0.46


def _circle(radius: float, corners: int = 40) -> np.ndarray:
    turns = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return radius * np.stack([np.sin(turns), -np.cos(turns)], 1)


def _sector(inner: float, outer: float, start: float, stop: float) -> np.ndarray:
    """Contour of a piece of a disc or ring; angles in degrees, clockwise from the top."""
    turns = np.radians(np.linspace(start, stop, 10))
    arc = np.stack([np.sin(turns), -np.cos(turns)], 1)
    return np.concatenate([outer * arc, inner * arc[::-1]])


def _heart(corners: int = 48) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    x = 16 * np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return np.stack([x, y - 2.0], 1) / 15.0


def _star() -> np.ndarray:
    turn = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.22, 0.62)[:, None]
    return radius * np.stack([np.sin(turn), -np.cos(turn)], 1)


def _cone(corners: int = 12) -> np.ndarray:
    """A triangle with equal angles whose base bulges a little."""
    across = np.linspace(1, -1, corners)
    base = np.stack([1.09 * across, 0.6 + 0.24 * np.sqrt(1 - across**2)], 1)
    return np.concatenate([[[0.0, -1.28]], base])


CONTOURS: dict[str, list[np.ndarray]] = {  # of radius about 1, y down, at rest
    "ball": [_circle(1.0)],
    "cube": [0.84 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])],
    "cone": [_cone()],
    "star": [_star()],
    "heart": [_heart()],
    "ring": [_circle(1.04), _circle(RING_HOLE, 28)],
}
STRIPES: dict[str, list[np.ndarray]] = {  # darker pieces that let a shape's turning be seen
    "ball": [_sector(0.0, 0.92, start, start + 90) for start in (45, 225)],
    "cone": [np.array([[0.0, -1.2], [0.34, 0.78], [0.7, 0.74], [1.02, 0.6]])],
    "ring": [_sector(RING_HOLE + 0.08, 0.96, start, start + 45) for start in (22.5, 112.5, 202.5, 292.5)],
}
HIGHLIGHTS = {"ball": (0.68, 0.17), "heart": (0.74, 0.13), "ring": (0.72, 0.15)}  # distance, size in radii
EYES: dict[str, tuple[float, float]] = {  # y and distance from the middle, relative to the radius
    "ball": (-0.12, 0.3),
    "cube": (-0.12, 0.32),
    "cone": (0.08, 0.26),
    "star": (-0.04, 0.27),
    "heart": (-0.2, 0.32),
    "ring": (-0.72, 0.3),
}


@lru_cache(maxsize=16)
def _inner(shape: str) -> list[np.ndarray]:
    """Contours of the lit part: a little smaller, so that the darker body shows at the lower right."""
    if shape == "ring":
        return [_circle(0.92), _circle(RING_HOLE + 0.06, 28)]
    return [0.84 * contour for contour in CONTOURS[shape]]


def _turned(contour: np.ndarray, pose: Pose, radius: float) -> np.ndarray:
    """Contour [N, 2] turned, squashed and scaled to units, still around the origin."""
    angle = math.radians(pose.angle)
    cosine, sine = math.cos(angle), math.sin(angle)
    wide, tall = radius * (2.0 - pose.squash), radius * pose.squash
    x, y = contour[:, 0], contour[:, 1]
    return np.stack([wide * (cosine * x - sine * y), tall * (sine * x + cosine * y)], 1)


def draw_subject(canvas: Canvas, scene: Scene, scenery: Scenery, pose: Pose) -> None:
    """Draw shadow and subject on the canvas."""
    radius = RADIUS[scene.size]
    body = [_turned(contour, pose, radius) for contour in CONTOURS[scene.shape]]
    x = 44.0 + 40.0 * scenery.subject_x + pose.aside
    y = GROUND_Y - pose.height - float(body[0][:, 1].max())
    near = 1.0 / (1.0 + pose.height / 40.0)
    canvas.glow(x + 2, GROUND_Y, radius * (0.7 + 0.55 * near), 4.0 + 0.08 * radius, (16, 20, 40), 0.62 * near)
    colour = palette.subject(palette.SUBJECT[scene.colour], scene.sky, scene.weather)
    dark = shade(colour, 0.36)
    pen = 1.5 + 0.02 * radius
    centre = np.array([x, y])
    if scene.shape == "cube":
        _draw_cube_sides(canvas, body[0] + centre, radius * CUBE_DEPTH, colour, dark, pen)
    canvas.polygon([contour + centre for contour in body], shade(colour, 0.74))
    lit_centre = centre - (0.05 * radius if scene.shape != "ring" else 0.0)
    canvas.polygon([_turned(c, pose, radius) + lit_centre for c in _inner(scene.shape)], colour)
    for stripe in STRIPES.get(scene.shape, ()):
        canvas.polygon(_turned(stripe, pose, radius) + centre, shade(colour, 0.8))
    canvas.outline([contour + centre for contour in body], dark, pen)
    _draw_highlight(canvas, scene.shape, centre, radius, pose, colour)
    _draw_eyes(canvas, scene, centre, radius, pose)


def _draw_cube_sides(
    canvas: Canvas, front: np.ndarray, depth: np.ndarray, colour: Colour, dark: Colour, pen: float
) -> None:
    """The faces behind those edges of the front [4, 2] that look towards depth: light above, dark aside."""
    for start, stop in zip(front, np.roll(front, -1, axis=0), strict=True):
        normal = np.array([stop[1] - start[1], start[0] - stop[0]])
        normal = normal / np.linalg.norm(normal)
        if normal @ depth <= 0:
            continue
        face = np.array([start, stop, stop + depth, start + depth])
        canvas.polygon(face, shade(colour, 0.86 - 0.3 * (normal[0] + normal[1])))
        canvas.outline(face, dark, pen)


def _draw_highlight(
    canvas: Canvas, shape: str, centre: np.ndarray, radius: float, pose: Pose, colour: Colour
) -> None:
    """A pale spot at the upper left of the shapes with room for it; a heart's turns with its body."""
    if shape not in HIGHLIGHTS:
        return
    distance, size = HIGHLIGHTS[shape]
    angle = math.radians(-48 + (pose.angle if shape == "heart" else 0.0))
    x, y = centre + distance * radius * np.array([math.sin(angle), -math.cos(angle)])
    tilt = math.degrees(angle) + 6
    canvas.ellipse(x, y, 1.5 * size * radius, size * radius, shade(colour, 1.6), tilt)


def _draw_eyes(canvas: Canvas, scene: Scene, centre: np.ndarray, radius: float, pose: Pose) -> None:
    """Two eyes that stay upright while the body turns, and look where it goes."""
    height, apart = EYES[scene.shape]
    eye = max(0.2 * radius, 3.4)
    white = palette.subject(palette.EYE, scene.sky, scene.weather)
    pupil = palette.subject(palette.PUPIL, scene.sky, scene.weather)
    for side in (-1, 1):
        x, y = centre + radius * np.array([side * apart, height])
        canvas.ellipse(x, y, eye + 0.7, eye + 0.7, pupil)
        canvas.ellipse(x, y, eye, eye, white)
        look_x, look_y = x + 0.42 * eye * pose.gaze[0], y + 0.42 * eye * pose.gaze[1]
        canvas.ellipse(look_x, look_y, 0.56 * eye, 0.56 * eye, pupil)
