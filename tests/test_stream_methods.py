"""Streams of every preset: whole chunks or none, state of their own, and options that each do something."""

from dataclasses import fields
from itertools import combinations, islice, product

import pytest
import tiny
import torch
from streamvid.kernels.attention import reference
from test_stream import Trap, same

from streamvid.methods import Method, load_method, method_names
from streamvid.rope import rotate, rotation
from streamvid.sampler import few_step_block
from streamvid.transformer import CausalWanTransformer3DModel

FOX, CAT, SNOW = "a red fox walks", "the blue cat sleeps", "the snow falls"
# presets in small: full windows after three or four blocks
SMALL = {
    "longlive_infinite": {"frames_per_block": 2, "window": 7, "sink": 2},
    "rolling_forcing": {"frames_per_block": 2, "window": 10, "sink": 2, "denoising_steps": [1000, 800, 500]},
    "reward_forcing": {"frames_per_block": 2, "window": 6, "sink": 2, "sink_decay": 0.5},
    "deep_forcing": {"frames_per_block": 2, "window": 8, "sink": 2, "budget": 6, "recent": 3},
}
POLICIES = [
    None,
    "cross_only",
    "recache",
    "recache(bidirectional, keep_once_full)",
    "recache(bidirectional, reencode)",
    "recache(causal, reanchor)",
    "flush",
    "blend(3, slerp)",
    "shot",
    "cut",
]


def start(method: str = "longlive", prompt=FOX, **options):
    overrides = {**SMALL.get(method, {}), **options.pop("overrides", {})}
    options = {"decode_pixels": False, **options}
    return tiny.pipeline().stream(prompt, method=method, overrides=overrides, **options)


def latents(stream, blocks: int | None = None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in islice(stream, blocks)], 2)


# --- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", method_names())
def test_every_preset_makes_blocks_within_its_window(name):
    method = load_method(name)
    stream = tiny.pipeline().stream(FOX, method=method, decode_pixels=False)
    blocks = method.window // method.frames_per_block + 3
    *_, last = chunks = list(islice(stream, blocks))
    assert [chunk.index for chunk in chunks] == list(range(blocks))
    for chunk in chunks:
        assert chunk.latents.shape == (1, 16, method.frames_per_block, 4, 4)
        assert chunk.latents.isfinite().all() and 0.1 < chunk.latents.std() < 10
        assert len(chunk.attended) <= method.window
    assert len(last.attended) >= (method.budget or method.window - method.frames_per_block)
    assert last.attended[: method.sink] == tuple(range(method.sink))


@pytest.mark.parametrize("name", method_names())
def test_every_preset_survives_a_switch_of_its_own(name):
    stream = tiny.pipeline().stream(FOX, method=name, decode_pixels=False)
    list(islice(stream, 3))
    stream.prompt(CAT)
    chunks = list(islice(stream, 2))
    assert chunks[0].events == (f"switch:{load_method(name).transition}",)
    assert all(chunk.prompt == CAT and chunk.latents.isfinite().all() for chunk in chunks)


# --- whole chunks or none -------------------------------------------------------------------------------------------


def failing(stream, trap) -> tuple:
    """The next chunk, after a failure at each of its calls in turn, and how many failures those were."""
    for call in range(1000):
        trap.left, trap.error = call, (KeyboardInterrupt, MemoryError)[call % 2]()
        block = stream.block
        try:
            chunk = next(stream)
        except (KeyboardInterrupt, MemoryError):
            assert stream.block == block
            continue
        trap.left = None
        return chunk, call
    raise AssertionError("it never succeeds")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", SMALL)
def test_a_chunk_commits_whole_or_not_at_all(method, policy):
    """Blocks 5 to 7 fail once at each of their calls; 5 comes with a prompt, 6 and 7 see what it left."""

    def before_block_5():
        stream = start(method, blocks=9)
        list(islice(stream, 5))
        if policy:
            stream.prompt(CAT, policy)
        return stream

    whole, stream = list(before_block_5()), before_block_5()
    with Trap(tiny.pipeline()) as trap:
        chunks, failures = zip(*(failing(stream, trap) for _ in range(3)), strict=True)
    chunks = [*chunks, *stream]
    assert min(failures) >= 2 * 2  # two forwards of two layers at least
    assert len(whole) == 4 and all(map(same, whole, chunks))


@pytest.mark.parametrize(("second", "third"), product(["cross_only", "recache", "flush", "cut"], repeat=2))
@pytest.mark.parametrize("method", SMALL)
def test_failed_blocks_leave_nothing_behind(method, second, third):
    """Block 5 fails without a prompt, then with one, and is made with a third: as if it had come at once."""
    chunks = {}
    for fails in (False, True):
        stream = start(method, blocks=8)
        list(islice(stream, 5))
        for prompt, policy in [(None, None), (SNOW, second)] * fails:
            if prompt:
                stream.prompt(prompt, policy)
            with Trap(tiny.pipeline()) as trap, pytest.raises(MemoryError):
                trap.left, trap.error = 3, MemoryError()
                next(stream)
        stream.prompt(CAT, third)
        chunks[fails] = list(stream)
    assert len(chunks[True]) == 3 and all(map(same, chunks[False], chunks[True]))


def test_interleaved_streams_are_separate_ones():
    options = [
        ("rolling_forcing", f"{FOX} [2s] | {CAT} [2s]", {"seed": 1}),
        ("reward_forcing", CAT, {"seed": 2, "blocks": 8}),
        ("deep_forcing", f"{FOX} [3s] | # {SNOW} [2s]", {"seed": 3}),
        ("rolling_forcing", SNOW, {"seed": 4, "blocks": 7}),
    ]
    alone = [list(start(method, prompt, **more)) for method, prompt, more in options]
    streams = [start(method, prompt, **more) for method, prompt, more in options]
    together: list[list] = [[] for _ in streams]
    while len(together[2]) < len(alone[2]):  # the longest
        for turn in (0, 1, 3, 1, 2, 3, 0, 2):
            together[turn] += list(islice(streams[turn], 1))
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) and all(map(same, one, other))


# --- options --------------------------------------------------------------------------------------------------------

LEVELS = [1000.0, 500.0]
DEEP = {"window": 12, "budget": 9, "recent": 4}
ROLLING = {"sampler": "rolling", "window": 12, "positions": "sink_before_window", "denoising_steps": LEVELS}
# option -> options of both streams, its value in the second
EFFECTS = {
    "sampler": ({"denoising_steps": LEVELS}, "rolling"),
    "solver": ({"denoising_steps": LEVELS}, "unipc"),
    "micro_steps": (ROLLING, 2),
    "frames_per_block": ({}, 2),
    "window": ({}, 9),
    "sink": ({}, 0),
    "sink_update": ({}, "ema"),
    "sink_decay": ({"sink_update": "ema"}, 0.5),
    "memory_decays": ({"sink_update": "memory", "sink": 5}, (0.99, 0.5)),
    "refresh_below": ({"sink_update": "adaptive", "refresh_below": -1.0}, 1.0),
    "sink_precision": ({"sink_update": "ema", "sink_decay": 0.99}, "native"),
    "sink_filling": ({"sink": 5}, "longlive_release"),
    "positions": ({}, "cache_relative"),
    "budget": ({}, 9),
    "recent": (DEEP, 5),
    "importance": (DEEP, "max"),
    "max_reuse": (DEEP, 1),
    "first_sink_shift": ({"positions": "deep_forcing_release"}, 5),
    "shot_offset": ({"transition": "shot"}, 8),
    "pin_shots": ({"transition": "shot"}, True),
    "past_bias": ({}, 0.5),
    "trained_frames": ({"far_decay": 0.5, "trained_frames": 4}, 8),
    "far_scale": ({"trained_frames": 6, "far_scale": 0.9}, 0.3),
    "far_decay": ({"trained_frames": 6, "far_decay": 0.9}, 0.3),
    "rope_interpolation": ({"trained_frames": 6, "rope_interpolation": 2.0}, 4.0),
    "head_jitter": ({}, 0.5),
    "noise_correlation": ({}, -0.5),
    "denoising_steps": ({}, LEVELS[:1]),
    "first_denoising_steps": ({}, LEVELS[:1]),
    "recompute": ({}, True),
    "reencode": ({"recompute": True, "sink": 0}, True),
    "context_timestep": ({}, 100.0),
    "context_window": (ROLLING, "release"),
    "cache_frames": (ROLLING, 7),  # full windows see three older frames
    "kv_dtype": ({}, "int8"),
    "transition": ({}, "cut"),
}
# the same for other values
MORE_EFFECTS = {
    "kv_dtype of 8 bits": ({"kv_dtype": "int8"}, "fp8"),
    "kv_dtype of 2 bits": ({"kv_dtype": "fp8"}, "kivi2"),
    "positions before the window": ({}, "sink_before_window"),
    "positions of the release": ({"positions": "sink_before_window"}, "deep_forcing_release"),
    "sink_update memory": ({"sink": 5}, "memory"),
    "sink_update adaptive": ({}, "adaptive"),
    "sink_filling of Reward Forcing": ({"sink": 5}, "reward_forcing_release"),
    "sink_update as released": ({"sink_update": "ema", "sink_decay": 0.5, "sink": 2}, "ema_release"),
}


def shown(overrides, pipe=None) -> torch.Tensor:
    """Nine blocks, another prompt from the fourth on."""
    pixels = "reencode" in overrides
    stream = (pipe or tiny.pipeline()).stream(FOX, overrides=overrides, decode_pixels=pixels)
    frames = []
    while len(frames) < 9:
        if len(frames) == 3:
            stream.prompt(CAT)
        frames.append(next(stream).latents)
    return torch.cat(frames, 2).float()


@pytest.fixture(scope="module")
def half():
    return tiny.new_pipeline().to(torch.bfloat16)


@pytest.mark.parametrize("option", [*EFFECTS, *MORE_EFFECTS])
def test_every_option_changes_the_video(option, half):
    base, value = (EFFECTS | MORE_EFFECTS)[option]
    pipe = half if option == "sink_precision" else None
    plain, changed = shown(base, pipe), shown(base | {option.split()[0]: value}, pipe)
    frames = min(plain.shape[2], changed.shape[2])
    assert (plain[:, :, :frames] - changed[:, :, :frames]).abs().max() > 1e-4


def test_the_first_block_of_a_scene_may_have_levels_of_its_own():
    """They are those of a stream that has them everywhere; all other blocks keep theirs."""

    def play(first_levels, levels, stop):
        overrides = {"denoising_steps": levels} | (
            {"first_denoising_steps": first_levels} if first_levels else {}
        )
        stream = start(overrides=overrides)
        made = [next(stream).latents]
        stream.prompt(CAT, policy="cut")
        return torch.cat([*made, *(chunk.latents for chunk in islice(stream, stop - 1))], 2)

    four = [1000.0, 750.0, 500.0, 250.0]
    mixed, everywhere = play(four, LEVELS, 3), play(None, four, 2)
    assert torch.equal(mixed[:, :, :6], everywhere)  # the stream's first block and that of the scene
    assert not torch.equal(mixed[:, :, 6:], play(None, four, 3)[:, :, 6:])
    assert not torch.equal(mixed[:, :, :3], play(None, LEVELS, 1))


def test_ranks_are_a_sink_before_the_window():
    """Only distances count, so the two are one as long as nothing is missing in between."""
    assert torch.equal(shown({"positions": "cache_relative"}), shown({"positions": "sink_before_window"}))


def test_no_option_is_without_a_test():
    assert EFFECTS.keys() == {f.name for f in fields(Method)} - {"name", "source"}


def test_precision_of_the_sink_means_nothing_in_float32():
    base = {"sink_update": "ema", "sink_decay": 0.99}
    assert torch.equal(shown(base), shown(base | {"sink_precision": "native"}))


# transitions that differ, of a stream that is longer than its window and of one that is not
DIFFERENT = {
    6: [
        "cross_only",
        *(
            f"recache({order}, {sink})"
            for order, sink in product(["causal", "bidirectional"], ["keep", "reencode"])
        ),
        "recache(causal, reanchor)",
        "recache(bidirectional, reanchor)",
        "flush",
        "blend(2)",
        "blend(3)",
        "blend(3, slerp)",
        "cut",
    ],
    2: ["recache(causal, keep)", "recache(causal, keep_once_full)"],
}


@pytest.mark.parametrize("blocks", DIFFERENT)
def test_options_of_transitions_change_the_video(blocks):
    pipe = tiny.pipeline(
        num_layers=3
    )  # with two layers, no key would tell in which order the window was rewritten
    outputs = {}
    for transition in DIFFERENT[blocks]:
        stream = pipe.stream(FOX, method="longlive", decode_pixels=False)
        list(islice(stream, blocks))
        stream.prompt(CAT, transition)
        outputs[transition] = latents(stream, 3)
    for one, other in combinations(outputs, 2):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-4, (one, other)


def test_keep_once_full_is_one_or_the_other():
    for blocks, twin in ((2, "reencode"), (6, "keep")):
        pair = []
        for sink in ("keep_once_full", twin):
            stream = start("longlive")
            list(islice(stream, blocks))
            stream.prompt(CAT, f"recache(bidirectional, {sink})")
            pair.append(latents(stream, 2))
        assert torch.equal(*pair)


# --- a prompt that changes slowly -----------------------------------------------------------------------------------


def told(stream, blocks: int) -> list[torch.Tensor]:
    """The text embedding of every block."""
    seen, prompt_kv = [], CausalWanTransformer3DModel.prompt_kv

    def spy(model, embedding):
        seen.append(embedding)
        return prompt_kv(model, embedding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalWanTransformer3DModel, "prompt_kv", spy)
        for _ in range(blocks):
            before = len(seen)
            next(stream)
            seen += seen[-1:] * (len(seen) == before)  # computed once per prompt
    return seen


def encoded(*prompts: str) -> list[torch.Tensor]:
    return [tiny.pipeline().encode_prompt(prompt) for prompt in prompts]


def test_a_blend_goes_from_one_prompt_to_the_other_in_equal_steps():
    fox, cat = encoded(FOX, CAT)
    stream = start("longlive")
    list(islice(stream, 2))
    stream.prompt(CAT, "blend(4)")
    expected = [torch.lerp(fox, cat, share) for share in (0.25, 0.5, 0.75, 1, 1)]
    torch.testing.assert_close(told(stream, 5), expected)


def test_a_blend_may_begin_in_the_middle_of_another():
    fox, cat, snow = encoded(FOX, CAT, SNOW)
    stream = start("longlive")
    list(islice(stream, 1))
    stream.prompt(CAT, "blend(4)")
    told(stream, 2)
    stream.prompt(SNOW, "blend(2)")
    halfway = torch.lerp(fox, cat, 0.5)
    torch.testing.assert_close(told(stream, 2), [torch.lerp(halfway, snow, 0.5), snow])


def test_another_transition_ends_a_blend():
    stream = start("longlive")
    list(islice(stream, 1))
    stream.prompt(CAT, "blend(8)")
    next(stream)
    stream.prompt(SNOW, "recache")
    assert torch.equal(told(stream, 1)[0], encoded(SNOW)[0])


def test_before_the_first_block_there_is_nothing_to_blend():
    stream = start("longlive")
    stream.prompt(CAT, "blend(4)")
    assert torch.equal(told(stream, 1)[0], encoded(CAT)[0])


def test_a_stream_that_is_always_changing_remembers_one_blend():
    stream, texts = start("longlive"), (FOX, CAT, SNOW)
    for block in range(12):
        stream.prompt(texts[block % 3], "blend(4)")
        next(stream)
    assert stream.blend.start == 11
    assert not any(isinstance(value, type(stream.blend)) for value in vars(stream.blend).values())


# --- Reward Forcing as released -------------------------------------------------------------------------------------


class Released:
    """Its cache written out (algorithms, section 3.3): un-rotated keys in a list, rotated by slot in every forward."""

    def __init__(self, window: int, sink: int, decay: float):
        self.capacity, self.sink, self.decay = window * tiny.TOKENS, sink * tiny.TOKENS, decay
        self.stored: dict[int, list[torch.Tensor]] = {}  # layer -> keys, values
        self.made: set[tuple[int, int]] = set()
        self.block = 0

    def attend(self, layer, q, k, v):
        kept, own = self.stored.get(layer, [k[:, :0], v[:, :0]]), k.shape[1]
        if (self.block, layer) in self.made:
            kept = [tensor[:, :-own] for tensor in kept]
        elif kept[0].shape[1] + own > self.capacity:
            kept = [self.shortened(tensor, tensor.shape[1] + own - self.capacity) for tensor in kept]
        self.made.add((self.block, layer))
        keys, values = self.stored[layer] = [torch.cat(pair, 1) for pair in zip(kept, (k, v), strict=True)]
        ranks = list(range(keys.shape[1] // tiny.TOKENS))
        q = rotate(q, rotation(ranks[-own // tiny.TOKENS :], *tiny.GRID, 12))
        return reference(q, rotate(keys, rotation(ranks, *tiny.GRID, 12)), values)

    def shortened(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        sink, evicted = stored[:, : self.sink].clone(), stored[:, self.sink : self.sink + count]
        if count == self.sink:
            sink = self.decay * sink + (1 - self.decay) * evicted
        else:
            least = min(count, self.sink)
            sink[:, :least] = evicted[:, :least]
        return torch.cat([sink, stored[:, self.sink + count :]], 1)


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(9, 3), (8, 3), (7, 3), (9, 2), (10, 2), (9, 1)])
def test_the_released_sink_is_overwritten_by_evictions_of_another_size(window, sink):
    overrides = {"window": window, "sink": sink, "sink_decay": 0.6, "sink_update": "ema_release"}
    stream = tiny.pipeline().stream(FOX, method="reward_forcing", overrides=overrides, decode_pixels=False)
    pipe, context = stream.pipe, Released(window, sink, 0.6)
    prompt_kv = pipe.transformer.prompt_kv(pipe.encode_prompt(FOX))
    for block in range(8):
        context.block = block
        plan = stream.cache.planner.plan()
        expected = few_step_block(
            pipe.transformer, pipe.scheduler, stream.steps, plan, prompt_kv, context, stream.noise
        )
        pipe.transformer(expected, torch.zeros(1, 3), prompt_kv=prompt_kv, context=context)
        torch.testing.assert_close(next(stream).latents, expected, atol=2e-5, rtol=0)


def test_the_released_sink_of_the_usual_sizes_is_the_average():
    overrides = {"window": 9, "sink": 3, "frames_per_block": 3, "sink_decay": 0.6}
    outputs = [
        latents(start("reward_forcing", overrides=overrides | {"sink_update": name}), 7)
        for name in ("ema", "ema_release")
    ]
    assert torch.equal(*outputs)
