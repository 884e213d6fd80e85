"""The command line. Mistakes of the user end in one sentence and exit code 2."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import yaml

from streamvid.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse with its errors as one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}: see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 failed check, 2 user mistake, 130 interrupted)."""
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


def _tell(message: str) -> None:
    """One line on the standard error."""
    print(message.replace("\n", " "), file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="streamvid", description="Streaming autoregressive video diffusion.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_script(commands)
    _add_info(commands)
    _add_methods(commands)
    _add_compare(commands)
    _add_train(commands)
    _add_parity(commands)
    _add_convert(commands)
    return parser


def _add_generate(commands) -> None:
    command = commands.add_parser("generate", help="make a video from a script of timed prompts")
    command.add_argument(
        "script", help='a script file, or "a fox walks [5s] | it snows [10s] | # a city [8s]"'
    )
    command.add_argument(
        "-o", "--output", default="out/video.mp4", help=".mp4, .gif, .webp or a folder of PNGs (%(default)s)"
    )
    command.add_argument(
        "--model", help="embedded model, folder or hub id (default: the script's, else diorama)"
    )
    command.add_argument("--method", help="preset (default: the script's, else the model's)")
    command.add_argument("--seed", type=int, help="seed of the noise (default: the script's, else 0)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="override an option of the method, e.g. sink=0",
    )
    command.add_argument("--height", type=int, help="pixels (default: the script's, else the model's)")
    command.add_argument("--width", type=int)
    command.add_argument("--fps", type=float)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--noise", default="seeded", help="seeded, or reference (the releases' draw order)")
    command.add_argument("--attention", default="auto", help="attention backend (see streamvid info)")
    command.add_argument("--crf", type=int, help="quality of an MP4: lower is better (default 18)")
    command.add_argument(
        "--contact-sheet",
        nargs="?",
        const="",
        metavar="PNG",
        help="also a PNG with a frame every two seconds",
    )
    command.add_argument("--quiet", action="store_true", help="no timeline and no progress bar")
    command.set_defaults(run=_generate)


def _generate(options) -> None:
    from streamvid.methods import OPTION_NAMES
    from streamvid.script import load_script

    script = load_script(options.script, options=OPTION_NAMES)
    _print_notes(script)
    sheet = options.contact_sheet
    if sheet == "":
        output = Path(options.output)
        sheet = output.parent / f"{output.stem}_contact_sheet.png"

    from streamvid.generate import generate

    path = generate(
        script,
        options.output,
        model=options.model,
        method=options.method,
        overrides=parse_assignments(options.set),
        seed=options.seed,
        height=options.height,
        width=options.width,
        fps=options.fps,
        device=options.device,
        dtype=options.dtype,
        noise=options.noise,
        attention=options.attention,
        crf=options.crf,
        contact_sheet=sheet,
        quiet=options.quiet,
    )
    if not options.quiet:
        print(f"wrote {path}" + (f" and {sheet}" if sheet else ""))


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


def _add_script(commands) -> None:
    command = commands.add_parser("script", help="work with scripts")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="read a script and print when each shot really starts")
    check.add_argument("script")
    check.add_argument("--fps", type=float, help="frames per second (default: the script's, else 16)")
    check.add_argument("--frames-per-block", type=int, default=3)
    check.add_argument("--yaml", action="store_true", help="print the script in the YAML form instead")
    check.set_defaults(run=_check_script)
    schema = actions.add_parser("schema", help="print the JSON Schema of scripts")
    schema.set_defaults(run=_print_schema)


def _check_script(options) -> None:
    from streamvid.methods import OPTION_NAMES
    from streamvid.script import format_timeline, load_script, timeline, to_yaml

    for name, value in (("fps", options.fps), ("frames-per-block", options.frames_per_block)):
        if value is not None and not 0 < value <= 1000:
            raise UserError(f"{name} = {value} must be above 0 and at most 1000")
    script = load_script(options.script, options=OPTION_NAMES)
    _print_notes(script)
    if options.yaml:
        print(to_yaml(script), end="")
        return
    print(format_timeline(timeline(script, options.fps or script.fps or 16.0, options.frames_per_block)))


def _print_schema(options) -> None:
    import json

    from streamvid.script import json_schema

    print(json.dumps(json_schema(), indent=2))


def _print_notes(script) -> None:
    for note in script.notes:
        print(f"note: {note}", file=sys.stderr)


def _add_info(commands) -> None:
    command = commands.add_parser("info", help="versions, device, backends, models; or what one model knows")
    command.add_argument("model", nargs="?", help="an embedded model")
    command.set_defaults(run=_info)


def _info(options) -> None:
    from streamvid.info import model_details, overview

    print(model_details(options.model) if options.model else overview())


def _add_methods(commands) -> None:
    command = commands.add_parser("methods", help="list the methods, or show what one attends block by block")
    _add_shape_options(command, default=None)
    command.set_defaults(run=_list_methods)
    actions = command.add_subparsers(metavar="ACTION")
    show = actions.add_parser("show", help="attended frames and their positions, block by block")
    show.add_argument("name", help="a method (see streamvid methods)")
    show.add_argument("--blocks", type=int, help="length of the stream (default: until a full window shows)")
    show.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="override an option, e.g. sink=0"
    )
    for switch, what in (
        ("cut", "a scene cut"),
        ("shot", "a new shot of the scene"),
        ("switch", "a prompt switch by the method's transition"),
    ):
        show.add_argument(
            f"--{switch}",
            type=int,
            nargs="+",
            action="extend",
            default=[],
            metavar="BLOCK",
            help=f"{what} before these blocks",
        )
    show.add_argument("--picture", metavar="FILE.png", help="also draw it")
    _add_shape_options(show, default=argparse.SUPPRESS)  # the list's own are kept where none are given here
    show.set_defaults(run=_show_method)


def _add_shape_options(command, default) -> None:
    """Whose sizes count."""
    shapes = command.add_mutually_exclusive_group()
    shapes.add_argument(
        "--model", default=default, help="embedded model or folder to tell the bytes of (default: diorama)"
    )
    shapes.add_argument(
        "--wan",
        default=default,
        choices=("1.3B", "14B", "5B"),
        help="tell the bytes of a published Wan transformer at its own picture size in bfloat16",
    )


def _model_shape(options):
    from streamvid.method_tables import WAN, model_shape
    from streamvid.models import DEFAULT_MODEL

    return WAN[options.wan] if options.wan else model_shape(options.model or DEFAULT_MODEL)


def _list_methods(options) -> None:
    from streamvid.method_tables import format_methods

    print(format_methods(_model_shape(options)))


def _show_method(options) -> None:
    from streamvid.method_tables import (
        enough_blocks,
        format_forwards,
        heading,
        planned,
        switches_at,
        window_options,
    )
    from streamvid.methods import load_method

    method = load_method(options.name, parse_assignments(options.set))
    unknown_levels = method.sampler == "rolling" and method.denoising_steps is None
    levels = _model_shape(options).levels if unknown_levels else None
    switches = switches_at(options.cut, options.shot, dict.fromkeys(options.switch, method.transition))
    blocks = options.blocks
    if blocks is None:
        blocks = enough_blocks(window_options(method, levels), switches)
    forwards, title = planned(method, blocks, switches, levels), heading(method, levels)
    written = None
    if options.picture is not None:
        from streamvid.method_picture import save

        written = save(forwards, title, options.picture)
    print(f"{title}\n\n{format_forwards(forwards)}")
    if written is not None:
        print(f"\nwrote {written}")


def _add_compare(commands) -> None:
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
    command.set_defaults(run=_compare)


def _compare(options) -> None:
    from streamvid.compare import compare
    from streamvid.methods import OPTION_NAMES
    from streamvid.script import load_script

    script = load_script(options.script, options=OPTION_NAMES)
    _print_notes(script)
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


def _add_train(commands) -> None:
    command = commands.add_parser("train", help="train what a configuration describes, or go on with it")
    command.add_argument("config", help="a YAML file, see configs/train")
    command.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="e.g. trainer.steps=100")
    command.add_argument("--processes", type=int, default=1, help="data-parallel processes on this machine")
    command.set_defaults(run=_train)


def _train(options) -> None:
    from streamvid.training.run import train

    train(options.config, options.overrides, processes=options.processes)


def _add_parity(commands) -> None:
    command = commands.add_parser(
        "parity", help="run recorded reference cases and print the error of every tensor"
    )
    command.add_argument("folders", nargs="+", metavar="CASE_FOLDER")
    command.set_defaults(run=_parity)


def _parity(options) -> int:
    from streamvid.parity import main as parity

    return parity(options.folders)


def _add_convert(commands) -> None:
    command = commands.add_parser("convert", help="turn published checkpoints into a model folder")
    command.add_argument("output", help="folder to write, new or empty")
    command.add_argument(
        "--transformer", required=True, help="the generator's checkpoint, in any published form"
    )
    command.add_argument(
        "--release", help="the published model that this is: method, steps, size travel with it"
    )
    command.add_argument("--method", help="preset the transformer was distilled for (default: the release's)")
    command.add_argument("--vae", help="file or folder of the VAE")
    command.add_argument("--text-encoder", help="file or folder of the UMT5 encoder")
    command.add_argument("--tokenizer", help="folder of the tokenizer")
    command.add_argument(
        "--base", help="pipeline folder (diffusers' Wan2.1) that supplies the parts not given"
    )
    command.add_argument("--lora", help="LoRA file, merged into the transformer")
    command.add_argument(
        "--which", choices=("ema", "raw"), help="weights of the checkpoint (default: ema if there)"
    )
    command.add_argument("--head-dim", type=int, help="size of an attention head, where it is not 128")
    command.add_argument("--shift", type=float, help="timestep shift (default: the release's, else 5)")
    command.add_argument(
        "--steps", type=_numbers, help="levels (default: the release's, else 1000,750,500,250)"
    )
    command.add_argument("--fps", type=float, help="default: the release's, else 16")
    command.add_argument("--height", type=int, help="default: the release's, else 480")
    command.add_argument("--width", type=int, help="default: the release's, else 832")
    command.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the file's)")
    command.set_defaults(run=_convert)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _convert(options) -> None:
    from streamvid.convert import convert

    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "output")}
    print(f"wrote {convert(options.output, **arguments)}")


if __name__ == "__main__":
    sys.exit(main())
