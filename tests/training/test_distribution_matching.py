"""Losses of distribution matching against closed forms; the recorded case is in tests/test_parity.py."""

import pytest
import torch

from streamvid.training.distribution_matching import (
    critic_loss,
    generator_gradient,
    guided,
    matching_loss,
    reward_weight,
    score_timestep,
    sid_loss,
)

SHAPE = (2, 3, 4, 5, 6)


def clips(count: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def test_timesteps_are_warped_and_clamped():
    drawn = torch.arange(1000)
    warped = score_timestep(drawn, shift=5.0)
    expected = (5000 * drawn / (1000 + 4 * drawn)).clamp(20, 980)  # s t / (1 + (s - 1) t / 1000)
    torch.testing.assert_close(warped, expected, atol=1e-3, rtol=1e-6)
    assert torch.equal(score_timestep(drawn, shift=1.0), drawn.clamp(20, 980))
    assert score_timestep(drawn, low=100.0, high=300.0).unique().numel() < warped.unique().numel()


def test_guidance_is_an_extrapolation():
    conditional, unconditional = clips(2)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, -1.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 3.0), 4 * conditional - 3 * unconditional)


def test_the_gradient_is_normalised_per_clip():
    x, fake, real = clips(3)
    gradient, normaliser = generator_gradient(x, fake, real)
    assert normaliser.shape == (2, 1, 1, 1, 1)
    for one in range(2):
        scale = (x[one] - real[one]).abs().mean()
        torch.testing.assert_close(gradient[one], (fake[one] - real[one]) / scale)
    # the same clip with ten times the distances asks for the same direction
    again, _ = generator_gradient(10 * x, 10 * fake, 10 * real)
    torch.testing.assert_close(again, gradient)
    still, _ = generator_gradient(x, x, x)
    assert torch.equal(still, torch.zeros_like(x))


def test_a_normaliser_per_block_makes_every_block_a_clip():
    """LongLive 2: the gradient of a block does not depend on how wrong the others are."""
    x, fake, real = clips(3)
    gradient, normaliser = generator_gradient(x, fake, real, frames_per_block=2)
    assert normaliser.shape == (2, 1, 4, 1, 1)
    for block in (slice(0, 2), slice(2, 4)):
        alone, scale = generator_gradient(x[:, :, block], fake[:, :, block], real[:, :, block])
        torch.testing.assert_close(gradient[:, :, block], alone)
        torch.testing.assert_close(normaliser[:, :, block], scale.expand(-1, -1, 2, -1, -1))
    whole, _ = generator_gradient(x, fake, real)
    assert not torch.allclose(whole, gradient)


def test_the_loss_has_the_gradient_that_it_was_given():
    x, g = clips(2)
    x.requires_grad_()
    loss = matching_loss(x, g)
    (by_x,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(by_x, g / g.numel())
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(0.5 * g.double().square().mean().item(), rel=1e-6)


def test_a_mask_and_a_weight_choose_elements_and_clips():
    x, g = clips(2)
    x.requires_grad_()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :, 1:] = True
    weight = torch.tensor([0.5, 3.0], requires_grad=True)
    loss = matching_loss(x, g, mask, weight)
    (by_x,) = torch.autograd.grad(loss, x)
    factor = torch.tensor([0.5, 3.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(by_x, g * mask * factor / mask.sum())
    assert not torch.equal(loss, matching_loss(x, g, mask))
    assert matching_loss(x, g, weight=torch.ones(1)) == matching_loss(x, g)


def test_gradients_stop_where_they_must():
    x, fake, real = (clip.requires_grad_() for clip in clips(3))
    gradient, _ = generator_gradient(x, fake, real)
    assert not gradient.requires_grad
    reward = torch.tensor([0.3, -0.2], requires_grad=True)
    loss = matching_loss(x, gradient, weight=reward_weight(reward, 2.0))
    loss.backward()
    assert x.grad is not None and fake.grad is None and real.grad is None and reward.grad is None


def test_rewards_are_exponentiated():
    torch.testing.assert_close(
        reward_weight(torch.tensor([0.0, 0.5, -1.0]), 2.0), torch.tensor([0.0, 1.0, -2.0]).exp()
    )


def test_score_identity_distillation_in_closed_form():
    x, fake, real = (clip.double().requires_grad_() for clip in clips(3))
    scale = (x - real).abs().mean((1, 2, 3, 4), keepdim=True).detach()
    for alpha in (0.5, 1.0):
        expected = ((real - fake) * ((real - x) - alpha * (real - fake)) / scale).mean()
        torch.testing.assert_close(sid_loss(x, fake, real, alpha), expected)
    # alpha = 1: (r - f)(f - x), which all three move
    by = torch.autograd.grad(sid_loss(x, fake, real), (x, fake, real))
    count = x.numel()
    for got, expected in zip(by, (-(real - fake), (real - fake) - (fake - x), fake - x), strict=True):
        torch.testing.assert_close(got, expected / scale / count)
    assert sid_loss(x, x, x) == 0


def test_the_critic_learns_the_flow_of_generated_clips():
    x, noise = clips(2)
    assert critic_loss(noise - x, x, noise) == 0
    assert critic_loss(noise - x + 0.5, x, noise).item() == pytest.approx(0.25, rel=1e-5)
