"""Training of the embedded model's autoencoder: Wan's causal video VAE at a small size, on renders of the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from PIL import Image

from streamvid.decoding import channels_last, decode, decoder_state, encode, encode_moments, encoder_state
from streamvid.errors import UserError
from streamvid.tiny_decoder import TinyDecoder
from streamvid.training.trainer import Stage
from streamvid.world.render import render_clip
from streamvid.world.sampling import sample_clip


class VaeStage(Stage):
    """Reconstruction of cropped clips: L1 + squared error + gradient L1.

    Latents get a fixed small noise instead of a learned variance (with which the noise drowns small latents for the first
    thousand steps), and a small penalty keeps their size.

    Args:
        vae: configuration of `AutoencoderKLWan`, for one that begins from nothing.
        frames: pixel frames per clip, 1 + 4 k. Long clips show the decoder its steady state.
        crop: side of the square crop in pixels.
        batch_size: clips per step and process.
        latent_noise: standard deviation of the noise added to the encoder's means in training.
        size_weight: weight of the latents' mean square.
        start_from: a saved VAE to continue from.
        freeze_encoder: train the decoder only, so that latents already cached stay valid.
    """

    def __init__(
        self,
        vae: dict[str, Any] | None = None,
        frames: int = 33,
        crop: int = 64,
        batch_size: int = 1,
        latent_noise: float = 0.1,
        size_weight: float = 1e-4,
        start_from: str | None = None,
        freeze_encoder: bool = False,
    ):
        super().__init__()
        if start_from is None:
            if not vae:
                raise UserError("stage: give vae, the configuration of a new one, or start_from, a folder")
            channels = vae["z_dim"]
            self.vae = AutoencoderKLWan(
                **vae, latents_mean=[0.0] * channels, latents_std=[1.0] * channels, scale_factor_temporal=4
            )
            initialise(self.vae)
        else:
            self.vae = AutoencoderKLWan.from_pretrained(start_from)
        channels_last(self.vae)
        self.frames, self.crop, self.batch_size = frames, crop, batch_size
        self.latent_noise, self.size_weight, self.freeze_encoder = latent_noise, size_weight, freeze_encoder
        if freeze_encoder:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def trainable(self) -> AutoencoderKLWan:
        return self.vae

    def batch(self, seed: int, step: int, process: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, step, process])
        return {"pixels": torch.stack([self._clip(rng) for _ in range(self.batch_size)])}

    def _clip(self, rng: np.random.Generator) -> torch.Tensor:
        shots, scenery = sample_clip(rng, self.frames)
        frames = render_clip(shots, scenery, self.frames)
        top, left = rng.integers(0, (frames.shape[1] - self.crop) // 8 + 1, 2) * 8
        return to_pixels(frames[:, top : top + self.crop, left : left + self.crop])

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last_3d)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            moments = encode_moments(self.vae, pixels, encoder_state(self.vae), None).float()
        mean, _ = moments.chunk(2, dim=1)
        sample = mean + self.latent_noise * torch.randn_like(mean)
        latent_mean, latent_std = (
            torch.tensor(v, device=mean.device).view(1, -1, 1, 1, 1)
            for v in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        normalised = (sample - latent_mean) / latent_std
        decoded = self.decode(normalised).float()
        squared = F.mse_loss(decoded, pixels)
        absolute = F.l1_loss(decoded, pixels)
        edges = sum(F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (-1, -2))
        size = mean.square().mean()
        loss = absolute + 2 * squared + 0.4 * edges + self.size_weight * size
        return loss, {"psnr": psnr(squared.detach()), "latent_square": size.detach()}

    def decode(self, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Normalised latents of a whole clip to pixels, not clamped."""
        return decode(self.vae, latents_BCFHW, decoder_state(self.vae), None, clamp=False)

    def validate(self, output: Path, step: int) -> dict[str, float]:
        numbers = reconstruction_quality(self.vae, clips=6, frames=81, picture=output / f"step_{step}.png")
        print("latent std", numbers.pop("latent_std"))
        return numbers

    def export(self, output: Path) -> None:
        if not self.freeze_encoder:
            mean, std = measure_latents(self.vae)
            self.vae.register_to_config(latents_mean=mean, latents_std=std)
        self.vae.save_pretrained(output)


def initialise(vae: AutoencoderKLWan) -> None:
    """Residual branches start at zero: the network begins as its shortcuts and learns faster."""
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "proj.weight", "proj.bias")):
            torch.nn.init.zeros_(parameter)


def to_pixels(frames_THWC: np.ndarray) -> torch.Tensor:
    """uint8 frames to `[3, T, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(3, 0, 1, 2).float() / 127.5 - 1


def psnr(squared_error: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1] (peak-to-peak 2)."""
    return 10 * torch.log10(4.0 / squared_error.clamp_min(1e-12))


def measure_latents(
    vae: AutoencoderKLWan, clips: int = 24, frames: int = 33
) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of latents of training renders."""
    rng = np.random.default_rng(1)
    latents = []
    for _ in range(clips):
        shots, scenery = sample_clip(rng, frames)
        with torch.no_grad():
            pixels = to_pixels(render_clip(shots, scenery, frames))[None]
            latents.append(encode_moments(vae, pixels, encoder_state(vae), None).chunk(2, dim=1)[0])
    stack = torch.cat(latents).transpose(0, 1).flatten(1)
    return [round(v, 4) for v in stack.mean(1).tolist()], [round(v, 4) for v in stack.std(1).tolist()]


@torch.no_grad()
def reconstruction_quality(
    vae: AutoencoderKLWan,
    clips: int,
    frames: int,
    picture: Path | None = None,
    seed: int = 123,
    decoder: TinyDecoder | None = None,
) -> dict[str, Any]:
    """PSNR in dB of held-out renders sent through the VAE: mean over clips, the first and the last frames.

    Args:
        decoder: in place of the VAE's own.
    """
    chosen = decoder or vae
    rng = np.random.default_rng(seed)
    curves, rows, spread = [], [], torch.zeros(0)
    for _ in range(clips):
        shots, scenery = sample_clip(rng, frames, held_out=True)
        truth = to_pixels(render_clip(shots, scenery, frames))[None]
        latents = encode(vae, truth.to(vae.dtype), encoder_state(vae), None)
        decoded = decode(chosen, latents.to(chosen.dtype), decoder_state(chosen), None).float()
        spread = latents.float().std(dim=(0, 2, 3, 4))
        curves.append(psnr((decoded - truth).square().mean(dim=(0, 1, 3, 4))))
        columns = [torch.cat([truth[0, :, t], decoded[0, :, t]], 1) for t in (0, frames // 3, frames - 1)]
        rows.append(torch.cat(columns, 2))
    curve = torch.stack(curves).mean(0)
    if picture is not None:
        image = ((torch.cat(rows, 1).permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().numpy()
        Image.fromarray(image).save(picture)
    return {
        "psnr": round(float(curve.mean()), 2),
        "psnr_first": round(float(curve[:4].mean()), 2),
        "psnr_last": round(float(curve[-8:].mean()), 2),
        "latent_std": [round(float(v), 2) for v in spread],
    }
