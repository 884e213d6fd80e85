"""`streamvid train --dry-run --measure-steps N`: how long a run will take, from a few real steps that are forgotten."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

from streamvid.training.options import TrainerOptions
from streamvid.training.stage import Stage
from streamvid.training.trainer import Trainer


def measure_steps(stage: Stage, options: TrainerOptions, count: int) -> dict[str, Any]:
    """Seconds of work per step and hours of the whole run, on one process.

    The first step is not counted. Seconds are those of the processor where the run is on one (other work beside it
    does not count), else those of the clock.
    """
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(stage, replace(options, output=folder, report="none"))
        on_cpu = trainer.accelerator.device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        trainer._train_step(0)
        began = clock()
        for step in range(1, count + 1):
            trainer._train_step(step)
        if not on_cpu:
            torch.accelerator.synchronize()
        seconds = (clock() - began) / count
    return {
        "measured_steps": count,
        "seconds_per_step": round(seconds, 3),
        "clock": "processor" if on_cpu else "wall",
        "threads": options.threads,
        "steps": options.steps,
        "hours": round(seconds * options.steps / 3600, 2),
    }


def told(found: dict[str, Any]) -> str:
    """In words."""
    return (
        f"measured {found['measured_steps']} steps: {found['seconds_per_step']:g} s each ({found['clock']} time of one "
        f"process); {found['steps']} steps: {found['hours']:g} h"
    )
