"""`streamvid methods`: list the presets, show what one attends."""

from __future__ import annotations

import argparse

from streamvid.commands.common import parse_assignments


def add(commands) -> None:
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
    from streamvid.method_list import WAN, model_shape
    from streamvid.models import DEFAULT_MODEL

    return WAN[options.wan] if options.wan else model_shape(options.model or DEFAULT_MODEL)


def _list_methods(options) -> None:
    from streamvid.method_list import format_methods

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
