"""The log of a training run: JSON lines, and the same numbers in TensorBoard or Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamvid.errors import UserError

REPORTS = ("none", "tensorboard", "wandb")


class RunLog:
    """Appends rows to `log.jsonl` and `validation.jsonl`; a resumed run first forgets what will be told again.

    Args:
        output: folder of the run.
        report: one of `REPORTS`.
        resumed_at: the step that comes next.
    """

    def __init__(self, output: Path, report: str, resumed_at: int):
        self.output, self.report = output, report
        _forget(output / "log.jsonl", resumed_at)
        _forget(output / "validation.jsonl", resumed_at + 1)
        self.writer = _writer(output, report, resumed_at)

    def add(self, step: int, numbers: Mapping[str, float], name: str = "log") -> None:
        """One row of `name`.jsonl."""
        with open(self.output / f"{name}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.report == "tensorboard":
            for key, value in numbers.items():
                self.writer.add_scalar(f"{name}/{key}", value, step)
            self.writer.flush()
        elif self.report == "wandb":
            self.writer.log({f"{name}/{key}": value for key, value in numbers.items()}, step=step)

    def close(self) -> None:
        """The run is at its end: what the reports still hold is written."""
        if self.report == "tensorboard":
            self.writer.close()
        elif self.report == "wandb":
            self.writer.finish()


def _forget(path: Path, step: int) -> None:
    """Drop a log's rows from `step` on, and a last row that was cut short."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        path.write_text("".join(row for row in rows if json.loads(row)["step"] < step))


def _writer(output: Path, report: str, resumed_at: int) -> Any:
    if report == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "report = 'tensorboard' needs tensorboard: pip install 'streamvid[train]', or set trainer.report=none"
            ) from None
        return SummaryWriter(str(output / "tensorboard"), purge_step=resumed_at or None)
    if report == "wandb":
        try:
            import wandb
        except ImportError:
            raise UserError(
                "report = 'wandb' needs Weights & Biases: pip install 'streamvid[wandb]', or set trainer.report=tensorboard"
            ) from None
        try:
            return wandb.init(
                project="streamvid", name=output.name, id=output.name, dir=str(output), resume="allow"
            )
        except Exception as error:  # whatever it raises where nobody is logged in or nothing can be reached
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"report = 'wandb' cannot begin ({reason}): log in, set WANDB_MODE=offline, or give trainer.report=none"
            ) from None
    return None
