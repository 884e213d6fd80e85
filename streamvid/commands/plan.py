"""`streamvid plan`."""

from __future__ import annotations

from streamvid.commands.configuration import add_configuration, configuration_of
from streamvid.errors import UserError


def add(commands) -> None:
    command = commands.add_parser(
        "plan", help="memory and speed of a configuration on a device, before loading anything"
    )
    add_configuration(command)
    command.add_argument(
        "--text-encoder",
        default="device",
        help="device, cpu (beside a GPU), or free (once the script is encoded)",
    )
    command.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, mps, or a card that need not be here: h100, rtx4090, ...",
    )
    command.add_argument(
        "--memory", type=float, metavar="GB", help="of the device (default: what is free there)"
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.set_defaults(run=run)


def run(options) -> int:
    import json

    import torch

    from streamvid.machine import CARDS, card, measured
    from streamvid.models import DTYPES, choose_device, choose_dtype
    from streamvid.plan import first_that_fits, format_plan, make_plan

    if options.memory is not None and not options.memory > 0:
        raise UserError(f"memory = {options.memory:g} must be above 0 GB")
    elsewhere = options.device in CARDS
    if not elsewhere and options.device.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(
            f"device = {options.device!r} is not known: give auto, cpu, cuda, mps or one of {', '.join(CARDS)}"
        )
    here = torch.device("cuda") if elsewhere else choose_device(options.device)
    named = "bfloat16" if elsewhere and options.dtype == "auto" else options.dtype
    dtype = DTYPES[named] if named in DTYPES else choose_dtype(named, here)
    configuration = configuration_of(options, here, dtype, options.text_encoder)
    device = card(options.device, dtype) if elsewhere else measured(here, dtype)
    if options.memory is not None:
        device = device._replace(memory=options.memory * 1e9)
    plan = make_plan(configuration, device)
    found = None if plan.fits else first_that_fits(configuration, device)
    if options.json:
        proposal = None if found is None else {"options": found[0], **found[1].to_dict()}
        print(json.dumps({**plan.to_dict(), "proposal": proposal}, indent=2))
    else:
        print(format_plan(plan))
        if found is not None:
            print(f"\nthe first that fits: {' '.join(found[0])}\n\n{format_plan(found[1])}")
        elif not plan.fits:
            print("\nnothing on the ladder fits: not even 8 bits, the smallest window and half the size")
    return 0 if plan.fits or found else 1
