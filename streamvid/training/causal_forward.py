"""One forward over a whole clip, as a teacher, a causal student or a moving buffer sees it: all blocks at once.

Three kinds of context:
- bidirectional: all frames attend each other (Wan itself);
- teacher forcing: every noisy block attends the clean frames that its window of inference holds (CausVid's second mask);
- diffusion forcing: it attends the noisy frames of its own clip there.
The windows are those that `WindowPlanner` gives a stream. Windows of several blocks at rising noise levels (Rolling Forcing,
StreamDiT) lie end to end over the clip, so that one forward holds every block once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from streamvid.methods import Method
from streamvid.training.model_stage import Denoiser
from streamvid.training.windows import WindowedAttention, plan_blocks
from streamvid.window import BlockPlan, WindowOptions, WindowPlanner

CONTEXTS = ("bidirectional", "teacher_forcing", "diffusion_forcing")


def clip_x0(
    denoiser: Denoiser,
    x_t: torch.Tensor,
    timestep_BF: torch.Tensor,
    text: torch.Tensor,
    plans: Sequence[BlockPlan] | None = None,
    clean: torch.Tensor | None = None,
    clean_timestep: float = 0.0,
    joint_plans: Sequence[BlockPlan] | None = None,
) -> torch.Tensor:
    """Predicted x0 of a noisy clip `[B, C, F, H, W]`.

    Args:
        plans: of its blocks; None: bidirectional.
        clean: the history that blocks attend (teacher forcing), told to be at `clean_timestep`.
        joint_plans: of windows of blocks denoised jointly, beside a clean history.
    """
    if plans is None:
        return denoiser.x0(x_t, timestep_BF, text)
    model, frames = denoiser.model, x_t.shape[2]
    attention = WindowedAttention(
        plans,
        1 if clean is None else 2,
        model.token_grid(*x_t.shape[-2:]),
        model.config.attention_head_dim,
        has_clean=clean is not None,
        device=x_t.device,
        attention=model.attention_name,
        noisy_plans=joint_plans,
    )
    if clean is None:
        return denoiser.x0(x_t, timestep_BF, text, attention)
    before = torch.full_like(timestep_BF, clean_timestep)
    sequence, times = torch.cat([clean, x_t], 2), torch.cat([before, timestep_BF], 1)
    return denoiser.x0(sequence, times, text, attention)[:, :, frames:]


def method_plans(method: Method, blocks: int) -> list[BlockPlan]:
    """Windows of inference for the first blocks of a stream, one block after the other."""
    return plan_blocks(
        replace(method, sampler="few_step", micro_steps=1, context_window="same").window_options(), blocks
    )


def joint_windows(options: WindowOptions, blocks: int, offset: int) -> list[BlockPlan]:
    """Windows of up to `options.joint_blocks` blocks that lie end to end; the first ends with block `offset`.

    These are windows of a rolling stream, every `joint_blocks`-th one.
    """
    planner = WindowPlanner(options)
    plans: list[BlockPlan] = []
    while planner.next_block < blocks:
        last = min(offset + len(plans) * options.joint_blocks, blocks - 1)
        count = last + 1 - planner.next_block
        plans.append(planner.plan(count * options.frames_per_block))
        for _ in range(count):
            planner.commit(planner.plan())
    return plans


def joint_levels(
    plans: Sequence[BlockPlan], frames_per_block: int, joint_blocks: int, blocks: int
) -> torch.Tensor:
    """Place of every frame's block in its window, `[F]`: 0 is the newest and noisiest, `joint_blocks - 1` the oldest.

    A window that starts the stream holds its newest blocks, one that ends it the oldest.
    """
    places = []
    for index, plan in enumerate(plans):
        count = len(plan.own) // frames_per_block
        oldest = count - 1 if index == 0 else joint_blocks - 1
        places += [oldest - place for place in range(count)]
    return torch.tensor(places[:blocks]).repeat_interleave(frames_per_block)
