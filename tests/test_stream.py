"""Streams: whole chunks or none, state of their own, the same frames however they are run."""

import gc
import hashlib
import pickle
import threading
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import tiny
import torch

from streamvid.errors import UserError
from streamvid.methods import SHOT_OPTION_NAMES, load_method
from streamvid.noise import SeededNoise
from streamvid.script import load_script

FOX, CAT, SNOW = "a red fox walks", "the blue cat sleeps", "the snow falls"


def start(prompt=FOX, **options):
    return tiny.pipeline().stream(prompt, **options)


def latents(stream, blocks: int | None = None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in islice(stream, blocks)], 2)


def same(one, other) -> bool:
    """Two chunks are bit for bit the same but for how long they took."""
    names = [f.name for f in fields(one) if f.name not in ("videos", "latents", "timings")]
    told = all(getattr(one, name) == getattr(other, name) for name in names)
    return told and np.array_equal(one.videos, other.videos) and torch.equal(one.latents, other.latents)


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_chunks_follow_each_other_without_a_gap():
    stream, frames = start(fps=8), 0
    for index, chunk in enumerate(islice(stream, 4)):
        assert chunk.index == index and chunk.prompt == FOX and chunk.events == ()
        assert chunk.first_frame == frames and chunk.media_time == frames / 8
        assert chunk.videos.shape == (1, 9 if index == 0 else 12, 32, 32, 3)
        assert chunk.videos.dtype == np.uint8 and chunk.frames is not None
        assert chunk.latents.shape == (1, 16, 3, 4, 4) and not chunk.latents.requires_grad
        assert set(chunk.timings) == {"switch", "denoise", "context", "decode", "total"}
        frames += chunk.frames.shape[0]


def test_pixels_are_the_one_shot_decode_of_the_latents():
    pipe, chunks = tiny.pipeline(), list(start(blocks=3))
    vae = pipe.vae
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        z = torch.cat([chunk.latents for chunk in chunks], 2) / (1.0 / std) + mean
        pixels = vae.decode(z).sample[0].permute(1, 2, 3, 0)
    expected = ((pixels + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), expected)


def test_without_pixels_everything_else_is_the_same():
    script = f"{FOX} [1s] | # {CAT} [2s]"
    for whole, bare in zip(start(script), start(script, decode_pixels=False), strict=True):
        assert bare.videos.shape[1] == 0
        assert same(replace(bare, videos=whole.videos), whole)


def test_blocks_end_a_stream_and_so_does_close():
    assert len(list(start(blocks=2, decode_pixels=False))) == 2
    script = f"{FOX} [10s]"
    assert len(list(start(script, blocks=2, decode_pixels=False))) == 2
    stream = start(decode_pixels=False)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.block == 1


def test_a_script_ends_with_its_timeline():
    stream = start(f"{FOX} [1s] | {CAT} [2s]", decode_pixels=False)
    chunks = list(stream)
    assert len(chunks) == stream.timeline.blocks
    assert [chunk.prompt for chunk in chunks] == [
        stream.timeline.shot_of_block(b).prompt for b in range(len(chunks))
    ]


@pytest.mark.parametrize("transition", ["cross_only", "recache", "cut"])
def test_shots_begin_when_the_timeline_says(transition):
    script = load_script({"shots": [{"prompt": FOX, "duration": 1}, {"prompt": CAT, "duration": 2}] * 2})
    overrides = {"transition": transition}
    stream = start(script, overrides=overrides)
    chunks = {chunk.index: chunk for chunk in stream}
    for shot in stream.timeline.shots:
        assert chunks[shot.first_block].media_time == shot.start
    assert sum(chunk.videos.shape[1] for chunk in chunks.values()) == stream.timeline.frames


def test_gradients_are_off_inside_and_as_they_were_outside():
    with torch.enable_grad():
        for chunk in start(blocks=2, decode_pixels=False):
            assert torch.is_grad_enabled() and chunk.latents.grad_fn is None
    assert all(p.grad is None for p in tiny.pipeline().transformer.parameters())


# --- state ----------------------------------------------------------------------------------------------------------


def fingerprint(module: torch.nn.Module) -> str:
    """Hash of all parameters, buffers and attributes of a module and its parts (also of the memory of diffusers' VAE)."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for part in module.modules():
        plain = {
            k: repr(v) for k, v in vars(part).items() if k not in ("_parameters", "_buffers", "_modules")
        }
        digest.update(pickle.dumps(sorted(plain.items())))
    return digest.hexdigest()


def test_a_stream_never_changes_its_pipeline():
    pipe = tiny.pipeline()
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    before = [fingerprint(part) for part in parts]
    attributes = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    script = load_script(
        {"shots": [{"prompt": FOX, "duration": 2}, {"prompt": CAT, "duration": 2, "seed": 7}]}
    )
    list(start(script, overrides={"denoising_steps": [1000, 250]}))
    assert [fingerprint(part) for part in parts] == before
    assert {name: repr(value) for name, value in vars(pipe.scheduler).items()} == attributes


def test_two_interleaved_streams_are_two_separate_ones():
    options = [
        (f"{FOX} [2s] | {CAT} [2s]", {"seed": 1}),
        (CAT, {"seed": 2, "method": "longlive_infinite", "blocks": 6}),
    ]
    alone = [list(start(prompt, **more)) for prompt, more in options]
    streams = [start(prompt, **more) for prompt, more in options]
    together: list[list] = [[], []]
    for turn in (0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0):
        together[turn] += list(islice(streams[turn], 1))
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) and all(map(same, one, other))


def test_a_batch_is_its_single_streams():
    both = list(start([FOX, CAT], seed=3, blocks=5))
    for i, prompt in enumerate((FOX, CAT)):
        for chunk, one in zip(both, start(prompt, seed=3 + i, blocks=5), strict=True):
            # sums over a batch of two round differently
            torch.testing.assert_close(chunk.latents[i], one.latents[0], atol=1e-4, rtol=0)
            assert np.abs(chunk.videos[i].astype(int) - one.videos[0]).max() <= 1


def test_steady_state_neither_moves_nor_grows():
    options = {"frames_per_block": 1, "window": 5, "sink": 1, "positions": "cache_relative"}
    stream, buffers, counts = start(overrides=options), set(), []
    for chunk in islice(stream, 60):
        cache = stream.cache
        buffers.add(tuple(t.data_ptr() for t in (cache.keys, cache.values, cache.raw_keys, cache.latents)))
        if chunk.index % 20 == 19:
            gc.collect()
            counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert len(buffers) == 1
    assert counts[1:] == counts[:-1]
    assert len(cache.rotated_at) == len(cache.planner.slot_of) == 5


@pytest.mark.parametrize("positions", ["absolute", "cache_relative"])
def test_a_stream_past_every_table(positions):
    """1,200 frames, the same noise for every block: seen by ranks, the stream comes to rest; else the sink moves away."""
    options = {
        "frames_per_block": 6,
        "window": 18,
        "sink": 6,
        "positions": positions,
        "denoising_steps": [1000],
    }
    noise = lambda block, step, frames: tiny.clip(step, frames)  # noqa: E731
    stream = start(overrides=options, noise=noise, decode_pixels=False)
    blocks = {chunk.index: chunk.latents for chunk in islice(stream, 200) if chunk.index in (30, 199)}
    drift = (blocks[199] - blocks[30]).abs().max()
    assert drift < 1e-5 if positions == "cache_relative" else 1e-3 < drift < 1


# --- whole chunks or none -------------------------------------------------------------------------------------------


class Trap:
    """Raises at the n-th call of any watched module: transformer blocks, and the decoder's up blocks."""

    def __init__(self, pipe):
        self.left, self.error, self.calls = None, None, 0
        watched = [*pipe.transformer.blocks, *pipe.vae.decoder.up_blocks]
        self.hooks = [module.register_forward_pre_hook(self) for module in watched]

    def __call__(self, module, inputs):
        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("switch", [None, "recache", "cut"])
@pytest.mark.parametrize("method", ["longlive", "longlive_infinite"])
def test_a_chunk_commits_whole_or_not_at_all(method, switch):
    """Block 5 fails once at each of its calls in turn: in the replay, in denoising (with block 4's keys), in the decoder."""

    def stream_before_block_5():
        stream = start(method=method, noise="reference", blocks=7)
        chunks = list(islice(stream, 5))
        if switch:
            stream.prompt(CAT, policy=switch)
        return stream, chunks

    with Trap(tiny.pipeline()) as trap:
        stream, whole = stream_before_block_5()
        trap.calls = 0
        whole.append(next(stream))
        calls = trap.calls
        keys_of_prompt = 2 if switch else 0
        assert calls == 2 * 2 + 3 * 4 + (2 * 3 if switch == "recache" else 0) + keys_of_prompt
        whole += stream

        stream, chunks = stream_before_block_5()
        for call in range(calls):
            stream.prompt_keys.latest = None  # made anew, so that every attempt has all its calls
            trap.left, trap.error = call, (KeyboardInterrupt, MemoryError)[call % 2]()
            with pytest.raises(type(trap.error)):
                next(stream)
            assert stream.block == 5
        chunks += stream
    assert len(whole) == 7 and all(map(same, whole, chunks))


@pytest.mark.parametrize("failed", [None, "recache", "cut"])
@pytest.mark.parametrize("policy", ["cross_only", "recache", "cut"])
def test_a_failed_block_leaves_nothing_behind(policy, failed):
    """It may have rewritten the window for its prompt, and slots that the next replay reads; another prompt follows."""
    chunks = {}
    for fails in (False, True):
        stream = start(method="longlive_infinite", blocks=7, decode_pixels=False)
        chunks[fails] = list(islice(stream, 5))
        if fails:
            if failed:
                stream.prompt(SNOW, failed)
            with Trap(tiny.pipeline()) as trap, pytest.raises(MemoryError):
                trap.left, trap.error = 3, MemoryError()
                next(stream)
        stream.prompt(CAT, policy)
        chunks[fails] += stream
    assert all(map(same, chunks[False], chunks[True]))


def test_a_failed_switch_keeps_the_prompt_waiting():
    stream = start(decode_pixels=False)
    next(stream)
    stream.prompt(CAT)
    with Trap(tiny.pipeline()) as trap, pytest.raises(MemoryError):
        trap.left, trap.error = 0, MemoryError()
        next(stream)
    chunk = next(stream)
    assert chunk.prompt == CAT and chunk.events == ("switch:recache",)
    assert next(stream).events == ()


# --- prompts --------------------------------------------------------------------------------------------------------


def test_the_last_prompt_before_a_block_wins():
    stream = start(decode_pixels=False)
    next(stream)
    stream.prompt(SNOW, policy="cut")
    stream.prompt(CAT)
    chunk = next(stream)
    assert chunk.prompt == CAT and chunk.events == ("switch:recache",)


def test_prompts_may_come_from_any_thread_at_any_time():
    stream = start(decode_pixels=False)
    prompts = [f"{FOX} in the {word}" for word in tiny.WORDS]
    seen = []

    def hammer():
        for prompt in prompts * 5:
            stream.prompt(prompt, policy="cross_only")

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen += [next(stream).prompt for _ in range(5)]
    for thread in threads:
        thread.join()
    seen.append(next(stream).prompt)
    assert set(seen) <= {FOX, *prompts} and seen[-1] == prompts[-1]


def test_a_prompt_that_comes_while_a_block_is_made_waits_for_the_next():
    stream = start(decode_pixels=False)
    next(stream)
    stream.prompt(SNOW)

    def meanwhile(*_):
        stream.prompt(CAT)

    hook = tiny.pipeline().transformer.blocks[0].register_forward_pre_hook(meanwhile)
    assert next(stream).prompt == SNOW
    hook.remove()
    assert next(stream).prompt == CAT


def test_one_prompt_for_all_videos_or_one_each():
    stream = start([FOX, CAT], decode_pixels=False)
    stream.prompt(SNOW)
    next(stream)
    assert stream.current.prompts == (SNOW, SNOW)
    stream.prompt([CAT, FOX])
    next(stream)
    assert stream.current.prompts == (CAT, FOX)
    with pytest.raises(UserError, match="prompt has 3 texts for 2 videos: give one for all or one each"):
        stream.prompt([FOX] * 3)


def test_a_bad_prompt_or_policy_is_refused_at_once():
    stream = start(decode_pixels=False)
    with pytest.raises(UserError, match="prompt = ' ' is empty: say what"):
        stream.prompt(" ")
    for policy, message in (
        (
            "fade",
            "transition = 'fade' is not known: choose one of cross_only, recache, flush, blend, shot, cut",
        ),
        (
            "blend(0)",
            r"transition = 'blend\(0\)' has options that do not exist: blend takes a number of blocks",
        ),
    ):
        with pytest.raises(UserError, match=message):
            stream.prompt(CAT, policy=policy)
    assert next(stream).prompt == FOX


@pytest.mark.parametrize("policy", ["cross_only", "recache", "cut"])
def test_a_script_does_what_live_prompts_do(policy):
    script = {"shots": [{"prompt": FOX, "duration": 3}, {"prompt": CAT, "duration": 3, "transition": policy}]}
    stream = start(load_script(script))
    scripted, live = list(stream), start(blocks=stream.blocks)
    chunks = []
    for block in range(stream.blocks):
        if block == stream.timeline.shots[1].first_block:
            live.prompt(CAT, policy)
        chunks.append(next(live))
    assert chunks[block].prompt == CAT and all(map(same, scripted, chunks))


def test_a_live_prompt_replaces_the_words_of_a_shot_not_its_options():
    options = {"seed": 5, "overrides": {"denoising_steps": [1000]}}
    script = load_script(
        {"shots": [{"prompt": FOX, "duration": 2}, {"prompt": FOX, "duration": 4, **options}]}
    )
    silent, live = start(script, decode_pixels=False), start(script, decode_pixels=False)
    first = silent.timeline.shots[1].first_block
    for block in range(silent.blocks):
        if block in (first, first + 2):
            live.prompt(CAT, policy="cross_only")
        next(live), next(silent)
        assert live.steps == silent.steps and live.noise.seeds == silent.noise.seeds
    assert len(live.steps) == 1 and live.noise.seeds == [5]


# --- options --------------------------------------------------------------------------------------------------------


def test_a_shot_may_have_a_seed_of_its_own():
    def of(seed):
        shots = [{"prompt": FOX, "duration": 2}, {"prompt": CAT, "duration": 3, **seed}]
        return list(start(load_script({"shots": shots, "seed": 1}), decode_pixels=False))

    plain, other, again = of({}), of({"seed": 9}), of({"seed": 9})
    assert same(plain[0], other[0]) and not torch.equal(plain[-1].latents, other[-1].latents)
    assert all(map(same, other, again))
    assert all(map(same, plain, of({"seed": 1})))


def test_a_shot_may_have_levels_of_its_own():
    def of(overrides):
        shots = [
            {"prompt": FOX, "duration": 1},
            {"prompt": FOX, "duration": 1, "overrides": overrides},
            {"prompt": FOX, "duration": 1},
        ]
        return start(load_script({"shots": shots}), decode_pixels=False)

    counts = []
    for stream in (of({}), of({"denoising_steps": [1000, 750, 500]})):
        with Trap(tiny.pipeline()) as trap:
            for _ in stream:
                counts.append(trap.calls)
                trap.calls = 0
    plain, changed = np.array_split(np.array(counts), 2)
    first = stream.timeline.shots[1].first_block
    assert changed[first] == plain[first] + 2  # one step more, of two layers
    assert changed[0] == plain[0] and changed[-1] == plain[-1]


def test_impossible_shots_are_refused_before_the_first_block():
    def of(**shot):
        shots = [{"prompt": FOX, "duration": 2}, {"prompt": FOX, "duration": 2, **shot}]
        return load_script({"shots": shots})

    assert SHOT_OPTION_NAMES == ("denoising_steps",)
    with pytest.raises(
        UserError, match=r"overrides\.window cannot change within a stream: a shot may override denois"
    ):
        start(of(overrides={"window": 9}))
    with pytest.raises(UserError, match=r"denoising_steps = .* must be descending"):
        start(of(overrides={"denoising_steps": [500, 1000]}))
    with pytest.raises(UserError, match="seed of a shot needs noise = seeded"):
        start(of(seed=3), noise="reference")


def test_transition_is_the_policy_where_none_is_named():
    for transition in ("cross_only", "blend(4, slerp)", "cut"):
        stream = start(method=replace(load_method("longlive"), transition=transition), decode_pixels=False)
        next(stream)
        stream.prompt(CAT)
        assert next(stream).events == (f"switch:{transition}",)


def test_attention_backends_agree_within_a_stream():
    outputs = [
        latents(start(attention=name, blocks=6, decode_pixels=False)) for name in ("sdpa", "reference")
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)


def test_the_same_noise_gives_the_same_stream_however_it_is_given():
    source = SeededNoise([4], tiny.LATENT)
    assert torch.equal(latents(start(seed=4), 2), latents(start(noise=source), 2))
    assert not torch.equal(latents(start(seed=4), 2), latents(start(seed=5), 2))
    assert not torch.equal(
        latents(start(seed=4, blocks=2)), latents(start(seed=4, blocks=2, noise="reference"))
    )


def test_half_precision_stays_near():
    pipe = tiny.new_pipeline().to(torch.bfloat16)
    chunks = list(pipe.stream(f"{FOX} [2s] | {CAT} [2s]", method="longlive_infinite"))
    exact = list(start(f"{FOX} [2s] | {CAT} [2s]", method="longlive_infinite"))
    for chunk, wide in zip(chunks, exact, strict=True):
        assert chunk.latents.dtype == torch.bfloat16 and chunk.videos.shape == wide.videos.shape
        error = (chunk.latents.float() - wide.latents).square().mean() / wide.latents.square().mean()
        assert error < 1e-3
