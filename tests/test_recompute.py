"""A past that is written anew before every block (Krea) against streams that begin with it."""

from itertools import islice

import numpy as np
import pytest
import tiny
import torch

from streamvid.ahead import decode_ahead
from streamvid.errors import UserError
from streamvid.given import encode_frames
from streamvid.methods import load_method
from streamvid.sampler import few_step_block

FOX = "a red fox walks"
KREA = {"window": 6, "sink": 1, "positions": "cache_relative", "recompute": True}
LEVELS = [1000, 500]


def start(pipe=None, **overrides):
    options = {name: overrides.pop(name) for name in ("blocks", "seed", "decode_pixels") if name in overrides}
    chosen = {"denoising_steps": LEVELS, "transition": "cross_only", **overrides}
    return (pipe or tiny.pipeline()).stream(FOX, overrides=chosen, **{"decode_pixels": False, **options})


@torch.no_grad()
def fresh_block(stream, past: list[torch.Tensor], block: int) -> torch.Tensor:
    """The block as the next one of a new stream whose clean frames are `past`."""
    pipe, size = stream.pipe, stream.method.frames_per_block
    cache = tiny.context_cache(stream.cache.options, past_bias=stream.method.past_bias)
    prompt_kv = pipe.transformer.prompt_kv(pipe.encode_prompt(FOX))
    for first in range(0, len(past), size):
        group = torch.cat(past[first : first + size], 2)
        plan = cache.planner.plan(group.shape[2])
        cache.begin(plan)
        pipe.transformer(group, torch.zeros(1, group.shape[2]), prompt_kv=prompt_kv, context=cache)
        cache.commit(plan, group)
    plan = cache.planner.plan()
    cache.begin(plan)
    return few_step_block(
        pipe.transformer,
        pipe.scheduler,
        stream.steps,
        plan,
        prompt_kv,
        cache,
        lambda _, step, frames: stream.noise(block, step, frames),
    )


@pytest.mark.parametrize(
    "options",
    [
        KREA,
        {**KREA, "window": 9, "sink": 2},
        {**KREA, "sink": 0},
        {**KREA, "frames_per_block": 2, "window": 8, "sink": 3},
        {**KREA, "rope_interpolation": 4.0, "trained_frames": 6},
    ],
)
def test_every_block_follows_from_the_latents_that_it_attends_alone(options):
    stream = start(**options)
    latents: list[torch.Tensor] = []
    for block, chunk in enumerate(islice(stream, 7)):
        past = [latents[frame] for frame in chunk.attended if frame < len(latents)]
        if options.get("trained_frames") is None:
            torch.testing.assert_close(chunk.latents, fresh_block(stream, past, block), atol=1e-5, rtol=0)
        latents += chunk.latents.split(1, 2)
    assert len(past) == stream.method.window - stream.method.frames_per_block


@pytest.mark.parametrize("positions", ["absolute", "cache_relative"])
def test_while_nothing_is_forgotten_it_changes_nothing(positions):
    """Context passes and block-causal replays of the same latents under the same prompt write the same keys."""
    options = {"window": 15, "sink": 0, "positions": positions}
    plain, anew = (start(**options, recompute=on, blocks=5) for on in (False, True))
    for one, other in zip(plain, anew, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-5, rtol=0)


def test_no_context_pass_follows_a_block():
    stream = start(**KREA)
    stream.times = None  # so that forwards are told timesteps, not their embeddings
    transformer, seen = stream.pipe.transformer, []
    handle = transformer.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].shape[2], float(inputs[1].max()))) if inputs else None
    )
    list(islice(stream, 3))
    handle.remove()
    steps = [(3, t) for t, _ in stream.steps]
    assert seen == [*steps, (3, 0.0), *steps, (3, 0.0), *steps]


def test_a_block_that_fails_is_made_again():
    whole = [chunk.latents for chunk in islice(start(**KREA), 5)]
    stream = start(**KREA)
    list(islice(stream, 3))
    sound, stream.noise = stream.noise, None
    with pytest.raises(TypeError):
        next(stream)
    stream.noise = sound
    assert all(map(torch.equal, whole[3:], (chunk.latents for chunk in islice(stream, 2))))


def test_the_past_is_told_the_new_prompt():
    """No recache is needed: before the first block of a prompt, its past is written under it."""
    streams = [start(**KREA) for _ in range(2)]
    for stream, policy in zip(streams, ["cross_only", "recache(causal, reencode)"], strict=True):
        list(islice(stream, 4))
        stream.prompt("the blue cat sleeps", policy)
    one, other = (next(stream).latents for stream in streams)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_bias_on_the_past_is_not_in_what_is_written_anew():
    stream = start(**{**KREA, "window": 9}, past_bias=0.3)  # its past is more than one group
    masks, choose = [], stream.cache._choose_keys

    def noting(plan, anchor):
        choose(plan, anchor)
        mask = stream.cache._mask  # boolean where only dead slots are left out
        masks.append((plan.own[0].frame, mask is not None and mask.is_floating_point()))

    stream.cache._choose_keys = noting
    list(islice(stream, 3))
    assert masks == [(0, False), (0, False), (3, True), (0, False), (3, False), (6, True)]


# --- its oldest frame from pixels ---------------------------------------------------------------------------------------

PICTURE = {**KREA, "sink": 0, "reencode": True, "decode_pixels": True}


@pytest.mark.parametrize("window", [6, 8])
def test_the_oldest_frame_of_the_past_is_a_picture_encoded_anew(window):
    """With a window of 6 it is the pixel frame 9 frames back, the oldest that Krea's release holds."""
    stream, plain = (start(**{**PICTURE, "window": window, "reencode": on}) for on in (True, False))
    clean, written = stream.cache.clean_latents, []
    stream.cache.clean_latents = lambda plan: written.append(clean(plan)) or written[-1]
    shown, latents = [], []
    for block in range(5):
        chunk, other = next(stream), next(plain)
        oldest = 3 * block - (window - 3)
        if latents:
            expected = torch.cat(latents, 2)[:, :, max(0, oldest) :].clone()
            if oldest > 0:
                pixel = 4 * oldest  # the last of its four
                assert window != 6 or pixel == sum(video.shape[1] for video in shown) - 9
                picture = np.concatenate(shown, 1)[:, pixel : pixel + 1]
                expected[:, :, :1] = encode_frames(stream.pipe.vae, picture)
            torch.testing.assert_close(torch.cat(written, 2), expected, atol=0, rtol=0)
        assert torch.equal(chunk.latents, other.latents) == (oldest <= 0)
        shown.append(chunk.videos)
        latents.append(chunk.latents)
        written.clear()


def test_a_stream_with_reencoding_goes_on_from_any_moment():
    """Forked, after a failure, after a reset, after a cut."""
    stream = start(**PICTURE)
    whole = [chunk.latents for chunk in islice(stream, 5)]
    again = start(**PICTURE)
    list(islice(again, 3))
    sound, again.noise = again.noise, None
    with pytest.raises(TypeError):
        next(again)
    again.noise = sound
    twin = again.fork()
    for one in (twin, again):
        assert all(map(torch.equal, whole[3:], (chunk.latents for chunk in islice(one, 2))))
    again.reset()
    assert all(map(torch.equal, whole, (chunk.latents for chunk in islice(again, 5))))
    twin.cut()  # the first frames of a scene are latents of a picture already
    blocks = [next(twin) for _ in range(3)]
    assert twin.cache.reencoded[0] == blocks[2].attended[0] == 18 and blocks[1].attended[0] == 15


def test_reencoding_decodes_in_any_case_and_needs_no_sink():
    """Nobody may ask for the pixels: who decodes elsewhere, or wants latents only."""
    seen, blind = (start(**{**PICTURE, "decode_pixels": on}) for on in (True, False))
    assert next(blind).videos.shape == next(seen).videos.shape
    for one, other in zip(islice(seen, 3), decode_ahead(blind), strict=False):
        assert torch.equal(one.latents, other.latents) and (one.videos == other.videos).all()
    with pytest.raises(
        UserError, match="reencode = True would have no effect: set recompute = True and sink = 0"
    ):
        start(**{**PICTURE, "sink": 1})


def test_krea_executes_its_last_level():
    method = load_method("krea")
    stream = tiny.pipeline().stream(FOX, method="krea", blocks=1)
    assert [t for t, _ in stream.steps] == pytest.approx([1000, 937.5, 833.3333, 625, 0], abs=1e-3)
    assert stream.steps[-1][1] == pytest.approx(0.00498, abs=1e-5) and method.recompute


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("rolling_forcing", {}),
        ("reward_forcing", {}),
        ("deep_forcing", {}),
        ("longlive2_multishot", {}),
    ],
)
def test_methods_that_keep_more_than_whole_frames_cannot_be_recomputed(name, overrides):
    with pytest.raises(UserError, match="recompute = True writes whole frames of the past anew"):
        load_method(name, {"recompute": True, **overrides})
