"""What a training run trains: one class per family of losses derives from `Stage`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
    from streamvid.training.dry_run import Work


class Stage(nn.Module):
    """One thing to train. Subclasses hold their trainable modules and the frozen ones they need.

    Attributes:
        cpu_only: its batches and noise are made on the CPU and stay there.
        frozen_parts: names of submodules that never change: no checkpoint holds them.
    """

    cpu_only = True
    frozen_parts: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_pre_hook(_fill_in_frozen)

    def trainable(self) -> nn.Module:
        """The module whose parameters are optimized and averaged."""
        raise NotImplementedError

    def parts(self) -> dict[str, nn.Module]:
        """All modules that are optimized, by the name of the phase that does it; the averaged one first."""
        return {"model": self.trainable()}

    def phases(self, step: int) -> tuple[str, ...]:
        """Which parts a step updates, one after the other, each with its own batch, loss and optimizers."""
        return ("model",)

    def batch(self, seed: int, step: int, process: int) -> dict[str, Any]:
        """The batch of a step: a pure function of its arguments."""
        raise NotImplementedError

    def phase_batch(self, phase: str, seed: int, step: int, process: int) -> dict[str, Any]:
        """The batch of a phase of a step."""
        return self.batch(seed, step, process)

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (a scalar with gradient) and scalars for the log."""
        raise NotImplementedError

    def after_step(self, phase: str) -> None:
        """Called when the optimizers of a phase have stepped."""

    def at_rest(self) -> bool:
        """Whether all that the next step depends on is in the weights and optimizers: checkpoints are made only then."""
        return True

    def validate(self, output: Path, step: int) -> dict[str, float]:
        """Held-out numbers, and pictures under `output`."""
        return {}

    def work(self) -> list[Work]:
        """The forwards of a mean step, for `--dry-run`."""
        return []

    def pipeline(self) -> StreamVidPipeline | None:
        """The model as it is now, for sample videos; None where it makes none."""
        return None

    def export(self, output: Path) -> None:
        """Write what the library loads (the trainable module then holds the averaged weights)."""
        raise NotImplementedError


def _leave_out_frozen(stage: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if _is_frozen(stage, name, prefix)]:
        del state[name]


def _fill_in_frozen(stage: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    whole: Any = {"remove_duplicate": False}  # tied weights have two names
    for kind in (stage.named_parameters(**whole), stage.named_buffers(**whole)):
        for name, tensor in kind:
            if _is_frozen(stage, prefix + name, prefix):
                state[prefix + name] = tensor


def _is_frozen(stage: Any, name: str, prefix: str) -> bool:
    return name.removeprefix(prefix).split(".")[0] in stage.frozen_parts
