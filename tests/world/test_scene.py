"""Scenes, scenery and the pairs that are held out."""

import itertools
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from streamvid.world.sampling import sample_clip
from streamvid.world.scene import (
    ATTRIBUTES,
    SCENERY,
    Scene,
    Scenery,
    change_scene,
    is_held_out,
    sample_scene,
    sample_scenery,
)


def test_labels_round_trip():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels = tuple(int(rng.integers(len(values))) for values in ATTRIBUTES.values())
        assert Scene.from_labels(labels).labels() == labels


def test_invalid_values_are_named():
    with pytest.raises(ValueError, match="colour is 'mauve'"):
        Scene("ball", "mauve", "small", "bounces", "sand", "day", "clear")
    with pytest.raises(ValueError, match="7 labels"):
        Scene.from_labels([0, 0])
    with pytest.raises(ValueError, match="hills"):
        Scenery(0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def test_six_of_48_pairs_are_held_out_one_per_shape():
    pairs = [
        (shape, colour)
        for shape, colour in itertools.product(ATTRIBUTES["shape"], ATTRIBUTES["colour"])
        if is_held_out(Scene(shape, colour, "small", "bounces", "sand", "day", "clear"))
    ]
    assert len(pairs) == 6
    assert {shape for shape, _ in pairs} == set(ATTRIBUTES["shape"])
    assert len({colour for _, colour in pairs}) == 6
    assert ("ball", "red") in pairs


def test_sampling_respects_the_held_out_pairs_and_covers_all_values():
    rng = np.random.default_rng(1)
    usual = [sample_scene(rng) for _ in range(600)]
    assert not any(map(is_held_out, usual))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(50))
    share = np.mean([is_held_out(sample_scene(rng, held_out=None)) for _ in range(2000)])
    assert abs(share - 1 / 8) < 0.03
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in usual} == set(values)


def test_sampling_depends_on_the_generator_only():
    first, second = (np.random.default_rng(7) for _ in range(2))
    assert sample_scene(first) == sample_scene(second)
    assert sample_scenery(first) == sample_scenery(second)


@pytest.mark.parametrize("how_many", [1, 2, 7])
def test_changes_are_exactly_as_many_as_asked_for(how_many):
    rng = np.random.default_rng(2)
    for _ in range(100):
        scene = sample_scene(rng)
        changed = change_scene(rng, scene, how_many)
        assert sum(a != b for a, b in zip(scene.labels(), changed.labels(), strict=True)) == how_many
        assert not is_held_out(changed)


def test_an_attribute_changes_as_often_as_its_weight_says():
    rng = np.random.default_rng(5)
    scene, count = sample_scene(rng), 1500
    changed = [
        change_scene(rng, scene, held_out=None, weights={"motion": 3.0, "sky": 0.0}) for _ in range(count)
    ]
    moved = [[name for name in ATTRIBUTES if getattr(c, name) != getattr(scene, name)] for c in changed]
    times = Counter(name for names in moved for name in names)
    for name in ATTRIBUTES:
        share = {"motion": 3.0, "sky": 0.0}.get(name, 1.0) / 8
        assert abs(times[name] / count - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_clips_change_motion_more_often():
    rng = np.random.default_rng(6)
    clips = [sample_clip(rng, 57, switch_probability=1.0)[0] for _ in range(1000)]
    moved = np.mean([shots[0][1].motion != shots[1][1].motion for shots in clips])
    # one change: 3 / 9; two: that, or another first (1 / 9 each) and then motion (3 / 8)
    assert abs(moved - (1 / 3 + 1 / 3 + 2 / 3 * 3 / 8) / 2) < 0.06


def test_changes_can_reach_and_leave_held_out_pairs():
    rng = np.random.default_rng(3)
    held_out = sample_scene(rng, held_out=True)
    assert is_held_out(change_scene(rng, held_out, 1, held_out=True))
    assert not is_held_out(change_scene(rng, held_out, 1))
    with pytest.raises(ValueError, match="how_many"):
        change_scene(rng, held_out, 0)


def test_cells_round_trip_over_the_whole_grid():
    assert list(SCENERY) == [field.name for field in fields(Scenery)]
    grid = list(itertools.product(*(range(len(values)) for values in SCENERY.values())))
    places = [Scenery.from_cells(cells) for cells in grid]
    assert [scenery.cells() for scenery in places] == grid
    assert len(set(places)) == len(grid) == 2 * 2 * 1 * 3 * 2 * 2
    assert Scenery.from_cells([1, 0, 0, 2, 1, 1]) == Scenery(0.9, 0.0, 0.0, 2 / 3, 0.375, 0.5)


def test_what_is_not_on_the_grid_has_no_cells():
    for cells in ((0,) * 5, (0,) * 7):
        with pytest.raises(ValueError):
            Scenery.from_cells(cells)
    with pytest.raises(IndexError):
        Scenery.from_cells((2, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError):
        Scenery(0.5, 0.0, 0.0, 0.0, 0.0, 0.0).cells()


@pytest.mark.parametrize(
    "sample", [sample_scenery, lambda rng: sample_clip(rng, 57)[1]], ids=["scenery", "clips"]
)
def test_scenery_is_uniform_on_its_grid(sample):
    rng, count = np.random.default_rng(4), 2000
    drawn = [sample(rng) for _ in range(count)]
    for name, values in SCENERY.items():
        times = Counter(getattr(scenery, name) for scenery in drawn)
        assert set(times) == set(values)
        share = 1 / len(values)
        error = 4 * (share * (1 - share) / count) ** 0.5
        assert all(abs(n / count - share) <= error for n in times.values())
