"""`streamvid info`."""

from __future__ import annotations


def add(commands) -> None:
    command = commands.add_parser("info", help="versions, device, backends, models; or what one model knows")
    command.add_argument("model", nargs="?", help="an embedded model")
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.info import model_details, overview

    print(model_details(options.model) if options.model else overview())
