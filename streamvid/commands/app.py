"""`streamvid app`."""

from __future__ import annotations

from dataclasses import fields

from streamvid.commands.common import add_compile


def add(commands) -> None:
    command = commands.add_parser("app", help="the live studio: a page, and the same over HTTP")
    command.add_argument("--model", default="diorama", help="embedded model, folder or hub id (%(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--decoder", default="exact", help="exact, tiny, or the path of a tiny decoder")
    command.add_argument("--weights", default="native", help="native, int8, int8_dynamic, fp8 or fp8_dynamic")
    add_compile(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine only)"
    )
    command.add_argument("--port", type=int, default=7860, help="port, 0 for a free one (%(default)s)")
    command.add_argument("--auth", metavar="USER:PASSWORD", help="ask everyone for it")
    command.add_argument(
        "--share", action="store_true", help="also at a public address, through Gradio's tunnel"
    )
    limits = {
        "sessions": "sessions that generate at once; the others queue",
        "queue": "sessions that may wait",
        "ahead-seconds": "how far generation may run ahead of play-out",
        "stream-seconds": "longest stream",
        "idle-seconds": "a stream that nobody steers for so long ends",
        "prompt-characters": "longest prompt",
        "window": "largest window, in latent frames",
    }
    for name, help in limits.items():
        command.add_argument(f"--{name}", type=float if name.endswith("seconds") else int, help=help)
    command.set_defaults(run=run)


def run(options) -> None:
    from streamvid.errors import UserError

    try:
        from streamvid.app.server import check_auth, serve
    except ImportError as error:
        raise UserError(f"the studio needs {error.name}: run `pip install 'streamvid[app]'`") from error
    from streamvid.app.engine import PipelineEngine, leave_a_core
    from streamvid.app.limits import Limits
    from streamvid.models import load_pipeline

    check_auth(options.auth)
    given = {field.name: getattr(options, field.name, None) for field in fields(Limits)}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    pipe = load_pipeline(
        options.model,
        options.device,
        options.dtype,
        options.decoder,
        options.weights,
        compiled=options.compile,
    )
    if pipe.device.type == "cpu":
        leave_a_core()
    engine = PipelineEngine(pipe, options.model, limits)
    engine.warm_up()
    serve(
        engine,
        limits,
        options.host,
        options.port,
        options.auth,
        options.share,
    )
