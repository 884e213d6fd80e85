"""The attribute probe: says what a two-second window of a diorama video shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from streamvid.world.scene import ATTRIBUTES

WINDOW_FRAMES = 32
STRIDE = 4  # every 4th frame is looked at, together with its difference to the very next frame


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class AttributeProbe(nn.Module):
    """A small classifier with one head per attribute.

    A window of 32 frames becomes 8 pictures of 6 channels: every 4th frame, and the difference to the frame
    that follows it (without which left, right and still cannot be told apart), both at half size. A trunk of
    convolutions turns each picture into an 8 x 8 map. From these maps `look` reads every picture by itself,
    `mix` reads all 8 together, for the motion.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 96, 128, 128),
        spots: int = 4,
        pooled: int = 16,
        hidden: int = 192,
    ):
        super().__init__()
        self.config = {"widths": list(widths), "spots": spots, "pooled": pooled, "hidden": hidden}
        inputs = (6, *widths[:-1])
        strides = (2, 2, 2) + (1,) * (len(widths) - 3)
        self.trunk = nn.Sequential(*map(_conv, inputs, widths, strides))
        self.attention = nn.Conv2d(widths[-1], spots, 1)
        self.squeeze = _conv(widths[-1], pooled, stride=2)
        pictures, cells = WINDOW_FRAMES // STRIDE, 4 * 4
        self.mix = nn.Sequential(
            nn.Linear(pictures * pooled * cells, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.1)
        )
        self.look = nn.Sequential(
            nn.Linear((2 + spots) * widths[-1], hidden), nn.LayerNorm(hidden), nn.ReLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * hidden, len(v)) for name, v in ATTRIBUTES.items()})

    @staticmethod
    def prepare(frames: Tensor | np.ndarray) -> Tensor:
        """Frames [B, 32, 128, 128, 3], uint8 in 0..255 or float in 0..1, to pictures [B, 8, 6, 64, 64]."""
        frames = torch.as_tensor(frames)
        if frames.ndim != 5 or frames.shape[1] != WINDOW_FRAMES or frames.shape[2:] != (128, 128, 3):
            raise ValueError(f"a window is [B, {WINDOW_FRAMES}, 128, 128, 3], not {tuple(frames.shape)}")
        pairs = torch.stack([frames[:, ::STRIDE], frames[:, 1::STRIDE]], dim=2)
        pairs = pairs.float() / (255 if frames.dtype == torch.uint8 else 1)
        pairs = pairs[..., 0::2, :, :] + pairs[..., 1::2, :, :]
        pairs = (pairs[..., 0::2, :] + pairs[..., 1::2, :]) / 4
        now, following = pairs.unbind(2)
        pictures = torch.cat([2 * now - 1, 4 * (following - now)], dim=-1)
        return pictures.permute(0, 1, 4, 2, 3)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits [B, classes] per attribute for pictures [B, 8, 6, 64, 64]."""
        batch, count = pictures.shape[:2]
        maps = self.trunk(pictures.flatten(0, 1))
        moving = self.mix(self.squeeze(maps).reshape(batch, -1))
        cells = maps.flatten(2)
        spots = torch.einsum("nsl,ncl->nsc", self.attention(maps).flatten(2).softmax(-1), cells)
        seen = self.look(torch.cat([cells.mean(2), cells.amax(2), spots.flatten(1)], dim=1))
        joined = torch.cat([moving, seen.unflatten(0, (batch, count)).mean(1)], dim=1)
        return {name: head(joined) for name, head in self.heads.items()}

    def logits(self, frames: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Logits [B, classes] per attribute for frames [B, 32, 128, 128, 3]; see prepare."""
        return self(self.prepare(frames).to(next(self.parameters()).device))

    @torch.inference_mode()
    def classify(self, frames: Tensor | np.ndarray, batch: int = 16) -> dict[str, Tensor]:
        """Class index [B] per attribute for frames [B, 32, 128, 128, 3], always in evaluation mode."""
        training = self.training
        self.eval()
        try:
            parts = [self.logits(frames[start : start + batch]) for start in range(0, len(frames), batch)]
        finally:
            self.train(training)
        return {name: torch.cat([part[name].argmax(1).cpu() for part in parts]) for name in ATTRIBUTES}

    def save(self, path: str | Path) -> None:
        """Write weights and layout as one safetensors file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"config": json.dumps(self.config), "attributes": json.dumps(ATTRIBUTES)}
        save_file(tensors, str(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> AttributeProbe:
        """Read what save wrote; in evaluation mode."""
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if json.loads(metadata["attributes"]) != {name: list(values) for name, values in ATTRIBUTES.items()}:
            raise ValueError(f"{path} was trained for other attributes than this version's")
        config = json.loads(metadata["config"])
        probe = cls(**{**config, "widths": tuple(config["widths"])})
        probe.load_state_dict(tensors)
        return probe.eval()
