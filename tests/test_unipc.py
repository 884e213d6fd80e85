"""UniPC along flows whose path is known, and as the solver of a stream."""

import itertools
import math

import pytest
import tiny
import torch

from streamvid.sampler import UniPC

SPREAD = 0.5  # standard deviation of the data: x(sigma) = x(1) sqrt((1 - sigma)^2 SPREAD^2 + sigma^2), the exact path


def size(sigma: float) -> float:
    return math.hypot((1 - sigma) * SPREAD, sigma)


def clean(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The mean of clean data given `x` at a level, for Gaussian data."""
    return (1 - sigma) * SPREAD**2 / size(sigma) ** 2 * x


def follow(count: int, last: float = 0.2) -> float:
    """Relative error at the level `last` after `count` steps from pure noise."""
    sigmas = torch.linspace(0.95, last, count + 1, dtype=torch.float64).tolist()
    solver = UniPC([(1000 * sigma, sigma) for sigma in sigmas])
    x = torch.full((1, 2), size(sigmas[0]), dtype=torch.float64)
    for index in range(count):
        x = solver.step(index, clean(x, sigmas[index]), x)
    # the corrector changes the last point only in the step after it; the predictor is of order 2 already
    return float((x / size(last) - 1).abs().max())


def test_the_error_falls_as_the_square_of_the_step():
    errors = [follow(count) for count in (8, 16, 32)]
    assert errors[0] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 3 < coarse / fine < 10


def test_the_first_step_is_the_exact_one_for_a_constant_answer():
    """With x0 fixed, the path is a straight line in sigma."""
    solver = UniPC([(900.0, 0.9), (600.0, 0.6), (300.0, 0.3)])
    answer, x = torch.tensor([[2.0]]), torch.tensor([[5.0]])
    noise = (x - 0.1 * answer) / 0.9
    for index, sigma in ((0, 0.6), (1, 0.3)):
        x = solver.step(index, answer, x)
        torch.testing.assert_close(x, (1 - sigma) * answer + sigma * noise)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_draws_noise_once_per_block_and_blocks_are_solved_apart(batch):
    drawn = []

    def noise(block, step, frames):
        drawn.append((block, step))
        return tiny.clip(block, frames, batch)

    def latents(count, blocks):
        overrides = {"solver": "unipc", "denoising_steps": [1000, 750, 500, 250], "window": 6, "sink": 0}
        stream = tiny.pipeline().stream(
            ["a red fox walks"] * batch, overrides=overrides, noise=noise, blocks=blocks, decode_pixels=False
        )
        return [next(stream).latents for _ in range(count)]

    alone = latents(3, 3)
    assert drawn == [(0, 0), (1, 0), (2, 0)]
    assert all(map(torch.equal, alone, latents(3, 5)))


def test_levels_of_the_stream_are_unsnapped():
    pipe = tiny.pipeline()
    plain = pipe.stream("a red fox", overrides={"denoising_steps": [999, 500]}, blocks=1)
    solved = pipe.stream(
        "a red fox", overrides={"denoising_steps": [999, 500.4], "solver": "unipc"}, blocks=1
    )
    assert solved.steps == pipe.scheduler.unsnapped([999, 500.4])
    assert plain.steps != solved.steps
    default = pipe.stream("a red fox", overrides={"solver": "unipc"}, blocks=1)
    assert default.steps == pipe.scheduler.unsnapped(pipe.scheduler.config.denoising_steps)
