"""Optimizers and the learning-rate schedule shared by all training stages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` for weights of any rank >= 2: convolutions are updated as `[out, rest]` matrices.

    The optimizer works on flat views that share memory with the real parameters. Learning rates are matched to
    AdamW's (scale 0.2 sqrt(max(rows, columns))).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        self.originals = list(params)
        flat = [nn.Parameter(_view(p)) for p in self.originals]
        super().__init__(
            flat, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure=None):
        for original, flat in zip(self.originals, self.param_groups[0]["params"], strict=True):
            flat.data = _view(original)  # distributed wrappers move a parameter's storage
            flat.grad = (
                None if original.grad is None else _ordered(original.grad, original).reshape(flat.shape)
            )
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for original in self.originals:
            original.grad = None


def _ordered(tensor: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """Dimensions in the memory order of `like`: contiguous, or channels last."""
    return tensor if like.ndim == 2 or like.is_contiguous() else tensor.movedim(1, -1)


def _view(parameter: nn.Parameter) -> torch.Tensor:
    """The parameter as `[out, rest]`, sharing its memory."""
    return _ordered(parameter.data, parameter).view(parameter.shape[0], -1)


# Inputs and outputs of a network: their rows are not exchangeable features, so AdamW serves them better.
ADAMW_NAMES = (
    "embed",
    "shared",
    "proj_out",
    "scale_shift_table",
    "conv_in",
    "conv_out",
    "heads",
    "classifier",
)


def build_optimizers(
    module: nn.Module,
    muon_lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
) -> list[torch.optim.Optimizer]:
    """Muon on hidden matrices, AdamW on everything else that requires grad."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1
            by_adamw = not is_matrix or muon_lr == 0 or any(part in name for part in ADAMW_NAMES)
            (rest if by_adamw else hidden).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=adamw_lr, betas=betas, weight_decay=weight_decay))
    return optimizers


def learning_rate_factor(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """Linear warm-up, constant, then a linear decay to zero over the last `decay_fraction` of all steps."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (steps - step) / max(1.0, decay_fraction * steps))
    return rising * falling
