"""Losses of distribution matching: pull the generator's videos towards a teacher's distribution (DMD, Yin et al. 2024).

With x a generated clip, noised to x_tau, `fake` the critic's x0 of it (it knows the generator's distribution) and `real` the
teacher's, guided:

    g = (fake - real) / mean |x - real|               generator_gradient, the mean over a clip or (LongLive 2) over a block
    L = 1/2 mean (x - stopgrad(x - g))^2              matching_loss: its gradient by x is g / number of elements
    L_critic = mean (v_fake - (noise - x))^2          critic_loss: flow matching on generated clips

All clips are `[B, C, F, H, W]`; only the first axis has a meaning here.
"""

from __future__ import annotations

import torch


def score_timestep(
    drawn: torch.Tensor, shift: float = 5.0, low: float = 20.0, high: float = 980.0
) -> torch.Tensor:
    """Timesteps at which scores are compared: integers drawn from [0, 1000), warped by `shift`, clamped to [low, high].

    Not snapped to the schedule's table; a shift of 1 leaves the integers.
    """
    if shift > 1:
        u = drawn / 1000
        drawn = shift * u / (1 + (shift - 1) * u) * 1000
    return drawn.clamp(low, high)


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """`c + scale (c - u)`: a scale of 3 is what other code calls a guidance of 4."""
    return conditional + (conditional - unconditional) * scale


def generator_gradient(
    generated: torch.Tensor, fake: torch.Tensor, real: torch.Tensor, frames_per_block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Direction in which a generated clip is too likely, and its normaliser: one per clip, over all of its frames.

    No gradient flows through it. A clip that equals the teacher's answer has no direction: its zeros over zero become 0.

    Args:
        frames_per_block: every block of so many frames has its own normaliser instead (LongLive 2, causal scores).
    """
    with torch.no_grad():
        apart = (generated - real).abs()
        if frames_per_block is None:
            normaliser = apart.mean(tuple(range(1, generated.ndim)), keepdim=True)
        else:
            blocks = apart.mean((1, 3, 4)).unflatten(1, (-1, frames_per_block)).mean(2)
            normaliser = blocks.repeat_interleave(frames_per_block, 1)[:, None, :, None, None]
        return ((fake - real) / normaliser).nan_to_num(0.0), normaliser


def matching_loss(
    generated: torch.Tensor,
    gradient: torch.Tensor,
    mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`1/2 mean (x - stopgrad(x - g))^2` in float64: the gradient by x is g over the number of elements.

    Args:
        mask: boolean, of the clip's shape: the mean is over these elements.
        weight: `[B]` or `[1]`, a factor per clip without gradient (`reward_weight`).
    """
    target = (generated - gradient).detach().double()
    error = 0.5 * (generated.double() - target).square()
    if weight is not None:
        error = error * weight.detach().double().view(-1, *[1] * (error.ndim - 1))
    return (error if mask is None else error[mask]).mean()


def reward_weight(reward: torch.Tensor, beta: float) -> torch.Tensor:
    """`exp(beta r)` per clip (Reward Forcing, Re-DMD): what moves well counts more.

    The release takes the reward of a batch's first clip for all; pass `reward[:1]` for that.
    """
    return torch.exp(beta * reward)


def sid_loss(
    generated: torch.Tensor, fake: torch.Tensor, real: torch.Tensor, alpha: float = 1.0
) -> torch.Tensor:
    """Score identity distillation (Zhou et al. 2024): `mean [(r - f) ((r - x) - alpha (r - f))] / mean |x - r|`.

    Gradients flow through all three, and not through the normaliser.
    """
    normaliser = (generated - real).abs().mean(tuple(range(1, generated.ndim)), keepdim=True).detach()
    product = (real - fake) * ((real - generated) - alpha * (real - fake))
    return (product / normaliser).nan_to_num(0.0).mean()


def critic_loss(flow: torch.Tensor, generated: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Flow matching of the critic on generated clips: mean squared distance of its flow from `noise - x`."""
    return (flow - (noise - generated)).square().mean()
