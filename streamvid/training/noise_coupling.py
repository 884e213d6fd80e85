"""Unnamed scenery and the noise that a first block comes from: every draw of noise names one scenery.

Without this a first block would have as many right answers as there are sceneries, and a student of few steps would draw
their mean: two half-transparent subjects, one at each place. Noise-data couplings: Pooladian et al. 2023, here with a
coupling that is known in advance; a sampler draws plain noise and knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from streamvid.training.latents import FRAMES_PER_BLOCK
from streamvid.world.scene import SCENERY


@dataclass(frozen=True)
class Place:
    """A pattern of the first block's noise: the mean of a channel, or a row of its first latent frame, cut into 4 x 4
    places, with weights of its columns."""

    channel: int
    row: int | None = None
    columns: tuple[float, float, float, float] = (1, 1, 1, 1)


# Where the noise tells each variable. What shows in a few tokens is told there, as a difference of two of them. What many
# tokens depend on (hills, the phase of a motion) is told by a mean over all of them, which one attention sees: a token knows
# where it is only from its distance to others, so that no linear map tells a difference of two places from the opposite one,
# and the student never read these from it.
COUPLED_PLACES: dict[str, Place] = {
    "subject_x": Place(0, 2, (0, 1, -1, 0)),
    "hills": Place(3),
    "sun_x": Place(2, 0, (1, 0, -1, 0)),
    "clouds": Place(3, 0, (1, 0, -1, 0)),
    "phase": Place(2),
}
PLACES = tuple(len(SCENERY[name]) for name in COUPLED_PLACES)
_COLUMNS = [list(SCENERY).index(name) for name in COUPLED_PLACES]


def coupled_scenery(cells: torch.Tensor) -> torch.Tensor:
    """Every coupled variable as a uniform number of its place's interval in [0, 1), `[B, K]`, of cells `[B, 6]`."""
    return (cells[:, _COLUMNS] + torch.rand(len(cells), len(PLACES))) / torch.tensor(PLACES)


def coupling_directions(channels: int, height: int, width: int) -> torch.Tensor:
    """Orthonormal patterns `[K, C, F, H, W]` of a first block, one per variable of COUPLED_PLACES."""
    directions = torch.zeros(len(COUPLED_PLACES), channels, FRAMES_PER_BLOCK, height, width)
    for direction, place in zip(directions, COUPLED_PLACES.values(), strict=True):
        if place.row is None:
            direction[place.channel] = 1.0
        else:
            columns = torch.tensor(place.columns, dtype=torch.float).repeat_interleave(width // 4)
            rows = slice(place.row * height // 4, (place.row + 1) * height // 4)
            direction[place.channel, 0, rows] = columns
    return directions / directions.flatten(1).norm(dim=1)[:, None, None, None, None]


def couple_noise(noise_BSCFHW: torch.Tensor, scenery_BK: torch.Tensor, only: torch.Tensor) -> torch.Tensor:
    """Tie unnamed scenery to the initial noise: where `only` `[B, S]`, the projection of the first block on direction k
    becomes the Gaussian quantile of variable k in [0, 1) (each of its places is an interval).

    For uniform scenery the noise stays exactly standard normal.
    """
    quantile = torch.special.ndtri(scenery_BK.float().clamp(1e-4, 1 - 1e-4))  # B K
    noise = noise_BSCFHW.clone()
    first = noise[:, :, :, :FRAMES_PER_BLOCK]
    directions = coupling_directions(noise.shape[2], *noise.shape[-2:]).to(noise)
    projection = torch.einsum("bscfhw,kcfhw->bsk", first, directions)
    wanted = torch.where(only[:, :, None], quantile[:, None], projection)
    first += torch.einsum("bsk,kcfhw->bscfhw", wanted - projection, directions)
    return noise


class SceneryHead(nn.Module):
    """Asks tokens for the scenery of their clip, in training only: without it a student reads its noise late or never."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.classifier = nn.Linear(width, sum(PLACES))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, tokens_BSLD: torch.Tensor, scenery_BK: torch.Tensor, only: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy, summed over variables, mean over tokens and over the streams `only` `[B, S]`."""
        streams, tokens = tokens_BSLD.shape[1:3]
        cells = (scenery_BK * torch.tensor(PLACES)).long()[:, None, None].expand(-1, streams, tokens, -1)
        told = self.classifier(self.norm(tokens_BSLD)).float().split(PLACES, -1)
        losses = [
            F.cross_entropy(logits.movedim(-1, 1), cell, reduction="none")
            for logits, cell in zip(told, cells.unbind(-1), strict=True)
        ]
        return (torch.stack(losses).sum(0).mean(2) * only).sum() / only.sum().clamp_min(1)
