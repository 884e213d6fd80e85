"""The grammar of prompts and its inverse."""

from dataclasses import asdict

import numpy as np
import pytest

from streamvid.world.prompts import VOCABULARY, describe, parse, unknown_words, words
from streamvid.world.scene import ATTRIBUTES, Scene, sample_scene

SCENE = Scene("ball", "red", "small", "bounces", "sand", "night", "snow")


def test_parse_inverts_describe():
    rng = np.random.default_rng(0)
    for _ in range(4000):
        scene = sample_scene(rng, held_out=None)
        prompt = describe(scene, rng)
        found = parse(prompt)
        if scene.weather == "clear":
            found.setdefault("weather", "clear")
        assert found == asdict(scene), prompt


def test_describe_depends_on_the_generator_only():
    assert describe(SCENE, np.random.default_rng(5)) == describe(SCENE, np.random.default_rng(5))
    prompts = {describe(SCENE, rng) for rng in map(np.random.default_rng, range(200))}
    assert len(prompts) > 190


def test_vocabulary_is_what_describe_says():
    rng = np.random.default_rng(1)
    said = set()
    for _ in range(8000):
        said.update(words(describe(sample_scene(rng, held_out=None), rng)))
    assert said == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(VOCABULARY)
    assert 100 <= len(VOCABULARY) <= 160


def test_prompts_are_short_english():
    rng = np.random.default_rng(2)
    for _ in range(500):
        prompt = describe(sample_scene(rng), rng)
        assert prompt == prompt.lower().strip() and "  " not in prompt
        assert not any(f" a {vowel}" in f" {prompt}" for vowel in "aeiou")
        assert 7 <= len(words(prompt)) <= 28


def test_clear_weather_is_sometimes_unsaid_and_the_rest_never():
    rng = np.random.default_rng(3)
    scene = Scene("star", "blue", "large", "floats", "ice", "day", "clear")
    named = [parse(describe(scene, rng)) for _ in range(500)]
    assert 0.3 < np.mean(["weather" in found for found in named]) < 0.5
    assert all(set(ATTRIBUTES) - set(found) <= {"weather"} for found in named)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A RED ball!", {"shape": "ball", "colour": "red"}),
        ("a blue star on green grass", {"shape": "star", "colour": "blue", "ground": "meadow"}),
        ("a frozen heart, raining", {"shape": "heart", "ground": "ice", "weather": "rain"}),
        ("a ring with no rain or snow", {"shape": "ring", "weather": "clear"}),
        ("a red ball and a blue cube", {"shape": "ball", "colour": "red"}),
        ("nothing of the kind", {}),
    ],
)
def test_parse_free_prompts(prompt, expected):
    assert parse(prompt) == expected


def test_unknown_words_come_with_the_nearest_known_one():
    assert unknown_words("A bleu bal bounces, a bleu one at night") == [
        ("bleu", "blue"),
        ("bal", "ball"),
        ("one", "cone"),
    ]
    assert unknown_words(describe(SCENE, np.random.default_rng(0))) == []
