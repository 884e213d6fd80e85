"""The pipeline as a modular pipeline of diffusers: one engine, in blocks that can be taken out, exchanged and added.

    blocks = StreamVidBlocks()      # text encoder -> prepare stream (encodes a given picture) -> chunk loop -> decoder
    pipe = blocks.init_pipeline("path/of/a/model")
    pipe.load_components()
    videos = pipe(prompt="a small green cube floats on the ice", seed=3, output="videos")

A block of yours in the loop is called after every chunk (it sees `chunk` and `stream`); put it in before `init_pipeline`:

    blocks.sub_blocks["chunks"].sub_blocks.insert("look", Look(), 1)
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from streamvid.pipelines.pipeline_output import as_output_type, check_output_type
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from streamvid.decoding import Decoder, decode_to_bytes, decoder_of_scene
from streamvid.schedule import FewStepFlowScheduler
from streamvid.text import PromptCache
from streamvid.tiny_decoder import TinyDecoder
from streamvid.transformer import CausalWanTransformer3DModel

SPECS = {
    "tokenizer": AutoTokenizer,
    "text_encoder": UMT5EncoderModel,
    "transformer": CausalWanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "scheduler": FewStepFlowScheduler,
    "tiny_decoder": TinyDecoder,  # may be absent
}
SETTINGS = {"method": "longlive", "fps": 16.0, "height": 480, "width": 832}


def specs(*names: str) -> list[ComponentSpec]:
    """Parts of a model by their names."""
    return [ComponentSpec(name, SPECS[name]) for name in names]


def engine(components: Any, *names: str) -> StreamVidPipeline:
    """The pipeline that runs these components, of which a block uses `names`."""
    parts = {name: getattr(components, name, None) if name in names else None for name in SPECS}
    settings = {name: getattr(components.config, name, value) for name, value in SETTINGS.items()}
    return StreamVidPipeline(**parts, **settings)


class StreamVidTextEncoderStep(ModularPipelineBlocks):
    """Prompts to embeddings, once per prompt of the script."""

    model_name = "streamvid"
    description = "Encodes every prompt of the script."
    expected_components = specs(
        "tokenizer", "text_encoder", "transformer"
    )  # the transformer tells the length

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("prompt", required=True, description="A script, a prompt or a list of prompts.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("prompt_embeds", dict, "Embedding [text_len, D] of every prompt.")]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        pipe = engine(components, "tokenizer", "text_encoder", "transformer")
        block.prompt_embeds = pipe.encode_script(block.prompt)
        self.set_block_state(state, block)
        return components, state


class StreamVidPrepareStreamStep(ModularPipelineBlocks):
    """Window, noise and timeline of a stream that has not made a block yet."""

    model_name = "streamvid"
    description = "Makes the stream: its method, noise, size, timeline and empty cache."
    expected_components = specs("transformer", "vae", "scheduler", "tiny_decoder")
    expected_configs = [ConfigSpec(name, value) for name, value in SETTINGS.items()]

    @property
    def stream_options(self) -> dict[str, Any]:
        """Options of `StreamVidPipeline.stream` and their defaults."""
        parameters = inspect.signature(StreamVidPipeline.stream).parameters
        left_out = ("self", "script", "decode_pixels")
        return {name: p.default for name, p in parameters.items() if name not in left_out}

    @property
    def inputs(self) -> list[InputParam]:
        options = [InputParam(name, default=value) for name, value in self.stream_options.items()]
        return [
            InputParam("prompt", required=True, description="A script, a prompt or a list of prompts."),
            InputParam("prompt_embeds", dict, required=True, description="Embedding of every prompt."),
            InputParam("num_frames", int, description="Pixel frames, unless a script brings its length."),
            InputParam("output_type", str, default="pil", description="pil, np, pt or latent."),
            *options,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("stream", description="A VideoStream that leaves decoding to the decoder."),
            OutputParam("given_latents", torch.Tensor, "Latents of a given picture or clip, None without."),
        ]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        check_output_type(block.output_type)
        pipe = engine(components, "transformer", "vae", "scheduler", "tiny_decoder")
        pipe.prompt_cache = PromptCache(limit=len(block.prompt_embeds))
        for prompt, embedding in block.prompt_embeds.items():
            pipe.prompt_cache.put(prompt, embedding)
        options = {name: block[name] for name in self.stream_options}
        block.stream, block.num_frames = pipe.stream_whole(
            block.prompt, block.num_frames, decode_pixels=False, **options
        )
        block.given_latents = block.stream.given
        self.set_block_state(state, block)
        return components, state


class StreamVidChunkStep(ModularPipelineBlocks):
    """The next block of latents: denoising and context pass."""

    model_name = "streamvid"
    description = "Makes the next chunk."
    expected_components = specs("transformer", "scheduler")

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("stream", required=True, description="Of the prepare step.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("chunk", description="The latest chunk, with latents and without pixels.")]

    def __call__(self, components, block_state):
        block_state.chunk = next(block_state.stream)
        return components, block_state


class StreamVidCollectStep(ModularPipelineBlocks):
    """Keep the chunk, as the blocks before have left it."""

    model_name = "streamvid"
    description = "Keeps the chunk."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("chunk", description="The latest chunk.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("chunks", list, "All chunks so far.")]

    def __call__(self, components, block_state):
        block_state.chunks.append(block_state.chunk)
        return components, block_state


class StreamVidChunkLoop(LoopSequentialPipelineBlocks):
    """Chunk after chunk, to the end of the stream or until a block in the loop closes it."""

    model_name = "streamvid"
    block_classes = [StreamVidChunkStep, StreamVidCollectStep]
    block_names = ["denoise", "collect"]
    description = "Runs its blocks once per chunk."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("stream", required=True, description="Of the prepare step.")]

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        stream = block_state.stream
        block_state.chunks = []
        with self.progress_bar(total=stream.blocks) as bar:
            while stream.block < stream.blocks and not stream.state().closed:
                components, block_state = self.loop_step(components, block_state)
                bar.update()
        block_state.stream = None  # a finished stream would only hold memory, and a state must be copyable
        self.set_block_state(state, block_state)
        return components, state


class StreamVidDecodeStep(ModularPipelineBlocks):
    """Latents to frames, with the feature caches of the streaming decoder."""

    model_name = "streamvid"
    description = "Decodes all chunks; every scene is a video of its own to the decoder."
    expected_components = specs("vae", "tiny_decoder")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("chunks", list, required=True, description="Of the chunk loop."),
            InputParam("given_latents", torch.Tensor, description="Of the prepare step."),
            InputParam("num_frames", int, description="Pixel frames to return; None: all."),
            InputParam("output_type", str, default="pil", description="pil, np, pt or latent."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("videos", description="As `StreamVidPipelineOutput.frames`.")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        pipe = engine(components, "vae", "tiny_decoder")
        if block.output_type == "latent":
            latents = torch.cat([chunk.latents for chunk in block.chunks], 2)
            continued = block.given_latents is not None
            count = block.num_frames and pipe.latent_frames(block.num_frames, continued)
            block.videos = latents[:, :, :count]
        else:
            videos = np.concatenate(self._decoded(pipe.decoder, block.chunks, block.given_latents), axis=1)
            block.videos = as_output_type(videos[:, : block.num_frames], block.output_type)
        self.set_block_state(state, block)
        return components, state

    def _decoded(self, decoder: Decoder, chunks, given_latents: torch.Tensor | None) -> list[np.ndarray]:
        memory, videos = None, []
        for chunk in chunks:
            if memory is None or chunk.new_scene:
                memory = decoder_of_scene(decoder, chunk.index, given_latents)
            videos.append(decode_to_bytes(decoder, chunk.latents, memory))
        return videos


class StreamVidBlocks(SequentialPipelineBlocks):
    """Text or script to video."""

    model_name = "streamvid"
    block_classes = [
        StreamVidTextEncoderStep,
        StreamVidPrepareStreamStep,
        StreamVidChunkLoop,
        StreamVidDecodeStep,
    ]
    block_names = ["text_encoder", "prepare", "chunks", "decode"]
    description = "Streaming autoregressive video from a prompt or a script."
