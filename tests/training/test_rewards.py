"""Rewards: a motion reward with a known answer, and errors."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamvid.errors import UserError
from streamvid.io.video import read_video
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


def test_video_reward_gets_videos_with_the_right_bytes_and_gives_motion_quality(monkeypatch):
    """The adapter beside a stand-in for VideoAlign's scripts, which are no package: what it is given, what is taken."""
    seen = {}

    class Scorer:
        def __init__(self, checkpoint, device, dtype):
            seen.update(checkpoint=checkpoint, device=device, dtype=dtype)

        def reward(self, paths, prompts, use_norm):
            seen.update(prompts=prompts, use_norm=use_norm)
            seen["frames"] = [np.stack(list(read_video(path))) for path in paths]
            return [{"VQ": 9.0, "MQ": 0.25 * (i + 1), "TA": 9.0, "Overall": 9.0} for i in range(len(paths))]

    monkeypatch.setitem(sys.modules, "inference", SimpleNamespace(VideoVLMRewardInference=Scorer))
    reward = load_reward(RewardOptions("video_reward", options={"checkpoint": "folder", "device": "cpu"}))
    assert (seen["checkpoint"], seen["device"], seen["dtype"]) == ("folder", "cpu", torch.bfloat16)
    clips = torch.stack([torch.full((3, 5, 32, 48), value) for value in (-1.0, 0.5)])
    assert reward(clips, ("a fox", "a cat")).tolist() == [0.25, 0.5]
    assert seen["prompts"] == ["a fox", "a cat"] and seen["use_norm"] is True
    for frames, grey in zip(seen["frames"], (0, 191), strict=True):
        assert frames.shape == (5, 32, 48, 3) and abs(frames.astype(int) - grey).max() <= 3


@pytest.mark.parametrize("options", [{"reference": 0}, {"limit": -1}, {"fox": 1}])
def test_impossible_options(options):
    with pytest.raises(UserError, match=r"reward\.options"):
        load_reward(RewardOptions("motion", options=options))
