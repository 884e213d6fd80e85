"""The modular pipeline gives what the standard one gives, and its blocks can be exchanged."""

import copy

import numpy as np
import pytest
import tiny
import torch
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks
from streamvid.pipelines.modular_blocks import (
    StreamVidBlocks,
    StreamVidChunkLoop,
    StreamVidDecodeStep,
    StreamVidPrepareStreamStep,
    StreamVidTextEncoderStep,
)

from streamvid.errors import UserError
from streamvid.tiny_decoder import TinyDecoder

FOX, CAT = "a red fox walks", "the blue cat sleeps"
PICTURES = np.random.default_rng(1).integers(0, 256, (21, 32, 32, 3), np.uint8)


@pytest.fixture
def standard():
    return tiny.pipeline()


@pytest.fixture
def modular(standard):
    pipe = StreamVidBlocks().init_pipeline()
    pipe.update_components(**standard.components, method="longlive", fps=16.0, height=32, width=32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (FOX, {"num_frames": 10, "seed": 3}),
        ([FOX, CAT], {"num_frames": 9, "num_videos_per_prompt": 2, "output_type": "pt"}),
        (f"{FOX} [1s] | # {CAT} [1s]", {"seed": 1, "method": "self_forcing"}),  # a cut restarts the decoder
        (FOX, {"num_frames": 14, "output_type": "latent", "overrides": {"sampler": "rolling"}}),
        (FOX, {"blocks": 2, "noise": "reference", "width": 48, "num_inference_steps": 1}),
        (FOX, {"num_frames": 20, "seed": 2, "image": PICTURES[0]}),
        ([FOX, CAT], {"num_frames": 14, "seed": 2, "image": list(PICTURES[:2])}),
        (f"{FOX} [1s] | {CAT} [1s]", {"video": PICTURES}),
        (f"{FOX} [1s] | # {CAT} [1s]", {"video": PICTURES, "output_type": "latent"}),
    ],
)
def test_both_pipelines_give_the_same_video(standard, modular, prompt, options):
    options = {"output_type": "np", **options}
    expected = standard(prompt, **options).frames
    got = modular(prompt=prompt, **options, output="videos")
    assert type(got) is type(expected) and np.array_equal(got, expected)


def test_the_first_chunk_goes_on_from_the_picture(modular):
    """Equality alone would hold if both passed it by."""
    given = {"num_frames": 9, "output_type": "np", "output": "videos"}
    with_picture, without = (modular(prompt=FOX, **given, **more) for more in ({"image": PICTURES[0]}, {}))
    assert np.abs(with_picture - without).mean() > 0.01
    state = modular(prompt=FOX, num_frames=9, image=PICTURES[0])
    assert state.get("given_latents").shape == (1, 16, 3, 4, 4)


@pytest.mark.parametrize("options", [{}, {"image": PICTURES[0]}])
def test_a_tiny_decoder_makes_the_pixels_of_both(options, tmp_path):
    torch.manual_seed(0)
    standard = tiny.new_pipeline()
    standard.register_modules(tiny_decoder=TinyDecoder(widths=(8, 8, 8, 8), blocks=(1, 1, 1)).eval())
    standard.save_pretrained(tmp_path)
    modular = StreamVidBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    script = {"output_type": "np", **options}
    expected = standard(f"{FOX} [1s] | # {CAT} [1s]", **script).frames
    got = modular(prompt=f"{FOX} [1s] | # {CAT} [1s]", **script, output="videos")
    assert np.array_equal(got, expected)
    modular.update_components(tiny_decoder=None)
    exact = modular(prompt=f"{FOX} [1s] | # {CAT} [1s]", **script, output="videos")
    assert np.abs(exact - expected).mean() > 0.01


def test_a_reset_in_the_loop_begins_anew_from_the_picture(standard):
    """The decoder's memory goes back too."""

    class Again(ModularPipelineBlocks):
        model_name, description = "streamvid", "resets once"
        inputs = [InputParam("stream"), InputParam("chunk")]

        def __call__(self, components, block_state):
            if block_state.chunk.index == 1 and block_state.chunk.prompt != CAT:
                block_state.stream.prompt(CAT)
                block_state.stream.reset()
            return components, block_state

    blocks = StreamVidBlocks()
    blocks.sub_blocks["chunks"].sub_blocks.insert("again", Again(), 1)
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(**standard.components, height=32, width=32)
    pipe.set_progress_bar_config(disable=True)
    options = {"blocks": 3, "image": PICTURES[0], "output_type": "np"}
    got = pipe(prompt=FOX, prompt_embeds=standard.encode_script([FOX, CAT]), **options, output="videos")
    first, again = (standard(prompt, **options).frames for prompt in (FOX, CAT))
    assert np.array_equal(got, np.concatenate([first[:, :24], again], 1))


def test_images_are_the_default(modular):
    assert modular(prompt=FOX, num_frames=1, output="videos")[0][0].size == (32, 32)


def test_a_saved_model_gives_the_parts_and_the_settings(standard, tmp_path):
    standard.save_pretrained(tmp_path)
    modular = StreamVidBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    assert modular.config.height == 32
    expected = standard(FOX, 9, output_type="np").frames
    assert np.array_equal(modular(prompt=FOX, num_frames=9, output_type="np", output="videos"), expected)


def test_blocks_run_one_by_one(standard, modular):
    """The text encoder may be gone before the stream begins."""
    parts = standard.components

    def run(block, names, state=None, **inputs):
        pipe = block.init_pipeline()
        pipe.update_components(**{name: parts[name] for name in names})
        if "height" in pipe.config:
            pipe.update_components(height=32, width=32)
        pipe.set_progress_bar_config(disable=True)
        return pipe(state=state, **inputs)

    state = run(StreamVidTextEncoderStep(), ["tokenizer", "text_encoder", "transformer"], prompt=FOX)
    assert torch.equal(state.get("prompt_embeds")[FOX], standard.encode_prompt(FOX)[0])
    rest = StreamVidBlocks.from_blocks_dict(
        {
            "prepare": StreamVidPrepareStreamStep(),
            "chunks": StreamVidChunkLoop(),
            "decode": StreamVidDecodeStep(),
        }
    )
    state = run(rest, ["transformer", "vae", "scheduler"], state, num_frames=9, output_type="np")
    expected = standard(FOX, 9, output_type="np").frames
    assert np.array_equal(state.get("videos"), expected)
    assert copy.deepcopy(state).get("stream") is None  # what is left can be kept and copied
    again = run(StreamVidDecodeStep(), ["vae"], state, output_type="pt")
    assert np.array_equal(again.get("videos").permute(0, 1, 3, 4, 2), expected)


class Steer(ModularPipelineBlocks):
    """Changes the prompt after the first chunk and ends with the third."""

    model_name = "streamvid"
    description = "steers"

    @property
    def inputs(self):
        return [InputParam("stream"), InputParam("chunk")]

    def __call__(self, components, block_state):
        if block_state.chunk.index == 0:
            block_state.stream.prompt(CAT)
        if block_state.chunk.index == 2:
            block_state.stream.close()
        return components, block_state


def test_a_block_in_the_loop_steers_the_stream(standard, modular):
    blocks = StreamVidBlocks()
    blocks.sub_blocks["chunks"].sub_blocks.insert("steer", Steer(), 1)
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(**standard.components, height=32, width=32)
    pipe.set_progress_bar_config(disable=True)
    embeddings = standard.encode_script([FOX, CAT])
    text = {"prompt": FOX, "prompt_embeds": embeddings}
    chunks = pipe(**text, blocks=9, output_type="np", output="chunks")
    assert [chunk.prompt for chunk in chunks] == [FOX, CAT, CAT]


def test_mistakes_are_told_in_one_sentence_before_anything_is_computed(modular):
    for options, message in (
        ({"output_type": "gif"}, "output_type = 'gif' is not known"),
        ({"height": 33}, "height = 33 must be a positive multiple of 16"),
        ({"prompt": ""}, "prompt = '' is empty"),
    ):
        with pytest.raises(UserError, match=message):
            modular(**{"prompt": FOX, "num_frames": 900, **options})
