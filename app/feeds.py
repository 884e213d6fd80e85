"""What flows from a stream to its viewers: fragmented MP4, events, and both over one socket for the page."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pydantic import ValidationError
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocket, WebSocketDisconnect
from streamvid.app import pictures
from streamvid.app.live import ENDED, LiveStream
from streamvid.app.schemas import PositionBody

SILENCE_SECONDS = 10  # then a sign of life is sent, so that proxies keep the connection
HEADER, PIECE, PICTURE = 0, 1, 2
"""First byte of a binary message of the socket; the media time follows (float64, big-endian), then the bytes."""


@contextmanager
def watching(stream: LiveStream) -> Iterator[None]:
    """Somebody looks: the stream must not be ended for being alone."""
    stream.viewers += 1  # on the event loop only
    stream.was_watched = True
    try:
        yield
    finally:
        stream.viewers -= 1
        stream.touched = time.monotonic()


class WatchedResponse(StreamingResponse):
    """A streaming response that counts as a viewer for as long as it is sent."""

    def __init__(self, stream: LiveStream, content: AsyncIterator[bytes], media_type: str):
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self.stream = stream

    async def __call__(self, scope, receive, send) -> None:
        with watching(self.stream):
            await super().__call__(scope, receive, send)


async def mp4(stream: LiveStream, from_start: bool = False) -> AsyncIterator[bytes]:
    """Fragmented MP4 from what is shown now, or from the start, to the end of the stream."""
    async for _kind, _time, data in pieces(stream, from_start):
        yield data


async def pieces(stream: LiveStream, from_start: bool = False) -> AsyncIterator[tuple[int, float, bytes]]:
    """(HEADER or PIECE, media time, bytes) as they come."""
    recording, number = stream.recording, -1
    with stream.bell.listen() as rang:
        while True:
            rang.clear()
            ended = stream.status == ENDED
            if number < 0 and recording.pieces:
                number = 0 if from_start else recording.piece_at(stream.clock.position(time.monotonic()))
                yield HEADER, recording.pieces[number].start, recording.header
            while 0 <= number < len(recording.pieces):
                piece = recording.pieces[number]
                yield PIECE, piece.start, recording.read(piece)
                number += 1
            if ended:
                return
            await rang.wait()


async def frames(stream: LiveStream) -> AsyncIterator[tuple[int, float, bytes]]:
    """(PICTURE, media time, JPEG) of every frame, for browsers without H.264; one that is too slow skips chunks."""
    following = -1
    with stream.bell.listen() as rang:
        while True:
            rang.clear()
            ended = stream.status == ENDED
            for number, start, chunk in list(stream.raw):
                if number < following:
                    continue
                following = number + 1
                for index, frame in enumerate(chunk):
                    yield (
                        PICTURE,
                        start + index / stream.opening.fps,
                        await asyncio.to_thread(pictures.jpeg, frame),
                    )
            if ended:
                return
            await rang.wait()


async def events(stream: LiveStream, first: int = 0) -> AsyncIterator[dict[str, Any] | None]:
    """The events from number `first` on as they come; None as a sign of life."""
    with stream.bell.listen() as rang:
        while True:
            rang.clear()
            for event in stream.events.since(first):
                yield event
                first = event["number"] + 1
                if event["event"] == "ended":
                    return
            try:
                await asyncio.wait_for(rang.wait(), SILENCE_SECONDS)
            except TimeoutError:
                yield None


async def server_sent_events(stream: LiveStream, first: int) -> AsyncIterator[bytes]:
    """Events in the format of `text/event-stream`."""
    async for event in events(stream, first):
        if event is None:
            yield b": still here\n\n"
        else:
            data = json.dumps(event)
            yield f"id: {event['number']}\nevent: {event['event']}\ndata: {data}\n\n".encode()


async def socket(websocket: WebSocket, stream: LiveStream, player: str, first_event: int) -> None:
    """The page's connection: events as text, video as binary, the player's position as text in return."""
    await websocket.accept()

    async def send_events() -> None:
        async for event in events(stream, first_event):
            await websocket.send_text(json.dumps(event or {"event": "alive"}))

    async def send_video() -> None:
        if player == "none":
            return
        source = frames(stream) if player == "canvas" else pieces(stream)
        async for kind, media_time, data in source:
            await websocket.send_bytes(struct.pack(">Bd", kind, media_time) + data)

    async def send_all() -> None:
        await asyncio.gather(send_events(), send_video())
        await asyncio.Event().wait()  # the page stays connected to what has ended, until it goes

    async def receive() -> None:
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            with suppress(ValidationError):  # whatever else is sent is passed by
                body = PositionBody.model_validate_json(message.get("text") or "")
                stream.report(body.position, body.rate)

    with watching(stream):
        tasks = [asyncio.create_task(send_all()), asyncio.create_task(receive())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(
            result, WebSocketDisconnect | RuntimeError | OSError
        ):
            raise result
