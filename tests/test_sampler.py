"""The few-step sampler against networks whose answer is known."""

import pytest
import tiny
import torch

from streamvid.sampler import few_step_block
from streamvid.schedule import FewStepFlowScheduler
from streamvid.window import WindowOptions, WindowPlanner

TARGET = tiny.clip(0, 3, 2)
LEVELS = (1000, 750, 500, 250)


class Network:
    """Knows the clean latents: returns the flow to them, or them. Notes how it was asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scheduler, answer=TARGET):
        self.scheduler, self.answer, self.asked = scheduler, answer, []

    def __call__(self, x_t, timestep, prompt_kv, context, return_dict):
        assert (prompt_kv, context, return_dict) == ("the prompt", "the cache", False)
        self.asked.append((x_t.clone(), timestep.clone()))
        sigma = self.scheduler.sigma(timestep)[0, 0]
        if self.scheduler.config.prediction_type == "sample":
            return (self.answer,)
        return ((x_t - self.answer) / sigma,)


class ConstantFlow(Network):
    def __call__(self, x_t, timestep, prompt_kv, context, return_dict):
        return (torch.full_like(x_t, 0.5),)


def noise(block: int, step: int, frames: int) -> torch.Tensor:
    return tiny.clip(100 * block + step + 1, frames, 2)


def sample(scheduler, network, on_step=None) -> torch.Tensor:
    planner = WindowPlanner(WindowOptions())
    planner.commit(planner.plan())
    steps = list(zip(scheduler.steps, scheduler.step_sigmas, strict=True))
    return few_step_block(
        network, scheduler, steps, planner.plan(), "the prompt", "the cache", noise, on_step
    )


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
def test_a_perfect_network_gives_its_answer_whatever_the_noise(prediction):
    scheduler = FewStepFlowScheduler(denoising_steps=LEVELS, prediction_type=prediction)
    network = Network(scheduler)
    torch.testing.assert_close(sample(scheduler, network), TARGET, atol=1e-5, rtol=0)
    # every step sees the target, noised to its level with the noise of (block 1, step)
    assert len(network.asked) == len(LEVELS)
    for step, (x_t, timestep) in enumerate(network.asked):
        sigma = scheduler.step_sigmas[step]
        assert torch.equal(timestep, torch.full((2, 3), scheduler.steps[step]))
        expected = (1 - sigma) * TARGET + sigma * noise(1, step, 3)
        torch.testing.assert_close(x_t, expected, atol=1e-5, rtol=0)


def test_a_constant_flow_has_a_closed_form():
    """With v = c: x0 = x_t - sigma c, so each step's x0 is (1 - sigma) of the one before plus sigma (noise - c)."""
    scheduler = FewStepFlowScheduler(denoising_steps=LEVELS)
    network = ConstantFlow(scheduler)
    expected = noise(1, 0, 3) - 0.5
    for step, sigma in enumerate(scheduler.step_sigmas[1:], start=1):
        expected = (1 - sigma) * expected + sigma * (noise(1, step, 3) - 0.5)
    torch.testing.assert_close(sample(scheduler, network), expected, atol=1e-5, rtol=0)


def test_every_step_is_reported():
    scheduler, seen = FewStepFlowScheduler(denoising_steps=LEVELS), []
    network = Network(scheduler)
    result = sample(scheduler, network, lambda *step: seen.append(step))
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(x_t, asked) for (_, x_t, _), (asked, _) in zip(seen, network.asked, strict=True))
    assert seen[-1][2] is result


def test_half_precision_noise_is_drawn_wide_and_cast():
    scheduler = FewStepFlowScheduler(denoising_steps=(1000,))
    network = Network(scheduler, TARGET.bfloat16())
    network.dtype = torch.bfloat16
    sample(scheduler, network)
    assert torch.equal(network.asked[0][0], noise(1, 0, 3).bfloat16())
