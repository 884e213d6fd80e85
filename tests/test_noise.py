"""Noise: from (seed, block, step) by default, in the releases' draw order for parity."""

import itertools

import pytest
import tiny
import torch

from streamvid.noise import ReferenceNoise, SeededNoise, correlated


def seeded(*seeds: int) -> SeededNoise:
    return SeededNoise(seeds, tiny.LATENT)


def test_a_draw_depends_on_seed_block_and_step_alone():
    noise = seeded(3)
    first = noise(5, 1, 3)
    assert first.shape == (1, 16, 3, 4, 4)
    for block, step in [(0, 0), (9, 2)]:
        noise(block, step, 3)  # what was drawn before does not matter
    assert torch.equal(noise(5, 1, 3), first)
    assert torch.equal(seeded(3)(5, 1, 3), first)


def test_draws_differ_between_seeds_blocks_and_steps():
    draws = [seeded(s)(b, i, 3) for s, b, i in itertools.product(range(3), range(3), range(3))]
    for one, other in itertools.combinations(draws, 2):
        correlation = (one * other).mean()
        assert abs(correlation) < 0.2  # 768 values: five standard deviations


def test_the_rest_of_the_batch_does_not_matter():
    both = seeded(3, 4)(2, 1, 3)
    assert torch.equal(both[:1], seeded(3)(2, 1, 3))
    assert torch.equal(both[1:], seeded(4)(2, 1, 3))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seeded(1)(0, 0, 3)
    ReferenceNoise(0, 1, 3, tiny.LATENT)(0, 1, 3)
    assert torch.equal(torch.rand(3), expected)


def test_draws_are_standard_normal():
    values = torch.cat([seeded(seed)(0, 0, 3).flatten() for seed in range(100)])
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs(values.pow(4).mean() - 3) < 0.1


# --- the releases' order --------------------------------------------------------------------------------------------


def literal_draws(seed: int, batch: int, blocks: int, size: int, steps: int) -> dict:
    """Self Forcing's pipeline written out: the clip's noise, then `randn_like` of every re-noised x0 `[B * n, C, H, W]`."""
    torch.manual_seed(seed)
    noise = torch.randn([batch, blocks * size, *tiny.LATENT])
    draws = {}
    for block in range(blocks):
        draws[block, 0] = noise[:, block * size : (block + 1) * size].transpose(1, 2)
        for step in range(1, steps):
            x0 = torch.zeros(batch, size, *tiny.LATENT)
            again = torch.randn_like(x0.flatten(0, 1))
            draws[block, step] = again.unflatten(0, (batch, size)).transpose(1, 2)
    return draws


@pytest.mark.parametrize("batch", [1, 2])
def test_reference_order_is_that_of_the_releases(batch):
    noise = ReferenceNoise(7, batch, 4 * 3, tiny.LATENT)
    for (block, step), expected in literal_draws(7, batch, 4, 3, 3).items():
        assert torch.equal(noise(block, step, 3), expected)


def test_a_retried_block_gets_its_draws_again():
    noise, literal = ReferenceNoise(7, 1, 12, tiny.LATENT), literal_draws(7, 1, 4, 3, 3)
    for block in range(4):
        for stop in (1, 2, 3, 3):  # tries that end after so many steps
            for step in range(stop):
                assert torch.equal(noise(block, step, 3), literal[block, step])


# --- correlated frames ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [-0.8, -0.3, 0.5])
def test_neighbouring_frames_are_correlated_and_each_is_standard_normal(correlation):
    noise = correlated(SeededNoise(range(4), (16, 40, 40)), correlation)
    frames = noise(3, 1, 4).transpose(0, 2).flatten(1)  # F, all values
    covariance = frames @ frames.T / frames.shape[1]
    lag = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    expected = torch.tensor(correlation) ** lag
    torch.testing.assert_close(covariance, expected, atol=4 / frames.shape[1] ** 0.5, rtol=0)
    assert frames.mean(1).abs().max() < 4 / frames.shape[1] ** 0.5


def test_correlated_noise_follows_from_seed_block_and_step():
    noise = correlated(seeded(3), -0.5)
    first = noise(5, 1, 3)
    noise(0, 0, 3)
    assert torch.equal(noise(5, 1, 3), first) and not torch.equal(noise(5, 2, 3), first)
    assert torch.equal(first[:, :, 0], seeded(3)(5, 1, 3)[:, :, 0])  # a block begins as without
    plain = seeded(3)
    assert correlated(plain, 0.0) is plain
