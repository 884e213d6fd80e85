"""The command line. Mistakes of the user end in one sentence and exit code 2."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Sequence

from streamvid.allocator import keep_freed_memory
from streamvid.commands import (
    app,
    bench,
    compare,
    convert,
    eval,
    generate,
    info,
    kernels,
    methods,
    parity,
    plan,
    script,
    train,
)
from streamvid.errors import UserError

COMMANDS = (generate, app, script, info, methods, compare, eval, train, parity, kernels, plan, bench, convert)


class _Parser(argparse.ArgumentParser):
    """argparse with its errors as one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}: see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 failed check, 2 user mistake, 130 interrupted)."""
    _quiet_torchao()
    keep_freed_memory()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        try:
            options = build_parser().parse_args(arguments)
            return options.run(options) or 0
        except UserError as error:
            _tell(f"streamvid: {error}")
            return 2
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
                raise
            reason = str(error).split("\n")[0][:100] or "no reason given"
            _tell(f"streamvid: there is not enough memory ({reason}): give a smaller size, window or batch")
            return 2
        except KeyboardInterrupt:
            _tell("streamvid: interrupted; what was written so far is kept")
            return 130


def _quiet_torchao() -> None:
    """Where it is installed, diffusers imports it, and five lines tell what it could not load and nobody asked for."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _tell(message: str) -> None:
    """One line on the standard error."""
    print(message.replace("\n", " "), file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="streamvid", description="Streaming autoregressive video diffusion.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
