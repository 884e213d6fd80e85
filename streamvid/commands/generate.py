"""`streamvid generate`."""

from __future__ import annotations

from pathlib import Path

from streamvid.commands.common import add_compile, parse_assignments, print_notes


def add(commands) -> None:
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
    command.add_argument(
        "--decoder",
        default="exact",
        help="exact (the VAE's), tiny (several times cheaper, less exact), or the path of a tiny decoder",
    )
    command.add_argument(
        "--weights",
        default="native",
        help="native, int8, int8_dynamic, fp8 or fp8_dynamic (streamvid[quantize])",
    )
    command.add_argument(
        "--text-encoder",
        default="device",
        help="device, cpu (beside a GPU), or free (it encodes the script and makes room for the rest)",
    )
    add_compile(command)
    command.add_argument(
        "--check-attention",
        action="store_true",
        help="compare the backend with the reference here before starting",
    )
    given = command.add_mutually_exclusive_group()
    given.add_argument("--image", metavar="FILE", help="go on from this picture")
    given.add_argument("--video", metavar="FILE", help="go on from the end of this clip")
    command.add_argument("--crf", type=int, help="quality of an MP4: lower is better (default 18)")
    command.add_argument(
        "--contact-sheet",
        nargs="?",
        const="",
        metavar="PNG",
        help="also a PNG with a frame every two seconds",
    )
    command.add_argument("--quiet", action="store_true", help="no timeline and no progress bar")
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.methods import OPTION_NAMES
    from streamvid.script import load_script

    script = load_script(options.script, options=OPTION_NAMES)
    print_notes(script)
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
        check_attention=options.check_attention,
        decoder=options.decoder,
        weights=options.weights,
        text_encoder=options.text_encoder,
        compiled=options.compile,
        crf=options.crf,
        contact_sheet=sheet,
        image=options.image,
        video=options.video,
        quiet=options.quiet,
    )
    if not options.quiet:
        print(f"wrote {path}" + (f" and {sheet}" if sheet else ""))
