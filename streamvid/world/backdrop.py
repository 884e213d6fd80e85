"""Everything behind the subject: sky, sun, clouds, hills and ground."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from streamvid.world import palette
from streamvid.world.canvas import OVERSAMPLING, UNITS, Canvas
from streamvid.world.motion import SCROLL_PER_BLOCK
from streamvid.world.palette import Colour, landscape, mix, shade, veiled
from streamvid.world.scene import Scene, Scenery

HORIZON = 84.0  # y of the far edge of the ground
WRAP = 256.0  # units after which hills and clouds repeat
CLOUD_DRIFT = 3.0 / 12  # units per frame
SUN_PLACE = {"day": (24.0, 10.0), "sunset": (58.0, 14.0), "night": (24.0, 10.0), "dawn": (50.0, 11.0)}
STARS = ((10, 12), (31, 30), (52, 9), (70, 26), (93, 11), (116, 24), (18, 48), (105, 45), (60, 46))
CLOUDS = ((0.0, 22.0, 1.0), (98.0, 36.0, 0.75), (176.0, 16.0, 0.85))  # x, y, scale
HILL_X = np.arange(-4.0, UNITS + 8.0, 4.0)


@lru_cache(maxsize=16)
def _sky(sky: str, weather: str, sun_x: float, size: int) -> np.ndarray:
    """Sky gradient with sun or moon and stars, as canvas pixels; it never moves, so it is kept."""
    canvas = Canvas(size)
    side = OVERSAMPLING * size
    top, horizon = palette.SKY_TOP[sky], palette.SKY_HORIZON[sky]
    down = np.clip((np.arange(side) + 0.5) / (canvas.scale * HORIZON), 0, 1)[:, None] ** 1.2
    top, horizon = veiled(top, sky, weather, 1.0), veiled(horizon, sky, weather, 1.0)
    canvas.pixels[:] = np.rint(np.array(top) + (np.array(horizon) - np.array(top)) * down)[:, None]
    if sky == "night":
        for x, y in STARS:
            canvas.ellipse(x, y, 1.3, 1.3, veiled((236, 236, 214), sky, weather, 1.0))
    _draw_sun(canvas, sky, weather, 16.0 + 96.0 * sun_x)
    canvas.pixels.flags.writeable = False
    return canvas.pixels


def _draw_sun(canvas: Canvas, sky: str, weather: str, x: float) -> None:
    y, radius = SUN_PLACE[sky]
    colour = veiled(palette.SUN[sky], sky, weather, 1.0)
    canvas.glow(x, y, 2.4 * radius, 2.4 * radius, colour, 0.45)
    canvas.ellipse(x, y, radius, radius, colour)
    if sky == "night":
        crater = shade(colour, 0.86)
        for dx, dy, crater_radius in ((-3.5, -2.5, 2.4), (3.5, 2.5, 3.0), (-2.0, 5.0, 1.6)):
            canvas.ellipse(x + dx, y + dy, crater_radius, crater_radius, crater)


def _draw_clouds(canvas: Canvas, scene: Scene, offset: float) -> None:
    """Soft round clouds, shaded below; heavier in rain. Offset in units."""
    tint = mix(
        palette.SKY_HORIZON[scene.sky], palette.CLOUD, {"night": 0.1, "sunset": 0.25}.get(scene.sky, 0.75)
    )
    if scene.weather == "rain":
        tint = shade(tint, 0.8)
    light = veiled(tint, scene.sky, scene.weather, 0.7)
    below = mix(light, veiled(palette.SKY_TOP[scene.sky], scene.sky, scene.weather, 1.0), 0.3)
    for x, y, scale in CLOUDS:
        x = (x + offset) % WRAP - 0.25 * WRAP
        if not -26 < x < UNITS + 26:
            continue
        for colour, lower in ((below, 2.5 * scale), (light, 0.0)):
            for dx, dy, width, height in ((-11, 1, 10, 6), (1, -3, 11, 9), (12, 1.5, 9, 5.5)):
                canvas.ellipse(x + dx * scale, y + dy * scale + lower, width * scale, height * scale, colour)


def _hill_line(
    offset: float, base: float, heights: tuple[float, float], waves: tuple[int, int]
) -> np.ndarray:
    """Contour [N, 2] of a range of hills; offset in units, waves = how many crests in WRAP units."""
    turns = 2 * np.pi * (HILL_X + offset) / WRAP
    y = base - heights[0] * np.sin(waves[0] * turns) - heights[1] * np.sin(waves[1] * turns + 1.3)
    floor = np.array([[HILL_X[-1], HORIZON + 4], [HILL_X[0], HORIZON + 4]])
    return np.concatenate([np.stack([HILL_X, y], 1), floor])


def _draw_hills(canvas: Canvas, scene: Scene, offset: float, camera: float) -> None:
    """Two ranges of hills, the far one paler and slower."""
    near_colour = palette.HILLS[scene.ground]
    haze = mix(palette.SKY_HORIZON["day"], near_colour, 0.5)
    far = mix(landscape(haze, scene.sky, scene.weather, 0.9), palette.SKY_HORIZON[scene.sky], 0.2)
    canvas.polygon(_hill_line(offset + 0.06 * camera, 68.0, (7.0, 4.0), (2, 5)), far)
    near = landscape(near_colour, scene.sky, scene.weather, 0.6)
    canvas.polygon(_hill_line(1.7 * WRAP + offset + 0.14 * camera, 78.0, (4.5, 2.5), (3, 7)), near)


@lru_cache(maxsize=64)
def _ground(ground: str, sky: str, weather: str, size: int) -> np.ndarray:
    """Rows of bare ground below the horizon [rows, 1, 3]: paler far away."""
    rows = OVERSAMPLING * size - round(HORIZON * OVERSAMPLING * size / UNITS)
    near = np.array(landscape(palette.GROUND[ground], sky, weather, 0.2))
    far = np.array(landscape(shade(palette.GROUND[ground], 1.15), sky, weather, 0.5))
    down = np.linspace(0, 1, rows)[:, None]
    return np.rint(far + (near - far) * down).astype(np.uint8)[:, None]


def _tuft(canvas: Canvas, x: float, y: float, scale: float, dark: Colour, light: Colour) -> None:
    for dx, lean, height, colour in ((-3, -3, 7, dark), (3, 3, 7, dark), (0, 0, 9.5, light)):
        blade = [
            [x + (dx - 2) * scale, y],
            [x + (dx + lean) * scale, y - height * scale],
            [x + (dx + 2) * scale, y],
        ]
        canvas.polygon(np.array(blade), colour)


def _ripple(canvas: Canvas, x: float, y: float, scale: float, dark: Colour, light: Colour) -> None:
    along = np.linspace(-1, 1, 7)
    crest = np.stack([x + 12 * scale * along, y - 3 * scale * np.cos(0.5 * np.pi * along)], 1)
    canvas.line(crest + np.array([0.0, 1.6]), light, 2.0)
    canvas.line(crest, dark, 2.0 * scale)


def _crack(canvas: Canvas, x: float, y: float, scale: float, dark: Colour, light: Colour) -> None:
    crack = np.array([[-11, 2], [-4, -2], [1, 1.5], [10, -3]]) * scale + np.array([x, y])
    canvas.line(crack + np.array([0.0, 1.8]), light, 2.0)
    canvas.line(crack, dark, 1.5)


def _stone(canvas: Canvas, x: float, y: float, scale: float, dark: Colour, light: Colour) -> None:
    canvas.ellipse(x, y, 7.5 * scale, 4.5 * scale, dark)
    canvas.ellipse(x - scale, y - 1.2 * scale, 6 * scale, 3 * scale, light)


MARKS = {
    "meadow": (_tuft, 0.62, 0.8),
    "sand": (_ripple, 0.82, 1.3),
    "ice": (_crack, 0.72, 1.6),
    "rock": (_stone, 0.66, 1.2),
}
MARK_ROWS = (
    (6.0, 95.0, 0.75),
    (30.0, 104.0, 0.9),
    (14.0, 117.0, 1.2),
)  # x, y, scale: one mark per period each


def _draw_ground(canvas: Canvas, scene: Scene, offset: float) -> None:
    """Bare ground and its marks, shifted to the right by offset units."""
    rows = _ground(scene.ground, scene.sky, scene.weather, canvas.size)
    canvas.pixels[-rows.shape[0] :] = rows
    draw, dark, light = MARKS[scene.ground]
    dark_colour = landscape(shade(palette.GROUND[scene.ground], dark), scene.sky, scene.weather, 0.2)
    light_colour = landscape(shade(palette.GROUND[scene.ground], light), scene.sky, scene.weather, 0.2)
    for start, y, scale in MARK_ROWS:
        x = (start + offset) % SCROLL_PER_BLOCK - 0.5 * SCROLL_PER_BLOCK
        while x < UNITS + 0.5 * SCROLL_PER_BLOCK:
            draw(canvas, x, y, scale, dark_colour, light_colour)
            x += SCROLL_PER_BLOCK


def draw_backdrop(scene: Scene, scenery: Scenery, frame: int, camera: float, size: int) -> Canvas:
    """A canvas with all but the subject and the weather; camera in units."""
    canvas = Canvas(size, _sky(scene.sky, scene.weather, scenery.sun_x, size).copy())
    _draw_clouds(canvas, scene, WRAP * scenery.clouds + CLOUD_DRIFT * frame - 0.03 * camera)
    _draw_hills(canvas, scene, WRAP * scenery.hills, camera)
    _draw_ground(canvas, scene, SCROLL_PER_BLOCK * scenery.ground_phase - camera)
    return canvas
