"""Rotary positions: the formula, relative by construction, at any distance."""

import math

import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.rope import Rotation, axis_pairs, rotate, rotation, temporal_frequencies

positions = st.floats(-1e6, 1e6) | st.integers(0, 10**6)


def test_a_head_is_split_as_in_wan():
    assert axis_pairs(128) == (22, 21, 21)  # algorithms, section 1.3
    assert axis_pairs(12) == (2, 2, 2)


@pytest.mark.parametrize("head_dim", [12, 24, 128])
def test_equals_diffusers_table(head_dim):
    frames, height, width = 5, 3, 4
    q = tiny.normal(0, 1, frames * height * width, 2, head_dim)
    table = WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024)
    cos, sin = table(torch.empty(1, 16, frames, height, width))
    even, odd = q.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    torch.testing.assert_close(rotate(q, rotation(range(frames), height, width, head_dim)), expected)


@pytest.mark.parametrize("frame", [0, 1, 1023, 1024, 2.5, 999_999])
def test_angles_are_those_of_the_formula(frame):
    by = rotation([frame], 2, 3, 24)
    pairs = axis_pairs(24)
    for token, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        angles = [
            position * 10000 ** (-i / count)
            for position, count in zip((frame, row, column), pairs, strict=True)
            for i in range(count)
        ]
        assert by.cos[token, 0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-7)
        assert by.sin[token, 0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-7)


@settings(deadline=None, max_examples=50)
@given(positions, positions, st.integers(-(10**6), 10**6))
def test_scores_depend_on_distance_only(query_at, key_at, shift):
    q, k = tiny.normal(0, 1, 4, 1, 12), tiny.normal(1, 1, 4, 1, 12)

    def score(offset):
        turned = [rotate(x, rotation([at + offset], 2, 2, 12)) for x, at in ((q, query_at), (k, key_at))]
        return (turned[0] * turned[1]).sum(-1)

    # float64 angles: at positions of 10^6 their error is 10^6 * 2^-53, far below that of float32 sums
    torch.testing.assert_close(score(0), score(shift), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(positions)
def test_a_rotation_keeps_lengths_and_can_be_undone(position):
    x, by = tiny.normal(0, 2, 4, 3, 12), rotation([position], 2, 2, 12)
    turned = rotate(x, by)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, Rotation(by.cos, -by.sin)), x)


def test_only_time_is_shifted_by_the_position():
    x = tiny.normal(0, 1, 4, 1, 12)
    turned = rotate(x, rotation([7], 2, 2, 12))
    still = rotate(x, rotation([0], 2, 2, 12))
    assert torch.equal(turned[..., 4:], still[..., 4:])  # rows and columns
    assert not torch.isclose(turned[..., :4], still[..., :4]).any()


def test_half_precision_is_rotated_in_float32():
    x, by = tiny.normal(0, 1, 4, 1, 12).bfloat16(), rotation([100], 2, 2, 12)
    assert torch.equal(rotate(x, by), rotate(x.float(), by).bfloat16())


# --- other frequencies ----------------------------------------------------------------------------------------------

HEADS = 4
FREQUENCIES = {
    "interpolated": {"trained_frames": 21, "interpolation": 4.0},
    "jittered": {"head_jitter": 0.6},
    "both": {"trained_frames": 12, "interpolation": 2.0, "head_jitter": 0.3},
}


def test_without_options_nothing_changes():
    plain = rotation([0, 7, 2.5], 2, 3, 24)
    for options in ({}, {"trained_frames": 21}, {"interpolation": 3.0}):
        other = rotation([0, 7, 2.5], 2, 3, 24, temporal=temporal_frequencies(24, HEADS, **options))
        assert torch.equal(plain.cos, other.cos) and torch.equal(plain.sin, other.sin)


def test_bands_that_training_saw_too_little_of_are_slowed_down():
    """At least a turn in 21 frames: kept; half a turn or less: a quarter of the speed; between, on a line."""
    plain = temporal_frequencies(128)[0]
    slowed = temporal_frequencies(128, trained_frames=21, interpolation=4.0)[0]
    turns = 21 * plain / (2 * math.pi)
    assert torch.equal(slowed[turns >= 1], plain[turns >= 1]) and (turns >= 1).sum() == 3
    torch.testing.assert_close(slowed[turns <= 0.5], plain[turns <= 0.5] / 4)
    between = (turns > 0.5) & (turns < 1)
    share = 2 * turns[between] - 1
    torch.testing.assert_close(slowed[between], plain[between] * (share + (1 - share) / 4))
    assert between.any() and (slowed.diff() < 0).all()


def test_heads_have_bases_of_their_own():
    jittered = temporal_frequencies(128, HEADS, head_jitter=0.6)
    assert jittered.shape == (HEADS, 22)
    for head, spread in enumerate((-0.75, -0.25, 0.25, 0.75)):
        base = 10000 * (1 + 0.6 * spread)
        expected = torch.tensor([base ** (-j / 22) for j in range(22)], dtype=torch.float64)
        torch.testing.assert_close(jittered[head], expected)


@pytest.mark.parametrize("options", FREQUENCIES.values(), ids=FREQUENCIES)
def test_scores_depend_on_distances_alone_for_any_frequencies(options):
    temporal = temporal_frequencies(24, HEADS, **options)
    q, k = tiny.normal(0, 1, 6, HEADS, 24), tiny.normal(1, 1, 6, HEADS, 24)

    def scores(query_at: float, key_at: float) -> torch.Tensor:
        turned_q, turned_k = (
            rotate(x, rotation([at], 2, 3, 24, temporal=temporal)) for x, at in ((q, query_at), (k, key_at))
        )
        return torch.einsum("blhd,bmhd->bhlm", turned_q, turned_k)

    torch.testing.assert_close(scores(5, 2), scores(100_005, 100_002), atol=1e-4, rtol=0)
    assert (scores(5, 2) - scores(5, 3)).abs().max() > 1e-2


@pytest.mark.parametrize("options", FREQUENCIES.values(), ids=FREQUENCIES)
def test_space_is_left_as_it_is(options):
    time, *_ = axis_pairs(24)
    plain = rotation([9], 2, 3, 24)
    other = rotation([9], 2, 3, 24, temporal=temporal_frequencies(24, HEADS, **options))
    assert torch.equal(other.cos[..., time:], plain.cos[..., time:].expand(-1, other.cos.shape[1], -1))
    assert not torch.equal(other.cos[..., :time], plain.cos[..., :time].expand(-1, other.cos.shape[1], -1))
