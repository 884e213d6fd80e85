"""Streaming latents <-> pixels over `AutoencoderKLWan`, with the stream's own feature caches.

Wan's causal VAE remembers the last two input frames of every temporal convolution. diffusers keeps that memory inside
the module and clears it on every call; here it is a `VaeState` that belongs to one stream, so that a stream decoded chunk
by chunk gives the very frames of one `vae.decode` call (bit for bit in float32), and two streams never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook

from streamvid import wan_decoder
from streamvid.tiny_decoder import TinyDecoder

Decoder: TypeAlias = AutoencoderKLWan | TinyDecoder
SHOWN_PER_CALL = 4  # latent frames, so that the pixels of a long clip are never in memory


@dataclass
class VaeState:
    """Feature caches of one stream's decoder or encoder, in visiting order of the causal convolutions."""

    features: list = field(default_factory=list)
    started: bool = False

    def fork(self) -> VaeState:
        """An independent continuation. Cached tensors are replaced, never written to, so they are shared."""
        return VaeState(copy(self.features), self.started)

    def state_dict(self) -> dict[str, Any]:
        return {"features": copy(self.features), "started": self.started}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.features, self.started = copy(state["features"]), state["started"]


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lay the convolutions' weights out channels-last, in place: what CPUs and GPUs convolve fastest; values stay."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return vae


def decoder_state(vae: Decoder) -> VaeState:
    if isinstance(vae, TinyDecoder):
        return VaeState([None] * vae.memories)
    return VaeState([None] * vae._cached_conv_counts["decoder"])


def decoder_after(vae: Decoder, latents_BCFHW: torch.Tensor | None) -> VaeState:
    """The memory of a decoder that has seen these latents from the start of a video on; None: nothing yet."""
    state = decoder_state(vae)
    for latents in () if latents_BCFHW is None else latents_BCFHW.split(SHOWN_PER_CALL, 2):
        decode_to_bytes(vae, latents, state)
    return state


def decoder_of_scene(vae: Decoder, block: int, given_BCFHW: torch.Tensor | None) -> VaeState:
    """The memory of a decoder at a block that begins a scene: before block 0 it has seen the frames that were given."""
    return decoder_after(vae, given_BCFHW if block == 0 else None)


def encoder_state(vae: AutoencoderKLWan) -> VaeState:
    return VaeState([None] * vae._cached_conv_counts["encoder"])


def latent_statistics(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel mean and standard deviation of the latents, `[1, C, 1, 1, 1]`, in the dtype of `like`."""
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@apply_forward_hook  # an offloaded VAE comes to its device, as for `vae.decode`
def decode(
    vae: Decoder,
    latents_BCFHW: torch.Tensor,
    state: VaeState,
    frames_per_call: int | None = 1,
    clamp: bool = True,
) -> torch.Tensor:
    """Normalised latents of the next `F` latent frames to pixels in [-1, 1], `[B, 3, T, H, W]`.

    The first latent frame of a stream gives one pixel frame, every later one gives `temporal ratio` (4) frames.
    One decoder call per latent frame is what `vae.decode` does, hence bit-equality; `frames_per_call=None` runs all
    frames after the first in one call, which is faster and equal up to rounding (used in training).
    """
    if isinstance(vae, TinyDecoder):
        pixels, state.features = vae(latents_BCFHW, state.features, state.started)
        state.started = True
        return pixels.clamp(-1.0, 1.0) if clamp else pixels
    x = _denormalised(vae, latents_BCFHW)
    features = copy(state.features)
    started = state.started
    pieces = []
    for piece in _pieces(x, started, 1, frames_per_call):
        pieces.append(vae.decoder(piece, feat_cache=features, feat_idx=[0], first_chunk=not started))
        started = True
    state.features, state.started = features, started
    pixels = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    if vae.config.patch_size is not None:
        pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
    return pixels.clamp(-1.0, 1.0) if clamp else pixels


def decode_to_bytes(vae: Decoder, latents_BCFHW: torch.Tensor, state: VaeState) -> np.ndarray:
    """The next latents as uint8 pixels `[B, T, H, W, 3]`.

    In float32 one decoder call per latent frame, bit for bit `vae.decode`; in half precision streamvid.wan_decoder, which is
    faster and as exact as half precision is.
    """
    return begin_decoding(vae, latents_BCFHW, state)()


@apply_forward_hook
@torch.no_grad()
def begin_decoding(vae: Decoder, latents_BCFHW: torch.Tensor, state: VaeState) -> Callable[[], np.ndarray]:
    """The first half of `decode_to_bytes`; what it returns does the second half, and may do so in another thread.

    In half precision the second half of a chunk may run beside the first half of the next one; each half must see the
    chunks in order. After a failure the state is of no use: decode with a fork.
    """
    latents = latents_BCFHW.to(vae.dtype)
    exact = isinstance(vae, TinyDecoder) or vae.dtype == torch.float32
    if exact or _hooked(vae.decoder):
        frames_per_call = 1 if exact else None
        return torch.no_grad()(lambda: to_bytes(decode(vae, latents, state, frames_per_call)))
    halves = []
    for piece in _pieces(_denormalised(vae, latents), state.started, 1, None):
        halves.append(wan_decoder.first_stage(vae.decoder, piece, state.features))
        state.started = True

    @torch.no_grad()
    def finish() -> np.ndarray:
        pixels = [wan_decoder.last_stage(vae.decoder, x, state.features, used) for x, used in halves]
        return np.concatenate([to_bytes(piece, vae.config.patch_size) for piece in pixels], 1)

    return finish


def _hooked(decoder: torch.nn.Module) -> bool:
    """Whether offloading or casting waits for calls of its modules, which a walk by hand would pass by."""
    parts = (decoder, decoder.conv_in)
    return any(hasattr(part, mark) for part in parts for mark in ("_hf_hook", "_diffusers_hook"))


def to_bytes(pixels_BCTHW: torch.Tensor, patch_size: int | None = None) -> np.ndarray:
    """Pixels in [-1, 1] to bytes `[B, T, H, W, 3]`; with a patch size, channels hold the pixels of a patch."""
    numbers = pixels_BCTHW.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    if patch_size is not None:
        numbers = unpatchify(numbers, patch_size=patch_size)
    frames = numbers.permute(0, 2, 3, 4, 1)
    if frames.is_meta:  # nothing is computed, only counted (streamvid.plan)
        return np.empty(frames.shape, np.uint8)
    return frames.cpu().numpy()


def _denormalised(vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor) -> torch.Tensor:
    """What the decoder takes."""
    mean, std = latent_statistics(vae, latents_BCFHW)
    # the reference divides by 1/std instead of multiplying by std (in its precision)
    return vae.post_quant_conv(latents_BCFHW / (1.0 / std) + mean)


def encode(
    vae: AutoencoderKLWan,
    pixels_BCTHW: torch.Tensor,
    state: VaeState,
    frames_per_call: int | None = 1,
) -> torch.Tensor:
    """Pixels in [-1, 1] of the next frames to normalised latent means, `[B, C, F, H, W]`.

    The first call takes `1 + 4 k` frames, later ones `4 k` (`frames_per_call` counts latent frames).

    Raises:
        ValueError: the number of frames does not fill latent frames.
    """
    moments = encode_moments(vae, pixels_BCTHW, state, frames_per_call)
    mean, std = latent_statistics(vae, moments)
    # the reference multiplies by 1/std
    return (moments.chunk(2, dim=1)[0] - mean) * (1.0 / std)


@apply_forward_hook
def encode_moments(
    vae: AutoencoderKLWan, pixels_BCTHW: torch.Tensor, state: VaeState, frames_per_call: int | None = 1
) -> torch.Tensor:
    """The encoder's raw output: mean and log-variance `[B, 2C, F, H, W]`, not normalised."""
    ratio = 2 ** sum(vae.config.temperal_downsample)
    frames = pixels_BCTHW.shape[2]
    if (frames - (not state.started)) % ratio:
        wanted = f"a multiple of {ratio}" if state.started else f"1 plus a multiple of {ratio}"
        raise ValueError(f"frames = {frames} does not fill latent frames: give {wanted}")
    x = pixels_BCTHW
    if vae.config.patch_size is not None:
        x = patchify(x, patch_size=vae.config.patch_size)
    features = copy(state.features)
    started = state.started
    step = None if frames_per_call is None else frames_per_call * ratio
    moments = [
        vae.encoder(piece, feat_cache=features, feat_idx=[0]) for piece in _pieces(x, started, ratio, step)
    ]
    state.features, state.started = features, True
    return vae.quant_conv(torch.cat(moments, 2))


def _pieces(x: torch.Tensor, started: bool, ratio: int, step: int | None) -> list[torch.Tensor]:
    """Cut frames into calls: the very first frame of a stream goes alone."""
    head = [] if started else [x[:, :, :1]]
    rest = x if started else x[:, :, 1:]
    if rest.shape[2] == 0:
        return head
    return head + list(rest.split(step or rest.shape[2], dim=2))
