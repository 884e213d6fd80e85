"""The flow-matching schedule: closed forms and the numbers of the releases."""

import math

import pytest
import torch

from streamvid.errors import UserError
from streamvid.schedule import FewStepFlowScheduler, flow_table, training_weights


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_table_is_the_shifted_line(shift):
    sigmas, timesteps = flow_table(1000, shift)
    for row in (0, 1, 500, 999):
        u = 1 - row / 1000
        assert float(sigmas[row]) == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-5)
    assert len(sigmas) == 1000 and bool((sigmas.diff() < 0).all())
    assert torch.equal(timesteps, sigmas * 1000)


def test_table_without_the_extra_step_reaches_its_end():
    sigmas, _ = flow_table(4, 1.0, sigma_max=0.9, sigma_min=0.3, extra_one_step=False)
    assert sigmas.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3])
    sigmas, _ = flow_table(3, 1.0, sigma_max=0.9, sigma_min=0.3)
    assert sigmas.tolist() == pytest.approx([0.9, 0.7, 0.5])


# algorithms, section 1.4
WARPED = [
    ((1000, 750, 500, 250), 5.0, (1000, 937.5, 833.3333, 625)),
    ((1000, 750, 500, 250), 8.0, (1000, 960, 888.889, 727.273)),
    ((1000, 800, 600, 400, 200), 5.0, (1000, 952.3810, 882.3529, 769.2308, 555.5556)),
    ((1000, 500), 5.0, (1000, 833.3333)),
    ((1000, 0), 5.0, (1000, 0)),
]


@pytest.mark.parametrize(("levels", "shift", "expected"), WARPED)
def test_warped_levels(levels, shift, expected):
    scheduler = FewStepFlowScheduler(shift=shift, denoising_steps=levels)
    assert scheduler.steps == pytest.approx(expected, abs=1e-3)


def test_levels_as_they_are_without_warping():
    scheduler = FewStepFlowScheduler(denoising_steps=(937.5, 625), warp=False)
    assert scheduler.steps == (937.5, 625)
    assert scheduler.step_sigmas == pytest.approx((0.9375, 0.625), abs=1e-3)


def test_step_sigmas_belong_to_the_steps():
    scheduler = FewStepFlowScheduler()
    assert scheduler.step_sigmas == pytest.approx([t / 1000 for t in scheduler.steps], rel=1e-6)
    scheduler.set_steps((1000, 500))
    assert scheduler.steps == pytest.approx((1000, 833.3333)) and len(scheduler.step_sigmas) == 2


def test_sigma_is_that_of_the_nearest_row():
    scheduler = FewStepFlowScheduler()
    assert float(scheduler.sigma(torch.tensor(0.0))) == pytest.approx(0.00498, abs=1e-5)  # not 0
    assert float(scheduler.sigma(torch.tensor(1000.0))) == 1.0
    timesteps = torch.rand(3, 4) * 1000
    nearest = [
        [min(range(1000), key=lambda r: abs(scheduler.timesteps[r] - t)) for t in row] for row in timesteps
    ]
    assert scheduler.nearest_index(timesteps).tolist() == nearest
    middle = (scheduler.timesteps[10:11] + scheduler.timesteps[11:12]) / 2
    assert scheduler.nearest_index(middle).item() in (10, 11)


@pytest.mark.parametrize("sigma", [1.0, 0.625, 0.00498, torch.full((2, 1), 0.3)])
def test_noise_flow_and_x0_agree(sigma):
    """x_t = (1 - sigma) x0 + sigma noise, v = noise - x0, x0 = x_t - sigma v."""
    scheduler, x0, noise = FewStepFlowScheduler(), torch.randn(2, 5), torch.randn(2, 5)
    x_t = scheduler.add_noise(x0, noise, sigma)
    torch.testing.assert_close(x_t, (1 - sigma) * x0 + sigma * noise)
    torch.testing.assert_close(scheduler.x0_from_output(noise - x0, x_t, sigma), x0, atol=1e-5, rtol=0)
    flow = scheduler.flow_from_x0(x0, x_t, sigma)
    torch.testing.assert_close(flow, noise - x0, atol=1e-4, rtol=1e-4)


def test_a_network_that_predicts_x0_is_taken_at_its_word():
    scheduler, output = FewStepFlowScheduler(prediction_type="sample"), torch.randn(3)
    assert scheduler.x0_from_output(output, torch.randn(3), 0.5) is output


def test_x0_is_computed_wide():
    """In bfloat16, x_t - sigma v loses what float64 keeps."""
    scheduler = FewStepFlowScheduler()
    x_t, flow = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    x0 = scheduler.x0_from_output(flow, x_t, 0.9375)
    assert x0.dtype == torch.bfloat16
    assert torch.equal(x0, (x_t.double() - 0.9375 * flow.double()).bfloat16())
    assert scheduler.add_noise(x_t.float(), flow, 0.5).dtype == torch.bfloat16


def test_euler_steps_along_a_straight_flow_reach_x0():
    scheduler, x0, noise = FewStepFlowScheduler(), torch.randn(4).double(), torch.randn(4).double()
    x, timestep = noise, torch.tensor(1000.0)
    for _ in range(1000):
        sigma, following = scheduler.sigma(timestep), scheduler.next_sigma(timestep)
        x = scheduler.euler_step(noise - x0, x, sigma, following)
        timestep = following * 1000
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)


def test_the_last_row_of_a_batch_ends_all():
    """A quirk of the releases, kept for parity."""
    scheduler = FewStepFlowScheduler()
    first, last = scheduler.timesteps[[0, -1]]
    assert scheduler.next_sigma(torch.stack([first, last])).tolist() == [0, 0]
    assert scheduler.next_sigma(first[None]).item() == float(scheduler.sigmas[1])
    assert scheduler.next_sigma(first[None], to_final=True).tolist() == [0]


def test_training_weights_are_a_bump_that_sums_to_the_rows():
    _, timesteps = flow_table()
    weights = training_weights(timesteps)
    assert float(weights.sum()) == pytest.approx(1000, rel=1e-5)
    assert float(weights.max()) == pytest.approx(2.0764, abs=1e-3)
    assert float(weights.min()) == 0.0
    ratio = (weights[200] - weights[300]) / (weights[400] - weights[300])
    bump = [math.exp(-2 * ((float(timesteps[r]) - 500) / 1000) ** 2) for r in (200, 300, 400)]
    assert float(ratio) == pytest.approx((bump[0] - bump[1]) / (bump[2] - bump[1]), rel=1e-2)


def test_saved_and_loaded(tmp_path):
    scheduler = FewStepFlowScheduler(shift=8.0, denoising_steps=(1000, 500), prediction_type="sample")
    scheduler.save_pretrained(tmp_path)
    loaded = FewStepFlowScheduler.from_pretrained(tmp_path)
    assert loaded.steps == scheduler.steps and loaded.config.prediction_type == "sample"
    assert torch.equal(loaded.sigmas, scheduler.sigmas)


@pytest.mark.parametrize("levels", [(), (500, 750), (1000, 1000), (1001,), (-1,)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(
        UserError, match=r"denoising_steps = .* must be descending numbers between 0 and 1000, e.g."
    ):
        FewStepFlowScheduler(denoising_steps=levels)


def test_an_unknown_prediction_type_is_named():
    with pytest.raises(
        UserError, match="prediction_type = 'noise' is not known: choose one of flow_prediction, sam"
    ):
        FewStepFlowScheduler(prediction_type="noise")


def test_levels_between_the_rows_are_those_of_longlive_2():
    """Algorithms, section 3.5: four and two steps of its solver."""
    scheduler = FewStepFlowScheduler(shift=5.0)
    four = scheduler.unsnapped([999, 749.25, 499.5, 249.75])
    assert [t for t, _ in four] == [999, 937, 833, 624]
    assert [sigma for _, sigma in four] == pytest.approx([0.99980, 0.93727, 0.83306, 0.62469], abs=1e-5)
    assert [t for t, _ in scheduler.unsnapped([999, 499.5])] == [999, 833]
