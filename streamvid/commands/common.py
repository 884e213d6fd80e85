"""What several commands share."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

from streamvid.errors import UserError


def parse_assignments(assignments: Sequence[str]) -> dict:
    """`["sink=0", "denoising_steps=[1000, 500]"]` to a dictionary, values read as YAML."""
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"--set {assignment!r} must have the form OPTION=VALUE, e.g. sink=0")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
            raise UserError(f"--set {assignment!r} has a value that cannot be read: quote it") from None
    return values


def print_notes(script) -> None:
    for note in script.notes:
        print(f"note: {note}", file=sys.stderr)


def add_compile(command) -> None:
    """The option `--compile` of what loads a pipeline."""
    command.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: the first blocks take minutes; for GPUs",
    )
