"""`streamvid bench`."""

from __future__ import annotations

from streamvid.commands.common import add_compile
from streamvid.commands.configuration import add_configuration, configuration_of


def add(commands) -> None:
    command = commands.add_parser("bench", help="measure speed and memory here, as JSON")
    add_configuration(command)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    command.add_argument(
        "--parts",
        help="some of first_frame,denoise,decode,disk,prompt,roofline,scaling (default: all)",
    )
    command.add_argument("--blocks", type=int, default=20, help="measured after the warm-up, in every part")
    command.add_argument("--length", type=int, default=0, help="also a stream of so many blocks: is it flat?")
    add_compile(command)
    command.add_argument("-o", "--output", metavar="FILE.json", help="also write it there")
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.io.files import prepare_output_file
    from streamvid.models import choose_device, choose_dtype

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    configuration = configuration_of(options, device, dtype)
    if options.output is not None:
        prepare_output_file(options.output)

    from streamvid.bench import NEXT_PROMPTS, PARTS, PROMPT, Subject, bench, check, write_record
    from streamvid.models import DEFAULT_MODEL, load_pipeline
    from streamvid.quantization import quantise

    model = None if options.wan else options.model or DEFAULT_MODEL

    def load():
        if model is not None:
            return load_pipeline(
                model,
                str(device),
                str(dtype).removeprefix("torch."),
                options.decoder,
                options.weights,
                compiled=options.compile,
            )
        pipe = configuration.spec.pipeline(device, dtype, options.decoder, (PROMPT, *NEXT_PROMPTS))
        quantise(pipe.transformer, options.weights)
        if options.compile:
            pipe.transformer.compile_repeated_blocks()
        return pipe

    subject = Subject(configuration, device, load, model, options.compile)
    parts = PARTS if options.parts is None else tuple(options.parts.split(","))
    check(subject, parts, options.blocks, options.length)
    write_record(bench(subject, parts, options.blocks, options.length, _command(options)), options.output)


def _command(options) -> str:
    """The command that measures the same, but for where it writes."""
    import shlex

    words = ["streamvid bench"]
    for name in (
        "model",
        "wan",
        "layers",
        "method",
        "kv_dtype",
        "size",
        "batch",
        "dtype",
        "weights",
        "decoder",
        "device",
    ):
        value = getattr(options, name)
        if value is not None and value not in (1, "auto", "native", "exact"):
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    words += [f"--set {shlex.quote(given)}" for given in options.set]
    words += ["--compile"] * options.compile
    words += [] if options.parts is None else [f"--parts {options.parts}"]
    return " ".join([*words, f"--blocks {options.blocks} --length {options.length}"])
