"""What each policy keeps, rewrites and forgets at a prompt switch."""

from itertools import combinations, islice

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamvid.kernels.attention import reference

from streamvid.errors import UserError
from streamvid.rope import rotate, rotation
from streamvid.script_fields import TRANSITIONS
from streamvid.switching import ORDERS, SWITCH_POLICIES, slerp, switch_policy
from streamvid.window import WindowOptions

FOX, CAT = "a red fox walks", "the blue cat sleeps"
# with two layers, no key would tell in which order the window was rewritten
PIPE = tiny.pipeline(num_layers=3)
METHODS = pytest.mark.parametrize("method", ["longlive", "longlive_infinite"])


def stream_of(blocks: int, prompt: str = FOX, **options):
    """A stream after so many blocks."""
    return stream_and_latents(blocks, prompt, **options)[0]


def stream_and_latents(blocks: int, prompt: str = FOX, **options):
    """... and all that it has shown."""
    options = {"context_pass": "separate", **options}  # the cache is looked at between blocks
    stream = PIPE.stream(prompt, decode_pixels=False, **options)
    return stream, torch.cat([chunk.latents for chunk in islice(stream, blocks)], 2)


@torch.no_grad()
def switch(stream, policy: str, prompt: str = CAT) -> None:
    """Apply a policy to the stream's cache, as the stream would before its next block."""
    prompt_kv = stream.prompt_keys.of_prompts((prompt,))
    switch_policy(policy).apply(stream.cache, lambda plan: stream._context_pass(plan, prompt_kv))


def stored(cache, frames, rotated: bool = False) -> list[torch.Tensor]:
    """Keys and values of all layers."""
    return [t for layer in range(len(cache.keys)) for t in cache.stored(layer, frames, rotated)]


@METHODS
def test_policies_keep_the_sink_and_differ_in_the_recent_window(method):
    kept: dict[str, list[torch.Tensor]] = {}
    for policy in ("cross_only", "recache"):
        stream = stream_of(6, method=method)
        sink, recent = stream.cache.planner.live_frames[:3], stream.cache.planner.live_frames[3:]
        before = stored(stream.cache, sink), stored(stream.cache, recent)
        buffers = stream.cache.values.clone(), stream.cache.raw_keys.clone()
        switch(stream, policy)
        slots = torch.tensor([stream.cache.planner.slot_of[frame] for frame in sink])
        tokens = (slots[:, None] * tiny.TOKENS + torch.arange(tiny.TOKENS)).flatten()
        assert torch.equal(stream.cache.values[:, :, tokens], buffers[0][:, :, tokens])
        assert torch.equal(stream.cache.raw_keys, buffers[1])
        # a realigned key is turned afresh, so what is turned back may differ in its last bit
        torch.testing.assert_close(stored(stream.cache, sink), before[0], atol=2e-6, rtol=0)
        kept[policy] = stored(stream.cache, recent)
        if policy == "cross_only":
            assert all(map(torch.equal, kept[policy], before[1]))
    # in the first layer keys do not know the text: only deeper ones are rewritten to something else
    changes = [float((a - b).abs().max()) for a, b in zip(kept["recache"], kept["cross_only"], strict=True)]
    assert max(changes[:2]) < 2e-6 and min(changes[2:]) > 1e-3


def test_recache_keeps_the_sink_bit_for_bit():
    stream = stream_of(6)
    before = stored(stream.cache, [0, 1, 2], rotated=True)
    switch(stream, "recache")
    assert all(map(torch.equal, stored(stream.cache, [0, 1, 2], rotated=True), before))


class FromScratch:
    """A window encoded from scratch in one forward: an explicit mask of frames, positions given, keys and values kept."""

    def __init__(self, positions, mask_FF: torch.Tensor):
        self.rotation = rotation(positions, *tiny.GRID, 12)
        self.mask = mask_FF.repeat_interleave(tiny.TOKENS, 0).repeat_interleave(tiny.TOKENS, 1)
        self.kept: list[torch.Tensor] = []

    def attend(self, layer, q, k, v):
        self.kept += [k, v]
        return reference(rotate(q, self.rotation), rotate(k, self.rotation), v, self.mask)


def causal(frames: int) -> torch.Tensor:
    block = torch.arange(frames) // 3
    return block[:, None] >= block[None]


def sink_apart(frames: int) -> torch.Tensor:
    """All see all, but the sink sees only itself: it is as it was."""
    is_sink = torch.arange(frames) < 3
    return ~is_sink[:, None] | is_sink[None]


def together(frames: int) -> torch.Tensor:
    return torch.ones(frames, frames, dtype=torch.bool)


# policy -> how its window is encoded anew, and whether the sink is told the new prompt: while the stream is no longer than
# the window, and later
RECACHES = {
    "recache": 2 * [(causal, False)],
    "recache(bidirectional)": 2 * [(sink_apart, False)],
    "recache(causal, keep_once_full)": [(causal, True), (causal, False)],
    "recache(bidirectional, keep_once_full)": [(together, True), (sink_apart, False)],
    "recache(causal, reencode)": 2 * [(causal, True)],
    "recache(bidirectional, reencode)": 2 * [(together, True)],
    "recache(causal, reanchor)": 2 * [(causal, True)],
    "recache(bidirectional, reanchor)": 2 * [(together, True)],
}


@METHODS
@pytest.mark.parametrize("blocks", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("policy", RECACHES)
@torch.no_grad()
def test_recache_is_the_window_encoded_anew(policy, blocks, method):
    """As if the stream had begun with the sink under its prompt and seen all the rest under the new one."""
    stream, shown = stream_and_latents(blocks, method=method)
    cache, frames = stream.cache, stream.cache.planner.live_frames
    if "reanchor" in policy:
        frames = list(range(max(0, 3 * blocks - 12), 3 * blocks))
    switch(stream, policy)
    assert cache.planner.live_frames == frames

    mask, new_sink = RECACHES[policy][blocks > 4]
    positions = frames if method == "longlive" else range(len(frames))
    old, new = (PIPE.encode_prompt(prompt)[:, None] for prompt in (FOX, CAT))
    text = torch.cat([new if new_sink else old] + [new] * (len(frames) // 3 - 1), 1)  # one prompt per block
    context = FromScratch(positions, mask(len(frames)))
    PIPE.transformer(shown[:, :, frames], torch.zeros(1, len(frames)), text, context=context)
    torch.testing.assert_close(stored(cache, frames), context.kept, atol=1e-5, rtol=0)


def test_after_a_new_anchor_the_next_block_attends_it():
    stream = stream_of(8)
    stream.prompt(CAT, "recache(bidirectional, reanchor)")
    assert next(stream).attended == (12, 13, 14, *range(18, 27))  # algorithms, section 4.1
    stream = stream_of(8)
    stream.prompt(CAT, "recache(bidirectional, keep_once_full)")
    assert next(stream).attended == (0, 1, 2, *range(18, 27))


@METHODS
def test_a_flush_leaves_the_sink_and_the_last_frame(method):
    stream = stream_of(7, method=method)
    before = stored(stream.cache, [0, 1, 2, 20])
    stream.prompt(CAT, "flush")
    assert next(stream).attended == (0, 1, 2, 20, 21, 22, 23)
    for kept, old in zip(stored(stream.cache, [0, 1, 2, 20]), before, strict=True):
        torch.testing.assert_close(kept, old, atol=2e-6, rtol=0)
    assert next(stream).attended == (0, 1, 2, *range(20, 27))  # the window fills again


@pytest.mark.parametrize(
    ("policy", "mix"), [("blend(4)", torch.lerp), ("blend", torch.lerp), ("blend(3, slerp)", slerp)]
)
@torch.no_grad()
def test_a_blend_tells_the_new_prompt_in_equal_steps(policy, mix, monkeypatch):
    blocks = switch_policy(policy).blocks
    assert blocks == (3 if "3" in policy else 4)
    stream = stream_of(2)
    told = []
    prompt_kv = PIPE.transformer.prompt_kv
    monkeypatch.setattr(PIPE.transformer, "prompt_kv", lambda text: told.append(text) or prompt_kv(text))
    stream.prompt(CAT, policy)
    for _ in islice(stream, blocks + 2):
        pass
    old, new = (PIPE.encode_prompt(prompt) for prompt in (FOX, CAT))
    expected = [mix(old, new, n / blocks) for n in range(1, blocks)] + [new]
    torch.testing.assert_close(told, expected)  # and never again


@METHODS
def test_a_blend_of_one_block_is_a_switch(method):
    outputs = []
    for policy in ("cross_only", "blend(1)", "blend(1, slerp)", "blend(2)"):
        stream = stream_of(2, method=method)
        stream.prompt(CAT, policy)
        outputs.append(next(stream).latents)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[3]).abs().max() > 1e-3


@given(st.integers(2, 8), st.floats(0, 1), st.integers(0, 1000))
def test_slerp_goes_along_the_arc_at_constant_speed(dim, share, seed):
    old, new = torch.nn.functional.normalize(tiny.normal(seed, 2, 5, dim), dim=-1)
    angle = (old * new).sum(-1).clamp(-1, 1).acos()
    good = (angle > 0.1) & (angle < 3)  # nearly (anti)parallel rows go straight
    mixed = slerp(old, new, share)
    for cosine, expected in (
        ((mixed * mixed).sum(-1), torch.ones(5)),  # the norm stays
        ((old * mixed).sum(-1), (share * angle).cos()),
        ((new * mixed).sum(-1), ((1 - share) * angle).cos()),
    ):
        torch.testing.assert_close(cosine[good], expected[good], atol=1e-4, rtol=0)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_slerp_of_parallel_rows_goes_straight(share, factor):
    old = tiny.normal(0, 5, 8)
    for new in (factor * old, -old):
        straight = torch.lerp(old, new, share)
        torch.testing.assert_close(slerp(old, new, share), straight, atol=1e-4, rtol=1e-4)
    assert torch.equal(slerp(0 * old, 0 * old, share), 0 * old)  # rows behind a prompt's end
    assert slerp(old.bfloat16(), old.bfloat16(), share).dtype == torch.bfloat16


def test_a_shot_moves_on_by_its_offset():
    chunks, positions = {}, {}
    for policy, offset in (("cross_only", 0), ("shot", 0), ("shot", 8)):
        stream = stream_of(5, overrides={"shot_offset": offset})
        stream.prompt(CAT, policy)
        chunks[policy, offset] = next(stream)
        positions[policy, offset] = stream.cache.planner.plan().positions
    assert chunks["shot", 8].attended == chunks["shot", 0].attended
    assert torch.equal(chunks["shot", 0].latents, chunks["cross_only", 0].latents)
    assert (chunks["shot", 8].latents - chunks["shot", 0].latents).abs().max() > 1e-3
    assert positions["shot", 0] == (0, 1, 2, *range(12, 21))  # the shot begins at frame 15
    assert positions["shot", 8] == (0, 1, 2, 12, 13, 14, *range(23, 29))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 5), st.integers(1, 6))
@torch.no_grad()
def test_recache_under_the_same_prompt_changes_nothing_before_the_first_eviction(block, sink, extra, blocks):
    """Whatever the sizes: a replay sees what the context passes saw, as long as nothing was forgotten."""
    window = max(sink + block + extra, block * blocks)
    for positions in ("absolute", "cache_relative"):
        cache = tiny.context_cache(WindowOptions(block, window, sink, positions))
        latents = tiny.clip(0, block * blocks)
        tiny.run_blocks(cache, latents, latents)
        frames, model = cache.planner.live_frames, tiny.shared_transformer()
        before = stored(cache, frames)
        prompt_kv = model.prompt_kv(tiny.text(0, 1))

        def replay(plan, cache=cache, prompt_kv=prompt_kv):
            clean = cache.clean_latents(plan)
            tiny.shared_transformer()(
                clean, torch.zeros(1, clean.shape[2]), prompt_kv=prompt_kv, context=cache
            )

        switch_policy("recache").apply(cache, replay)
        torch.testing.assert_close(stored(cache, frames), before, atol=2e-6, rtol=0)


@METHODS
def test_after_a_cut_the_stream_is_a_fresh_one(method):
    """The same noise and prompt: equal chunks, up to the rounding of later positions."""
    stream = stream_of(5, method=method)
    stream.prompt(CAT, policy="cut")

    def noise(block, step, frames):
        return stream.noise(block + 5, step, frames)

    fresh = PIPE.stream(CAT, method=method, noise=noise, decode_pixels=False)
    for chunk, first in zip(islice(stream, 6), fresh, strict=False):
        torch.testing.assert_close(chunk.latents, first.latents, atol=1e-4, rtol=0)
        assert [frame - 15 for frame in chunk.attended] == list(first.attended)


def test_after_a_cut_the_decoder_is_a_fresh_one():
    stream = PIPE.stream(FOX)
    for _ in islice(stream, 2):
        pass
    stream.prompt(CAT, policy="cut")
    noise = lambda block, step, frames: stream.noise(block + 2, step, frames)  # noqa: E731
    for chunk, first in zip(islice(stream, 2), PIPE.stream(CAT, noise=noise), strict=False):
        assert chunk.videos.shape == first.videos.shape
        assert abs(chunk.videos.astype(int) - first.videos).max() <= 1


@METHODS
def test_policies_lead_to_different_videos(method):
    """Before the window is full, and after."""
    names = [None, "cross_only", "blend", "blend(4, slerp)", "blend(3)", "flush", "cut", *RECACHES]
    overrides = {}
    if method == "longlive":  # positions relative to the window do not know of jumps
        names, overrides = [*names, "shot"], {"shot_offset": 8}
    for blocks, alike in ((4, "reencode"), (6, "keep")):  # what keep_once_full is before, and after
        outputs = {}
        for policy in names:
            stream = stream_of(blocks, method=method, overrides=overrides)
            if policy:
                stream.prompt(CAT, policy)
            outputs[policy] = torch.cat([chunk.latents for chunk in islice(stream, 2)], 2)
        for order in ORDERS:
            once_full = outputs.pop(f"recache({order}, keep_once_full)")
            same = {"keep": "recache" if order == "causal" else "recache(bidirectional)"}.get(alike)
            assert torch.equal(once_full, outputs[same or f"recache({order}, {alike})"])
            if blocks == 4:  # nothing has left the window: its oldest frames are the sink
                assert torch.equal(outputs.pop(f"recache({order}, reanchor)"), once_full)
        for one, other in combinations(outputs, 2):
            assert (outputs[one] - outputs[other]).abs().max() > 1e-3, (blocks, one, other)


def test_scripts_know_the_same_policies():
    assert tuple(SWITCH_POLICIES) == TRANSITIONS


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("recache", "recache(causal)"),
        ("recache", "recache(causal, keep)"),
        ("recache(bidirectional)", "recache(bidirectional,keep )"),
    ],
)
def test_options_left_out_are_the_first_of_their_kind(name, policy):
    apply = [switch_policy(text).apply for text in (name, policy)]
    assert apply[0].keywords == apply[1].keywords != switch_policy("recache(causal, reanchor)").apply.keywords


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fade", f"'fade' is not known: choose one of {', '.join(SWITCH_POLICIES)}, some with options"),
        ("", "'' is not known: choose one of cross_only"),
        ("recache(", "'recache\\(' is not known"),
        ("recache()", "'recache\\(\\)' is not known"),
        (["cut"], "\\['cut'\\] is not known"),
        ("recache(slow)", "recache takes one of causal, bidirectional and one of keep, .*reanchor"),
        ("recache(causal, lose)", "recache takes one of causal, bidirectional and one of keep, .*reanchor"),
        ("recache(causal, keep, keep)", "recache takes fewer options"),
        ("cut(3)", "cut takes fewer options"),
        ("shot(8)", "shot takes fewer options"),
        ("blend(0)", "blend takes a number of blocks and one of lerp, slerp"),
        ("blend(lerp)", "blend takes a number of blocks and one of lerp, slerp"),
        ("blend(4, fade)", "blend takes a number of blocks and one of lerp, slerp"),
    ],
)
def test_an_unknown_policy_or_option_is_named(name, message):
    with pytest.raises(UserError, match=f"transition = .*{message}") as error:
        switch_policy(name)
    assert "\n" not in str(error.value)
