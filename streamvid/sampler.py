"""Samplers: how a block of latents comes out of noise. Siblings of one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streamvid.noise import NoiseSource
from streamvid.schedule import FewStepFlowScheduler
from streamvid.transformer import AttentionContext, CausalWanTransformer3DModel, PromptKV
from streamvid.window import BlockPlan

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]


def few_step_block(
    transformer: CausalWanTransformer3DModel,
    scheduler: FewStepFlowScheduler,
    steps: Sequence[tuple[float, float]],
    plan: BlockPlan,
    prompt_kv: PromptKV,
    context: AttentionContext,
    noise: NoiseSource,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Predict x0, re-noise to the next level, repeat (Self Forcing, algorithm 2): clean latents `[B, C, F, H, W]`.

    Args:
        steps: timestep and sigma of every level, descending.
        context: the stream's cache, on which `begin(plan)` was called.
        on_step: called after every step with its index, the noisy input and the predicted x0.
    """
    frames = len(plan.own)
    like = {"device": transformer.device, "dtype": transformer.dtype}
    x_t = noise(plan.block, 0, frames).to(**like)
    timestep = torch.empty(x_t.shape[0], frames, device=transformer.device)
    for index, (t, sigma) in enumerate(steps):
        output = transformer(x_t, timestep.fill_(t), prompt_kv=prompt_kv, context=context, return_dict=False)[
            0
        ]
        x_0 = scheduler.x0_from_output(output, x_t, sigma)
        if on_step is not None:
            on_step(index, x_t, x_0)
        if index + 1 < len(steps):
            x_t = scheduler.add_noise(
                x_0, noise(plan.block, index + 1, frames).to(**like), steps[index + 1][1]
            )
    return x_0
