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
    command.add_argument(
        "--measure-steps",
        type=int,
        default=0,
        metavar="N",
        help="with --dry-run: make N steps, forget them, and tell how long the run will take",
    )
    command.add_argument(
        "--timing", metavar="FILE", help="with --measure-steps: append what was measured to this JSONL file"
    )
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.errors import UserError
    from streamvid.training.run import train

    if (options.measure_steps and not options.dry_run) or options.measure_steps < 0:
        raise UserError("--measure-steps needs --dry-run and a number above 0")
    if options.timing and not options.measure_steps:
        raise UserError("--timing needs --measure-steps: say how many")
    train(
        options.config,
        options.overrides,
        processes=options.processes,
        dry_run=options.dry_run,
        measured=options.measure_steps,
        timing=options.timing,
    )
