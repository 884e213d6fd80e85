"""The window planner: LongLive's table, and properties of any stream."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import UserError
from streamvid.window import POSITIONS, WindowOptions, WindowPlanner

LONGLIVE = WindowOptions(frames_per_block=3, window=12, sink=3)


def frames(*spans: tuple[int, int]) -> list[int]:
    """Frames of inclusive spans."""
    return [frame for first, last in spans for frame in range(first, last + 1)]


def plans_of(options: WindowOptions, blocks: int) -> list:
    planner, plans = WindowPlanner(options), []
    for _ in range(blocks):
        plans.append(planner.plan())
        planner.commit(plans[-1])
    return plans


# block: queries and keys, as recorded from the release (algorithms, section 3.1)
TABLE = {
    0: (frames((0, 2)), frames((0, 2))),
    1: (frames((3, 5)), frames((0, 5))),
    2: (frames((6, 8)), frames((0, 8))),
    3: (frames((9, 11)), frames((0, 11))),
    4: (frames((12, 14)), frames((0, 2), (6, 14))),
    7: (frames((21, 23)), frames((0, 2), (15, 23))),
}


@pytest.mark.parametrize("block", TABLE)
def test_longlive_attends_what_the_release_attends(block):
    plan = plans_of(LONGLIVE, 8)[block]
    queries, keys = TABLE[block]
    assert list(plan.frames) == queries
    assert list(plan.attended) == keys
    assert list(plan.positions) == keys  # absolute: a position is a frame index


def test_longlive_infinite_sees_ranks():
    plans = plans_of(WindowOptions(3, 12, 3, "cache_relative"), 8)
    for plan in plans:
        assert list(plan.positions) == list(range(len(plan.window)))
    assert [slot.position for slot in plans[7].own] == [9, 10, 11]
    assert plans[7].attended == tuple(TABLE[7][1])


def test_self_forcing_with_a_sink_attends_what_the_release_attends():
    plan = plans_of(WindowOptions(3, 21, 3), 8)[7]
    assert list(plan.attended) == frames((0, 2), (6, 23))  # algorithms, section 2.3


def test_a_full_ring_reuses_the_slots_of_what_it_evicts():
    plans = plans_of(LONGLIVE, 40)
    slot_of = {slot.frame: slot.slot for plan in plans for slot in plan.own}
    for plan in plans[4:]:
        assert len(plan.evicted) == 3
        assert [slot.slot for slot in plan.own] == [slot_of[frame] for frame in plan.evicted]


def test_a_block_shorter_than_the_others_keeps_the_window_full():
    planner = WindowPlanner(LONGLIVE)
    for _ in range(5):
        planner.commit(planner.plan())
    plan = planner.plan(frames=1)
    assert plan.frames == (15,) and plan.evicted == (6,) and len(plan.window) == 12


# --- properties -----------------------------------------------------------------------------------------------------


@st.composite
def any_options(draw) -> WindowOptions:
    block, sink = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    window = sink + block + draw(st.integers(0, 7))
    capacity = draw(st.none() | st.integers(window, window + 5))
    return WindowOptions(block, window, sink, draw(st.sampled_from(sorted(POSITIONS))), capacity)


# a number is the length of a block, as a share of the longest allowed
any_history = st.lists(st.sampled_from(["scene", "replay", "copy", 0.3, 0.6, 1.0, 1.0, 1.0]), max_size=30)


def state(planner: WindowPlanner) -> tuple:
    return dict(planner.slot_of), planner.next_block, planner.next_frame, planner.scene_start


def expected_window(options: WindowOptions, scene: list[int]) -> tuple[list[int], list[int]]:
    """Sink and recent frames that a stream attends, from the definition alone."""
    sink, recent = scene[: options.sink], scene[options.sink :]
    return sink, recent[-(options.window - options.sink) :]


@settings(max_examples=150, deadline=None)
@given(any_options(), any_history)
def test_every_plan_of_every_history(options, history):
    planner = WindowPlanner(options)
    scene: list[int] = []  # frames since the last cut
    kept: dict[int, int] = {}  # frame -> slot it was given
    made = 0
    for event in history:
        if event == "scene":
            planner.start_scene()
            scene, kept = [], {}
        elif event == "copy":
            twin = planner.copy()
            twin.commit(twin.plan())  # must not be seen by the original, which goes on below
        elif event == "replay":
            check_replay(planner, scene)
        else:
            count = max(1, int(event * options.frames_per_block))
            scene += range(made, made + count)
            made += count
            before = state(planner)
            plan = planner.plan(count)
            assert planner.plan(count) == plan and state(planner) == before  # planning changes nothing
            check_plan(options, plan, scene, kept)
            planner.commit(plan)
            kept = {slot.frame: slot.slot for slot in plan.window}
            assert planner.slot_of == kept
            assert len(planner.live_frames) <= options.window <= options.slots
    assert planner.next_frame == made


def check_plan(options, plan, scene, kept) -> None:
    sink, recent = expected_window(options, scene)
    assert list(plan.attended) == sink + recent  # each once, in temporal order, the sink never evicted
    assert plan.own == plan.window[-len(plan.own) :]
    assert list(plan.frames) == scene[-len(plan.own) :]
    assert set(plan.evicted) == kept.keys() - set(plan.attended)
    slots = [slot.slot for slot in plan.window]
    assert len(set(slots)) == len(slots) and set(slots) <= set(range(options.slots))
    for slot in plan.window[: -len(plan.own)]:
        assert slot.slot == kept[slot.frame]  # what is kept never moves
    if options.positions == "absolute":
        assert list(plan.positions) == [frame - scene[0] for frame in plan.attended]
    else:
        assert list(plan.positions) == list(range(len(slots)))


def check_replay(planner, scene) -> None:
    before = state(planner)
    plans = planner.replay()
    assert state(planner) == before
    sink, recent = expected_window(planner.options, scene)
    assert [frame for plan in plans for frame in plan.frames] == recent  # all but the sink, in order
    seen = list(sink)
    for plan in plans:
        seen += plan.frames
        assert list(plan.attended) == seen  # the sink, what is older, itself
        assert all(slot.slot == planner.slot_of[slot.frame] for slot in plan.window)
        assert 1 <= len(plan.own) <= planner.options.frames_per_block


@settings(max_examples=50, deadline=None)
@given(any_options(), st.integers(0, 12))
def test_replay_repeats_the_blocks_as_they_were_made(options, blocks):
    planner = WindowPlanner(options)
    made = []
    for _ in range(blocks):
        plan = planner.plan()
        planner.commit(plan)
        made.append(plan.frames)
    live = set(planner.live_frames[options.sink :])
    expected = [tuple(frame for frame in block if frame in live) for block in made]
    assert [plan.frames for plan in planner.replay()] == [block for block in expected if block]


@settings(max_examples=50, deadline=None)
@given(any_options(), st.integers(1, 6), st.integers(0, 8))
def test_a_cut_makes_a_stream_of_its_own(options, before, after):
    """After a cut, everything but frame and block numbers is that of a fresh stream."""
    planner = WindowPlanner(options)
    for _ in range(before):
        planner.commit(planner.plan())
    planner.start_scene()
    shift = before * options.frames_per_block
    for fresh in plans_of(options, after):
        plan = planner.plan()
        planner.commit(plan)
        assert [(s.slot, s.frame - shift, s.position) for s in plan.window] == [
            (s.slot, s.frame, s.position) for s in fresh.window
        ]


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames_per_block": 0}, "frames_per_block = 0 must be at least 1"),
        ({"sink": -1}, "sink = -1 must not be negative: give 0"),
        ({"window": 5}, "window = 5 cannot hold sink = 3 and a block of 3 .* at least 6"),
        ({"positions": "polar"}, "positions = 'polar' is not known: choose one of absolute, cache_relative"),
        ({"capacity": 11}, "capacity = 11 is below window = 12"),
        ({"capacity": 0}, "capacity = 0 is below window = 12"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        WindowOptions(**options)
