"""What a stream costs: bytes held, products and traffic per block, counted by running it on the meta device.

    counts = count(Configuration(spec, load_method("longlive"), height=480, width=832))

The real pipeline, stream, cache and decoder run, with shapes in place of numbers; of the transformer's blocks, which are
alike, the first stands for all but the last, of which a context pass takes only the keys. So nothing here has to be told how
a method or a decoder works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from streamvid.decoding import Decoder, begin_decoding, decoder_state
from streamvid.errors import UserError
from streamvid.meter import Meter, size_of
from streamvid.methods import Method
from streamvid.models import TEXT_ENCODERS
from streamvid.quantization import WEIGHTS, bytes_saved
from streamvid.specs import ModelSpec

PROMPTS = ("one prompt", "another prompt")


@dataclass(frozen=True)
class Configuration:
    """A model and how it is played.

    Args:
        height, width: pixels; batch: videos made together.
        dtype: of weights, caches and activations.
        weights: of the transformer's blocks, one of `streamvid.quantization.WEIGHTS`.
        decoder: exact or tiny.
        text_encoder: on the device, on the CPU beside it, or freed once the script is encoded.
        on_cpu: the device is a CPU.
        beside: chunks are decoded beside denoising (streamvid.ahead).
    """

    spec: ModelSpec
    method: Method
    height: int
    width: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    weights: str = "native"
    decoder: str = "exact"
    text_encoder: str = "device"
    on_cpu: bool = False
    beside: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("weights", self.weights, tuple(WEIGHTS)),
            ("decoder", self.decoder, ("exact", "tiny")),
            ("text_encoder", self.text_encoder, TEXT_ENCODERS),
        ):
            if value not in choices:
                raise UserError(f"{name} = {value!r} is not known: choose one of {', '.join(choices)}")
        if self.batch < 1:
            raise UserError(f"batch = {self.batch} must be at least 1")
        if self.text_encoder == "cpu" and self.on_cpu:
            raise UserError("text_encoder = cpu saves nothing on a CPU: give free, or leave it out")


@dataclass(frozen=True)
class Counts:
    """Bytes of what is held, and what a block in a full window takes.

    Attributes:
        text_encoder, transformer, decoder: weights that are held together.
        stream: keys, values and clean latents of the window; prompt: keys and values of the text.
        memory: what the decoder remembers.
        activations: the most that is needed besides at one moment of a block.
        small: of the activations, those in pieces that an allocator keeps when they are freed (`Meter.small`).
        switch: a copy of the window while a prompt switch rewrites it.
        encoding_alone: the text encoder and its activations, where they are there before everything else and then freed.
        denoise, decode: every call of a block's denoising with its context pass, and of its decoding.
        frames: pixel frames of a block, all videos together.
    """

    text_encoder: int
    transformer: int
    decoder: int
    stream: int
    prompt: int
    memory: int
    activations: int
    small: int
    switch: int
    encoding_alone: int
    denoise: Meter
    decode: Meter
    frames: int

    @property
    def bytes(self) -> dict[str, int]:
        """By what they are for."""
        return {
            "text encoder": self.text_encoder,
            "transformer": self.transformer,
            "decoder": self.decoder,
            "keys and values of the window": self.stream,
            "keys and values of the prompt": self.prompt,
            "memory of the decoder": self.memory,
            "activations": self.activations,
            "a copy of the window at a prompt switch": self.switch,
        }

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return max(sum(self.bytes.values()), self.encoding_alone)


@lru_cache(maxsize=64)
@torch.no_grad()
def count(configuration: Configuration) -> Counts:
    """Run a stream until its window is full, then count a block, a block at a prompt switch, and the decoding of one."""
    spec, dtype = configuration.spec, configuration.dtype
    layers, host = spec.transformer["num_layers"], configuration.on_cpu
    pipe = spec.pipeline("meta", dtype, configuration.decoder, PROMPTS, blocks=min(layers, 2))
    prompts = [PROMPTS[0]] * configuration.batch
    size = {"height": configuration.height, "width": configuration.width}
    with Meter(host) as held:
        stream = pipe.stream(prompts, method=configuration.method, decode_pixels=False, **size)
    options = stream.cache.options
    for _ in range(-(-options.slots // options.frames_per_block) + 1):
        next(stream)
    with _all_blocks(pipe.transformer.blocks[0], layers - 1, Meter(host)) as denoise:
        chunk = next(stream)
    stream.prompt(PROMPTS[1])
    with _all_blocks(pipe.transformer.blocks[0], layers - 1, Meter(host)) as switch:
        next(stream)
    with Meter(host) as copied:
        copy = stream.cache.snapshot()  # kept until the block of a switch is finished
    copied_bytes = copied.live
    del copy
    memory, decode, halves = _decoding(pipe.decoder, chunk.latents, configuration.beside)
    if configuration.beside:
        # on a CPU both halves are worked on at a time, of two chunks
        decoding = sum(halves) if configuration.on_cpu else max(halves)
        needed, needed_to_switch = (meter.peak + decoding for meter in (denoise, switch))
        small = denoise.small_peak + decode.small_peak
    else:
        needed, needed_to_switch = max(denoise.peak, *halves), max(switch.peak, copied_bytes + max(halves))
        small = max(denoise.small_peak, decode.small_peak)
    text, encoding = _text_encoder(spec, dtype)
    if configuration.text_encoder == "device":
        needed = max(needed, encoding)
    prompt_kv = pipe.transformer.prompt_kv(pipe.encode_prompt(PROMPTS[0]).to("meta", dtype))
    return Counts(
        text_encoder=text if configuration.text_encoder == "device" else 0,
        transformer=_transformer_bytes(pipe.transformer, layers, configuration.weights),
        decoder=sum(size_of(part.parameters()) for part in {pipe.vae, pipe.decoder}),
        stream=held.live,
        prompt=configuration.batch * layers * sum(size_of(tensors[:1]) for tensors in prompt_kv),
        memory=memory,
        activations=needed,
        small=small,
        switch=max(0, needed_to_switch - needed),
        encoding_alone=text + encoding if configuration.text_encoder == "free" else 0,
        denoise=denoise,
        decode=decode,
        frames=chunk.latents.shape[0] * chunk.latents.shape[2] * pipe.temporal_ratio,
    )


@contextmanager
def _all_blocks(block: nn.Module, times: int, meter: Meter) -> Iterator[Meter]:
    """Count with a meter; calls within a block count so many times."""

    def within(times: int):
        return lambda *_: setattr(meter, "times", times)

    hooks = [block.register_forward_pre_hook(within(max(times, 1))), block.register_forward_hook(within(1))]
    try:
        with meter:
            yield meter
    finally:
        for hook in hooks:
            hook.remove()


def _decoding(decoder: Decoder, latents: torch.Tensor, beside: bool) -> tuple[int, Meter, tuple[int, int]]:
    """Bytes that the decoder remembers, the decoding of a block, and the bytes that each half of it needs besides."""
    with Meter() as meter:
        state = decoder_state(decoder)
        begin_decoding(decoder, latents, state)()
        memory = meter.live
        # a stream that decodes by itself can go back to before the block
        following = state if beside else state.fork()
        meter.restart()
        rest = begin_decoding(decoder, latents, following)
        first, meter.peak = meter.peak - memory, meter.live
        rest()
    return memory, meter, (first, meter.peak - memory)


def _transformer_bytes(transformer: Any, layers: int, weights: str) -> int:
    """Of all layers, a few of which are there."""
    block, there = transformer.blocks[0], len(transformer.blocks)
    plain, inside = size_of(transformer.parameters()), size_of(block.parameters())
    return plain - there * inside + layers * (inside - bytes_saved(block, weights))


@lru_cache
def _text_encoder(spec: ModelSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the text encoder's weights, and of the activations of one prompt."""
    layers, length = spec.text_encoder["num_layers"], spec.transformer.get("text_len", 512)
    encoder = spec.part("text_encoder", num_layers=1).to(dtype)
    block = encoder.encoder.block[0]
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    mask = torch.zeros(
        1, 1, length, length, dtype=dtype, device="meta"
    )  # transformers would look into one of rows
    with Meter() as meter:
        encoder(tokens, mask)
    return size_of(encoder.parameters()) + (layers - 1) * size_of(block.parameters()), meter.peak
