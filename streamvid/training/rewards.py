"""Rewards of generated clips, for distribution matching weighted by them (Reward Forcing, Re-DMD).

A reward is a function of pixels `[B, 3, T, H, W]` in [-1, 1] and the prompts; it returns one number per clip, around 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from streamvid.errors import UserError

Reward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass
class RewardOptions:
    """Which reward.

    Args:
        name: motion or video_reward.
        beta: clips weigh `exp(beta reward)`.
        options: of the reward.
    """

    name: str = "motion"
    beta: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)


class MotionReward:
    """How fast pictures move, without a model: the logarithm of the normal flow's speed over a reference speed.

    Speed is the least-squares solution of `|I_t| = speed |grad I|` over a pair of frames, in pixels per frame: exact for a
    small shift along the gradient, blind to motion along an edge. Brightness changes of the whole picture are taken out.

    Args:
        reference: speed in pixels per frame whose reward is 0.
        limit: rewards are clamped to [-limit, limit], so that no clip outweighs all others.
    """

    def __init__(self, reference: float = 0.5, limit: float = 1.0):
        if not (reference > 0 and limit > 0):
            raise UserError("reward.options: reference and limit must be above 0")
        self.reference, self.limit = reference, limit

    @torch.no_grad()
    def __call__(self, pixels_BCTHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (speed(pixels_BCTHW) / self.reference).clamp_min(1e-6).log().clamp(-self.limit, self.limit)


def speed(pixels_BCTHW: torch.Tensor) -> torch.Tensor:
    """Mean speed of the normal flow `[B]`, in pixels per frame."""
    grey = pixels_BCTHW.float().mean(1)
    grey = grey - grey.mean((-1, -2), keepdim=True)
    change = grey.diff(dim=1)[:, :, :-1, :-1].abs()
    middle = (grey[:, 1:] + grey[:, :-1]) / 2
    down, right = middle.diff(dim=-2)[..., :-1], middle.diff(dim=-1)[..., :-1, :]
    slope = (down.square() + right.square()).sqrt()
    over = (1, 2, 3)
    return (change * slope).sum(over) / slope.square().sum(over).clamp_min(1e-12)


def video_reward(checkpoint: str, device: str = "cuda") -> Reward:
    """The motion-quality head of VideoReward (KlingTeam VideoAlign), where it is installed.

    Pixels become bytes by `127.5 (x + 1)`. (The release multiplies pixels in [-1, 1] by 255.)
    """
    try:
        from inference import VideoVLMRewardInference  # VideoAlign is a folder of scripts, not a package
    except ImportError:
        raise UserError(
            "reward = video_reward needs VideoAlign: clone KlingTeam/VideoAlign, install its requirements and put its "
            "folder on PYTHONPATH, or choose reward.name = motion"
        ) from None
    model = VideoVLMRewardInference(checkpoint, device=device, dtype=torch.bfloat16)

    def reward(pixels_BCTHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        import tempfile
        from pathlib import Path

        from streamvid.io.writers import open_writer

        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for index, clip in enumerate(pixels_BCTHW):
                paths.append(str(Path(folder) / f"{index}.mp4"))
                frames = clip.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0)
                with open_writer(paths[-1], 16) as writer:
                    writer.write(frames.cpu().numpy())
            scores = model.reward(paths, list(prompts), use_norm=True)
        return torch.tensor([score["MQ"] for score in scores])

    return reward


REWARDS: dict[str, Callable[..., Reward]] = {"motion": MotionReward, "video_reward": video_reward}


def load_reward(options: RewardOptions) -> Reward:
    """The reward that the options name.

    Raises:
        UserError: it does not exist, or what it needs is not installed.
    """
    if options.name not in REWARDS:
        raise UserError(f"reward.name = {options.name!r} is not known: choose one of {', '.join(REWARDS)}")
    try:
        return REWARDS[options.name](**options.options)
    except TypeError as error:
        raise UserError(f"reward.options: {str(error).split('() ')[-1]}") from None
