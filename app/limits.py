"""What one server allows; every number is an option of `streamvid app`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from streamvid.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds that keep one machine usable by several people.

    Attributes:
        sessions: sessions that generate at the same time; others wait in a queue.
        queue: sessions that may wait; one more is refused.
        streams_per_session: streams side by side in one session (a fork, a comparison).
        ahead_seconds: generation runs at most so far ahead of play-out, unless a stream asks for another number.
        stream_seconds: media time after which a stream ends.
        idle_seconds: a stream that nobody steers for so long ends.
        linger_seconds: a stream without any connection or request for so long ends.
        prompt_characters: longest prompt.
        window: largest window, in latent frames.
        pixels: largest height x width.
        upload_bytes: largest saved stream that may be sent.
    """

    sessions: int = 2
    queue: int = 32
    streams_per_session: int = 2
    ahead_seconds: float = 1.0
    stream_seconds: float = 3600
    idle_seconds: float = 900
    linger_seconds: float = 30
    prompt_characters: int = 500
    window: int = 48
    pixels: int = 1280 * 720
    upload_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "queue" else 0.1 if field.type == "float" else 1
            if not value >= least:
                raise UserError(f"{field.name} = {value} must be at least {least}")
