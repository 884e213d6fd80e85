"""The HTTP API: the same engine that the page uses, described in OpenAPI (`/docs`, `/openapi.json`)."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from streamvid.app import feeds
from streamvid.app.engine import StreamRequest, check_policy
from streamvid.app.examples import EXAMPLES
from streamvid.app.export import export_mp4
from streamvid.app.live import Busy, LiveStream, StreamEnded
from streamvid.app.schemas import (
    CreateStream,
    CutBody,
    PositionBody,
    Problem,
    PromptBody,
    ReceiptOut,
    ResetBody,
    ScriptBody,
    ScriptOut,
    StreamOut,
)
from streamvid.app.scripts import describe_script, read_script
from streamvid.app.sessions import NotFound, Studio

from streamvid.errors import UserError
from streamvid.script import to_yaml

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "a password is needed (--auth)"},
    404: {"model": Problem, "description": "no such stream"},
    409: {"model": Problem, "description": "the stream is queued or over"},
    422: {"model": Problem, "description": "the request cannot be made"},
    503: {
        "model": Problem,
        "description": "no room",
        "headers": {"Retry-After": {"schema": {"type": "integer"}}},
    },
}


SAVED_BEFORE = "# The stream went on from a saved one, which this script does not bring back.\n"


def add_routes(app: FastAPI, studio: Studio) -> None:
    """The API of `studio`, and its errors in one sentence."""
    app.include_router(server_routes(studio))
    app.include_router(stream_routes(studio))
    app.include_router(control_routes(studio))
    app.include_router(media_routes(studio))
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)


def server_routes(studio: Studio) -> APIRouter:
    """What the server is and how it is."""
    router = APIRouter(tags=["server"])

    @router.get("/healthz")
    def health() -> dict[str, Any]:
        """Alive, and how busy."""
        return {"status": "ok", **studio.counts()}

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(studio.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/api/info")
    def info() -> dict[str, Any]:
        """The model, its methods, switch policies, limits and examples."""
        return {**studio.engine.describe(), "examples": EXAMPLES}

    @router.post("/api/scripts/check", responses=PROBLEMS)
    def check_script(body: ScriptBody) -> ScriptOut:
        """Read a script in any form; nothing is generated."""
        return ScriptOut(**describe_script(read_script(body.text, body.kind)))

    return router


def stream_routes(studio: Studio) -> APIRouter:
    """Making streams and ending them."""
    router = APIRouter(prefix="/api/streams", tags=["streams"], responses=PROBLEMS)

    def out(stream: LiveStream) -> StreamOut:
        return StreamOut(**stream.state(), place=studio.place(stream))

    @router.post("", status_code=201)
    def create_stream(body: CreateStream) -> StreamOut:
        """Start a stream; with a full house it waits in the queue, and starts by itself."""
        values = body.model_dump(exclude={"script", "beside"})
        script = None if body.script is None else read_script(body.script)
        return out(studio.create(StreamRequest(**values, script=script), body.beside))

    @router.post(
        "/resume",
        status_code=201,
        openapi_extra={
            "requestBody": {
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
            }
        },
    )
    async def resume_saved_stream(
        request: Request, linger: Annotated[float, Query(ge=0.5, le=3600)] = 30
    ) -> StreamOut:
        """Go on with a stream from the bytes of a file that `save` gave."""
        upload = studio.workspace / f"upload-{secrets.token_hex(8)}"
        try:
            await _receive(request, upload, studio.limits.upload_bytes)
            return out(await asyncio.to_thread(studio.resume_saved, upload, linger))
        finally:
            upload.unlink(missing_ok=True)

    @router.get("/{name}")
    def get_stream(name: str) -> StreamOut:
        """Where a stream is: times, shots, receipts."""
        return out(studio.get(name))

    @router.delete("/{name}", status_code=204)
    def delete_stream(name: str) -> None:
        """End it; its recording goes too."""
        studio.remove(name)

    @router.post("/{name}/close", status_code=204)
    def close_stream(name: str) -> None:
        """Like DELETE, for a tab that is being closed, which can only post."""
        studio.remove(name)

    @router.post("/{name}/stop", status_code=204)
    def stop_stream(name: str) -> None:
        """End it; its recording and script can still be had."""
        studio.get(name).close("stopped")

    @router.post("/{name}/fork", status_code=201)
    def fork_stream(name: str) -> StreamOut:
        """A second continuation from the latest chunk on; both share one seat."""
        return out(studio.fork(name))

    return router


def control_routes(studio: Studio) -> APIRouter:
    """Steering."""
    router = APIRouter(prefix="/api/streams/{name}", tags=["control"], responses=PROBLEMS)

    @router.post("/prompt")
    def prompt(name: str, body: PromptBody) -> ReceiptOut:
        """Switch to another prompt at the next block. The receipt is pending; events say when it is applied."""
        check_policy(body.policy)
        return ReceiptOut(
            **studio.get(name).prompt(studio.engine.check_prompt(body.text), body.policy).to_dict()
        )

    @router.post("/cut")
    def cut(name: str, body: CutBody) -> ReceiptOut:
        """Begin a new scene at the next block."""
        text = None if body.text is None else studio.engine.check_prompt(body.text)
        return ReceiptOut(**studio.get(name).cut(text).to_dict())

    @router.post("/pause", status_code=204)
    def pause(name: str) -> None:
        """Generation and play-out hold."""
        studio.get(name).pause()

    @router.post("/resume", status_code=204)
    def resume(name: str) -> None:
        """Go on after a pause."""
        studio.get(name).resume()

    @router.post("/reset", status_code=204)
    def reset(name: str, body: ResetBody) -> None:
        """Start anew under the current prompt."""
        studio.get(name).reset(body.seed)

    @router.post("/position", status_code=204)
    def position(name: str, body: PositionBody) -> None:
        """A player says where it is; generation keeps step with it. Without reports, play-out in real time is assumed."""
        studio.get(name).report(body.position, body.rate)

    return router


def media_routes(studio: Studio) -> APIRouter:
    """Video, events and files."""
    router = APIRouter(prefix="/api/streams/{name}", tags=["media"], responses=PROBLEMS)

    @router.get("/video.mp4", response_class=Response, responses={200: {"content": {"video/mp4": {}}}})
    async def video(name: str, start: Annotated[Literal["live", "beginning"], Query()] = "live") -> Response:
        """Fragmented MP4 as it is made, until the stream ends."""
        stream = studio.get(name)
        return feeds.WatchedResponse(stream, feeds.mp4(stream, start == "beginning"), "video/mp4")

    @router.get("/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
    async def events(
        name: str, last_event_id: Annotated[str | None, Header(max_length=20)] = None
    ) -> Response:
        """Server-sent events: queued, started, chunk, shot, receipt, paused, resumed, reset, ended."""
        stream = studio.get(name)
        first = int(last_event_id) + 1 if last_event_id and last_event_id.isdecimal() else 0
        return feeds.WatchedResponse(stream, feeds.server_sent_events(stream, first), "text/event-stream")

    @router.get(
        "/thumbnails/{shot}.jpg", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}}
    )
    def thumbnail(name: str, shot: int) -> Response:
        """A picture of a shot."""
        shots = studio.get(name).history.shots
        picture = shots[shot].thumbnail if 0 <= shot < len(shots) else None
        if picture is None:
            raise NotFound(f"shot = {shot} has no picture (yet)")
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @router.get(
        "/script.yaml", response_class=Response, responses={200: {"content": {"application/yaml": {}}}}
    )
    def script(name: str) -> Response:
        """What really happened, as a script that makes the same video again."""
        stream = studio.get(name)
        if not stream.history.shots:
            raise StreamEnded("nothing has been made yet: wait for the first chunk")
        return _download(
            (SAVED_BEFORE * stream.opening.resumed + to_yaml(stream.script())).encode(),
            "streamvid.yaml",
            "application/yaml",
        )

    @router.get("/export.mp4", response_class=FileResponse, responses={200: {"content": {"video/mp4": {}}}})
    def export(name: str) -> FileResponse:
        """The video so far, as an MP4 that every player takes."""
        return FileResponse(export_mp4(studio.get(name)), media_type="video/mp4", filename="streamvid.mp4")

    @router.get(
        "/saved", response_class=FileResponse, responses={200: {"content": {"application/octet-stream": {}}}}
    )
    def saved(name: str, mode: Literal["compact", "exact"] = "compact") -> FileResponse:
        """The stream's state as a file: exact continues bit for bit on the same device, compact is small."""
        stream = studio.get(name)
        path = stream.folder / f"{mode}-{secrets.token_hex(4)}.stream"
        stream.save(path, mode)
        return FileResponse(path, media_type="application/octet-stream", filename=f"{mode}.stream")

    @router.websocket("/socket")
    async def socket(
        websocket: WebSocket,
        name: str,
        player: Literal["mse", "canvas", "none"] = "mse",
        first_event: Annotated[int, Query(ge=0)] = 0,
    ) -> None:
        try:
            stream = studio.get(name)
        except NotFound:
            await websocket.close(4404)
            return
        await feeds.socket(websocket, stream, player, first_event)

    return router


async def _receive(request: Request, path: Path, most: int) -> None:
    size = 0
    with path.open("wb") as file:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise UserError(f"the file has more than {most} bytes, which is what this server takes")
            file.write(part)
    if size == 0:
        raise UserError("the file is empty: send the bytes that `saved` gave")


def _download(data: bytes, name: str, media_type: str) -> Response:
    return Response(
        data, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


async def _user_error(request: Request, error: Exception) -> JSONResponse:
    status = 404 if isinstance(error, NotFound) else 503 if isinstance(error, Busy) else 422
    status = 409 if isinstance(error, StreamEnded) else status
    headers = {"Retry-After": "10"} if status == 503 else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a body, without repeating it: it may hold numbers that JSON cannot write."""
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()]
    return JSONResponse({"detail": "; ".join(problems)[:1000].encode("utf-8", "replace").decode()}, 422)
