"""The server: API, page and player in one ASGI application."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from streamvid.app.api import add_routes
from streamvid.app.guard import Guard
from streamvid.app.limits import Limits
from streamvid.app.sessions import Studio

from streamvid import __version__
from streamvid.errors import UserError

STATIC = Path(__file__).parent / "static"
logger = logging.getLogger(__name__)


def build_app(studio: Studio, auth: str | None = None, page: bool = True) -> Any:
    """The ASGI application of a studio.

    Args:
        studio: whose streams are served; closed when the server stops.
        auth: `user:password`, asked for everywhere but at /healthz.
        page: False serves the API only, without Gradio.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        studio.close()

    app = FastAPI(
        title="streamvid",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        docs_url=None,  # its page loads scripts from elsewhere
        description="Endless video, steered by prompts while it is made.",
    )
    add_routes(app, studio)
    app.mount("/studio", StaticFiles(directory=STATIC), name="studio")
    if page:
        app = mount_page(app, studio)
    return Guard(app, auth)


def mount_page(app: FastAPI, studio: Studio) -> FastAPI:
    """Gradio's page at /, beside the API."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
    from streamvid.app.page import HEAD, build_page, theme

    return gr.mount_gradio_app(
        app,
        build_page(studio.engine.describe()),
        path="/",
        theme=theme(),
        head=HEAD,
        footer_links=[],
        ssr_mode=False,
        show_error=False,
    )


def check_auth(auth: str | None) -> str | None:
    """`user:password`, or nothing."""
    if auth is not None and not all(auth.partition(":")[::2]):
        raise UserError("auth must be of the form user:password, with neither of them empty")
    return auth


def serve(
    engine: Any, limits: Limits, host: str, port: int, auth: str | None = None, share: bool = False
) -> None:
    """Serve until interrupted.

    Args:
        host, port: to listen at; port 0 takes a free one.
        share: also at a public address, through Gradio's tunnel.
    """
    import socket

    import uvicorn

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"{host}:{port} cannot be listened at ({error.strerror}): give another --port or --host"
        ) from error
    port = listener.getsockname()[1]
    address = open_tunnel(host, port) if share else None
    app = build_app(Studio(engine, limits), check_auth(auth))
    local = host in ("127.0.0.1", "::1", "localhost")
    open_to_all = "" if auth else " (no password: give --auth)"
    print(
        f"streamvid studio: http://{'localhost' if local else host}:{port}{'' if local else open_to_all}",
        flush=True,
    )
    if address:
        print(f"shared with everyone who has this address: {address}{open_to_all}", flush=True)
    config = uvicorn.Config(app, log_level="warning", ws="websockets-sansio", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])


def open_tunnel(host: str, port: int) -> str:
    """A public address of what listens at `host`:`port`, by Gradio's share server."""
    import secrets

    from gradio import networking

    everywhere = host in ("0.0.0.0", "::")
    try:
        return networking.setup_tunnel(
            "127.0.0.1" if everywhere else host, port, secrets.token_urlsafe(32), None, None
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"share: Gradio's tunnel gave no public address ({reason}): check the network, or leave --share out"
        ) from error
