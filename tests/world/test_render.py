"""Renders are a pure function of shots, scenery and frame index, with the periods that they promise."""

from dataclasses import replace

import numpy as np
import pytest

from streamvid.world.backdrop import draw_backdrop
from streamvid.world.render import FADE_FRAMES, camera_position, render_clip, render_frame
from streamvid.world.scene import ATTRIBUTES, Scene, Scenery, sample_scene, sample_scenery
from streamvid.world.scene import SCENERY as PLACES

SCENE = Scene("star", "yellow", "large", "bounces", "meadow", "day", "clear")
SCENERY = Scenery(0.5, 0.3, 0.2, 0.1, 0.6, 0.25)

# All places 32 px apart (marks: within their period of 48), of which worlds use some.
GRID = {
    "subject_x": (0.1, 0.9),
    "hills": tuple(k / 8 for k in range(8)),
    "ground_phase": (0.0, 1 / 3, 2 / 3),
    "sun_x": (0.0, 1 / 3, 2 / 3),
    "clouds": tuple(k / 8 for k in range(8)),
    "phase": (0.0, 0.5),
}


def test_worlds_use_places_on_the_grid():
    assert {name: set(places) <= set(GRID[name]) for name, places in PLACES.items()} == dict.fromkeys(
        GRID, True
    )


def at_cells(cells) -> Scenery:
    return Scenery(*(places[cell] for places, cell in zip(GRID.values(), cells, strict=True)))


BELOW_CLOUDS = slice(54, 128)
GROUND = slice(88, 128)


def changed_pixels(first, second):
    """Share of pixels that differ by more than 8 of 255 in a channel."""
    return float((np.abs(first.astype(int) - second.astype(int)).max(-1) > 8).mean())


def test_shape_type_and_determinism():
    first = render_clip([(0, SCENE)], SCENERY, 5)
    assert first.shape == (5, 128, 128, 3) and first.dtype == np.uint8
    assert np.array_equal(first, render_clip([(0, SCENE)], SCENERY, 5))
    assert np.array_equal(first[3], render_frame([(0, SCENE)], SCENERY, 3))
    assert np.array_equal(first[2:], render_clip([(0, SCENE)], SCENERY, 3, first_frame=2))


def test_a_smaller_picture_shows_the_same():
    large = render_frame([(0, SCENE)], SCENERY, 7, size=128).astype(float)
    small = render_frame([(0, SCENE)], SCENERY, 7, size=64).astype(float)
    assert small.shape == (64, 64, 3)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 6


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_changes_the_picture(name):
    pictures = [
        render_frame([(0, replace(SCENE, **{name: value}))], SCENERY, 40) for value in ATTRIBUTES[name]
    ]
    for index, first in enumerate(pictures):
        for second in pictures[:index]:
            assert changed_pixels(first, second) > 0.005


@pytest.mark.parametrize("name", GRID)
def test_every_place_of_the_scenery_changes_the_picture(name):
    pictures = [render_frame([(0, SCENE)], replace(SCENERY, **{name: value}), 5) for value in GRID[name]]
    for index, first in enumerate(pictures):
        for second in pictures[:index]:
            assert changed_pixels(first, second) > 0.005


def moved_by_a_step(scenery, **steps):
    """Scenery some places further on the grid, which wraps around."""
    return at_cells(
        (values.index(getattr(scenery, name)) + steps.get(name, 0)) % len(values)
        for name, values in GRID.items()
    )


@pytest.mark.parametrize("sky", ["day", "sunset", "dawn"])  # the stars of the night stand still
@pytest.mark.parametrize("weather", ["clear", "rain"])  # drops repeat every 32 px
@pytest.mark.parametrize("ground", ATTRIBUTES["ground"])
def test_a_step_of_everything_on_the_grid_moves_the_picture_by_32_px(ground, sky, weather):
    """To the right. Hills go left with their number; marks go right by 16 px, which is 32 to the left of their 48."""
    scene = replace(SCENE, ground=ground, sky=sky, weather=weather)
    for step in range(8):
        here = at_cells([0, step, step % 3, step % 2, 7 - step, step % 2])
        there = moved_by_a_step(here, subject_x=1, hills=-1, ground_phase=-1, sun_x=1, clouds=1)
        first, second = (render_frame([(0, scene)], scenery, 5) for scenery in (here, there))
        # lines that cross the picture's edge are smoothed differently in its last column
        assert np.array_equal(second[:, 33:127], first[:, 1:95])


# Where nothing else is: rows, and columns that the glow of a sun on the left does not reach.
ALONE = {
    "hills": (slice(50, 84), -32),
    "ground_phase": (slice(88, 128), 16),
    "clouds": (slice(0, 50), 32),
}  # px


@pytest.mark.parametrize("name", ALONE)
def test_neighbouring_places_of_a_landscape_differ_by_a_shift(name):
    rows, shift = ALONE[name]
    seen = []
    for cell in range(len(GRID[name])):
        here = moved_by_a_step(at_cells([0] * 6), **{name: cell})
        first, second = (
            draw_backdrop(SCENE, scenery, 0, 0.0, 128).picture()[rows, 65:127]
            for scenery in (here, moved_by_a_step(here, **{name: 1}))
        )
        seen.append(changed_pixels(first, second))
        if shift < 0:
            first, second = second, first
        assert np.array_equal(second[:, abs(shift) :], first[:, : -abs(shift)])
    assert max(seen) > 0.01


@pytest.mark.parametrize("weather", ATTRIBUTES["weather"])
@pytest.mark.parametrize(("motion", "period"), [("bounces", 12), ("circles", 24), ("floats", 24)])
def test_motion_and_weather_repeat(motion, period, weather):
    clip = render_clip([(0, replace(SCENE, motion=motion, weather=weather))], SCENERY, 2 * period)
    clip = clip[:, BELOW_CLOUDS]
    for frame in range(0, period, 3):
        assert changed_pixels(clip[frame], clip[frame + period]) < 0.001
    assert changed_pixels(clip[0], clip[period // 3]) > 0.01


@pytest.mark.parametrize("shape", ["ball", "cube", "star", "ring"])
@pytest.mark.parametrize("motion", ["rolls left", "rolls right"])
def test_rolling_repeats_with_every_block(shape, motion):
    clip = render_clip([(0, replace(SCENE, motion=motion, shape=shape))], SCENERY, 18)[:, GROUND]
    for frame in range(6):
        assert changed_pixels(clip[frame], clip[frame + 12]) < 0.002
    assert changed_pixels(clip[0], clip[6]) > 0.02


def test_standing_still_is_still():
    clip = render_clip([(0, replace(SCENE, motion="stands still"))], SCENERY, 20)[:, BELOW_CLOUDS]
    assert np.array_equal(clip[0], clip[19])


def test_left_is_not_right():
    left, right = (
        render_clip([(0, replace(SCENE, motion=motion))], replace(SCENERY, phase=0.0), 4)
        for motion in ("rolls left", "rolls right")
    )
    assert camera_position([(0, replace(SCENE, motion="rolls left"))], 12) == -48
    assert changed_pixels(left[3, GROUND], right[3, GROUND]) > 0.02


def test_the_future_does_not_change_the_past():
    shots = [(0, SCENE), (20, replace(SCENE, motion="rolls left", sky="night"))]
    for later in (shots[:1], [*shots, (40, replace(SCENE, shape="ring"))]):
        count = 20 if len(later) == 1 else 40
        assert np.array_equal(
            render_clip(later, SCENERY, 5, first_frame=count - 5),
            render_clip(shots, SCENERY, 5, first_frame=count - 5),
        )


def test_the_camera_never_jumps():
    rng = np.random.default_rng(0)
    shots = [(start, sample_scene(rng, None)) for start in (0, 17, 30, 45, 71)]
    positions = [camera_position(shots, frame) for frame in range(100)]
    assert positions[0] == 0
    assert np.abs(np.diff(positions)).max() <= 4 + 1e-9


def test_the_ground_stays_where_rolling_left_it():
    """Two blocks of rolling are two periods of the marks: the shot after it shows the same ground."""
    scenery = replace(SCENERY, phase=0.0)
    still = replace(SCENE, motion="stands still")
    shots = [(0, replace(SCENE, motion="rolls right")), (24, still)]
    after = render_frame(shots, scenery, 24 + FADE_FRAMES)
    assert changed_pixels(after[GROUND], render_frame([(0, still)], scenery, 0)[GROUND]) < 0.001


def test_a_switch_fades_and_then_is_done():
    night = replace(SCENE, sky="night")
    shots = [(0, SCENE), (20, night)]
    day_only, night_only = ([(0, scene)] for scene in (SCENE, night))
    assert np.array_equal(render_frame(shots, SCENERY, 19), render_frame(day_only, SCENERY, 19))
    done = 20 + FADE_FRAMES
    assert np.array_equal(render_frame(shots, SCENERY, done), render_frame(night_only, SCENERY, done))
    brightness = render_clip(shots, SCENERY, FADE_FRAMES + 2, first_frame=19)[:, :40].mean((1, 2, 3))
    assert (np.diff(brightness) < 0).all()


def test_a_new_motion_starts_at_its_beginning():
    """Whatever the phase of the first shot was."""
    shots = [(0, SCENE), (30, replace(SCENE, motion="circles"))]
    pictures = [
        render_frame(shots, replace(SCENERY, phase=phase), 30 + FADE_FRAMES)[BELOW_CLOUDS]
        for phase in (0.0, 0.4)
    ]
    assert np.array_equal(*pictures)


def test_it_runs_for_hours():
    rng = np.random.default_rng(1)
    scenery = sample_scenery(rng)
    shots = [(0, replace(SCENE, motion="rolls right")), (100_000, sample_scene(rng))]
    assert render_frame(shots, scenery, 100_004).std() > 10


@pytest.mark.parametrize("starts", [(), (3,), (0, 0), (0, 9, 5)])
def test_shots_must_rise_from_zero(starts):
    with pytest.raises(ValueError, match="shots must start"):
        render_frame([(start, SCENE) for start in starts], SCENERY, 0)
