"""The window planner: which frames each method attends, as recorded from the releases, and properties of any stream."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamvid.errors import UserError
from streamvid.positions import POSITIONS
from streamvid.window import SINK_FILLINGS, BlockPlan, WindowOptions, WindowPlanner

LONGLIVE = WindowOptions(frames_per_block=3, window=12, sink=3)
ROLLING = WindowOptions(3, 21, 3, "sink_before_window", joint_blocks=5)
REWARD = WindowOptions(3, 9, 3, "cache_relative", fuse=True)
DEEP = WindowOptions(3, 21, 10, "sink_before_window", budget=16, recent=4)
LONGLIVE_2 = WindowOptions(8, 32, 8, shot_offset=8, pin_shots=True)


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


# denoised window, clean window and the one the release shows its context pass, recorded with 14 blocks (section 3.2)
ROLLING_TABLE = {  # window: its queries, positions of its keys, their frames; queries of the context pass, its keys
    4: (frames((0, 14)), frames((0, 14)), frames((0, 14)), frames((0, 2)), frames((0, 2))),
    5: (frames((3, 17)), frames((0, 17)), frames((0, 17)), frames((3, 5)), frames((0, 5))),
    9: (frames((15, 29)), frames((9, 29)), frames((0, 2), (12, 29)), frames((15, 17)), frames((0, 17))),
    10: (frames((18, 32)), frames((12, 32)), frames((0, 2), (15, 32)), frames((18, 20)), frames((0, 20))),
    11: (frames((21, 35)), frames((15, 35)), frames((0, 2), (18, 35)), frames((21, 23)), frames((3, 23))),
    17: (frames((39, 41)), frames((21, 41)), frames((0, 2), (24, 41)), frames((39, 41)), frames((21, 41))),
}


@pytest.mark.parametrize("window", ROLLING_TABLE)
def test_rolling_forcing_attends_what_the_release_attends(window):
    planner = WindowPlanner(ROLLING)
    for now in range(4, window + 1):
        plan = planner.plan(3 * (min(13, now) - (now - 4) + 1))  # blocks now - 4 .. now, the last is 13
        released, same = planner.context_plan(plan, released=True), planner.context_plan(plan)
        planner.commit(same)
    queries, positions, attended, context_queries, context_keys = ROLLING_TABLE[window]
    assert list(plan.frames) == queries
    assert (list(plan.positions), list(plan.attended)) == (positions, attended)
    assert list(released.frames) == list(same.frames) == context_queries
    assert list(released.attended) == list(released.positions) == context_keys  # at their indices
    # ours sees what the joint forward saw before it, where it saw it
    seen = len(attended) - len(queries) + 3
    assert (list(same.positions), list(same.attended)) == (positions[:seen], attended[:seen])


def test_reward_forcing_sees_ranks_and_fuses_what_it_evicts():
    plans = plans_of(REWARD, 6)
    for plan in plans[2:]:
        assert list(plan.positions) == frames((0, 8))
        assert [slot.position for slot in plan.own] == [6, 7, 8]
    assert list(plans[3].attended) == frames((0, 2), (6, 11))
    assert list(plans[5].attended) == frames((0, 2), (12, 17))
    slot_of = {slot.frame: slot.slot for plan in plans for slot in plan.own}
    assert not any(plan.fused for plan in plans[:3])
    for plan, first in zip(plans[3:], (3, 6, 9), strict=True):  # frame by frame into the sink
        assert plan.evicted == (first, first + 1, first + 2)
        assert plan.fused == tuple((slot_of[first + n], slot_of[n]) for n in range(3))


def test_a_sink_larger_than_a_block_fills_as_in_the_releases():
    """Zero keys stand for frames to come; LongLive never rewrites what a later block put into the sink."""
    large = WindowOptions(frames_per_block=2, window=9, sink=5)
    assert all(plan == replace(plan, empty=0, frozen=0) for plan in plans_of(large, 5))
    released = plans_of(replace(large, sink_filling="longlive_release"), 5)
    assert [(plan.empty, plan.frozen, plan.queries_ahead) for plan in released] == [
        (3, 0, 0),
        (1, 2, 0),
        (0, 1, 0),
        (0, 0, 0),
        (0, 0, 0),
    ]
    released = plans_of(replace(large, sink_filling="reward_forcing_release"), 3)
    assert [(plan.empty, plan.frozen, plan.queries_ahead) for plan in released] == [
        (3, 0, 3),
        (1, 0, 1),
        (0, 0, 0),
    ]
    planner = WindowPlanner(replace(large, sink_filling="longlive_release"))
    for _ in range(2):
        planner.commit(planner.plan())
    replay = planner.replay_at_once(sink=True)[0]  # a recache of the whole stream does rewrite the sink
    assert (replay.frames, replay.empty, replay.frozen) == ((0, 1, 2, 3), 1, 0)


def test_evicted_frames_are_fused_in_turn():
    """With 2 frames a block and a sink of 3, the n-th evicted frame goes into sink frame n modulo 3."""
    plans = plans_of(WindowOptions(2, 7, 3, "cache_relative", fuse=True), 12)
    pairs = [pair for plan in plans for pair in zip(plan.evicted, plan.fused, strict=True)]
    assert [frame for frame, _ in pairs] == list(range(3, 3 + len(pairs))) and len(pairs) > 9
    assert [target for _, (_, target) in pairs] == [n % 3 for n in range(len(pairs))]


# chunk: positions of queries and keys, frames of the keys; cuts at chunks 5 and 11 (section 3.5)
SHOTS_TABLE = {
    4: ((32, 39), ((0, 7), (16, 39)), ((0, 7), (16, 39))),
    5: ((48, 55), ((0, 7), (24, 39), (48, 55)), ((0, 7), (24, 47))),
    6: ((56, 63), ((0, 7), (32, 39), (48, 63)), ((0, 7), (32, 55))),
    7: ((64, 71), ((0, 7), (48, 71)), ((0, 7), (40, 63))),
    9: ((80, 87), ((0, 7), (48, 55), (72, 87)), ((0, 7), (40, 47), (64, 79))),
    11: ((104, 111), ((0, 7), (48, 55), (88, 95), (104, 111)), ((0, 7), (40, 47), (80, 95))),
    12: ((112, 119), ((0, 7), (88, 95), (104, 119)), ((0, 7), (80, 103))),
}


@pytest.mark.parametrize("chunk", SHOTS_TABLE)
def test_longlive_2_attends_what_the_release_attends(chunk):
    planner = WindowPlanner(LONGLIVE_2)
    for now in range(chunk + 1):
        if now in (5, 11):
            planner.start_shot()
        plan = planner.plan()
        planner.commit(plan)
    queries, positions, attended = SHOTS_TABLE[chunk]
    assert [slot.position for slot in plan.own] == frames(queries)
    assert list(plan.positions) == frames(*positions)
    assert list(plan.attended) == frames(*attended)


def test_deep_forcing_compresses_every_second_block():
    """16 -> 19 -> 22 > 21 frames: sink 0-9, two frames' worth of tokens, the last four frames (section 3.4)."""
    plans = plans_of(DEEP, 12)
    assert [bool(plan.compressed_from) for plan in plans] == [False] * 7 + [True, False] * 2 + [True]
    assert [len(plan.window) for plan in plans[6:]] == [21, 16, 19, 16, 19, 16]
    first, grown, again = plans[7], plans[8], plans[9]
    assert list(first.attended) == [*range(10), -1, -2, *range(20, 24)]
    assert first.compressed_from == tuple(range(21)) and first.evicted == tuple(range(10, 20))
    assert list(grown.attended) == [*first.attended, *range(24, 27)]
    assert list(again.attended) == [*range(10), -1, -2, *range(26, 30)]
    assert again.compressed_from == tuple(range(19)) and again.evicted == tuple(range(20, 26))
    for plan in plans[7:]:  # sink, two frames of tokens, window: no gap
        start = plan.own[-1].frame + 1 - len(plan.window)
        assert list(plan.positions)[:10] == frames((start, start + 9))
        assert plan.positions[10:] == tuple(float(frame) for frame in plan.attended if frame >= 10)
    for plan in (first, again):
        assert [slot.slot for slot in plan.window] == list(range(16))  # moved to the front


def test_deep_forcing_as_released_moves_the_sink_by_a_constant_first():
    """By 21 - 16 at the first compression, then with the stream (section 3.4); deep sink only: a gap of 3 frames."""
    plans = plans_of(replace(DEEP, positions="deep_forcing_release", first_sink_shift=5), 12)
    assert [plan.positions[0] for plan in plans] == [0] * 7 + [5, 5, 11, 11, 17]
    plans = plans_of(replace(DEEP, positions="deep_forcing_release", budget=None, recent=None), 12)
    assert [plan.positions[0] for plan in plans[:8]] == [0] * 8
    for plan in plans[8:]:
        start = plan.own[0].frame
        assert list(plan.positions[:10]) == frames((start - 21, start - 12))  # start - 11 - 10
        assert list(plan.positions[10:]) == frames((start - 8, start + 2))


def test_a_recache_rewrites_what_the_release_rewrites():
    """At frame 24 (section 4.1). The release replays 12-23 and discards 12-14 where it keeps the sink."""
    planner = WindowPlanner(LONGLIVE)
    for _ in range(8):
        planner.commit(planner.plan())
    (plan,) = planner.replay_at_once(sink=False)
    assert list(plan.frames) == frames((15, 23)) and list(plan.attended) == frames((0, 2), (15, 23))
    planner.reanchor(range(12, 24))
    (plan,) = planner.replay_at_once(sink=True)
    assert list(plan.frames) == list(plan.attended) == list(plan.positions) == frames((12, 23))
    plan = planner.plan()
    assert list(plan.attended) == frames((12, 14), (18, 26)) and plan.evicted == (15, 16, 17)


def test_a_flush_leaves_the_sink_and_the_last_frame():
    planner = WindowPlanner(LONGLIVE)
    for _ in range(8):
        planner.commit(planner.plan())
    planner.forget(keep_last=1)
    assert planner.live_frames == [0, 1, 2, 23]
    assert list(planner.plan().attended) == [0, 1, 2, 23, 24, 25, 26]


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
def any_options(draw, kinds=("plain", "joint", "pinned", "budget")) -> WindowOptions:
    """Any combination of options that is not refused."""
    block, sink = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    kind = draw(st.sampled_from(kinds))
    joint = draw(st.integers(2, 4)) if kind == "joint" else 1
    pinned = kind == "pinned" or (kind == "joint" and draw(st.booleans()))
    window = sink * (1 + pinned) + block * joint + draw(st.integers(0, 7))
    budget = recent = cache_frames = None
    names = sorted(POSITIONS)
    if pinned or kind == "budget":
        names.remove("cache_relative")
    positions = draw(st.sampled_from(names))
    if kind == "budget":
        least = 1 if positions == "deep_forcing_release" else block
        recent = draw(st.integers(least, window - sink))
        budget = draw(st.integers(sink + max(recent, block), window))
    if kind == "joint" and not pinned and draw(st.booleans()):
        cache_frames = draw(st.integers(sink + block, window + sink + 2))
        window = draw(st.integers(sink + block, window))
    fuse = kind != "budget" and sink > 0 and draw(st.booleans())
    released = draw(st.booleans())
    return WindowOptions(
        block,
        window,
        sink,
        positions,
        draw(st.none() | st.integers(window, window + 5)),
        joint_blocks=joint,
        fuse=fuse,
        fuse_release=released,
        memories=draw(st.integers(0, sink)) if fuse and not released else 0,
        budget=budget,
        recent=recent,
        first_sink_shift=draw(st.integers(0, 3)),
        shot_offset=draw(st.integers(0, 9)),
        pin_shots=pinned,
        sink_filling=draw(st.sampled_from(SINK_FILLINGS)) if kind == "plain" else "clean",
        cache_frames=cache_frames,
    )


class Definition:
    """Frames that a stream attends and where it sees them, from the meaning of its options: no slots, no bookkeeping."""

    def __init__(self, options: WindowOptions):
        self.options, self.made = options, 0
        self.cut()

    def cut(self):
        self.start = self.sink_start = self.made
        self.shots, self.opens_shot, self.pinned = [], False, []
        self.live = []  # frames that no event has made it forget
        self.tokens = 0  # frames' worth of compressed tokens
        self.first_roll = self.roll = None
        self.fusions = 0

    def shot(self):
        self.shots.append(self.made)
        self.opens_shot = True

    def flush(self):
        sink, others = self.split(self.live)
        self.forget(sink + others[-1:])

    def reanchor(self):
        last = list(range(max(self.start, self.made - self.options.window), self.made))
        if last:
            self.sink_start, self.first_roll, self.roll = last[0], None, None
            self.forget(last)

    def forget(self, live):
        self.live, self.tokens = live, 0
        self.pinned = [frame for frame in self.pinned if frame in self.split(live)[1]]

    def split(self, frames):
        end = self.sink_start + self.options.sink
        return [f for f in frames if f < end], [f for f in frames if f >= end]

    def attended(self, own) -> tuple[list[int], list[int]]:
        """Sink and other frames of the block's window."""
        sink, others = self.split([*self.live, *own])
        if self.full(own):
            return sink, others[-max(self.options.recent_frames, self.options.frames_per_block) :]
        if self.options.budget is not None:
            return sink, others
        windows = []
        for latest in range(len(others) + 1):
            kept = others[len(others) - latest :]
            windows.append([f for f in self.pinned if f not in kept] + kept)
        room = self.options.window - self.options.sink
        if (
            self.options.cache_frames is not None
        ):  # the span bounds what the block is added to, the cache what there is
            older = self.options.cache_frames - self.options.sink - self.options.frames_per_block
            room = len(own) + min(max(0, room - len(own)), older)
        return sink, [w for w in windows if len(w) <= room][-1]

    def full(self, own) -> bool:
        stored = len(self.live) + self.tokens + len(own)
        return self.options.budget is not None and stored > self.options.window

    def tokens_after(self, own) -> int:
        sink, others = self.attended(own)
        return self.options.budget - len(sink) - len(others) if self.full(own) else self.tokens

    def positions(self, own, rolls: bool) -> list[float]:
        sink, others = self.attended(own)
        offset = self.options.shot_offset
        index = {f: f - self.start + offset * sum(f >= s for s in self.shots) for f in sink + others}
        ranks = range(len(sink))
        if self.options.positions == "cache_relative":
            return list(range(len(sink + others)))
        if self.options.positions == "sink_before_window":
            before = index[others[0]] - self.tokens_after(own) if others else index[sink[-1]] + 1
            return [before - len(sink) + rank for rank in ranks] + [index[f] for f in others]
        shift = 0
        if self.options.positions == "deep_forcing_release" and (rolls or self.first_roll is not None):
            first = own[0] if self.first_roll is None else self.first_roll
            shift = self.options.first_sink_shift + (own[0] if rolls else self.roll) - first
        return [index[f] + shift for f in sink] + [index[f] for f in others]

    def commit(self, own, rolls: bool):
        tokens = self.tokens_after(own)
        sink, others = self.attended(own)
        self.live = sink + others if self.full(own) else [*self.live, *own]
        self.tokens, self.made = tokens, own[-1] + 1
        if rolls:
            self.first_roll, self.roll = own[0] if self.first_roll is None else self.first_roll, own[0]
        if self.opens_shot and self.options.pin_shots:
            self.pinned = self.split(own[: self.options.sink])[1]
        self.opens_shot = False


# a number is a block: its length as a share of the longest, or the share of the blocks denoised jointly
EVENTS = ["cut", "shot", "flush", "reanchor", "reset", "replay", "copy", 0.3, 0.6, *[1.0] * 8]
any_history = st.lists(st.sampled_from(EVENTS), min_size=5, max_size=40)


FULL = [1.0] * 8


@settings(max_examples=200, deadline=None)
@given(any_options(), any_history)
@example(replace(LONGLIVE_2, sink=12), [1.0, "shot", *FULL])  # what is pinned lies in the sink
@example(LONGLIVE_2, [*FULL, "shot", *FULL, "replay", "flush", "replay", *FULL])
@example(LONGLIVE_2, [*FULL, "shot", 1.0, "reanchor", *FULL, "shot", 1.0, 1.0, "reanchor", *FULL])
@example(replace(DEEP, positions="deep_forcing_release"), [*FULL, 1.0, "reanchor", *FULL])
@example(replace(ROLLING, pin_shots=True, shot_offset=4), [*FULL, "shot", *FULL, 0.2, 0.2])
def test_every_plan_of_every_history(options, history):
    planner, expected = WindowPlanner(options), Definition(options)
    for event in history:
        if event == "copy":
            twin = planner.copy()
            twin.start_shot()
            twin.commit(twin.plan())  # must not be seen by the original, which goes on below
        elif event == "reset":
            planner, expected = WindowPlanner(options), Definition(options)
        elif event == "replay":
            check_replays(planner, expected)
        elif isinstance(event, str):
            switch(planner, event)
            getattr(expected, event)()
        else:
            check_block(planner, expected, event)
        assert planner.next_frame == expected.made
        slots = [*planner.slot_of.values(), *planner.compressed]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(options.slots))
        if options.joint_blocks == 1:
            assert len(slots) <= options.window and options.slots == (options.capacity or options.window)
        elif options.cache_frames is not None:
            assert len(slots) <= options.cache_frames


def switch(planner: WindowPlanner, event: str) -> None:
    start = max(planner.scene_start, planner.next_frame - planner.options.window)
    if event == "cut":
        planner.start_scene()
    elif event == "shot":
        planner.start_shot()
    elif event == "flush":
        planner.forget(keep_last=1)
    elif start < planner.next_frame:
        planner.reanchor(range(start, planner.next_frame))


def check_block(planner: WindowPlanner, expected: Definition, share: float) -> None:
    options = planner.options
    count = options.frames_per_block
    if options.joint_blocks > 1:
        count *= max(1, int(share * options.joint_blocks))
    elif not options.pin_shots:
        count = max(1, int(share * count))
    before, live = vars(planner.copy()), dict(planner.slot_of)
    plan = planner.plan(count)
    assert planner.plan(count) == plan and vars(planner) == before  # planning changes nothing
    own = list(range(expected.made, expected.made + count))
    rolls = bool(plan.evicted)
    sink, others = expected.attended(own)
    # each once, in temporal order, the sink always
    assert [f for f in plan.attended if f >= 0] == sink + others
    assert list(plan.positions) == expected.positions(own, rolls)
    assert plan.own == plan.window[len(plan.window) - count :] and list(plan.frames) == own
    slots = [slot.slot for slot in plan.window]
    most = options.window if options.cache_frames is None else max(options.window, options.sink + count)
    assert len(set(slots)) == len(slots) <= most and set(slots) <= set(range(options.slots))
    assert not set(plan.evicted) & set(plan.attended)
    if options.joint_blocks == 1:
        assert set(plan.evicted) == live.keys() - set(plan.attended)
    if options.fuse and plan.evicted and len(expected.split(live)[0]) == options.sink:
        fused = plan.evicted[: options.sink] if options.fuse_release else plan.evicted
        meetings = options.memories or 1
        assert [source for source, _ in plan.fused][::meetings] == [live[frame] for frame in fused]
        sink_slots = [slot.slot for slot in plan.window[: options.sink]]
        if options.memories:
            memories = sink_slots[options.sink - options.memories :]
            assert plan.fused == tuple((live[frame], slot) for frame in fused for slot in memories)
        start = 0 if options.fuse_release else expected.fusions
        assert options.memories or [target for _, target in plan.fused] == [
            sink_slots[(start + n) % options.sink] for n in range(len(fused))
        ]
        assert plan.overwrites == (options.fuse_release and len(plan.evicted) != options.sink)
    else:
        assert plan.fused == () and not plan.overwrites
    expected.fusions += len(plan.fused)
    check_filling(options, plan, first_of_scene=own[0] == expected.start)
    tokens = [slot for slot in plan.window if slot.frame < 0]
    assert len(tokens) == expected.tokens_after(own)
    assert all(math.isnan(slot.position) for slot in tokens)
    if expected.full(own):
        assert rolls and slots == list(range(options.budget))  # moved to the front
        assert len(set(plan.compressed_from)) == len(live) + len(planner.compressed)
    else:  # what is kept never moves
        assert plan.compressed_from == () and [slot.slot for slot in tokens] == list(planner.compressed)
        assert all(live[slot.frame] == slot.slot for slot in plan.window if slot.frame in live)
    if options.budget is None:
        check_recompute(planner, plan)
    finished = planner.context_plan(plan) if options.joint_blocks > 1 else plan
    assert finished.window == plan.window[: len(plan.window) - count + len(finished.own)]
    planner.commit(finished)
    expected.commit(list(finished.frames), rolls)


def check_filling(options: WindowOptions, plan: BlockPlan, first_of_scene: bool) -> None:
    """Frames of the sink that are still to come, as the releases attend them."""
    to_come = max(0, options.sink - len(plan.window)) if options.sink_filling != "clean" else 0
    assert plan.empty == to_come
    assert plan.queries_ahead == (to_come if options.sink_filling == "reward_forcing_release" else 0)
    frozen = [s for s in plan.window[: options.sink] if s in plan.own]
    if options.sink_filling != "longlive_release" or first_of_scene:
        frozen = []
    assert plan.frozen == len(frozen)


def check_recompute(planner: WindowPlanner, plan: BlockPlan) -> None:
    """All of the past, in order, in groups of a block, each seeing what came before it and nothing else."""
    groups = planner.recompute(plan)
    past = [frame for frame in plan.attended if frame not in plan.frames]
    assert [frame for group in groups for frame in group.frames] == past
    slot_of = {slot.frame: slot.slot for slot in plan.window}
    for number, group in enumerate(groups):
        end = min(len(past), (number + 1) * planner.options.frames_per_block)
        assert list(group.attended) == past[:end] and not group.evicted and not group.fused
        assert all(slot_of[slot.frame] == slot.slot for slot in group.window)
        if planner.options.positions == "cache_relative":
            assert group.positions == tuple(range(end))


def check_replays(planner: WindowPlanner, expected: Definition) -> None:
    options, before = planner.options, vars(planner.copy())
    sink, live = expected.split(planner.live_frames)
    recent = [frame for frame in live if frame >= expected.made - options.window]
    stays = [frame for frame in live if frame not in recent]
    assert set(stays) <= set(expected.pinned)  # their latents are gone: never rewritten
    for with_sink in (False, True):
        plans, rewritten = planner.replay(with_sink), sink * with_sink + recent
        assert [frame for plan in plans for frame in plan.frames] == rewritten
        for plan in plans:
            older = [frame for frame in sink + live if frame < plan.frames[0]]
            seen = [frame for frame in plan.attended if frame >= 0]
            assert seen == (sink if plan.frames[0] in sink else sorted({*sink, *stays, *older, *plan.frames}))
            size = options.frames_per_block if plan.frames[0] not in sink else options.sink
            assert 1 <= len(plan.own) <= plan.own[-1].frame - plan.own[0].frame + 1 <= size
        at_once = planner.replay_at_once(with_sink)
        assert len(at_once) == bool(rewritten)
        for plan in at_once:
            assert list(plan.frames) == rewritten and [f for f in plan.attended if f >= 0] == sink + live
        for plan in plans + at_once:
            assert all(planner.slot_of[s.frame] == s.slot for s in plan.window if s.frame >= 0)
            assert [s.slot for s in plan.window if s.frame < 0] == list(planner.compressed)
            assert plan.evicted == plan.compressed_from == plan.fused == ()
    assert vars(planner) == before


@settings(max_examples=50, deadline=None)
@given(any_options(kinds=["plain"]), st.integers(0, 12))
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
@given(any_options(), st.integers(1, 6), st.integers(0, 8), st.booleans())
def test_a_cut_makes_a_stream_of_its_own(options, before, after, shot):
    """After a cut, everything but frame and block numbers is that of a fresh stream."""
    planner = WindowPlanner(options)
    for block in range(before):
        if shot and block == before - 1:
            planner.start_shot()
        planner.commit(planner.plan())
    planner.start_scene()
    shift = before * options.frames_per_block
    for fresh in plans_of(options, after):
        plan = planner.plan()
        planner.commit(plan)
        assert [(s.slot, s.frame - shift * (s.frame >= 0), s.position) for s in plan.window] == [
            (s.slot, s.frame, s.position) for s in fresh.window
        ]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(-4, 12), st.integers(0, 12), st.integers(2, 20))
def test_rolling_windows_follow_the_buffer_of_the_release(block, levels, wider, larger, blocks):
    """A span and a cache of any size: the buffer as the release moves it, of frame numbers (algorithms, section 3.2)."""
    span, capacity = max(2 * block, block * levels + wider), 2 * block + larger
    options = WindowOptions(
        block, span, block, "sink_before_window", joint_blocks=levels, cache_frames=capacity
    )
    planner, buffer = WindowPlanner(options), list[int]()
    for first in range(0, blocks * block, block):
        own = [*range(first, min(first + levels * block, blocks * block))]
        buffer += own[:block]
        del buffer[block : block + max(0, len(buffer) - capacity)]
        working = buffer[block:-block][::-1][: max(0, span - len(own) - block)][::-1]
        sink = buffer[:block] if first else []
        plan = planner.plan(len(own))
        assert list(plan.attended) == sink + working + own
        before = first - len(working) - block
        assert list(plan.positions) == [before + rank for rank in range(len(sink))] + working + own
        context = planner.context_plan(plan, released=True)
        seen = buffer[-span:]
        assert list(context.attended) == seen and list(context.frames) == own[:block]
        rotated = [None if f < block and seen != buffer else f for f in seen]
        assert [None if math.isnan(p) else p for p in context.positions] == rotated
        planner.commit(context)


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
        ({"joint_blocks": 0}, "joint_blocks = 0 must be at least 1"),
        ({"joint_blocks": 4}, "cannot hold sink = 3 and 4 blocks of 3 latent frames.* at least 15"),
        ({"pin_shots": True, "window": 8}, "cannot hold sink = 3 and a block of 3 .* at least 9"),
        ({"pin_shots": True, "positions": "cache_relative"}, "moves pinned shots.*: use absolute"),
        ({"fuse": True, "sink": 0}, "sink = 0 leaves evicted frames nothing to be fused into"),
        ({"budget": 9, "recent": 2}, "recent = 2 must hold the block of 3 latent frames"),
        ({"budget": 5}, "budget = 5 must lie between sink . recent = 6 and window = 12"),
        ({"budget": 13}, "budget = 13 must lie between sink . recent = 6 and window = 12"),
        ({"budget": 9, "recent": 0, "positions": "deep_forcing_release"}, "recent = 0 must hold the block"),
        (
            {"budget": 5, "recent": 1, "positions": "deep_forcing_release"},
            "budget = 5 must lie between sink . recent = 6",
        ),
        ({"cache_frames": 5, "joint_blocks": 2}, "cache_frames = 5 and window = 12 must both hold sink = 3"),
        (
            {"cache_frames": 9, "window": 5, "joint_blocks": 2},
            "cache_frames = 9 and window = 5 must both hold sink = 3 and a block of 3 latent frames: give at least 6",
        ),
        ({"budget": 9, "joint_blocks": 2}, "budget = 9 keeps single tokens, which excludes joint blocks"),
        ({"budget": 9, "fuse": True}, "budget = 9 keeps single tokens"),
        ({"budget": 9, "pin_shots": True}, "budget = 9 keeps single tokens"),
        ({"budget": 9, "positions": "cache_relative"}, "budget = 9 keeps single tokens"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        WindowOptions(**options)
