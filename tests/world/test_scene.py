"""Scenes, scenery and the pairs that are held out."""

import itertools

import numpy as np
import pytest

from streamvid.world.scene import (
    ATTRIBUTES,
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
    with pytest.raises(ValueError, match="6 variables"):
        Scenery.from_uniform([0.5])


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


def test_changes_can_reach_and_leave_held_out_pairs():
    rng = np.random.default_rng(3)
    held_out = sample_scene(rng, held_out=True)
    assert is_held_out(change_scene(rng, held_out, 1, held_out=True))
    assert not is_held_out(change_scene(rng, held_out, 1))
    with pytest.raises(ValueError, match="how_many"):
        change_scene(rng, held_out, 0)


def test_scenery_names_are_its_fields():
    assert Scenery.names == ("subject_x", "hills", "ground_phase", "sun_x", "clouds", "phase")
    assert Scenery.from_uniform([0.1 * i for i in range(6)]).phase == 0.5
