"""`streamvid compare`."""

from __future__ import annotations

from streamvid.commands.common import parse_assignments, print_notes


def add(commands) -> None:
    command = commands.add_parser("compare", help="several methods on one script, side by side")
    command.add_argument("script", help="a script file or one-line script (see streamvid generate)")
    command.add_argument(
        "--methods", required=True, metavar="A,B,...", help="presets, e.g. longlive,deep_sink"
    )
    command.add_argument(
        "-o",
        "--output",
        default="out/compare",
        help="folder for the page, the numbers and the videos (%(default)s)",
    )
    command.add_argument(
        "--model", help="embedded model, folder or hub id (default: the script's, else diorama)"
    )
    command.add_argument("--seed", type=int, help="seed of the noise (default: the script's, else 0)")
    command.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="override an option of all methods"
    )
    command.add_argument("--height", type=int, help="pixels (default: the script's, else the model's)")
    command.add_argument("--width", type=int)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--quiet", action="store_true", help="no timeline and no progress bar")
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.compare import compare
    from streamvid.methods import OPTION_NAMES
    from streamvid.script import load_script

    script = load_script(options.script, options=OPTION_NAMES)
    print_notes(script)
    page = compare(
        script,
        [name.strip() for name in options.methods.split(",")],
        options.output,
        model=options.model,
        overrides=parse_assignments(options.set),
        seed=options.seed,
        height=options.height,
        width=options.width,
        device=options.device,
        dtype=options.dtype,
        quiet=options.quiet,
    )
    if not options.quiet:
        print(f"wrote {page}")
