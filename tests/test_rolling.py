"""The rolling sampler against Rolling Forcing written out (algorithms, section 3.2), and against the few-step sampler."""

from itertools import islice

import pytest
import tiny
import torch
from streamvid.kernels.attention import reference

from streamvid.errors import UserError
from streamvid.noise import ReferenceNoise
from streamvid.rope import rotate, rotation
from streamvid.script import load_script

FOX, CAT = "a red fox walks", "the blue cat sleeps"
LEVELS = [1000, 750, 500, 250]
SIZE, SINK, SPAN = (
    2,
    2,
    12,
)  # of a block, of the sink, attended at most: two frames of past beside a full window
OPTIONS = {
    "sampler": "rolling",
    "frames_per_block": SIZE,
    "window": SPAN,
    "sink": SINK,
    "denoising_steps": LEVELS,
    "positions": "sink_before_window",
}


STREAM = ("blocks", "noise", "seed", "context_pass")  # arguments of the stream, not of the method


def start(**overrides):
    options = {name: overrides.pop(name) for name in STREAM if name in overrides}
    chosen = OPTIONS | overrides
    return tiny.pipeline().stream(FOX, overrides=chosen, decode_pixels=False, **options)


def latents(stream, blocks: int | None = None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in islice(stream, blocks)], 2)


class Written:
    """Attention by concatenation: un-rotated keys of every finished frame are kept and rotated afresh in each forward."""

    def __init__(self):
        self.kept: dict[
            tuple[int, int], tuple[torch.Tensor, torch.Tensor]
        ] = {}  # (layer, frame) -> key, value

    def see(self, past: list[tuple[int, int]], own: range, keep: bool = False) -> "Written":
        """The next forward's past, as (frame, position), and its own frames."""
        self.past, self.own, self.keep = past, own, keep
        return self

    def attend(self, layer, q, k, v):
        if self.keep:
            for index, frame in enumerate(self.own):
                tokens = slice(index * tiny.TOKENS, (index + 1) * tiny.TOKENS)
                self.kept[layer, frame] = k[:, tokens], v[:, tokens]
        past = [self.kept[layer, frame] for frame, _ in self.past]
        keys = torch.cat([key for key, _ in past] + [k], 1)
        values = torch.cat([value for _, value in past] + [v], 1)
        positions = [position for _, position in self.past] + list(self.own)
        q = rotate(q, rotation(list(self.own), *tiny.GRID, 12))
        return reference(q, rotate(keys, rotation(positions, *tiny.GRID, 12)), values)


@torch.no_grad()
def rolling_forcing(stream, blocks: int, released: bool) -> torch.Tensor:
    """Section 3.2: windows over blocks s..e, of which block b has done w - b levels."""
    pipe, steps, noise = stream.pipe, stream.steps, stream.noise
    model, scheduler, context = pipe.transformer, pipe.scheduler, Written()
    prompt_kv = model.prompt_kv(pipe.encode_prompt(FOX))
    buffer, output = {}, {}
    for w in range(blocks + len(steps) - 1):
        window = range(max(0, w - len(steps) + 1), min(blocks - 1, w) + 1)
        first, frames = window[0] * SIZE, len(window) * SIZE
        if w < blocks:
            buffer[w] = noise(w, 0, SIZE)
        past: list[tuple[int, int]] = []
        if first > 0:  # the sink directly before the working cache
            working = min(first - SINK, SPAN - frames - SINK)
            past = [(frame, first - working - SINK + frame) for frame in range(SINK)]
            past += [(frame, frame) for frame in range(first - working, first)]
        x_t = torch.cat([buffer[b] for b in window], 2)
        t = torch.tensor([[steps[w - b][0] for b in window for _ in range(SIZE)]])
        sigma = torch.tensor([steps[w - b][1] for b in window for _ in range(SIZE)]).view(1, 1, -1, 1, 1)
        own = range(first, first + frames)
        flow = model(x_t, t, prompt_kv=prompt_kv, context=context.see(past, own)).sample
        x_0 = x_t - sigma * flow
        for b, clean in zip(window, x_0.split(SIZE, 2), strict=True):
            output[b] = clean
            if w - b + 1 < len(steps):
                buffer[b] = scheduler.add_noise(clean, noise(b, w - b + 1, SIZE), steps[w - b + 1][1])
        if (
            released
        ):  # the last SPAN frames that are stored, the sink at its index as long as it is one of them
            past = [(frame, frame) for frame in range(max(0, first + SIZE - SPAN), first)]
            past = past if first + SIZE <= SPAN else [pair for pair in past if pair[0] >= SINK]
        own = range(first, first + SIZE)
        context.see(past, own, keep=True)
        model(output[window[0]], torch.zeros(1, SIZE), prompt_kv=prompt_kv, context=context)
    return torch.cat([output[b] for b in range(blocks)], 2)


@pytest.mark.parametrize("context_window", ["same", "release"])
@pytest.mark.parametrize("blocks", [1, 3, 5, 12])  # fewer than levels, and more than the window holds
def test_rolling_is_rolling_forcing_written_out(blocks, context_window):
    stream = start(blocks=blocks, context_window=context_window)
    expected = rolling_forcing(stream, blocks, context_window == "release")
    torch.testing.assert_close(latents(stream), expected, atol=2e-5, rtol=0)


def test_the_two_context_windows_differ_once_there_is_a_past():
    same, release = (latents(start(context_window=name), 6) for name in ("same", "release"))
    first = (same - release).abs().amax((0, 1, 3, 4)).gt(1e-4).nonzero()[0]
    # block 3 is the first whose joint window drops a frame, block 4 the first to see what it wrote
    assert first == 4 * SIZE


def test_a_smaller_cache_leaves_less_to_see_where_the_stream_ends():
    """A full window has room for two older frames, which 6 hold beside sink and block; shorter windows would see more."""
    usual, same, less = (latents(start(blocks=12, cache_frames=n)) for n in (None, SINK + SPAN, 6))
    assert torch.equal(usual, same)
    assert (usual - less).abs().amax((0, 1, 3, 4)).gt(1e-4).nonzero()[0] == 9 * SIZE


@pytest.mark.parametrize("method", ["longlive", "longlive_infinite", "reward_forcing", "deep_sink"])
def test_with_one_level_rolling_is_few_step(method):
    def of(sampler):
        options = {
            "sampler": sampler,
            "denoising_steps": [1000],
            "window": 9,
            "sink": 3,
            "frames_per_block": 3,
        }
        return latents(tiny.pipeline().stream(FOX, method=method, overrides=options, decode_pixels=False), 7)

    torch.testing.assert_close(of("rolling"), of("few_step"), atol=1e-6, rtol=0)


def test_an_end_that_is_known_changes_the_last_blocks_only():
    """A known end lets the window shrink: the last (levels - 1) blocks no longer see any after them."""
    known, endless = latents(start(blocks=9)), latents(start(), 9)
    equal = [torch.equal(*pair) for pair in zip(known.split(SIZE, 2), endless.split(SIZE, 2), strict=True)]
    assert equal == [True] * 6 + [False] * 3


def test_forwards_per_block():
    """Windows grow to one block per level, then there is one forward per block beside its context pass."""
    calls, stream = [], start(blocks=7)
    model = tiny.pipeline().transformer
    hook = model.register_forward_pre_hook(
        lambda module, args: calls.append((stream.block, args[0].shape[2] // SIZE)) if args else None
    )
    try:
        list(stream)
    finally:
        hook.remove()
    sizes = {block: [size for at, size in calls if at == block] for block in range(7)}
    assert sizes == {
        0: [1, 2, 3, 4, 1],
        1: [4, 1],
        2: [4, 1],
        3: [4, 1],
        4: [3, 1],
        5: [2, 1],
        6: [1, 1],
    }


def test_a_cut_drops_the_blocks_under_way():
    """They were begun in the old scene; the new one starts as a stream of its own."""
    stream = start()
    list(islice(stream, 5))
    assert sorted(stream.sampler.joint) == [5, 6, 7]
    stream.prompt(CAT, policy="cut")
    fresh = tiny.pipeline().stream(
        CAT, overrides=OPTIONS, noise=lambda b, step, n: stream.noise(b + 5, step, n), decode_pixels=False
    )
    torch.testing.assert_close(latents(stream, 6), latents(fresh, 6), atol=2e-5, rtol=0)


def test_a_switch_keeps_the_blocks_under_way():
    stream = start()
    list(islice(stream, 5))
    under_way = {block: noisy.clone() for block, (noisy, _) in stream.sampler.joint.items()}
    seen = []
    hook = tiny.pipeline().transformer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if args else None
    )
    stream.prompt(CAT, policy="cross_only")
    next(stream)
    hook.remove()
    assert torch.equal(seen[0][:, :, : 3 * SIZE], torch.cat(list(under_way.values()), 2))


# --- what does not go together --------------------------------------------------------------------------------------


def shots(**second):
    return load_script({"shots": [{"prompt": FOX, "duration": 2}, {"prompt": CAT, "duration": 2, **second}]})


def refused(message, *args, **options):
    with pytest.raises(UserError, match=message) as error:
        tiny.pipeline().stream(*args, decode_pixels=False, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def nothing_allocated(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a cache was made")

    monkeypatch.setattr("streamvid.stream.ContextCache", refuse)


def test_a_shot_may_have_other_levels_but_not_another_number():
    script = shots(overrides={"denoising_steps": [1000, 500, 250]})
    refused(
        "denoising_steps of a shot has 3 levels, and with sampler = rolling each .* 4 .*: give as many",
        script,
        overrides=OPTIONS,
    )
    plain, other = (
        latents(tiny.pipeline().stream(script, overrides=OPTIONS, decode_pixels=False))
        for script in (shots(), shots(overrides={"denoising_steps": [1000, 700, 400, 100]}))
    )
    assert (plain - other).abs().max() > 1e-3


def test_the_reference_order_is_for_one_block_after_the_other(nothing_allocated):
    message = "noise = 'reference' draws block after block, and sampler = rolling .*: take noise = 'seeded'"
    refused(message, FOX, overrides=OPTIONS, noise="reference", blocks=5)
    refused(message, FOX, overrides=OPTIONS, noise=ReferenceNoise(0, 1, 10, tiny.LATENT), blocks=5)


def test_a_window_for_one_block_per_level(nothing_allocated):
    refused(
        "window = 8 cannot hold sink = 2 and 4 blocks of 2 .* at least 10",
        FOX,
        overrides=OPTIONS | {"window": 8},
    )
    # the levels are the model's where the method names none
    model_s = {"sampler": "rolling", "denoising_steps": None, "window": 6, "sink": 1}
    refused("window = 6 cannot hold sink = 1 and 2 blocks of 3 .* at least 7", FOX, overrides=model_s)


# --- micro-steps (StreamDiT's moving buffer) ------------------------------------------------------------------------


def forwards_of(stream, blocks: int) -> list[int]:
    """Jointly denoised blocks of every forward; context passes are 0."""
    seen = []
    begin = stream.cache.begin

    def noting(plan):
        begin(plan)
        seen.append(len(plan.own) // SIZE)

    stream.cache.begin = noting
    list(islice(stream, blocks))
    return seen


@pytest.mark.parametrize(("micro_steps", "most"), [(1, 4), (2, 2), (4, 1)])
def test_a_block_enters_after_so_many_forwards(micro_steps, most):
    stream = start(micro_steps=micro_steps, blocks=5)
    assert stream.cache.options.joint_blocks == most
    seen = forwards_of(stream, 5)
    ramp_up = [1 + n // micro_steps for n in range(len(LEVELS))]
    assert seen[: len(LEVELS) + 1] == [*ramp_up, 1]  # then the context pass of the first block
    forwards = len(LEVELS) + 4 * micro_steps
    assert len(seen) == forwards + 5 and max(seen) == most
    assert seen[-2:] == [1, 1]  # the end shrinks the buffer


def test_a_buffer_of_one_block_is_the_few_step_sampler():
    plain = start(sampler="few_step", blocks=6, context_pass="separate")
    assert torch.equal(latents(start(micro_steps=len(LEVELS), blocks=6)), latents(plain))


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_an_endless_stream_is_the_beginning_of_a_longer_one(micro_steps):
    endless = latents(start(micro_steps=micro_steps), 4)
    longer = latents(start(micro_steps=micro_steps, blocks=9), 4)
    assert torch.equal(endless, longer)
    assert not torch.equal(endless, latents(start(micro_steps=3 - micro_steps), 4))
