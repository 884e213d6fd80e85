"""The context cache: attended in place, whatever the slots, at any distance from the start."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamvid.kernels.attention import reference

from streamvid.context import contiguous_runs
from streamvid.rope import rotate, rotation
from streamvid.window import POSITIONS, WindowOptions

SMALL = WindowOptions(frames_per_block=2, window=6, sink=2)
RELATIVE = replace(SMALL, positions="cache_relative")
BOTH = pytest.mark.parametrize("options", [SMALL, RELATIVE], ids=["absolute", "cache_relative"])


class LiteralContext:
    """A stream's window written out: raw keys of all frames, concatenated and rotated at the plan's positions each time."""

    def __init__(self):
        self.raw: dict[
            tuple[int, int], tuple[torch.Tensor, torch.Tensor]
        ] = {}  # (layer, frame) -> key, value

    def begin(self, plan):
        self.plan = plan

    def attend(self, layer, q, k, v):
        for index, frame in enumerate(self.plan.frames):
            tokens = slice(index * tiny.TOKENS, (index + 1) * tiny.TOKENS)
            self.raw[layer, frame] = k[:, tokens], v[:, tokens]
        keys, values = (
            torch.cat([self.raw[layer, frame][part] for frame in self.plan.attended], 1) for part in (0, 1)
        )
        positions = self.plan.positions
        q = rotate(q, rotation(positions[-len(self.plan.own) :], *tiny.GRID, 12))
        return reference(q, rotate(keys, rotation(positions, *tiny.GRID, 12)), values)


class Both:
    """Attends through the cache and, beside it, literally; remembers the largest difference."""

    def __init__(self, cache):
        self.cache, self.literal, self.difference = cache, LiteralContext(), 0.0
        self.options, self.planner = cache.options, cache.planner

    def begin(self, plan):
        self.cache.begin(plan)
        self.literal.begin(plan)

    def attend(self, layer, q, k, v):
        output = self.cache.attend(layer, q, k, v)
        literal = self.literal.attend(layer, q, k, v)
        self.difference = max(self.difference, float((output - literal).abs().max()))
        return output

    def commit(self, plan, latents):
        self.cache.commit(plan, latents)


@BOTH
@pytest.mark.parametrize("sink", [0, 1, 2, 3])
def test_the_cache_attends_what_the_plan_says(options, sink):
    both = Both(tiny.context_cache(replace(options, sink=sink), batch=2))
    tiny.run_blocks(both, tiny.clip(1, 20, 2), tiny.clip(2, 20, 2))
    assert both.difference < 2e-6


@BOTH
@pytest.mark.parametrize("block", [0, 1, 50_000])
def test_positions_have_no_horizon(options, block):
    """The window moves on to a frame far from the sink; for cache_relative this is ranks 0 .. n-1 all the same."""
    both = Both(tiny.context_cache(options))
    tiny.run_blocks(both, tiny.clip(1, 2), tiny.clip(2, 2))
    both.planner.next_frame += block * options.frames_per_block
    tiny.run_blocks(both, tiny.clip(3, 16), tiny.clip(4, 16))
    assert both.difference < (1e-4 if block == 50_000 else 2e-6)


@torch.no_grad()
def test_cache_relative_does_not_know_how_late_it_is():
    """The same sink and recent frames at other frame numbers: equal outputs; under absolute positions they differ."""
    outputs = {}
    for options in (SMALL, RELATIVE):
        for jump in (0, 100_000):
            cache = tiny.context_cache(options)
            tiny.run_blocks(cache, tiny.clip(1, 2), tiny.clip(2, 2))
            cache.planner.next_frame += jump
            outputs[options.positions, jump] = tiny.run_blocks(cache, tiny.clip(3, 12), tiny.clip(4, 12))
    near, far = outputs["cache_relative", 0], outputs["cache_relative", 100_000]
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)
    assert (outputs["absolute", 0] - outputs["absolute", 100_000]).abs().max() > 1e-2


@torch.no_grad()
def test_past_every_table_late_windows_equal_early_ones():
    """One block repeated after the sink for 1,200 frames: two layers see few blocks back, then nothing can change."""
    first, repeated, noisy = tiny.clip(1, 4), tiny.clip(2, 4), tiny.clip(3, 4)
    for positions in POSITIONS:
        cache = tiny.context_cache(WindowOptions(4, 12, 4, positions))
        tiny.run_blocks(cache, noisy, first)
        outputs = tiny.run_blocks(cache, noisy.repeat(1, 1, 300, 1, 1), repeated.repeat(1, 1, 300, 1, 1))
        early, late = outputs[:, :, 20:24], outputs[:, :, -4:]
        if positions == "cache_relative":
            torch.testing.assert_close(early, late, atol=1e-5, rtol=0)
        else:
            assert (early - late).abs().max() > 1e-2  # the sink has moved away


# --- slots ----------------------------------------------------------------------------------------------------------


class Scattered:
    """A cache whose planned slots are renamed: dead slots lie between live ones."""

    def __init__(self, cache, order):
        self.cache, self.order = cache, order
        self.options, self.planner, self.attend = cache.options, cache.planner, cache.attend

    def begin(self, plan):
        def move(slots):
            return tuple(replace(slot, slot=self.order[slot.slot]) for slot in slots)

        self.cache.begin(replace(plan, window=move(plan.window), own=move(plan.own)))

    def commit(self, plan, latents):
        self.planner.commit(plan)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([SMALL, RELATIVE]), st.permutations(range(2, 9)))
def test_the_order_of_slots_does_not_matter(options, order):
    noisy, clean = tiny.clip(1, 12), tiny.clip(2, 12)
    exact = tiny.run_blocks(tiny.context_cache(options), noisy, clean)
    roomy = tiny.context_cache(replace(options, capacity=9))
    for slot in order:  # what lies in dead slots must not matter
        roomy.keys[:, :, slot * tiny.TOKENS :] = roomy.values[:, :, slot * tiny.TOKENS :] = 3.0 * slot
    outputs = tiny.run_blocks(Scattered(roomy, [0, 1, *order]), noisy, clean)
    torch.testing.assert_close(outputs, exact, atol=2e-6, rtol=0)


@BOTH
def test_capacity_above_the_window_changes_nothing(options):
    noisy, clean = tiny.clip(1, 16), tiny.clip(2, 16)
    exact = tiny.run_blocks(tiny.context_cache(options), noisy, clean)
    roomy = tiny.context_cache(replace(options, capacity=11))
    assert torch.equal(tiny.run_blocks(roomy, noisy, clean), exact)


@BOTH
def test_steady_state_writes_one_block_in_place(options):
    cache = tiny.context_cache(options)
    tiny.run_blocks(cache, tiny.clip(1, 8), tiny.clip(2, 8))
    buffers = [t.data_ptr() for t in (cache.keys, cache.values, cache.raw_keys, cache.latents)]
    model, prompt_kv = tiny.shared_transformer(), tiny.shared_transformer().prompt_kv(tiny.text(0, 1))
    for _ in range(6):
        plan = cache.planner.plan()
        evicted = [cache.planner.slot_of[frame] for frame in plan.evicted]
        assert sorted(slot.slot for slot in plan.own) == sorted(evicted)
        cache.begin(plan)
        for step in range(3):
            keys, values = cache.keys.clone(), cache.values.clone()
            model(tiny.clip(step, 2), torch.full((1, 2), 300.0), prompt_kv=prompt_kv, context=cache)
            for before, after in ((keys, cache.keys), (values, cache.values)):
                changed = (before != after).flatten(3).any(3).all(0).all(0)  # tokens changed in every layer
                assert torch.equal(changed, (before != after).flatten(3).any(3).any(0).any(0))
                slots = changed.nonzero()[:, 0].unique() // tiny.TOKENS
                assert slots.unique().tolist() == sorted(evicted) and changed.sum() == 2 * tiny.TOKENS
        cache.commit(plan, tiny.clip(9, 2))
    assert buffers == [t.data_ptr() for t in (cache.keys, cache.values, cache.raw_keys, cache.latents)]


def test_raw_keys_are_kept_for_a_sink_that_moves_only():
    assert tiny.context_cache(SMALL).raw_keys.numel() == 0
    cache = tiny.context_cache(RELATIVE)
    assert cache.raw_keys.shape[2] == 2 * tiny.TOKENS
    assert cache.bytes == 4 * 2 * (2 * 6 + 2) * tiny.TOKENS * 2 * 12


@given(st.lists(st.integers(0, 30), min_size=1, unique=True))
def test_runs_of_slots_cover_the_block_once(slots):
    written = torch.full((31 * 4,), -1)
    for source, target in contiguous_runs(slots, 4):
        written[target] = torch.arange(source.start, source.stop)
    for index, slot in enumerate(slots):
        assert written[slot * 4 : slot * 4 + 4].tolist() == list(range(index * 4, index * 4 + 4))
    assert (written >= 0).sum() == len(slots) * 4


# --- inspection and undo --------------------------------------------------------------------------------------------


@BOTH
def test_stored_keys_are_those_of_the_context_pass(options):
    both = Both(tiny.context_cache(options))
    clean = tiny.clip(2, 16)
    tiny.run_blocks(both, tiny.clip(1, 16), clean)
    cache, raw = both.cache, both.literal.raw
    frames = cache.planner.live_frames
    for layer in (0, 1):
        keys, values = cache.stored(layer, frames, rotated=False)
        torch.testing.assert_close(keys, torch.cat([raw[layer, f][0] for f in frames], 1))
        assert torch.equal(values, torch.cat([raw[layer, f][1] for f in frames], 1))
    for plan in cache.planner.replay():
        assert torch.equal(cache.clean_latents(plan), clean[:, :, list(plan.frames)])


@BOTH
def test_restore_goes_back_to_the_snapshot(options):
    cache, noisy, clean = tiny.context_cache(options), tiny.clip(1, 10), tiny.clip(2, 10)
    tiny.run_blocks(cache, noisy, clean)
    snapshot, pointer = cache.snapshot(), cache.keys.data_ptr()
    expected = tiny.run_blocks(cache, noisy, clean)
    for _ in range(2):
        cache.restore(snapshot)
        # latents are part of no switch, so that a snapshot need not hold them
        assert torch.equal(tiny.run_blocks(cache, noisy, clean), expected)
    assert cache.keys.data_ptr() == pointer
