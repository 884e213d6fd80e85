"""`streamvid convert`."""

from __future__ import annotations


def add(commands) -> None:
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
    command.set_defaults(run=run)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def run(options) -> None:
    from streamvid.convert import convert

    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "output")}
    print(f"wrote {convert(options.output, **arguments)}")
