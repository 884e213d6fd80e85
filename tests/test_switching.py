"""What each policy keeps, rewrites and forgets at a prompt switch."""

from itertools import islice

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamvid.kernels.attention import reference

from streamvid.errors import UserError
from streamvid.rope import rotate, rotation
from streamvid.script import TRANSITIONS
from streamvid.switching import SWITCH_POLICIES, switch_policy
from streamvid.window import WindowOptions

FOX, CAT = "a red fox walks", "the blue cat sleeps"
# with two layers, no key would tell in which order the window was rewritten
PIPE = tiny.pipeline(num_layers=3)
METHODS = pytest.mark.parametrize("method", ["longlive", "longlive_infinite"])


def stream_of(blocks: int, prompt: str = FOX, **options):
    """A stream after so many blocks."""
    stream = PIPE.stream(prompt, decode_pixels=False, **options)
    for _ in islice(stream, blocks):
        pass
    return stream


@torch.no_grad()
def switch(stream, policy: str, prompt: str = CAT) -> None:
    """Apply a policy to the stream's cache, as the stream would before its next block."""
    prompt_kv = stream._keys_of((prompt,))
    switch_policy(policy)(stream.cache, lambda plan: stream._context_pass(plan, prompt_kv))


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


class BlockCausal:
    """The window encoded from scratch in one forward: an explicit mask, positions given, keys and values kept."""

    def __init__(self, positions, block: int):
        self.rotation = rotation(positions, *tiny.GRID, 12)
        block_of = torch.arange(len(positions)) // block
        mask = block_of[:, None] >= block_of[None]
        self.mask = mask.repeat_interleave(tiny.TOKENS, 0).repeat_interleave(tiny.TOKENS, 1)
        self.kept: list[torch.Tensor] = []

    def attend(self, layer, q, k, v):
        self.kept += [k, v]
        return reference(rotate(q, self.rotation), rotate(k, self.rotation), v, self.mask)


@METHODS
@pytest.mark.parametrize("blocks", [1, 2, 4, 7])
@torch.no_grad()
def test_recache_is_the_window_encoded_anew(method, blocks):
    """As if the stream had begun with the sink under the old prompt and seen all the rest under the new one."""
    stream = stream_of(blocks, method=method)
    cache, model = stream.cache, PIPE.transformer
    frames = cache.planner.live_frames
    latents = cache.latents[:, [cache.planner.slot_of[frame] for frame in frames]].transpose(1, 2)
    switch(stream, "recache")

    positions = frames if method == "longlive" else range(len(frames))
    old, new = (PIPE.encode_prompt(prompt)[:, None] for prompt in (FOX, CAT))
    text = torch.cat([old] + [new] * (len(frames) // 3 - 1), 1)  # one prompt per block
    context = BlockCausal(positions, 3)
    model(latents, torch.zeros(1, len(frames)), text, context=context)
    torch.testing.assert_close(stored(cache, frames), context.kept, atol=1e-5, rtol=0)


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

        switch_policy("recache")(cache, replay)
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
    outputs = {}
    for policy in (None, *SWITCH_POLICIES):
        stream = stream_of(5, method=method)
        if policy:
            stream.prompt(CAT, policy)
        outputs[policy] = torch.cat([chunk.latents for chunk in islice(stream, 2)], 2)
    names = list(outputs)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (outputs[one] - outputs[other]).abs().max() > 1e-3, (one, other)


def test_scripts_know_the_same_policies():
    assert tuple(SWITCH_POLICIES) == TRANSITIONS


def test_an_unknown_policy_is_named():
    with pytest.raises(
        UserError, match="transition = 'fade' is not known: choose one of cross_only, recache, cut"
    ):
        switch_policy("fade")
