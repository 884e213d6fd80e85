"""`streamvid train --dry-run`: what a step will cost, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from streamvid.training.options import TrainerOptions
from streamvid.training.stage import Stage
from streamvid.transformer import CausalWanTransformer3DModel
from streamvid.window import BlockPlan


@dataclass(frozen=True)
class Work:
    """Forwards of a step.

    Attributes:
        what: in words; model: which transformer.
        times: forwards per step; queries, keys: tokens of each, and how many each of them attends.
        backward: with gradient.
    """

    what: str
    model: CausalWanTransformer3DModel
    times: float
    queries: int
    keys: int
    backward: bool = False

    @property
    def flops(self) -> float:
        """Multiplications and additions: a backward is two forwards, and checkpointing one more."""
        factor = (4 if self.model.gradient_checkpointing else 3) if self.backward else 1
        return self.times * factor * forward_flops(self.model, self.queries, self.keys)


def forward_flops(model: CausalWanTransformer3DModel, queries: int, keys: int) -> float:
    """Of one forward of `queries` tokens, each attending `keys`; the prompt's keys and values are not counted."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    linear = 6 * width**2 + 2 * width * config.ffn_dim  # self q, k, v, o; cross q, o; feed-forward
    attention = 2 * width * (keys + config.text_len)
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    ends = width * patch * (config.in_channels + config.out_channels)
    return 2 * queries * (config.num_layers * (linear + attention) + ends)


def describe(stage: Stage, options: TrainerOptions) -> list[str]:
    """Lines about parameters, tokens, memory and operations."""
    lines = []
    learnt, total = 0, 0
    for name, part in stage.parts().items():
        whole, own = _count(part.parameters()), _count(p for p in part.parameters() if p.requires_grad)
        learnt += own
        lines.append(f"{name}: {_short(whole)} parameters, {_short(own)} learn")
    total = _count(stage.parameters())
    lines.append(
        f"frozen beside them: {_short(total - sum(_count(p.parameters()) for p in stage.parts().values()))}"
    )
    ema = _count(stage.trainable().parameters()) if options.ema else 0
    memory = 4 * (total + 3 * learnt + ema)  # weights; gradients and two moments; the average
    lines.append(
        f"memory of weights, gradients, moments, average in float32: {memory / 2**30:.2f} GiB; activations beside"
    )
    works = stage.work()
    for work in works:
        lines.append(
            f"{work.what}: {work.times:g} x {work.queries:,} tokens attending {work.keys:,}"
            f"{' with backward' if work.backward else ''}, {work.flops / 1e12:.4g} TFLOP"
        )
    flops = options.accumulate * (sum(work.flops for work in works) if works else counted_flops(stage))
    lines.append(
        f"a step on one process: {flops / 1e12:.4g} TFLOP{'' if works else ', counted in one that was made'}; "
        f"{options.steps} steps: {flops * options.steps / 1e15:.4g} PFLOP"
    )
    return lines


def counted_flops(stage: Stage) -> float:
    """Of a micro-batch, forward and backward, by PyTorch's count: for stages of other networks, which do not say."""
    stage.train()
    with FlopCounterMode(display=False) as counter:
        loss, _ = stage(stage.batch(0, 0, 0))
        loss.backward()
    stage.zero_grad()
    return counter.get_total_flops()


def mean_window(plans: Sequence[BlockPlan]) -> float:
    """Latent frames that a block attends."""
    return sum(len(plan.window) for plan in plans) / len(plans)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
