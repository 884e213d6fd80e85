"""A discriminator on the critic's hidden states, and the losses of a (relativistic) GAN.

    plain:        L_G = softplus(-f)         L_D = softplus(f) + softplus(-r)
    relativistic: L_G = softplus(r - f)      L_D = softplus(f - r)                (Jolicoeur-Martineau 2018)

with f and r the logits of generated and real clips at the same noise level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from streamvid.errors import UserError
from streamvid.transformer import CausalWanTransformer3DModel


@dataclass
class GanOptions:
    """The adversarial part of distillation.

    Args:
        relativistic: compare generated with real clips instead of judging each alone.
        generator_weight, critic_weight: of the two losses beside those of distribution matching.
        layers: depths of the critic's blocks whose hidden states are judged, as shares of its depth.
        r1_weight, r2_weight, r_sigma: penalty of logits that change under small noise on real and on generated clips.
    """

    relativistic: bool = True
    generator_weight: float = 0.01
    critic_weight: float = 0.01
    layers: tuple[float, ...] = (0.5, 1.0)
    r1_weight: float = 0.0
    r2_weight: float = 0.0
    r_sigma: float = 0.01

    def __post_init__(self) -> None:
        self.layers = tuple(self.layers)
        if not self.layers or not all(0 < share <= 1 for share in self.layers):
            raise UserError(
                f"gan.layers = {list(self.layers)} must be shares of the depth in (0, 1], e.g. [0.5, 1.0]"
            )


class Discriminator(nn.Module):
    """One logit per clip: a small head on the mean hidden state after each chosen block.

    Args:
        model: the critic's transformer. It is not part of this module: its parameters are the critic's.
    """

    def __init__(self, model: CausalWanTransformer3DModel, options: GanOptions):
        super().__init__()
        depth, width = len(model.blocks), model.patch_embedding.out_channels
        self.depths = sorted({max(1, round(share * depth)) for share in options.layers})
        self._model = [model]  # in a list: not registered twice
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
            for _ in self.depths
        )

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        model = self._model[0]
        seen: list[torch.Tensor] = []
        prompt_kv = model.prompt_kv(text)  # calls the blocks too
        hooks = [
            model.blocks[depth - 1].register_forward_hook(lambda module, args, output: seen.append(output))
            for depth in self.depths
        ]
        try:
            model(noisy, timestep, prompt_kv=prompt_kv, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        pooled = zip(self.heads, seen, strict=True)
        return torch.stack([head(hidden.float().mean(1))[:, 0] for head, hidden in pooled]).mean(0)


def generator_loss(fake: torch.Tensor, real: torch.Tensor, options: GanOptions) -> torch.Tensor:
    """Of logits `[B]`: what makes generated clips look real."""
    return F.softplus(real - fake if options.relativistic else -fake).mean()


def discriminator_loss(fake: torch.Tensor, real: torch.Tensor, options: GanOptions) -> torch.Tensor:
    """Of logits `[B]`: what tells them apart."""
    if options.relativistic:
        return F.softplus(fake - real).mean()
    return F.softplus(fake).mean() + F.softplus(-real).mean()
