"""The five reference clips (made from their words) and the values that the official VBench code gave for them."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from streamvid.evaluation.flow import DisFlow

DATA = Path(__file__).parent / "data"
OFFICIAL = json.loads((DATA / "official_values.json").read_text())
METRICS, SCORING = OFFICIAL["official_1_metrics"], OFFICIAL["official_2_long_and_scoring"]
NAMES = tuple(OFFICIAL["clips"])


def _texture(rng):
    coarse = rng.integers(40, 216, size=(8, 12, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(coarse + rng.integers(-8, 9, size=(64, 96, 3)), 0, 255).astype(np.uint8)


def _blurred(image):
    padded = np.pad(image.astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
    return sum(padded[y : y + 64, x : x + 96] for y in range(3) for x in range(3)) // 9


def _drifted(texture, k):
    image = np.roll(texture, -k, 0)
    for _ in range(k // 10):
        image = _blurred(image)
    image = ((image.astype(int) - 128) * (100 + 2 * k)) // 100 + 128
    image[..., 0] += (30 * k) // 39
    return np.clip(image, 0, 255).astype(np.uint8)


def _looped(texture, k):
    y, x = np.mgrid[:64, :96]
    if k < 20:
        image = np.stack([x * 255 // 95, y * 255 // 63, np.full_like(x, 96)], -1)
        image[(x - 12 - 8 * (k % 10)) ** 2 + (y - 32) ** 2 <= 100] = (250, 240, 20)
        return image.astype(np.uint8)
    image = texture.copy()
    image[10:26, 4 + 4 * (k - 20) : 20 + 4 * (k - 20)] = (20, 30, 230)
    return image


@cache
def clip(name):
    """uint8 [T, 64, 96, 3]."""
    about = OFFICIAL["clips"][name]
    rng, count = np.random.default_rng(about["seed"]), about["frames"]
    texture = _texture(rng)
    if name == "a_static":
        return np.stack([texture] * count)
    if name == "b_flicker":
        return np.stack(
            [
                np.clip(
                    texture.astype(int) + (8 if k % 2 else -8) + rng.integers(-3, 4, size=texture.shape),
                    0,
                    255,
                ).astype(np.uint8)
                for k in range(count)
            ]
        )
    if name == "c_pan":
        return np.stack([np.roll(texture, -3 * k, 1) for k in range(count)])
    make = _drifted if name == "d_drift" else _looped
    return np.stack([make(texture, k) for k in range(count)])


class Grid8:
    """Stands for an encoder: the prepared picture averaged to 8 x 8, optionally projected."""

    def __init__(self, prepare, projection=None, name="grid8"):
        self.prepare, self.projection, self.name = prepare, projection, name

    def __call__(self, frames):
        grid = torch.nn.functional.adaptive_avg_pool2d(self.prepare(frames), 8).flatten(1)
        return (grid if self.projection is None else grid @ self.projection).numpy()


def laplacian(image):
    """Stands for MUSIQ."""
    luma = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return 100 * torch.tanh(4 * torch.nn.functional.conv2d(luma, kernel).abs().mean())


def stand_ins(**more):
    """Backbones that need no weights."""
    from streamvid.evaluation.sampling import for_clip, for_dino

    rng = np.random.default_rng(2024)
    projection = torch.from_numpy(rng.standard_normal((192, 768)).astype(np.float32) / 192**0.5)
    head = torch.from_numpy(rng.standard_normal((1, 768)).astype(np.float32))
    known = {
        "dino": Grid8(for_dino),
        "clip_b": Grid8(for_clip, name="clip_b"),
        "clip_l": Grid8(for_clip, projection, "clip_l"),
        "aesthetic_head": lambda rows: (rows @ head.T + 5.0)[:, 0],
        "musiq": laplacian,
        "amt": lambda a, b: (a + b) / 2,
        "raft": DisFlow("medium"),
        **more,
    }
    return SimpleNamespace(get=known.__getitem__, problem=lambda names: None, fingerprint=lambda names: "")
