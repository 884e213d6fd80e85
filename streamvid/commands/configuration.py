"""The options of `plan` and `bench` that say which model is played how, and what they come to."""

from __future__ import annotations

import argparse

from streamvid.commands.common import parse_assignments
from streamvid.errors import UserError


def add_configuration(command: argparse.ArgumentParser) -> None:
    """Which model, and how it is played."""
    model = command.add_mutually_exclusive_group()
    model.add_argument("--model", help="embedded model or folder (default: diorama)")
    model.add_argument(
        "--wan", choices=("1.3B", "14B", "5B"), help="a published Wan model, by its shapes only"
    )
    command.add_argument(
        "--layers", type=int, help="of the transformer, where fewer shall stand for all of --wan"
    )
    command.add_argument("--method", help="preset (default: the model's)")
    command.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="override an option of the method"
    )
    command.add_argument("--kv-dtype", help="native, int8, fp8 or kivi2: the same as --set kv_dtype=...")
    command.add_argument("--size", metavar="WxH", help="pixels (default: the model's)")
    command.add_argument("--batch", type=int, default=1, help="videos made together")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--weights", default="native", help="native, int8, int8_dynamic, fp8 or fp8_dynamic")
    command.add_argument("--decoder", default="exact", help="exact or tiny")


def configuration_of(options, device, dtype, text_encoder: str = "device"):
    """The configuration that options name, on a device.

    Args:
        device: a `torch.device`, which need not be here.
    """
    from dataclasses import replace

    from streamvid.ahead import decodes_beside_on
    from streamvid.costs import Configuration
    from streamvid.methods import load_method
    from streamvid.models import DEFAULT_MODEL
    from streamvid.specs import WAN_SPECS, model_spec

    spec = WAN_SPECS[options.wan] if options.wan else model_spec(options.model or DEFAULT_MODEL)
    if options.layers is not None:
        if not options.wan or not 1 <= options.layers <= spec.transformer["num_layers"]:
            raise UserError(
                f"layers = {options.layers} must be from 1 to those of the model, and needs --wan: leave it out"
            )
        transformer = {**spec.transformer, "num_layers": options.layers}
        spec = replace(spec, name=f"{spec.name} with {options.layers} layers", transformer=transformer)
    overrides = parse_assignments(options.set)
    if options.kv_dtype is not None:
        overrides["kv_dtype"] = options.kv_dtype
    width, height = (spec.width, spec.height) if options.size is None else parse_size(options.size, spec)
    return Configuration(
        spec,
        load_method(options.method or spec.method, overrides),
        height,
        width,
        options.batch,
        dtype,
        options.weights,
        options.decoder,
        text_encoder,
        on_cpu=device.type == "cpu",
        beside=decodes_beside_on(device),
    )


def parse_size(text: str, spec) -> tuple[int, int]:
    """`832x480` to width and height.

    Raises:
        UserError: it has another form, or does not fill the model's tokens.
    """
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise UserError(f"size = {text!r} must be WIDTHxHEIGHT in pixels, e.g. {spec.width}x{spec.height}")
    for name, value, unit in (("height", int(height), spec.unit[0]), ("width", int(width), spec.unit[1])):
        if not 0 < value <= 8192 or value % unit:
            raise UserError(f"size = {text!r} has a {name} that is no multiple of {unit} from {unit} to 8192")
    return int(width), int(height)
