"""Rewards: a motion reward with a known answer, and errors."""

import math

import pytest
import torch

from streamvid.errors import UserError
from streamvid.training.rewards import MotionReward, RewardOptions, load_reward, speed


def sliding(pixels_per_frame: float, frames: int = 6, angle: float = 0.0) -> torch.Tensor:
    """A soft pattern of waves that moves along its gradient; `[1, 3, T, 64, 64]`."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    place = x * math.cos(angle) + y * math.sin(angle)
    time = torch.arange(frames)[:, None, None] * pixels_per_frame
    return (0.6 * torch.sin((place - time) / 4)).expand(1, 3, -1, -1, -1).clone()


@pytest.mark.parametrize("pixels", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2])
def test_the_speed_of_a_pattern_is_found(pixels, angle):
    assert speed(sliding(pixels, angle=angle)).item() == pytest.approx(pixels, rel=0.08)


def test_brightness_is_no_motion_and_clips_are_judged_alone():
    still = sliding(0.0)
    flicker = still + torch.tensor([0.0, 0.3] * 3)[:, None, None]
    assert speed(flicker).item() < 1e-3
    both = torch.cat([sliding(0.2), sliding(1.0)])
    torch.testing.assert_close(speed(both), torch.cat([speed(both[:1]), speed(both[1:])]))


def test_the_motion_reward_is_the_logarithm_of_the_speed():
    reward = load_reward(RewardOptions("motion", options={"reference": 0.5, "limit": 1.0}))
    clips = torch.cat([sliding(v) for v in (0.5, 1.0, 0.25, 4.0, 0.0)])
    found = reward(clips, ["x"] * 5).tolist()
    assert found == pytest.approx([0, math.log(2), -math.log(2), 1, -1], abs=0.06)
    assert MotionReward(reference=1.0)(clips[:1], ["x"]).item() == pytest.approx(-math.log(2), abs=0.06)


@pytest.mark.parametrize("options", [{"reference": 0}, {"limit": -1}, {"fox": 1}])
def test_impossible_options(options):
    with pytest.raises(UserError, match=r"reward\.options"):
        load_reward(RewardOptions("motion", options=options))
