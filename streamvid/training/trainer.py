"""The one training loop: accelerate, resumable, seeded, logged; what is trained is a `Stage`.

    trainer = Trainer(stage, TrainerOptions(output="runs/vae", steps=3000))
    trainer.run()

Everything random in a step derives from (seed, step, micro-batch), and micro-batches are numbered over all processes. So a
run that is killed and resumed sees the batches of one that was not, and two processes see those of one that accumulates two.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from streamvid.errors import UserError
from streamvid.training.logs import RunLog
from streamvid.training.optimizers import build_optimizers, learning_rate_factor
from streamvid.training.options import TrainerOptions
from streamvid.training.samples import write_samples
from streamvid.training.sharding import make_contiguous, sharding_plugin
from streamvid.training.stage import Stage

__all__ = ["Stage", "Trainer", "TrainerOptions"]


class _Progress:
    """The step counter, saved with accelerate's state."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.skipped = int(state.get("skipped", 0))


class _NotFinite(Exception):
    """A loss or gradient that no optimizer may see."""


class Trainer:
    """Runs a stage to its last step; call `run` again (also in a new process) to resume."""

    def __init__(self, stage: Stage, options: TrainerOptions):
        self.options = options
        self.output = Path(options.output)
        self.output.mkdir(parents=True, exist_ok=True)
        parts = stage.parts()
        self.accelerator = Accelerator(
            # where there is only a CPU, this alone makes accelerate see the other processes
            cpu=stage.cpu_only or options.device == "cpu" or not torch.accelerator.is_available(),
            mixed_precision=options.mixed_precision,
            fsdp_plugin=sharding_plugin(options.sharding),
            kwargs_handlers=[
                # a phase leaves the other parts without gradient
                DistributedDataParallelKwargs(find_unused_parameters=len(parts) > 1),
                # FSDP frees weights between forwards; a cast remembered from one without gradient would hide them
                AutocastKwargs(cache_enabled=options.sharding != "fsdp2"),
            ],
        )
        if options.sharding == "fsdp2" and self.accelerator.distributed_type != DistributedType.FSDP:
            raise UserError(
                "sharding = fsdp2 needs several GPUs: set trainer.sharding=ddp, or give --processes"
            )
        if options.sharding == "fsdp2":
            make_contiguous(stage)
        stage.to(self.accelerator.device)
        self.stage = stage
        made = [self._optimizers(part, first=index == 0) for index, part in enumerate(parts.values())]
        self.model, *prepared = self.accelerator.prepare(stage, *chain.from_iterable(made))
        self.optimizers = prepared
        # after `prepare`: sharding makes other parameters
        self.learnt = {
            name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()
        }
        counts = iter(prepared)
        self.optimizers_of = {
            name: [next(counts) for _ in own] for name, own in zip(parts, made, strict=True)
        }
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

    def _optimizers(self, part: nn.Module, first: bool) -> list[torch.optim.Optimizer]:
        options = self.options
        rate = options.adamw_lr if first else options.critic_lr or options.adamw_lr
        muon = options.muon_lr if first or not options.critic_lr else 0.0
        return build_optimizers(part, muon, rate, options.weight_decay, (options.beta1, options.beta2))

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint"

    def run(self) -> None:
        """Train from the last checkpoint, if there is one, to `steps`; then export the (averaged) weights."""
        self._resume()
        options, began, progress = self.options, time.monotonic(), self.progress
        log = RunLog(self.output, options.report, progress.step) if self.accelerator.is_main_process else None
        first, due = progress.step, False
        while progress.step < options.steps:
            step = progress.step
            numbers = self._train_step(step)
            progress.step += 1
            now = time.monotonic()
            elapsed = progress.seconds + now - began
            last = progress.step == options.steps
            if step % options.log_every == 0 or last:
                pace = (now - began) / (progress.step - first)
                self._log(log, step, numbers, elapsed, pace * (options.steps - progress.step))
            if options.validate_every and progress.step % options.validate_every == 0:
                self._validate(log)
            if options.sample_every and progress.step % options.sample_every == 0:
                self._sample()
            due = due or progress.step % options.checkpoint_every == 0
            if last or (due and self.stage.at_rest()):
                seconds, progress.seconds = progress.seconds, elapsed
                self._save()
                progress.seconds, due = seconds, False
        self._validate(log)
        if log is not None:
            log.close()
        if self.accelerator.is_main_process:
            self._with_average(lambda: self.stage.export(self.output / "model"))

    def _resume(self) -> None:
        old = self.checkpoint.with_suffix(".old")
        # killed between the two renames of `_save`
        if self.accelerator.is_main_process and old.is_dir() and not self.checkpoint.is_dir():
            os.replace(old, self.checkpoint)
        self.accelerator.wait_for_everyone()
        if self.checkpoint.is_dir():
            try:
                self.accelerator.load_state(str(self.checkpoint))
            except (RuntimeError, ValueError, KeyError, OSError, EOFError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"output = {str(self.output)!r} has a checkpoint that does not fit this configuration ({reason}): "
                    "give the configuration it was made with, or another output"
                ) from error

    def _train_step(self, step: int) -> dict[str, Any]:
        """One step: every phase on its own batches. Numbers for the log."""
        options = self.options
        factor = learning_rate_factor(step, options.steps, options.warmup, options.decay_fraction)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        self.stage.train()
        numbers: dict[str, Any] = {}
        for index, phase in enumerate(self.stage.phases(step)):
            mark = "" if len(self.learnt) == 1 else f"{phase}_"
            try:
                found = self._phase(index, phase, step)
            except _NotFinite as error:
                if options.on_nan == "stop":
                    raise UserError(
                        f"{mark}{error} at step {step}: lower muon_lr / adamw_lr and resume from {self.checkpoint}"
                    ) from None
                self.progress.skipped += 1
                print(f"step {step}: {mark}{error}, update skipped", flush=True)
                found = {"skipped": float(self.progress.skipped)}
            numbers |= {mark + name: value for name, value in found.items()}
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        if self.average is not None and step >= options.ema_from:
            self.average.update_parameters(self.stage.trainable())
        return numbers

    def _phase(self, index: int, phase: str, step: int) -> dict[str, Any]:
        """Gradient of one part over all micro-batches, then its optimizers. Means of loss and metrics."""
        options, count = self.options, self.options.accumulate
        if len(self.learnt) > 1:  # other parts are only looked through
            for name, parameters in self.learnt.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == phase)
        total: dict[str, torch.Tensor] = {}
        for micro in range(count):
            number = self.accelerator.process_index * count + micro
            entropy = [options.seed, step, number, *([index] if index else [])]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
            batch = self.stage.phase_batch(phase, options.seed, step, number)
            batch = send_to_device(batch, self.accelerator.device)
            alone = micro < count - 1 and self.accelerator.num_processes > 1
            with self.accelerator.no_sync(self.model) if alone else nullcontext():
                with self.accelerator.autocast():
                    loss, metrics = self.model(batch)
                self._check("loss", loss)
                self.accelerator.backward(loss / count)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                total[name] = total.get(name, 0.0) + torch.as_tensor(value).detach().float().cpu() / count
        norm = self.accelerator.clip_grad_norm_(self.learnt[phase], options.clip)
        self._check("gradient norm", norm)
        for optimizer in self.optimizers_of[phase]:
            optimizer.step()
        self.stage.after_step(phase)
        return {**total, "gradient_norm": norm}

    def _check(self, what: str, value: torch.Tensor) -> None:
        """All processes stop or skip together."""
        bad = (~torch.isfinite(value.detach())).float().reshape(1)
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if float(bad) > 0:
            raise _NotFinite(f"{what} is {float(value.detach())}")

    def _log(self, log: RunLog | None, step: int, numbers, elapsed: float, left: float) -> None:
        if log is None:
            return
        row = {name: round(float(value), 6) for name, value in numbers.items()}
        log.add(step, {**row, "seconds": round(elapsed, 1)})
        text = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        print(f"step {step + 1}/{self.options.steps}  {text}  {left / 60:.1f} min left", flush=True)

    def _validate(self, log: RunLog | None) -> None:
        if log is None:
            return
        self.stage.eval()
        step = self.progress.step
        with torch.no_grad():
            numbers = self._with_average(lambda: self.stage.validate(self.output, step))
        if numbers:
            log.add(step, numbers, "validation")
            print(f"validation at step {step}: {numbers}", flush=True)

    def _sample(self) -> None:
        """A video of the averaged weights, with its contact sheet."""
        pipe = self.stage.pipeline()
        if pipe is None or not self.accelerator.is_main_process:
            return
        self.stage.eval()
        options, path = self.options, self.output / "samples" / f"step_{self.progress.step:06d}.mp4"
        self._with_average(
            lambda: write_samples(pipe, options.sample_prompt, options.sample_blocks, options.seed, path)
        )

    def _with_average(self, action):
        """Call `action` while the trainable module holds the averaged weights."""
        if self.average is None or self.progress.step <= self.options.ema_from:
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
