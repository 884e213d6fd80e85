"""Training of a tiny streaming decoder for the latents of a VAE that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from streamvid.decoding import decode, decoder_state
from streamvid.tiny_decoder import TinyDecoder
from streamvid.training.vae_stage import VaeStage, reconstruction_quality


class TinyDecoderStage(VaeStage):
    """Reconstruction as in `VaeStage`, with the encoder frozen and `TinyDecoder` in place of the VAE's decoder.

    Args:
        vae: folder of the trained VAE.
        widths, blocks: of `TinyDecoder`; it grows rows and columns twice and gives patches of the VAE's size.
        frames, crop, batch_size, latent_noise: of `VaeStage`.
    """

    def __init__(
        self,
        vae: str,
        widths: Sequence[int] = (64, 48, 32, 32),
        blocks: Sequence[int] = (2, 2, 1),
        frames: int = 25,
        crop: int = 64,
        batch_size: int = 2,
        latent_noise: float = 0.1,
    ):
        super().__init__(
            None, frames, crop, batch_size, latent_noise, size_weight=0.0, start_from=vae, freeze_encoder=True
        )
        self.vae.requires_grad_(False)
        config = self.vae.config
        self.tiny = TinyDecoder(
            latent_channels=config.z_dim,
            widths=tuple(widths),
            blocks=tuple(blocks),
            space=(True, True, False) if config.patch_size == 2 else (True, True, True),
            patch_size=config.patch_size or 1,
        )
        for name, parameter in self.tiny.named_parameters():
            if ".conv.4." in name:  # blocks start as identities
                nn.init.zeros_(parameter)
        self.tiny.to(memory_format=torch.channels_last)

    def trainable(self) -> TinyDecoder:
        return self.tiny

    def decode(self, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        return decode(self.tiny, latents_BCFHW, decoder_state(self.tiny), clamp=False)

    def validate(self, output: Path, step: int) -> dict[str, float]:
        picture = output / f"step_{step}.png"
        with torch.no_grad():
            numbers = reconstruction_quality(self.vae, clips=6, frames=81, picture=picture, decoder=self.tiny)
        numbers.pop("latent_std")
        return numbers

    def export(self, output: Path) -> None:
        self.tiny.save_pretrained(output)
