"""`streamvid train`."""

from __future__ import annotations


def add(commands) -> None:
    command = commands.add_parser("train", help="train what a configuration describes, or go on with it")
    command.add_argument("config", help="a YAML file, see configs/train")
    command.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="e.g. trainer.steps=100")
    command.add_argument("--processes", type=int, default=1, help="data-parallel processes on this machine")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, tokens, memory and operations of a step, and stop",
    )
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.training.run import train

    train(options.config, options.overrides, processes=options.processes, dry_run=options.dry_run)
