"""`streamvid parity`."""

from __future__ import annotations


def add(commands) -> None:
    command = commands.add_parser(
        "parity", help="run recorded reference cases and print the error of every tensor"
    )
    command.add_argument("folders", nargs="+", metavar="CASE_FOLDER")
    command.add_argument(
        "--attention", default="auto", help="attention backend (see streamvid kernels check)"
    )
    command.set_defaults(run=run)


def run(options) -> int:
    from streamvid.kernels.attention import attention_backend
    from streamvid.parity import main as parity

    attention_backend(options.attention)
    return parity(options.folders, options.attention)
