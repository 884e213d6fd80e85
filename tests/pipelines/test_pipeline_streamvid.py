"""The pipeline: a loop over its streams, with readable mistakes."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from streamvid.pipelines.pipeline_output import StreamVidPipelineOutput
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

from streamvid.errors import UserError
from streamvid.methods import load_method
from streamvid.script import load_script

FOX, CAT = "a red fox walks", "the blue cat sleeps"
SCRIPT = f"{FOX} [1s] | # {CAT} [1s]"


@pytest.fixture
def pipe() -> StreamVidPipeline:
    return tiny.pipeline()


def frames_of(stream) -> np.ndarray:
    return np.concatenate([chunk.videos for chunk in stream], 1)


@pytest.mark.parametrize("num_frames", [1, 2, 9, 10, 25])
def test_a_call_is_a_loop_over_a_stream(pipe, num_frames):
    video = pipe(FOX, num_frames, seed=3, output_type="np").frames
    assert video.shape == (1, num_frames, 32, 32, 3)
    blocks = -(-(num_frames + 3) // 12)
    expected = frames_of(pipe.stream(FOX, seed=3, blocks=blocks))
    assert expected.shape[1] - num_frames < 12
    assert np.array_equal(video, expected[:, :num_frames].astype(np.float32) / 255)


def test_a_script_brings_its_own_length(pipe, tmp_path):
    (tmp_path / "story.yaml").write_text(
        f"shots:\n- {{prompt: {FOX}, duration: 1}}\n- {{prompt: {CAT}, duration: 1}}\n"
    )
    for script in (SCRIPT, load_script(SCRIPT), tmp_path / "story.yaml", str(tmp_path / "story.yaml")):
        video = pipe(script, output_type="np").frames
        stream = pipe.stream(script)
        assert video.shape[1] == stream.timeline.frames >= 32
        assert np.array_equal(video * 255, frames_of(stream).astype(np.float32))


@pytest.mark.parametrize(("num_frames", "blocks", "latents"), [(9, 1, 3), (12, 1, 3), (13, 2, 4), (24, 2, 6)])
def test_a_call_from_a_picture_makes_no_block_too_many(pipe, num_frames, blocks, latents):
    """After given frames, the first latent frame gives as many pixel frames as every other one."""
    options = {"image": Image.new("RGB", (32, 32)), "decode_pixels": False}
    stream, count = pipe.stream_whole(FOX, num_frames, **options)
    assert (stream.blocks, count, pipe.latent_frames(count, continued=True)) == (blocks, num_frames, latents)
    video = pipe(FOX, num_frames, image=options["image"], output_type="latent").frames
    assert video.shape[2] == latents


def test_the_default_length_is_that_of_the_base_model(pipe):
    assert pipe(FOX, output_type="latent").frames.shape == (1, 16, 21, 4, 4)  # 81 pixel frames
    options = {"frames_per_block": 4, "window": 12}
    assert pipe(FOX, output_type="latent", overrides=options).frames.shape[2] == 21
    assert pipe(FOX, output_type="latent", blocks=2).frames.shape[2] == 6
    assert pipe(FOX, 10, output_type="latent", blocks=9).frames.shape[2] == 4


def test_output_types_hold_the_same_video(pipe):
    outputs = {kind: pipe([FOX, CAT], 9, output_type=kind).frames for kind in ("pil", "np", "pt", "latent")}
    assert outputs["np"].shape == (2, 9, 32, 32, 3) and 0 <= outputs["np"].min() <= outputs["np"].max() <= 1
    assert torch.equal(outputs["pt"].permute(0, 1, 3, 4, 2), torch.from_numpy(outputs["np"]))
    assert isinstance(outputs["pil"][1][8], Image.Image)
    assert np.array_equal(np.array(outputs["pil"][1][8]), (outputs["np"][1, 8] * 255).round())
    assert outputs["latent"].shape == (2, 16, 3, 4, 4)


def test_outputs_come_as_a_tuple_on_request(pipe):
    (frames,) = pipe(FOX, 1, output_type="np", return_dict=False)
    output = pipe(FOX, 1, output_type="np")
    assert isinstance(output, StreamVidPipelineOutput) and np.array_equal(frames, output[0])


def test_options_of_a_call_go_before_those_of_the_script(pipe):
    script = load_script(
        {
            "method": "self_forcing",
            "seed": 1,
            "fps": 8,
            "width": 64,
            "height": 32,
            "overrides": {"window": 9, "denoising_steps": [1000]},
            "shots": [{"prompt": FOX, "duration": 1}],
        }
    )
    stream = pipe.stream(script)
    assert (stream.method.name, stream.method.window, stream.noise.seeds) == ("self_forcing", 9, [1])
    assert (stream.fps, next(stream).videos.shape[2:4]) == (8, (32, 64))
    options = {"method": "longlive", "seed": 0, "fps": 16, "width": 32, "height": 64}
    stream = pipe.stream(script, overrides={"window": 6}, **options)
    assert (stream.method.name, stream.method.window, stream.noise.seeds) == ("longlive", 6, [0])
    assert (stream.fps, next(stream).videos.shape[2:4]) == (16, (64, 32))
    assert len(stream.steps) == 1  # what only the script says still holds


def test_what_nobody_says_is_the_model_s(pipe):
    stream = pipe.stream(FOX)
    assert stream.method == load_method("longlive") and stream.fps == 16 and stream.noise.seeds == [0]
    assert stream.steps == tuple(zip(pipe.scheduler.steps, pipe.scheduler.step_sigmas, strict=True))
    method = load_method("longlive", {"window": 6})
    assert pipe.stream(FOX, method=method).method is method


def test_videos_of_a_batch_have_neighbouring_seeds(pipe):
    assert pipe.stream([FOX, CAT], seed=5).noise.seeds == [5, 6]
    assert pipe.stream([FOX, CAT], seed=[9, 2]).noise.seeds == [9, 2]


def test_the_reference_order_serves_calls_of_known_length(pipe):
    video = pipe(FOX, 20, noise="reference", output_type="latent").frames
    stream = pipe.stream(FOX, noise="reference", blocks=2, decode_pixels=False)
    assert torch.equal(video, torch.cat([chunk.latents for chunk in stream], 2))
    video = pipe(SCRIPT, noise="reference", output_type="latent").frames
    assert video.shape[2] == 3 * pipe.stream(SCRIPT).blocks


@pytest.mark.parametrize("option", ["tiling", "slicing"])
def test_what_a_vae_does_by_itself_is_said_to_have_no_effect(option):
    pipe = tiny.new_pipeline()
    getattr(pipe.vae, f"enable_{option}")()
    with pytest.warns(UserWarning, match=rf"vae.enable_{option}\(\) has no effect on streams"):
        pipe.stream(FOX)


def test_ratios_are_those_of_the_vae(pipe):
    assert (pipe.temporal_ratio, pipe.spatial_ratio) == (4, 8)
    parts = {**pipe.components, "vae": tiny.vae(residual=True)}
    wide = StreamVidPipeline(**parts, height=32, width=32)
    assert (wide.temporal_ratio, wide.spatial_ratio) == (4, 8)
    wide.set_progress_bar_config(disable=True)
    assert wide(FOX, 9, output_type="np").frames.shape == (1, 9, 32, 32, 3)


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = StreamVidPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.height, loaded.config.method) == (32, "longlive")
    assert np.array_equal(loaded(FOX, 12, output_type="np").frames, pipe(FOX, 12, output_type="np").frames)


BAD = [
    ({"prompt": ""}, "prompt = '' is empty: say what the video shall show"),
    ({"prompt": [FOX, " "]}, "prompt = ' ' is empty: say what"),
    ({"prompt": []}, "prompt = '' is empty: say what"),
    ({"prompt": 5}, "prompt = 5 must be a text or a list of texts"),
    ({"prompt": "fox " * 1000}, r"prompt = 'fox fox .*\.\.\. has 4000 characters: shorten it to 2000"),
    ({"prompt": Path("missing.yaml")}, "missing.yaml: there is no such script file"),
    ({"num_frames": 0}, "num_frames = 0 must be at least 1"),
    ({"height": 33}, "height = 33 must be a positive multiple of 16, e.g. 32"),
    ({"height": 0}, "height = 0 must be a positive multiple of 16, e.g. 16"),
    ({"width": -16}, "width = -16 must be a positive multiple of 16, e.g. 16"),
    ({"fps": 0}, "fps = 0 must be above 0"),
    ({"blocks": 0, "num_frames": None}, "blocks = 0 must be above 0"),
    ({"method": "longlife"}, r"method = 'longlife' is not known \(did you mean longlive\?\): choose one of"),
    ({"overrides": {"windw": 3}}, r"option windw is not known \(did you mean window\?\): choose from"),
    ({"overrides": {"window": 5}}, "window = 5 cannot hold sink = 3 and a block of 3 .* at least 6"),
    ({"overrides": {"positions": "polar"}}, "positions = 'polar' is not known: choose one of"),
    ({"overrides": {"transition": "fade"}}, "transition = 'fade' is not known: choose one of"),
    (
        {"overrides": {"sampler": "rolling", "window": 8}},
        "window = 8 cannot hold sink = 3 and 2 blocks of 3 .* 9",
    ),
    (
        {"overrides": {"sampler": "rolling"}, "noise": "reference"},
        "noise = 'reference' draws .*: take noise = 'seed",
    ),
    ({"method": "rolling_forcing", "noise": "reference"}, "noise = 'reference' draws block after block"),
    ({"noise": "pink"}, "noise = 'pink' is not known: choose one of seeded, reference"),
    ({"attention": "flash9"}, "attention backend = 'flash9' is not known: choose one of auto"),
    ({"output_type": "gif"}, "output_type = 'gif' is not known: choose one of pil, np, pt, latent"),
    (
        {"negative_prompt": "ugly"},
        "negative_prompt has no effect here, a few-step student makes no .*: leave it out",
    ),
    ({"guidance_scale": 5.0}, "guidance_scale has no effect here, guidance was distilled .*: leave it out"),
    ({"heigth": 32}, "option heigth is not known: choose from num_frames, method, overrides"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt = 0 must be above 0"),
    ({"num_inference_steps": 0}, "num_inference_steps = 0 must be between 1 and 1000"),
    (
        {"num_inference_steps": 2, "overrides": {"denoising_steps": [1000]}},
        "num_inference_steps = 2 must be .* excludes overrides of denoising_steps",
    ),
    ({"seed": 1, "generator": torch.Generator()}, "generator and seed or a noise source exclude each other"),
    ({"generator": [torch.Generator()] * 3}, "generator has 3 generators for 1 videos: give one"),
    (
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        "callback_on_step_end_tensor_inputs = 'prompt_embeds' is not known: choose from latents",
    ),
    ({"seed": -1}, "seed = -1 must be a whole number from 0, or a list of them"),
    ({"seed": [1, 2]}, r"seed = \[1, 2\] has 2 numbers for 1 videos: give one per video"),
    ({"seed": [1], "noise": "reference"}, r"seed = \[1\] must be one number with noise = 'reference'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_mistakes_are_told_in_one_sentence(pipe, options, message):
    with pytest.raises(UserError, match=message) as error:
        pipe(**{"prompt": FOX, "num_frames": 9, **options})
    assert "\n" not in str(error.value)


def seeds(pipe, prompt=FOX, **options) -> list[int]:
    return pipe.stream(prompt, **options).noise.seeds


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_asks_for_nothing_is_taken(pipe):
    """Code written for other pipelines passes defaults along."""
    options = {"num_frames": 9, "seed": 1, "output_type": "latent"}
    plain = pipe(FOX, **options).frames
    same = pipe(FOX, negative_prompt=None, guidance_scale=1.0, **options).frames
    assert torch.equal(plain, same)


def test_a_generator_draws_the_seed(pipe):
    first, second = seeds(pipe, generator=generator(5)), seeds(pipe, generator=generator(6))
    assert first == seeds(pipe, generator=generator(5)) != second
    used = generator(5)
    assert seeds(pipe, generator=used) != seeds(
        pipe, generator=used
    )  # it goes on, as everywhere in diffusers
    assert seeds(pipe, [FOX, CAT], generator=generator(5)) == [first[0], first[0] + 1]
    assert seeds(pipe, [FOX, CAT], generator=[generator(6), generator(5)]) == second + first
    script = load_script({"seed": 7, "shots": [{"prompt": FOX, "duration": 1}]})
    assert seeds(pipe, script, generator=generator(5)) == first


def test_a_generator_serves_the_reference_order(pipe):
    (seed,) = seeds(pipe, generator=generator(5))
    options = {"noise": "reference", "output_type": "latent"}
    drawn = pipe(FOX, 9, generator=generator(5), **options).frames
    assert torch.equal(drawn, pipe(FOX, 9, seed=seed, **options).frames)


def test_several_videos_per_prompt(pipe):
    stream = pipe.stream([FOX, CAT], num_videos_per_prompt=2, seed=5)
    assert stream.current.prompts == (FOX, FOX, CAT, CAT) and stream.noise.seeds == [5, 6, 7, 8]
    videos = pipe([FOX, CAT], 9, num_videos_per_prompt=2, seed=5, output_type="np").frames
    assert videos.shape[0] == 4
    alone = pipe(CAT, 9, seed=7, output_type="np").frames[0]
    assert np.abs(videos[2] - alone).max() <= 1 / 255  # a batch may round differently
    script = pipe(SCRIPT, num_videos_per_prompt=2, seed=5, output_type="np").frames
    assert np.abs(script[1] - pipe(SCRIPT, seed=6, output_type="np").frames[0]).max() <= 1 / 255


def test_a_number_of_steps_means_even_levels(pipe):
    assert pipe.stream(FOX, num_inference_steps=2).steps == pipe.stream(FOX).steps  # 1000 and 500
    assert len(pipe.stream(FOX, num_inference_steps=5).steps) == 5
    one = pipe(FOX, 9, num_inference_steps=1, output_type="latent").frames
    assert torch.equal(one, pipe(FOX, 9, overrides={"denoising_steps": [1000]}, output_type="latent").frames)
    assert not torch.equal(one, pipe(FOX, 9, output_type="latent").frames)


class Record:
    """A step callback that keeps what it is given and returns what it is told."""

    def __init__(self, change=lambda step, latents: {}):
        self.calls, self.change = [], change

    def __call__(self, pipe, step, timestep, given):
        self.calls.append((step, timestep, {name: tensor.clone() for name, tensor in given.items()}))
        return self.change(step, given.get("latents"))


def latents_of(pipe, record=None, num_frames=21, **options):
    return pipe(FOX, num_frames, output_type="latent", callback_on_step_end=record, **options).frames


def test_the_step_callback_sees_every_step(pipe):
    record, plain = Record(), latents_of(pipe)
    assert torch.equal(latents_of(pipe, record), plain)  # one that returns nothing changes nothing
    timesteps = [t for t, _ in pipe.stream(FOX).steps]
    assert [step for step, *_ in record.calls] == [0, 1, 2, 3]
    assert [float(t) for _, t, _ in record.calls] == pytest.approx(2 * timesteps)
    assert torch.equal(
        record.calls[1][2]["latents"], plain[:, :, :3]
    )  # after a block's last step: the clean block
    assert torch.equal(record.calls[3][2]["latents"], plain[:, :, 3:])
    blind = Record()
    latents_of(pipe, blind, callback_on_step_end_tensor_inputs=[])
    assert all(given == {} for *_, given in blind.calls)


def test_the_step_callback_outlives_a_reset(pipe):
    record, resets = Record(), []

    def again(pipe, index, media_time, given):
        if not resets:
            resets.append(given["stream"].reset())

    latents_of(pipe, record, callback_on_chunk_end=again)
    assert [step for step, *_ in record.calls] == list(range(2 * 3))


def test_the_step_callback_changes_the_latents(pipe):
    plain = latents_of(pipe)
    last = latents_of(pipe, Record(lambda step, x: {"latents": 0 * x} if step == 1 else {}))
    assert last[:, :, :3].abs().max() == 0 and last[:, :, 3:].abs().max() > 0
    assert not torch.equal(last[:, :, 3:], plain[:, :, 3:])  # the next block has seen the changed one
    first = latents_of(pipe, Record(lambda step, x: {"latents": x.flip(-1)} if step == 0 else {}))
    assert not torch.equal(first[:, :, :3], plain[:, :, :3])


def test_the_step_callback_sees_all_blocks_of_a_rolling_window(pipe):
    rolling = {"overrides": {"sampler": "rolling"}}
    record, plain = Record(), latents_of(pipe, **rolling)
    assert torch.equal(latents_of(pipe, record, **rolling), plain)
    frames = [given["latents"].shape[2] for *_, given in record.calls]
    assert frames == [3, 6, 3]  # the window grows, holds two blocks, and shrinks where the stream ends
    assert torch.equal(record.calls[1][2]["latents"][:, :, :3], plain[:, :, :3])
    assert [len(t) for _, t, _ in record.calls] == [1, 2, 1]
    zeroed = latents_of(pipe, Record(lambda step, x: {"latents": 0 * x} if step == 1 else {}), **rolling)
    assert zeroed[:, :, :3].abs().max() == 0 and not torch.equal(zeroed[:, :, 3:], plain[:, :, 3:])


class FlipOnce(PipelineCallback):
    """A callback of diffusers' own kind."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["latents"] = callback_kwargs["latents"].flip(-1)
        return callback_kwargs


def test_callbacks_of_diffusers_work(pipe):
    by_hand = latents_of(pipe, Record(lambda step, x: {"latents": x.flip(-1)} if step == 1 else {}))
    callback = FlipOnce(cutoff_step_ratio=None, cutoff_step_index=1)
    assert torch.equal(latents_of(pipe, callback), by_hand)
    assert torch.equal(latents_of(pipe, MultiPipelineCallbacks([callback])), by_hand)


def test_the_chunk_callback_sees_and_steers(pipe):
    seen = []

    def steer(pipe, index, media_time, given):
        seen.append((index, media_time, given["chunk"].frames))
        if index == 0:
            given["stream"].prompt(CAT, "cross_only")

    video = pipe(FOX, 21, seed=2, output_type="np", callback_on_chunk_end=steer).frames
    assert [(index, time) for index, time, _ in seen] == [(0, 0), (1, 9 / 16)]
    shown = np.concatenate([frames for *_, frames in seen])
    assert np.array_equal(shown.astype(np.float32) / 255, video[0])
    stream = pipe.stream(FOX, seed=2, blocks=2)
    next(stream)
    stream.prompt(CAT, "cross_only")
    assert np.array_equal(next(stream).frames, seen[1][2])


@pytest.mark.parametrize("when", ["callback_on_step_end", "callback_on_chunk_end"])
def test_an_interrupted_call_ends_with_the_chunk(pipe, when):
    def interrupt(pipe, index, time, given):
        pipe._interrupt = index == 1

    video = pipe(FOX, 45, output_type="np", **{when: interrupt}).frames
    assert video.shape[1] == (9 if when == "callback_on_step_end" else 21)
    assert pipe(FOX, 45, output_type="np").frames.shape[1] == 45  # the next call runs through


def test_an_exception_in_a_callback_ends_the_call(pipe):
    def fail(*_):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        pipe(FOX, 9, callback_on_step_end=fail)


def test_progress_counts_chunks(pipe, capsys):
    pipe.set_progress_bar_config(desc="chunks")
    try:
        pipe(FOX, 21, output_type="latent")
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert re.search(r"chunks: 100%.*2/2", capsys.readouterr().err)
    pipe(FOX, 21, output_type="latent")
    assert "2/2" not in capsys.readouterr().err


def test_the_reference_order_needs_a_length(pipe):
    with pytest.raises(UserError, match="noise = 'reference' needs a known length: give blocks or a script"):
        pipe.stream(FOX, noise="reference")
