"""The official rules of the semantic dimensions on recorded boxes and captions."""

import pytest
from reference import METRICS, clip, stand_ins

from streamvid.evaluation.engine import measure
from streamvid.evaluation.metrics.vbench_semantic import (
    colour_share,
    names_scene,
    position_score,
    spatial_score,
)
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.sources import ArraySource
from streamvid.evaluation.types import Video


@pytest.mark.parametrize(
    ("relationship", "name", "expected"),
    [
        (relationship, name, value)
        for relationship, row in METRICS["spatial_get_position_score"].items()
        for name, value in row.items()
    ],
)
def test_positions(relationship, name, expected):
    a, b = METRICS["spatial_boxes"][name]
    assert position_score(relationship, a, b) == pytest.approx(expected, abs=1e-12)


def test_direction_is_an_option():
    a, b = METRICS["spatial_boxes"]["left_clear"]
    assert position_score("on the left of", a, b, directed=True) == 1.0
    assert position_score("on the right of", a, b, directed=True) == 0.0
    assert position_score("on the right of", b, a, directed=True) == 1.0
    a, b = METRICS["spatial_boxes"]["vertical"]
    assert position_score("on the top of", a, b, directed=True) == 1.0
    assert position_score("on the bottom of", a, b, directed=True) == 0.0
    boxes = {"cup": METRICS["spatial_boxes"]["left_clear"]}
    assert spatial_score("on the left of", boxes, "cup", "dog") == 1.0  # officially two of one class count
    assert spatial_score("on the left of", boxes, "cup", "dog", directed=True) == 0.0


def test_colours_are_substrings():
    frames = [["a red car"], ["a covered car"], ["a blue car"], ["a car"]]
    assert colour_share(frames, "red") == (2, 3)


def test_scenes_need_every_word():
    assert names_scene("a man on an alley at night", "alley") and not names_scene("a park", "amusement park")
    assert names_scene("An Amusement ride in a parking lot", "amusement park")


def found(metric, prompt, labels, detector=None, captioner=None, **options):
    backbones = stand_ins(detector=detector, captioner=captioner)
    video = Video("v", "v", prompt, labels=labels)
    request = resolve([{"name": metric, **options}])
    return measure(video, ArraySource(clip("c_pan"), 16.0), request, backbones)[metric][0]


def half(names_with_boxes):
    """A detector that finds something in every other frame."""
    return lambda frames, names: [
        {name: names_with_boxes.get(name, []) if i % 2 == 0 else [] for name in names}
        for i in range(len(frames))
    ]


def test_objects():
    box = [[0, 0, 9, 9]]
    label = {"object_class": {"object": "cat"}}
    assert found("vbench.object_class", "a cat", label, half({"cat": box})).score == 0.5
    label = {"multiple_objects": {"object": "bird and cat"}}
    assert (
        found("vbench.multiple_objects", "a bird and a cat", label, half({"bird": box, "cat": box})).score
        == 0.5
    )
    assert found("vbench.multiple_objects", "a bird and a cat", label, half({"bird": box})).score == 0.0
    assert found("vbench.object_class", "a cat", {}, half({})).status == "skipped"


def test_colour_skips_what_is_not_found():
    label = {"color": {"color": "red"}}
    detector = half({"red bicycle": [[0, 0, 9, 9]]})
    assert found("vbench.color", "a red bicycle", label, detector).score == 1.0
    detector = half({"blue bicycle": [[0, 0, 9, 9]]})
    assert found("vbench.color", "a red bicycle", label, detector).score == 0.0
    assert found("vbench.color", "a red bicycle", label, half({})).status == "skipped"


def test_spatial_relationship_and_scene():
    a, b = METRICS["spatial_boxes"]["left_clear"]
    place = {"object_a": "cup", "object_b": "dog", "relationship": "on the right of"}
    labels = {"spatial_relationship": {"spatial_relationship": place}}
    detector = half({"cup": [a], "dog": [b]})
    prompt = "a cup on the right of a dog"
    assert found("vbench.spatial_relationship", prompt, labels, detector).score == 0.5
    assert found("vbench.spatial_relationship", prompt, labels, detector, directed=True).score == 0.0
    captions = ["an alley"] * 4 + ["a road"] * 12
    labels = {"scene": {"scene": {"scene": "alley"}}}
    assert found("vbench.scene", "alley", labels, captioner=lambda frames: captions).score == 0.25
