"""Who may ask, and what the page may load: in front of every route, Gradio's included."""

from __future__ import annotations

import base64
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/healthz",)
CLOSED_PATHS = ("/gradio_api/",)  # uploads, files, proxies: the page needs nothing of Gradio's own API
COOKIE = "streamvid"
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
        auth: `user:password` of HTTP basic authentication; None asks for nothing. Who has given it once is known by a cookie
            from then on: not every browser sends the password with a WebSocket.
    """

    def __init__(self, app: ASGIApp, auth: str | None = None):
        self.app = app
        self.expected = None if auth is None else "Basic " + base64.b64encode(auth.encode()).decode()
        self._ticket = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.expected is not None and _equal(headers.get("authorization", ""), self.expected)
        known = given or _equal(_cookie(headers), self._ticket)
        if not (known or self.expected is None or scope["path"] in OPEN_PATHS):
            challenge = (b"www-authenticate", b'Basic realm="streamvid", charset="UTF-8"')
            await self._refuse(scope, send, 401, "a password is needed", challenge)
        elif not _same_origin(scope, headers):
            await self._refuse(scope, send, 403, "requests of other sites' pages are refused")
        elif scope["path"].startswith(CLOSED_PATHS):
            await self._refuse(scope, send, 404, "there is nothing here")
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            new = [self._cookie_header(headers)] if given else []
            await self.app(scope, receive, _with_headers(send, new))

    def _cookie_header(self, headers: dict[str, str]) -> tuple[bytes, bytes]:
        secure = "; Secure" if headers.get("x-forwarded-proto") == "https" else ""
        return b"set-cookie", f"{COOKIE}={self._ticket}; Path=/; HttpOnly; SameSite=Strict{secure}".encode()

    async def _refuse(self, scope: Scope, send: Send, status: int, reason: str, *headers: tuple) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = f'{{"detail": "{reason}"}}'.encode()
        all_headers = [*headers, (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": all_headers})
        await send({"type": "http.response.body", "body": body})


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _cookie(headers: dict[str, str]) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if cookie is None else cookie.value


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


def _with_headers(send: Send, new: list[tuple[bytes, bytes]]) -> Send:
    """Adds `new` headers, and to pages what they may load."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), *new]
            html = any(
                name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers
            )
            if html:
                headers.append((b"content-security-policy", POLICY.encode()))
            message["headers"] = headers
        await send(message)

    return sender
