"""The one training loop: accelerate, resumable, seeded, logged; what is trained is a `Stage`.

    trainer = Trainer(stage, TrainerOptions(output="runs/vae", steps=3000))
    trainer.run()

Everything random in a step derives from (seed, step, process), so a run that is killed and resumed sees the batches of
one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from streamvid.errors import UserError
from streamvid.training.optimizers import build_optimizers, learning_rate_factor


@dataclass
class TrainerOptions:
    """How to train, apart from what.

    Learning rates are peaks; `ema` is the decay per step (0: off); `threads` are CPU threads of a process.
    """

    output: str
    steps: int
    seed: int = 0
    muon_lr: float = 2e-3
    adamw_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 20
    decay_fraction: float = 0.45
    ema: float = 0.99
    clip: float = 1.0
    mixed_precision: str = "bf16"
    threads: int = 1
    log_every: int = 20
    checkpoint_every: int = 100
    validate_every: int = 0


class Stage(nn.Module):
    """One thing to train. Subclasses hold their trainable modules and the frozen ones they need."""

    def trainable(self) -> nn.Module:
        """The module whose parameters are optimized and averaged."""
        raise NotImplementedError

    def batch(self, seed: int, step: int, process: int) -> dict[str, Any]:
        """The batch of a step: a pure function of its arguments."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (a scalar with gradient) and scalars for the log."""
        raise NotImplementedError

    def validate(self, output: Path, step: int) -> dict[str, float]:
        """Held-out numbers, and pictures under `output`."""
        return {}

    def export(self, output: Path) -> None:
        """Write what the library loads (the trainable module then holds the averaged weights)."""
        raise NotImplementedError


class _Progress:
    """The step counter, saved with accelerate's state."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


class Trainer:
    """Runs a stage to its last step; call `run` again (also in a new process) to resume."""

    def __init__(self, stage: Stage, options: TrainerOptions):
        self.options = options
        self.output = Path(options.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            cpu=True,  # the stages make their batches and noise there
            mixed_precision=options.mixed_precision,
        )
        stage.to(self.accelerator.device)
        self.stage = stage
        optimizers = build_optimizers(
            stage.trainable(), options.muon_lr, options.adamw_lr, options.weight_decay
        )
        self.model, *self.optimizers = self.accelerator.prepare(stage, *optimizers)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.average = (
            AveragedModel(stage.trainable(), multi_avg_fn=get_ema_multi_avg_fn(options.ema))
            if options.ema
            else None
        )
        self.progress = _Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        if self.average is not None:
            self.accelerator.register_for_checkpointing(self.average)

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint"

    def run(self) -> None:
        """Train from the last checkpoint, if there is one, to `steps`; then export the (averaged) weights."""
        old = self.checkpoint.with_suffix(".old")
        # killed between the two renames of `_save`
        if self.accelerator.is_main_process and old.is_dir() and not self.checkpoint.is_dir():
            os.replace(old, self.checkpoint)
        self.accelerator.wait_for_everyone()
        if self.checkpoint.is_dir():
            self.accelerator.load_state(str(self.checkpoint))
        if self.accelerator.is_main_process:  # a killed run has told of steps that come again
            self._forget("log.jsonl", self.progress.step)
            self._forget("validation.jsonl", self.progress.step + 1)
        options, began = self.options, time.monotonic()
        first = self.progress.step
        while self.progress.step < options.steps:
            step = self.progress.step
            loss, metrics = self._train_step(step)
            self.progress.step += 1
            now = time.monotonic()
            elapsed = self.progress.seconds + now - began
            if step % options.log_every == 0 or self.progress.step == options.steps:
                pace = (now - began) / (self.progress.step - first)
                self._log(step, loss, metrics, elapsed, pace * (options.steps - self.progress.step))
            if options.validate_every and self.progress.step % options.validate_every == 0:
                self._validate()
            if self.progress.step % options.checkpoint_every == 0 or self.progress.step == options.steps:
                seconds, self.progress.seconds = self.progress.seconds, elapsed
                self._save()
                self.progress.seconds = seconds
        self._validate()
        if self.accelerator.is_main_process:
            self._with_average(lambda: self.stage.export(self.output / "model"))

    def _train_step(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        options = self.options
        factor = learning_rate_factor(step, options.steps, options.warmup, options.decay_fraction)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        self.stage.train()
        process = self.accelerator.process_index
        draw = np.random.SeedSequence([options.seed, step, process]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(draw))
        batch = self.stage.batch(options.seed, step, process)
        with self.accelerator.autocast():
            loss, metrics = self.model(batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"loss is {loss.item()} at step {step}: lower muon_lr / adamw_lr and resume from {self.checkpoint}"
            )
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.stage.trainable().parameters(), options.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.stage.trainable())
        return loss.detach(), {**metrics, "gradient_norm": norm}

    def _log(self, step, loss, metrics, elapsed: float, left: float) -> None:
        if not self.accelerator.is_main_process:
            return
        row = {"step": step, "loss": round(float(loss), 6), "seconds": round(elapsed, 1)}
        row |= {name: round(float(value), 6) for name, value in metrics.items()}
        with open(self.output / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = "  ".join(
            f"{name} {value:.4g}" for name, value in row.items() if name not in ("step", "seconds")
        )
        print(f"step {step + 1}/{self.options.steps}  {numbers}  {left / 60:.1f} min left", flush=True)

    def _forget(self, name: str, step: int) -> None:
        """Drop a log's rows from `step` on, and a last row that was cut short."""
        path = self.output / name
        if path.is_file():
            rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            path.write_text("".join(row for row in rows if json.loads(row)["step"] < step))

    def _validate(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.stage.eval()
        step = self.progress.step
        with torch.no_grad():
            numbers = self._with_average(lambda: self.stage.validate(self.output, step))
        if numbers:
            with open(self.output / "validation.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
            print(f"validation at step {step}: {numbers}", flush=True)

    def _with_average(self, action):
        """Call `action` while the trainable module holds the averaged weights."""
        if self.average is None:
            return action()
        module = self.stage.trainable()
        own = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.average.module.state_dict())
        try:
            return action()
        finally:
            module.load_state_dict(own)

    def _save(self) -> None:
        """Write a new checkpoint beside the old one, then swap: a kill at any moment leaves one of them whole."""
        fresh, old = self.output / "checkpoint.new", self.output / "checkpoint.old"
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()  # every process writes a part
        if self.accelerator.is_main_process:
            shutil.rmtree(old, ignore_errors=True)
            if self.checkpoint.is_dir():
                os.replace(self.checkpoint, old)
            os.replace(fresh, self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
