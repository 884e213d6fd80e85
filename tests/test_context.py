"""The context cache: attended in place, whatever the slots, at any distance from the start."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_window import any_options

from streamvid.context import SINK_PRECISIONS, ContextCache, contiguous_runs
from streamvid.positions import POSITIONS
from streamvid.rope import rotate, rotation, temporal_frequencies
from streamvid.switching import ORDERS, SINKS, switch_policy
from streamvid.window import WindowOptions

SMALL = WindowOptions(frames_per_block=2, window=6, sink=2)
RELATIVE = replace(SMALL, positions="cache_relative")
BOTH = pytest.mark.parametrize("options", [SMALL, RELATIVE], ids=["absolute", "cache_relative"])


class LiteralContext:
    """A stream's window written out: raw keys of all frames, concatenated and rotated at the plan's positions each time.

    Args:
        decay: share of the sink that stays when a frame is averaged into it.
        bias: factor on the weight of finished frames but the first, except where frames are written anew.
    """

    def __init__(self, grid=tiny.GRID, head_dim: int = 12, decay: float = 0.999, bias: float = 1.0):
        self.grid, self.head_dim, self.decay, self.bias = grid, head_dim, decay, bias
        # (layer, frame) -> key, value; as finished, and as the block sees them
        self.raw: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.seen = self.raw
        # slot -> frame: a released context pass may not see the sink that it fuses into
        self.frame_at: dict[int, int] = {}

    def begin(self, plan):
        self.plan, self.seen = plan, dict(self.raw)
        self.frame_at |= {slot.slot: slot.frame for slot in plan.window}
        decay = 0.0 if plan.overwrites else self.decay
        meetings = max(1, len(plan.fused) // max(1, len(plan.evicted)))  # of an evicted frame
        for number, (_, sink) in enumerate(plan.fused):
            frame = plan.evicted[number // meetings]
            for layer in {layer for layer, _ in self.raw}:
                into = layer, self.frame_at[sink]
                pairs = zip(self.seen[into], self.seen[layer, frame], strict=True)
                self.seen[into] = tuple(decay * old + (1 - decay) * new for old, new in pairs)

    def attend(self, layer, q, k, v):
        tokens = self.grid[0] * self.grid[1]
        for index, frame in enumerate(self.plan.frames):
            part = slice(index * tokens, (index + 1) * tokens)
            self.seen[layer, frame] = k[:, part], v[:, part]
        window = self.plan.window
        keys, values = (torch.cat([self.seen[layer, s.frame][part] for s in window], 1) for part in (0, 1))
        own = [slot.position for slot in self.plan.own]
        at = [None if math.isnan(slot.position) else slot.position for slot in window]
        query = rotate(q, rotation(own, *self.grid, self.head_dim))
        key = rotate(keys, rotation([p or 0.0 for p in at], *self.grid, self.head_dim))
        rotated = torch.tensor([p is not None for p in at]).repeat_interleave(tokens)
        key = torch.where(rotated[:, None, None], key, keys)
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(self.head_dim**-0.5).exp()
        replays = (layer, self.plan.frames[0]) in self.raw
        past = [index > 0 and slot not in self.plan.own and not replays for index, slot in enumerate(window)]
        weights = weights * torch.tensor([self.bias if p else 1.0 for p in past]).repeat_interleave(tokens)
        return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), values)

    def keep(self):
        """What was written last is finished."""
        self.raw = self.seen


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
        self.literal.keep()


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
@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_late_windows_equal_early_ones(positions):
    """The stream jumps ahead past every table; soon two layers see nothing of the jump. Only absolute sinks fall behind."""
    first, repeated = tiny.clip(1, 2), tiny.clip(2, 2).repeat(1, 1, 9, 1, 1)
    cache = tiny.context_cache(replace(SMALL, positions=positions))
    tiny.run_blocks(cache, first, first)
    early = tiny.run_blocks(cache, repeated, repeated)[:, :, -2:]
    cache.planner.next_frame += 100_000
    late = tiny.run_blocks(cache, repeated, repeated)[:, :, -2:]
    difference = (early - late).abs().max()
    assert difference > 1e-2 if positions == "absolute" else difference < 1e-4


# --- any stream -----------------------------------------------------------------------------------------------------

GRID = (1, 2)
SWITCHES = [
    *("cross_only", "flush", "shot", "cut"),
    *(f"recache({order}, {sink})" for order in ORDERS for sink in SINKS),
]


class Direct:
    """A one-layer stream of random queries, keys, values and latents, through the cache and written out."""

    def __init__(self, options: WindowOptions, seed: int = 0, bias: float = 1.0, decay: float = 0.7):
        torch.manual_seed(seed)
        self.cache = ContextCache(options, 1, 1, 6, GRID, (1, 1, 1), 2, past_bias=bias, sink_decay=decay)
        self.literal = LiteralContext(GRID, 6, decay, bias)
        self.latents: dict[int, torch.Tensor] = {}  # of every frame

    def forward(self, plan) -> None:
        self.literal.begin(plan)
        q, k, v = torch.randn(3, 2, len(plan.own) * 2, 1, 6)
        torch.testing.assert_close(
            self.cache.attend(0, q, k, v), self.literal.attend(0, q, k, v), atol=2e-5, rtol=1e-5
        )

    def replay(self, plan) -> None:
        clean = torch.stack([self.latents[frame] for frame in plan.frames], 2)
        assert torch.equal(self.cache.clean_latents(plan), clean)
        self.forward(plan)
        self.literal.keep()

    def block(self, share: float = 1.0, fails: bool = False, released: bool = False) -> None:
        planner, options = self.cache.planner, self.cache.options
        plan = planner.plan(options.frames_per_block * max(1, int(share * options.joint_blocks)))
        self.cache.begin(plan)
        self.forward(plan)
        if fails:
            return
        if options.joint_blocks > 1:
            plan = planner.context_plan(plan, released)
            self.cache.begin(plan)
        self.forward(plan)
        latents = torch.randn(2, 1, len(plan.own), 1, 1)
        self.latents |= dict(zip(plan.frames, latents.unbind(2), strict=True))
        self.cache.commit(plan, latents)
        self.literal.keep()

    def switch(self, name: str) -> None:
        switch_policy(name).apply(self.cache, self.replay)

    def fail_after(self, name: str) -> None:
        """A switch and a block, both undone."""
        snapshot, raw = self.cache.snapshot(), dict(self.literal.raw)
        self.switch(name)
        self.block(fails=True)
        self.cache.load_state_dict(snapshot)
        self.literal.raw = raw


any_event = st.sampled_from(SWITCHES) | st.sampled_from(["fails", "undone", 0.3, *[1.0] * 8])


@settings(max_examples=80, deadline=None)
@given(
    # how the releases see a sink that is not full yet is compared with them (test_parity_random.py)
    any_options(kinds=["plain", "joint", "pinned"]).map(lambda o: replace(o, sink_filling="clean")),
    st.lists(any_event, min_size=8, max_size=30),
    st.sampled_from(SWITCHES),
    st.sampled_from([1.0, 0.3]),
    st.booleans(),
)
@example(
    WindowOptions(2, 10, 2, shot_offset=3, pin_shots=True),
    [
        *[1.0] * 4,
        "shot",
        *[1.0] * 7,
        "recache(causal, reencode)",
        1.0,
        "recache(bidirectional, reencode)",
        1.0,
    ],
    "flush",
    1.0,
    False,
)
@torch.no_grad()
def test_any_stream_attends_as_written_out(options, history, undone, bias, released):
    """Whatever sinks, positions, shots, switches and failures come together."""
    released = released and options.positions == "sink_before_window"
    stream = Direct(options, bias=bias)
    for event in history:
        if event == "undone":
            stream.fail_after(undone)
        elif event == "fails":
            stream.block(fails=True)
        elif isinstance(event, str):
            stream.switch(event)
        else:
            stream.block(event, released=released)


# --- sinks that are averaged ----------------------------------------------------------------------------------------


def ema_cache(block: int, sink: int, window: int, positions="cache_relative", **changes) -> ContextCache:
    options = WindowOptions(block, window, sink, positions, fuse=True)
    return ContextCache(options, 1, 1, 6, GRID, (1, 1, 1), **changes)


def feed(cache: ContextCache, keys: torch.Tensor, values: torch.Tensor, commit: bool = True) -> None:
    """One block of given keys and values `[1, L, 1, 6]`."""
    plan = cache.planner.plan()
    cache.begin(plan)
    cache.attend(0, keys, keys, values)
    if commit:
        cache.commit(plan, torch.zeros(1, 1, len(plan.own), 1, 1))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.floats(0, 1),
    st.sampled_from(sorted(POSITIONS)),
)
@torch.no_grad()
def test_an_averaged_sink_has_a_closed_form(block, sink, extra, decay, positions):
    """decay^m sink + (1 - decay) (e_m + decay e_(m-1) + ...), of the m frames evicted into it (Reward Forcing, eq. 6)."""
    cache = ema_cache(block, sink, sink + block + extra, positions, sink_decay=decay)
    blocks = 12
    keys, values = torch.randn(2, blocks, 1, block * 2, 1, 6, generator=torch.Generator().manual_seed(0))
    for k, v in zip(keys, values, strict=True):
        feed(cache, k, v)
    gone = cache.planner.fusions  # frames sink, sink + 1, ... in turn
    assert gone == blocks * block - len(cache.planner.live_frames)
    # F B L H D
    by_frame = [t.unflatten(2, (block, 2)).transpose(1, 2).flatten(0, 1) for t in (keys, values)]
    for index in range(sink):
        evicted = list(range(sink + index, sink + gone, sink))
        shares = torch.tensor([decay ** (len(evicted) - 1 - n) for n in range(len(evicted))]) * (1 - decay)
        span = slice(index * 2, index * 2 + 2)
        for frames, state in zip(by_frame, (cache.raw_keys, cache.sink_values), strict=True):
            expected = decay ** len(evicted) * frames[index]
            expected = expected + torch.einsum("f,fblhd->blhd", shares, frames[evicted])
            torch.testing.assert_close(state[0][:, span], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_averages_stall_in_bfloat16_and_not_in_float32():
    """A decay of 0.999 moves bfloat16 by less than half of its last digit (the release's EMA is inert)."""
    change = {}
    for precision in SINK_PRECISIONS:
        cache = ema_cache(1, 1, 3, dtype=torch.bfloat16, sink_precision=precision)
        for k in torch.randn(302, 1, 2, 1, 6, generator=torch.Generator().manual_seed(0)).bfloat16():
            feed(cache, k, k)
            if cache.planner.next_frame == 1:
                first = cache.raw_keys.clone()
        assert cache.planner.fusions == 299
        change[precision] = float((cache.raw_keys.float() / first.float()).median())
    assert abs(change["float32"] - 0.999**299) < 0.15  # 0.74, and a little of the evicted
    assert change["native"] > 0.98


@pytest.mark.parametrize("between", [None, "recache", "recache(bidirectional, reencode)", "undone", "flush"])
@torch.no_grad()
def test_a_block_that_begins_again_fuses_once(between):
    keys = torch.randn(9, 1, 4, 1, 6, generator=torch.Generator().manual_seed(0))
    caches = []
    for fails in (False, True):
        cache = ema_cache(2, 2, 6, sink_decay=0.5)
        for k in keys[:5]:
            feed(cache, k, -k)
        if fails:
            for _ in range(2):
                feed(cache, keys[8], keys[7], commit=False)
        if between == "undone" and fails:
            snapshot = cache.snapshot()
            feed(cache, keys[8], keys[7], commit=False)
            cache.load_state_dict(snapshot)
        elif between not in (None, "undone"):

            def replay(plan, cache=cache):
                k = torch.cat([keys[frame // 2][:, frame % 2 * 2 :][:, :2] for frame in plan.frames], 1) + 1
                cache.attend(0, k, k, -k)

            switch_policy(between).apply(cache, replay)
        for k in keys[5:7]:
            feed(cache, k, -k)
        assert cache.planner.fusions == (5 if between == "flush" else 8)
        caches.append(cache)
    for name in ("raw_keys", "sink_values"):
        one, other = (getattr(cache, name) for cache in caches)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert (caches[0].raw_keys - caches[0].raw_keys.roll(1, 2)).abs().max() > 0.1


# --- sinks that are re-aligned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["cache_relative", "sink_before_window", "deep_forcing_release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_realignment_does_not_drift(positions, dtype):
    """After a thousand of them and at position 100,000, the sink's keys are its raw keys rotated once."""
    options = WindowOptions(1, 4, 2, positions)
    cache = ContextCache(options, 1, 1, 6, GRID, (1, 1, 1), dtype=dtype)
    raw = torch.randn(2, 1, 2, 1, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for block in range(1000):
        plan = cache.planner.plan()
        cache.begin(plan)
        if block < 2:
            cache.attend(0, raw[block], raw[block], raw[block])
        cache.commit(plan, torch.zeros(1, 1, 1, 1, 1))
        if block == 500:
            cache.planner.next_frame += 100_000
    window = {slot.frame: slot.position for slot in plan.window}
    moved = [cache.rotated_at[frame] for frame in (0, 1)]
    newest = plan.own[0].frame
    assert moved[0] > (990 if positions == "cache_relative" else 99_000)
    for frame, at in enumerate(moved):
        assert cache.rotated_at[newest] - at == window[newest] - window[frame]
    fresh = torch.cat([rotate(raw[n], rotation([moved[n]], *GRID, 6)) for n in (0, 1)], 1)
    assert torch.equal(cache.keys[0][:, :4], fresh)
    assert torch.equal(cache.raw_keys[0], raw.transpose(0, 1).flatten(1, 2))


# --- bias on the past -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [1.0, 0.5, 0.01])
@torch.no_grad()
def test_past_bias_multiplies_the_weight_of_past_frames(bias):
    """Of all finished frames but the first; the block itself is exempt (Daydream Scope)."""
    options = WindowOptions(2, 6, 2)
    plain, biased = (ContextCache(options, 1, 1, 6, GRID, (1, 1, 1), past_bias=b) for b in (1.0, bias))
    for block in range(5):
        plan = plain.planner.plan()
        q, k, v = torch.randn(3, 1, 4, 1, 6, generator=torch.Generator().manual_seed(block))
        outputs = []
        for cache in (plain, biased):
            cache.begin(plan)
            outputs.append(cache.attend(0, q, k, v))
            cache.commit(plan, torch.zeros(1, 1, 2, 1, 1))
        query = rotate(q, rotation([slot.position for slot in plan.own], *GRID, 6))
        keys, values = plain.stored(0, plan.attended)
        weights = (query[:, :, 0] @ keys[:, :, 0].mT / 6**0.5).exp()
        weights[..., 2:-4] *= bias  # two tokens a frame: all but the first frame and the block's two
        expected = weights @ values[:, :, 0] / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(outputs[1][:, :, 0], expected, atol=1e-5, rtol=0)
        if block:
            assert (outputs[0] - outputs[1]).abs().max() > 1e-2 or bias == 1
        assert (biased._mask is None) == (bias == 1 or block == 0)


@pytest.mark.parametrize(("positions", "far"), [("absolute", 5), ("cache_relative", 3)])
@pytest.mark.parametrize("bias", [1.0, 0.5])
@torch.no_grad()
def test_far_decay_multiplies_the_weight_of_frames_seen_far_away(positions, far, bias):
    """Distance is as seen, from the block's last frame: trained_frames or more. It comes on top of the bias."""
    options = WindowOptions(1, 5, 1, positions)
    decayed = ContextCache(options, 1, 1, 6, GRID, (1, 1, 1), past_bias=bias, trained_frames=3, far_decay=0.2)
    for block in range(8):
        plan = decayed.planner.plan()
        q, k, v = torch.randn(3, 1, 2, 1, 6, generator=torch.Generator().manual_seed(block))
        decayed.begin(plan)
        output = decayed.attend(0, q, k, v)
        decayed.commit(plan, torch.zeros(1, 1, 1, 1, 1))
    at = decayed.rotated_at
    query = rotate(q, rotation([at[7]], *GRID, 6))
    keys, values = decayed.stored(0, plan.attended)
    weights = (query[:, :, 0] @ keys[:, :, 0].mT / 6**0.5).exp()
    distance = [plan.own[-1].position - slot.position for slot in plan.window]
    for index, away in enumerate(distance):
        factor = (0.2 if away >= 3 else 1.0) * (bias if 0 < index < len(distance) - 1 else 1.0)
        weights[..., 2 * index : 2 * index + 2] *= factor
    assert max(distance) >= far - 1 and min(distance) == 0 and 3 in distance
    expected = weights @ values[:, :, 0] / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(output[:, :, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_far_scale_multiplies_the_scores_of_frames_seen_far_away():
    """UltraViCo: the product of query and key, whatever its sign, before the softmax."""
    cache = ContextCache(WindowOptions(1, 5, 1), 1, 1, 6, GRID, (1, 1, 1), trained_frames=3, far_scale=0.3)
    for block in range(8):
        plan = cache.planner.plan()
        q, k, v = torch.randn(3, 1, 2, 1, 6, generator=torch.Generator().manual_seed(block))
        cache.begin(plan)
        output = cache.attend(0, q, k, v)
        cache.commit(plan, torch.zeros(1, 1, 1, 1, 1))
    query = rotate(q, rotation([cache.rotated_at[7]], *GRID, 6))
    keys, values = cache.stored(0, plan.attended)
    scores = query[:, :, 0] @ keys[:, :, 0].mT / 6**0.5
    far = torch.tensor([7 - slot.position >= 3 for slot in plan.window]).repeat_interleave(2)
    assert far.tolist() == [True] * 4 + [False] * 6  # the sink and frame 4 of 0, 4-7
    expected = scores.where(~far, 0.3 * scores).softmax(-1) @ values[:, :, 0]
    torch.testing.assert_close(output[:, :, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("jitter", [0.0, 0.5])
@torch.no_grad()
def test_a_realigned_sink_has_the_frequencies_of_its_heads(jitter):
    options = WindowOptions(1, 3, 1, "cache_relative")
    cache = ContextCache(
        options, 1, 2, 12, GRID, (1, 1, 1), trained_frames=4, rope_interpolation=8.0, head_jitter=jitter
    )
    raw = []
    for block in range(9):
        plan = cache.planner.plan()
        q, k, v = torch.randn(3, 1, 2, 2, 12, generator=torch.Generator().manual_seed(block))
        raw.append(k)
        cache.begin(plan)
        cache.attend(0, q, k, v)
        cache.commit(plan, torch.zeros(1, 1, 1, 1, 1))
    temporal = temporal_frequencies(12, 2, 4, 8.0, jitter)
    turned = rotate(raw[0], rotation([cache.rotated_at[0]], *GRID, 12, temporal=temporal))
    torch.testing.assert_close(cache.stored(0, [0])[0], turned)
    assert cache.rotated_at[0] != 0
    torch.testing.assert_close(cache.stored(0, [0, 8], rotated=False)[0], torch.cat([raw[0], raw[8]], 1))


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
        cache.load_state_dict(snapshot)
        # latents are part of no switch, so that a snapshot need not hold them
        assert torch.equal(tiny.run_blocks(cache, noisy, clean), expected)
    assert cache.keys.data_ptr() == pointer
