"""`streamvid script`: check scripts, print their schema."""

from __future__ import annotations

from streamvid.commands.common import print_notes
from streamvid.errors import UserError


def add(commands) -> None:
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
    from streamvid.script import load_script, to_yaml
    from streamvid.timeline import format_timeline, timeline

    for name, value in (("fps", options.fps), ("frames-per-block", options.frames_per_block)):
        if value is not None and not 0 < value <= 1000:
            raise UserError(f"{name} = {value} must be above 0 and at most 1000")
    script = load_script(options.script, options=OPTION_NAMES)
    print_notes(script)
    if options.yaml:
        print(to_yaml(script), end="")
        return
    print(format_timeline(timeline(script, options.fps or script.fps or 16.0, options.frames_per_block)))


def _print_schema(options) -> None:
    import json

    from streamvid.script_fields import json_schema

    print(json.dumps(json_schema(), indent=2))
