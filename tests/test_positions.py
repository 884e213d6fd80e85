"""Position policies: where the frames of a window are seen."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamvid.errors import UserError
from streamvid.positions import POSITIONS, View
from streamvid.window import WindowOptions

LATE = View([0, 1, 2, 30, 31, 32], sink=3)
SHOT = View([0, 1, 10, 11, 20, 21], sink=2)  # a jump of ten positions at each shot
TOKENS = View([0, 1, 2, 30, 31, 32], sink=3, compressed=2)  # two frames' worth between the sink and frame 30


def released(rolled: int | None, shift: int = 5) -> View:
    return View([0, 1, 2, 30, 31, 32], sink=3, rolled=rolled, first_sink_shift=shift)


@pytest.mark.parametrize(
    ("policy", "view", "positions"),
    [
        ("absolute", LATE, [0, 1, 2, 30, 31, 32]),
        ("absolute", SHOT, [0, 1, 10, 11, 20, 21]),
        ("cache_relative", LATE, [0, 1, 2, 3, 4, 5]),
        ("cache_relative", SHOT, [0, 1, 2, 3, 4, 5]),
        ("sink_before_window", LATE, [27, 28, 29, 30, 31, 32]),
        ("sink_before_window", SHOT, [8, 9, 10, 11, 20, 21]),
        ("sink_before_window", TOKENS, [25, 26, 27, 30, 31, 32]),
        ("sink_before_window", View([7, 8], sink=2), [7, 8]),  # nothing follows the sink yet
        ("deep_forcing_release", released(None), [0, 1, 2, 30, 31, 32]),
        ("deep_forcing_release", released(0), [5, 6, 7, 30, 31, 32]),
        ("deep_forcing_release", released(6), [11, 12, 13, 30, 31, 32]),
        ("deep_forcing_release", released(6, shift=0), [6, 7, 8, 30, 31, 32]),
    ],
)
def test_a_window_is_seen_at(policy, view, positions):
    assert POSITIONS[policy](view) == positions


@st.composite
def any_view(draw) -> View:
    """A sink, then frames that follow each other, with a gap before them."""
    sink, others = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    start = draw(st.integers(0, 3)) * 100_000
    compressed = draw(st.integers(0, 4))
    first = start + sink + compressed + draw(st.integers(0, 50))
    rolled = draw(st.none() | st.integers(0, 50))
    indices = [*range(start, start + sink), *range(first, first + others)]
    return View(indices, sink, compressed, rolled, draw(st.integers(0, 9)))


@given(any_view(), st.integers(1, 100_000))
def test_any_window_is_seen_at_differences_that_do_not_know_how_late_it_is(view, late):
    later = replace(view, indices=[index + late for index in view.indices])
    for name, policy in POSITIONS.items():
        positions = policy(view)
        moved = 0 if name == "cache_relative" else late
        assert policy(later) == [position + moved for position in positions]
        # sink and window keep their inner distances under every policy
        for part in (slice(view.sink), slice(view.sink, None)):
            steps = [b - a for a, b in zip(positions[part], positions[part][1:], strict=False)]
            assert steps == [1.0] * len(steps)


@given(any_view())
def test_the_sink_lies_where_the_policy_says(view):
    for name, policy in POSITIONS.items():
        positions, index = policy(view), view.indices
        window = positions[view.sink]
        assert window == (view.sink if name == "cache_relative" else index[view.sink])
        if view.sink:
            distance = {
                "absolute": index[view.sink] - index[0],
                "cache_relative": view.sink,
                "sink_before_window": view.sink + view.compressed,
                "deep_forcing_release": index[view.sink]
                - index[0]
                - (0 if view.rolled is None else view.rolled + view.first_sink_shift),
            }[name]
            assert window - positions[0] == distance


def test_an_unknown_policy_is_named():
    with pytest.raises(UserError, match=f"'polar' is not known: choose one of {', '.join(POSITIONS)}"):
        WindowOptions(positions="polar")
