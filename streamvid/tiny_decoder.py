"""A tiny streaming decoder of video latents: many times cheaper than the VAE's own, and less exact.

Shaped like TAEHV (Ollin Boer Bohan): 2D convolutions whose only memory is each block's previous input frame, nearest
upsampling in space, 1x1 convolutions that grow time. Module names are TAEHV's, so that its decoder weights for Wan 2.1
(`taew2_1`) load by name; with other widths it can be the embedded model's (streamvid.training.tiny_decoder_stage).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import nn

from streamvid.errors import UserError


class Squash(nn.Module):
    """`3 tanh(x / 3)`: latents far out are brought near."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block that sees its input frame and the one before it."""

    def __init__(self, width: int):
        super().__init__()
        layers = [nn.Conv2d(2 * width, width, 3, padding=1)]
        layers += [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x_NCHW: torch.Tensor, before_NCHW: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(torch.cat([x_NCHW, before_NCHW], 1)) + x_NCHW)


class TimeGrowth(nn.Module):
    """Every frame becomes `stride` frames."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        grown = self.conv(x_NCHW)
        return grown.unflatten(1, (self.stride, -1)).flatten(0, 1)


class TinyDecoder(ModelMixin, ConfigMixin):
    """Normalised latents to pixels; the first latent frame of a stream gives one pixel frame, every later one four.

    Args:
        latent_channels: of the VAE whose latents it decodes.
        widths: channels of the three growth stages and of the last layers.
        blocks: memory blocks before each growth.
        space: whether each growth doubles rows and columns; time: whether it doubles frames.
        patch_size: the last layer gives patches of so many pixels.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: Sequence[int] = (256, 128, 64, 64),
        blocks: Sequence[int] = (3, 3, 3),
        space: Sequence[bool] = (True, True, True),
        time: Sequence[bool] = (False, True, True),
        patch_size: int = 1,
    ):
        super().__init__()
        layers: list[nn.Module] = [
            Squash(),
            nn.Conv2d(latent_channels, widths[0], 3, padding=1),
            nn.ReLU(),
        ]
        for stage, width in enumerate(widths[:-1]):
            layers += [MemoryBlock(width) for _ in range(blocks[stage])]
            layers.append(nn.Upsample(scale_factor=2 if space[stage] else 1))
            layers.append(TimeGrowth(width, 2 if time[stage] else 1))
            layers.append(nn.Conv2d(width, widths[stage + 1], 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3 * patch_size**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)
        self.trimmed = 2 ** sum(time) - 1  # frames that come before the first one

    @property
    def memories(self) -> int:
        """Frames that a stream remembers, one per memory block."""
        return sum(isinstance(layer, MemoryBlock) for layer in self.decoder)

    def forward(
        self, latents_BCFHW: torch.Tensor, memory: Sequence[torch.Tensor | None], started: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pixels `[B, 3, T, H, W]` in [-1, 1], not clamped, of the next latents, and the memory after them.

        Args:
            memory: of the frames before (`[None] * memories` at the start of a stream).
            started: whether there were any.
        """
        batch = latents_BCFHW.shape[0]
        x = latents_BCFHW.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        past, after = iter(memory), []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                frames = x.unflatten(0, (batch, -1))
                first = next(past)
                first = torch.zeros_like(frames[:, :1]) if first is None else first
                after.append(frames[:, -1:].clone())
                x = layer(x, torch.cat([first, frames[:, :-1]], 1).flatten(0, 1))
            else:
                x = layer(x)
        x = F.pixel_shuffle(x, self.config.patch_size).unflatten(0, (batch, -1))
        pixels = (x if started else x[:, self.trimmed :]).transpose(1, 2)
        return pixels * 2 - 1, after  # the network's own range is 0 to 1


def load_tiny_decoder(source: str | Path, dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """From a folder that `save_pretrained` wrote, or from a file of TAEHV weights for Wan 2.1 (`taew2_1`).

    Raises:
        UserError: neither is there, or the weights are of another network.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        return TinyDecoder.from_pretrained(path, torch_dtype=dtype).eval()
    if not path.is_file():
        raise UserError(
            f"decoder = {str(source)!r} is neither a folder of a tiny decoder nor a file of taew2_1 weights: "
            "give exact, or train one with `streamvid train configs/train/diorama_tiny_decoder.yaml`"
        )
    suffix = path.suffix == ".safetensors"
    weights = load_file(path) if suffix else torch.load(path, map_location="cpu", weights_only=True)
    decoder = TinyDecoder()
    own = {name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}
    try:
        decoder.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"decoder = {str(source)!r} does not hold the decoder of taew2_1 ({reason}): give that file"
        ) from error
    return decoder.to(dtype).eval()
