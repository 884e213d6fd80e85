"""Shots snap to blocks."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_script import check_sentence, scripts

from streamvid.errors import UserError
from streamvid.script import load_script, parse_script
from streamvid.script_fields import MAX_PROMPT_CHARACTERS
from streamvid.timeline import first_frame_of_block, format_timeline, timeline


def test_pixel_frames_of_blocks():
    assert [first_frame_of_block(block, 3) for block in range(4)] == [0, 9, 21, 33]
    assert [first_frame_of_block(block, 1) for block in range(4)] == [0, 1, 5, 9]
    assert [first_frame_of_block(block, 2, temporal_ratio=1) for block in range(3)] == [0, 2, 4]


def test_timeline_of_three_shots():
    script = load_script("a fox walks [5s] | it snows [10s] | # a city at night [8s]")
    plan = timeline(script, 16, 3)
    assert [(shot.first_block, shot.blocks) for shot in plan.shots] == [(0, 7), (7, 13), (20, 12)]
    assert [shot.start for shot in plan.shots] == [0, 81 / 16, 237 / 16]
    assert [shot.requested_start for shot in plan.shots] == [0, 5, 15]
    assert [shot.transition for shot in plan.shots] == [None, None, "cut"]
    assert (plan.blocks, plan.frames, plan.seconds, plan.requested_seconds) == (
        32,
        378,
        378 / 16,
        23,
    )  # a cut costs 3
    assert [plan.shot_of_block(block).index for block in (0, 6, 7, 19, 20, 30)] == [0, 0, 1, 1, 2, 2]
    for block in (-1, 32):
        with pytest.raises(IndexError):
            plan.shot_of_block(block)


def test_of_two_equally_near_boundaries_the_earlier_is_taken():
    # Boundaries at pixel frames 0, 9, 21: frame 15 lies between 9 and 21.
    script = load_script({"shots": [{"prompt": "a", "duration": 15}, {"prompt": "b", "duration": 20}]})
    assert timeline(script, 1, 3).shots[1].first_block == 1


def test_a_short_last_shot_still_gets_a_block():
    script = load_script("a [5s] | b [0.1s]")
    plan = timeline(script, 16, 3)
    assert plan.shots[1].blocks == 1
    assert plan.seconds >= 5.1


@given(
    scripts(),
    st.sampled_from([8, 15, 16, 23.976, 24, 30]),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=80, deadline=None)
def test_snapping_partitions_the_stream(script, fps, frames_per_block, temporal_ratio):
    block_seconds = frames_per_block * temporal_ratio / fps
    try:
        plan = timeline(script, fps, frames_per_block, temporal_ratio)
    except UserError as error:
        check_sentence(str(error))
        assert min(shot.duration for shot in script.shots) < block_seconds
        return
    blocks = [b for shot in plan.shots for b in range(shot.first_block, shot.first_block + shot.blocks)]
    assert blocks == list(range(plan.blocks))
    assert all(shot.blocks >= 1 for shot in plan.shots)
    for shot, snapped in zip(script.shots, plan.shots, strict=True):
        assert snapped.prompt == shot.prompt
        assert abs(snapped.start - shot.start) <= block_seconds / 2 + 1e-6
        assert snapped.requested_start == shot.start
    assert plan.seconds >= script.duration - 1e-6
    assert plan.seconds < script.duration + block_seconds * (
        2 if script.shots[-1].duration < block_seconds else 1
    )
    # a cut restarts the decoder, whose first latent frame gives one pixel frame
    if temporal_ratio > 1:
        assert plan.cuts == sum(shot.transition == "cut" for shot in script.shots[1:])
    whole = first_frame_of_block(plan.blocks, frames_per_block, temporal_ratio)
    assert plan.frames == whole - plan.cuts * (temporal_ratio - 1)
    assert plan.shot_of_block(plan.blocks - 1).index == len(script.shots) - 1
    assert len(format_timeline(plan).splitlines()) == len(script.shots) + 2


def test_two_shots_on_one_block_are_an_error():
    text = "shots:\n- {prompt: a, duration: 5}\n- {prompt: b, duration: 0.25}\n- {prompt: c, duration: 5}"
    script = parse_script(text, ".yaml", source="story.yaml")
    with pytest.raises(UserError) as caught:
        timeline(script, 16, 3)
    check_sentence(str(caught.value))
    assert str(caught.value) == (
        "story.yaml, line 4: shot 3: it starts at 5.25 and falls on the same block as shot 2; "
        "make shot 2 (duration 0.25) at least 0.75 seconds, one block of 12 frames at 16 fps"
    )


@pytest.mark.parametrize("arguments", [(0, 3), (math.nan, 3), (math.inf, 3), (16, 0), (16, 3, 0)])
def test_impossible_streams_are_errors(arguments):
    with pytest.raises(UserError):
        timeline(load_script("a fox"), *arguments)


def test_table_shows_transitions_seeds_and_options_within_its_width():
    document = {
        "shots": [
            {"prompt": "a", "duration": 5},
            {"prompt": "b", "duration": 5, "seed": 3, "overrides": {"steps": 2}, "transition": "recache"},
            {"prompt": "c" * MAX_PROMPT_CHARACTERS, "duration": 5},
        ]
    }
    table = format_timeline(timeline(load_script(document), 16, 3), width=80).splitlines()
    assert "recache     b [seed=3] [steps=2]" in table[2]
    assert all(len(line) <= 80 for line in table[:4])
    assert table[3].endswith("ccc...")
