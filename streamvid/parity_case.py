"""A recorded case of a reference implementation: its files, and how far a tensor is from a recorded one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamvid.checkpoint_files import read_json, read_state_dict
from streamvid.errors import UserError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tolerance:
    """How far a tensor may be off: every element by `atol + rtol |recorded|`, the whole by `rel_l2`."""

    atol: float
    rtol: float = 0.0
    rel_l2: float | None = None

    def __str__(self) -> str:
        if self == EXACT:
            return "exact"
        parts = [f"{self.atol:g}", f"{self.rtol:g} rel" * bool(self.rtol)]
        parts.append(f"L2 {self.rel_l2:g}" if self.rel_l2 is not None else "")
        return " + ".join(filter(None, parts[:2])) + (", " + parts[2] if parts[2] else "")


EXACT = Tolerance(0.0)
LATENTS = Tolerance(1e-4, 1e-4, 1e-5)
X0 = Tolerance(1e-4, 1e-4)
FORWARD = Tolerance(2e-5, 1e-5)
SCHEDULE = Tolerance(1e-6)
PIXELS = Tolerance(2e-5)
SCORES = Tolerance(1e-3, 1e-4)  # sums over many queries


@dataclass(frozen=True)
class Row:
    """The comparison of one recorded tensor."""

    name: str
    max_abs: float
    rel_l2: float
    tolerance: Tolerance
    ok: bool


def compare(name: str, got: torch.Tensor | None, recorded: torch.Tensor, tolerance: Tolerance) -> Row:
    """A tensor that is absent, of another shape or not finite is infinitely far off."""
    if got is None or got.shape != recorded.shape:
        return Row(name, float("inf"), float("inf"), tolerance, False)
    a, b = got.double(), recorded.double()
    off = (a - b).abs()
    size = float(b.norm())
    max_abs = float(off.max()) if off.numel() else 0.0
    rel_l2 = float(off.norm()) / size if size else max_abs
    ok = bool((off <= tolerance.atol + tolerance.rtol * b.abs()).all())
    return Row(
        name, max_abs, rel_l2, tolerance, ok and (tolerance.rel_l2 is None or rel_l2 < tolerance.rel_l2)
    )


class Case:
    """A case folder, and the attention backend to replay it with. Access to what is not there is an error that names it."""

    def __init__(self, folder: str | Path, attention: str = "auto"):
        self.folder, self.attention = Path(folder), attention
        if not (self.folder / "case.json").is_file():
            raise UserError(f"{self.folder} is no recorded case: it should hold case.json")
        self.settings = read_json(self.folder / "case.json")
        self.inputs = self.tensors("inputs")
        self.outputs = self.tensors("outputs")

    def tensors(self, name: str) -> Tensors:
        return read_state_dict(self.folder / f"{name}.safetensors")

    def section(self, name: str, known: Sequence[str], needed: Sequence[str] | None = None) -> dict[str, Any]:
        """A section of `case.json`; all of its keys must be known, and those needed (default: all known) be there."""
        section = self.settings.get(name)
        if not isinstance(section, dict):
            raise UserError(f"{self.folder}/case.json has no section {name}: record the case again")
        for key in section:
            if key not in known:
                raise UserError(
                    f"{self.folder}/case.json: {name}.{key} = {section[key]!r} is not known: "
                    f"this version of streamvid knows {', '.join(known)}"
                )
        for key in known if needed is None else needed:
            if key not in section:
                raise UserError(f"{self.folder}/case.json: {name}.{key} is not there: record the case again")
        return section

    def input(self, name: str) -> torch.Tensor:
        if name not in self.inputs:
            raise UserError(
                f"{self.folder}/inputs.safetensors has no {name}, which the settings in case.json need"
            )
        return self.inputs[name]

    def missing(self, setting: str, what: str) -> UserError:
        return UserError(
            f"{self.folder}/case.json: {setting} asks for {what}, which streamvid does not have yet"
        )

    def recorded(self, known: str) -> list[str]:
        """Names of the outputs, numbers in numerical order; all of them must match the pattern `known`."""
        for name in self.outputs:
            if not re.fullmatch(known, name):
                raise self.missing(f"recorded tensor {name}", "such a quantity")
        return sorted(self.outputs, key=lambda name: [(len(p) * p.isdigit(), p) for p in name.split("/")])

    def check_prompt(self, name: str, valid_rows: int | list[int], shape: tuple[int, ...]) -> None:
        """A recorded prompt must have the shape and the number of rows (one for all, or per sample) that it says."""
        prompt = self.input(name)
        rows = [valid_rows] * prompt.shape[0] if isinstance(valid_rows, int) else valid_rows
        found = prompt.ne(0).any(-1).sum(-1).tolist()
        if tuple(prompt.shape) != shape or found != rows:
            raise UserError(
                f"{self.folder}/case.json: {name} should be {shape} with {rows} rows of text and is "
                f"{tuple(prompt.shape)} with {found}: record the case again"
            )
