"""Who may ask, and what the page may load: in front of every route, Gradio's included."""

from __future__ import annotations

import base64
import hmac
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/healthz",)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
POLICY = (  # the page works offline: nothing is loaded from elsewhere, whatever a library's template asks for
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; frame-ancestors 'self' https://huggingface.co"
)


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands in front of.
        auth: `user:password` of HTTP basic authentication; None asks for nothing.
    """

    def __init__(self, app: ASGIApp, auth: str | None = None):
        self.app = app
        self.expected = None if auth is None else "Basic " + base64.b64encode(auth.encode()).decode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._allowed(scope, headers):
            await self._refuse(
                scope, send, 401, [(b"www-authenticate", b'Basic realm="streamvid", charset="UTF-8"')]
            )
        elif not _same_origin(scope, headers):
            await self._refuse(scope, send, 403, [])
        else:
            await self.app(scope, receive, _with_policy(send) if scope["type"] == "http" else send)

    def _allowed(self, scope: Scope, headers: dict[str, str]) -> bool:
        if self.expected is None or scope["path"] in OPEN_PATHS:
            return True
        given = headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), self.expected.encode())

    async def _refuse(self, scope: Scope, send: Send, status: int, headers: list) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        reason = "a password is needed" if status == 401 else "requests of other sites' pages are refused"
        body = f'{{"detail": "{reason}"}}'.encode()
        headers = [*headers, (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _same_origin(scope: Scope, headers: dict[str, str]) -> bool:
    """A page of another site must not steer a server that only this machine can reach."""
    if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
        return True
    origin = headers.get("origin")
    if origin is None:
        return True
    asked = (headers.get("x-forwarded-host", ""), headers.get("host", ""))
    try:
        return urlsplit(origin).netloc in asked
    except ValueError:
        return False


def _with_policy(send: Send) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            html = any(
                name.lower() == b"content-type" and value.startswith(b"text/html")
                for name, value in message.get("headers", [])
            )
            if html:
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                ]
        await send(message)

    return sender
