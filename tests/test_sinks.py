"""Sinks that evicted frames change, against closed forms over whole streams; averages with one decay are in test_context."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.context import ContextCache
from streamvid.sinks import Meeting, sink_update
from streamvid.switching import switch_policy
from streamvid.window import WindowOptions

TOKENS = 2  # of a frame


def new_cache(options: WindowOptions, batch: int = 1, **changes) -> ContextCache:
    return ContextCache(options, 1, 1, 6, (1, TOKENS), (1, 1, 2), batch, **changes)


def by_frame(frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Keys of every frame, `[F, B, L, 1, 6]`; values are their negatives."""
    return torch.randn(frames, batch, TOKENS, 1, 6, generator=torch.Generator().manual_seed(seed))


def feed(cache: ContextCache, keys: torch.Tensor, latents: torch.Tensor, commit: bool = True) -> None:
    """One block; latents of every frame, `[F, B, 2]`."""
    plan = cache.planner.plan()
    cache.begin(plan)
    own = torch.cat([keys[frame] for frame in plan.frames], 1)
    cache.attend(0, own, own, -own)
    if commit:
        cache.commit(plan, torch.stack([latents[f] for f in plan.frames], 1)[:, None, :, None])


def run(options: WindowOptions, blocks: int, batch: int = 1, **changes):
    cache = new_cache(options, batch, **changes)
    keys = by_frame(blocks * options.frames_per_block, batch)
    latents = keys[:, :, 0, 0, :2]
    for _ in range(blocks):
        feed(cache, keys, latents)
    return cache, keys


# --- memories -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.integers(0, 4),
    st.integers(1, 2),
)
@torch.no_grad()
def test_memories_have_a_closed_form(block, static, decays, extra, batch):
    """Memory m: d^n (its own frame) + (1 - d) sum d^(n-1-i) e_i over all n evicted frames; static frames stay."""
    sink = static + len(decays)
    options = WindowOptions(
        block, sink + block + extra, sink, "cache_relative", fuse=True, memories=len(decays)
    )
    cache, keys = run(options, 14, batch, sink_update="memory", memory_decays=tuple(decays))
    gone = len(keys) - len(cache.planner.live_frames)
    evicted = keys[sink : sink + gone]
    for rank in range(sink):
        expected = keys[rank]
        if rank >= static:
            decay = decays[rank - static]
            shares = torch.tensor([(1 - decay) * decay ** (gone - 1 - n) for n in range(gone)])
            expected = decay**gone * expected + torch.einsum("f,fblhd->blhd", shares, evicted)
        span = slice(rank * TOKENS, (rank + 1) * TOKENS)
        torch.testing.assert_close(cache.raw_keys[0][:, span], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.sink_values[0][:, span], -expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_evicted_frame_meets_every_memory_and_static_frames_nobody():
    options = WindowOptions(3, 12, 5, "cache_relative", fuse=True, memories=2)
    cache, _ = run(options, 5, sink_update="memory", memory_decays=(0.9, 0.5))
    plan = cache.planner.plan()
    slot = cache.planner.slot_of
    assert plan.evicted == (8, 9, 10) and len(plan.attended) == 12
    assert plan.fused == tuple((slot[frame], slot[kept]) for frame in (8, 9, 10) for kept in (3, 4))
    assert [p.position for p in plan.window] == list(range(12))  # 3 static, 2 memories, 4 recent, 3 own
    assert plan.attended == (0, 1, 2, 3, 4, 11, 12, 13, 14, 15, 16, 17)


# --- adaptive refresh -----------------------------------------------------------------------------------------------


SINK = ("raw_keys", "sink_values", "sink_latents")  # what a cache keeps of its sink


@pytest.mark.parametrize("below", [-1.0, -0.4, 0.0, 0.5, 1.0])
@torch.no_grad()
def test_a_sink_frame_is_replaced_where_the_video_no_longer_looks_like_it(below):
    """Against a plain loop over the evicted frames; the two videos of the batch decide for themselves."""
    options = WindowOptions(3, 9, 2, "cache_relative", fuse=True)
    cache, keys = run(options, 14, 2, sink_update="adaptive", refresh_below=below)
    gone = len(keys) - len(cache.planner.live_frames)
    holds = [[0, 1], [0, 1]]  # per video, the frame that each sink frame is
    for n in range(gone):
        for video, sink in enumerate(holds):
            old, new = (keys[f, video, 0, 0, :2] for f in (sink[n % 2], 2 + n))
            if torch.cosine_similarity(old, new, 0) < below:
                sink[n % 2] = 2 + n
    for video, sink in enumerate(holds):
        expected = torch.cat([keys[f, video] for f in sink])
        torch.testing.assert_close(cache.raw_keys[0][video], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.sink_values[0][video], -expected, atol=1e-5, rtol=0)
        for rank, frame in enumerate(sink):  # a replay of the sink shows what it has become
            assert torch.equal(cache.sink_latents[video, rank].flatten(), keys[frame, video, 0, 0, :2])
    assert (holds == [[0, 1], [0, 1]]) == (below == -1.0)
    if below == 0.0:
        assert holds[0] != holds[1]


# --- what must hold for all -----------------------------------------------------------------------------------------

KINDS = {
    "ema": {"sink_update": "ema", "sink_decay": 0.7},
    "memory": {"sink_update": "memory", "memory_decays": (0.9, 0.5)},
    "adaptive": {"sink_update": "adaptive", "refresh_below": 0.3},
}


def options_of(kind: str, positions: str = "cache_relative") -> WindowOptions:
    return WindowOptions(2, 8, 3, positions, fuse=True, memories=2 if kind == "memory" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "between", [None, "undone", "recache", "recache(causal, reencode)", "flush", "reanchor"]
)
@torch.no_grad()
def test_a_block_that_fails_changes_nothing(kind, between):
    """Begun twice, undone after another fusion, or with a prompt switch before it is tried again."""
    keys = by_frame(30)
    latents = keys[:, :, 0, 0, :2]
    caches = []
    for fails in (False, True):
        cache = new_cache(options_of(kind), **KINDS[kind])
        for _ in range(7):
            feed(cache, keys, latents)
        if fails:
            for _ in range(2):
                feed(cache, 3 * keys, latents, commit=False)
        if between == "undone" and fails:
            snapshot = cache.snapshot()
            cache.reanchor()  # another window evicts other frames
            feed(cache, 5 * keys, latents, commit=False)
            cache.load_state_dict(snapshot)
        elif between not in (None, "undone"):

            def replay(plan, cache=cache):
                own = torch.cat([keys[frame] for frame in plan.frames], 1) + 1
                cache.attend(0, own, own, -own)

            name = "recache(causal, reanchor)" if between == "reanchor" else between
            switch_policy(name).apply(cache, replay)
        for _ in range(4):
            feed(cache, keys, latents)
        caches.append(cache)
    for name in SINK:
        one, other = (getattr(cache, name) for cache in caches)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_scene_cut_begins_a_new_sink(kind):
    keys = by_frame(40)
    latents = keys[:, :, 0, 0, :2]
    cut = new_cache(options_of(kind), **KINDS[kind])
    for block in range(16):
        if block == 8:
            cut.planner.start_scene()
        feed(cut, keys, latents)
    fresh = new_cache(options_of(kind), **KINDS[kind])
    for _ in range(8):
        feed(fresh, keys[16:], latents[16:])
    for name in SINK:
        one, other = (getattr(cache, name) for cache in (cut, fresh))
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["absolute", "cache_relative", "sink_before_window"])
@torch.no_grad()
def test_what_is_attended_is_the_state_rotated_once(kind, positions):
    """After a thousand blocks, far beyond every table."""
    cache = new_cache(options_of(kind, positions), **KINDS[kind])
    keys = by_frame(2000)
    for _ in range(1000):
        feed(cache, keys, keys[:, :, 0, 0, :2])
    shown = cache.stored(0, [0, 1, 2], rotated=False)[0]
    torch.testing.assert_close(shown, cache.raw_keys[0], atol=2e-4, rtol=0)


def test_shares_that_stay():
    meeting = Meeting(-1, torch.ones(2, 1, 1, 2), torch.tensor([[[[1.0, 1.0]]], [[[1.0, -1.0]]]]))
    assert sink_update("static", 0.9, (), 0.0) is None
    assert [sink_update("ema", 0.9, (), 0.0)(meeting), sink_update("ema_release", 0.8, (), 0)(meeting)] == [
        0.9,
        0.8,
    ]
    assert sink_update("memory", 0.0, (0.3, 0.6), 0.0)(meeting) == 0.6
    assert sink_update("memory", 0.0, (0.3, 0.6), 0.0)(meeting._replace(rank=-2)) == 0.3
    assert sink_update("adaptive", 0.0, (), 0.5)(meeting).flatten().tolist() == [1.0, 0.0]


def test_evictions_read_nothing_back_from_the_device():
    """On a GPU that would wait for it; the meta device has nothing to read (`streamvid plan` runs streams there)."""
    options = WindowOptions(1, 3, 1, fuse=True)
    cache = ContextCache(options, 1, 1, 6, (1, 2), (1, 1, 1), device="meta")
    for _ in range(5):
        plan = cache.planner.plan()
        cache.begin(plan)
        cache.commit(plan, torch.zeros(1, 1, 1, 1, 1, device="meta"))
    assert cache.planner.fusions == 2
