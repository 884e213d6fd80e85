"""What the HTTP API takes and gives, as OpenAPI shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=5000)]
Policy = Annotated[
    str,
    Field(
        max_length=64,
        description="switch policy, e.g. recache, flush, blend(8, slerp); default: the method's",
    ),
]
Seed = Annotated[int, Field(ge=0, le=2**63 - 2)]
OptionValue = (
    bool
    | Annotated[int, Field(ge=-(10**9), le=10**9)]
    | Number
    | Annotated[str, Field(max_length=64)]
    | list[Number]
    | None
)


class Body(BaseModel):
    """Unknown fields are refused: a misspelt one would silently do nothing."""

    model_config = ConfigDict(extra="forbid")


class CreateStream(Body):
    """Either `prompt`, for an endless stream, or `script`, for one that ends by itself."""

    prompt: Text | None = Field(None, examples=["A large red cube floats on the ice at dawn"])
    script: Annotated[str, Field(min_length=1, max_length=100_000)] | None = Field(
        None,
        description="a script of timed prompts in YAML or as one line, e.g. `a fox walks [5s] | it snows [10s]`",
    )
    method: Annotated[str, Field(max_length=64)] | None = Field(None, description="a preset, e.g. longlive")
    overrides: dict[Annotated[str, Field(max_length=64)], OptionValue] = Field(
        default_factory=dict, description="single options of the method, e.g. {'sink': 0, 'window': 9}"
    )
    steps: int | None = Field(
        None, ge=1, le=16, description="denoising steps, evenly spaced; default: the method's"
    )
    seed: Seed | None = None
    height: int | None = Field(None, ge=16, le=8192, description="pixels")
    width: int | None = Field(None, ge=16, le=8192, description="pixels")
    ahead: float | None = Field(
        None, ge=0.1, le=60, description="seconds that generation may run ahead of play-out"
    )
    linger: float | None = Field(
        None,
        ge=0.5,
        le=3600,
        description="the stream ends after so many seconds without a connection or a request",
    )
    beside: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="name of a stream whose session (seat) the new one shares"
    )


class PromptBody(Body):
    text: Text
    policy: Policy | None = None


class CutBody(Body):
    text: Text | None = Field(None, description="default: the current prompt")


class ResetBody(Body):
    seed: Seed | None = Field(None, description="default: the same")


class PositionBody(Body):
    """What a player reports, so that generation keeps step with it."""

    position: float = Field(ge=0, le=1e9, allow_inf_nan=False, description="media time shown, in seconds")
    rate: float = Field(1, ge=0, le=4, allow_inf_nan=False, description="how fast it plays")


class ScriptBody(Body):
    text: Annotated[str, Field(min_length=1, max_length=100_000)]
    kind: Literal["auto", "line", ".yaml", ".json", ".jsonl", ".txt"] = "auto"
    method: Annotated[str, Field(max_length=64)] | None = None


class ReceiptOut(BaseModel):
    receipt: int
    text: str
    policy: str | None
    status: Literal["pending", "applied", "replaced", "dropped"]
    accepted_at: float = Field(description="Unix time")
    applied_at: float | None = Field(description="Unix time at which its first chunk was made")
    chunk: int | None = Field(description="first chunk that was made with it")
    media_time: float | None = Field(description="second of the stream at which that chunk begins")


class ShotOut(BaseModel):
    shot: int
    prompt: str
    start: float
    chunk: int
    policy: str | None
    receipt: int | None


class StreamOut(BaseModel):
    """A stream; times are seconds of media time unless they are said to be Unix time."""

    stream: str = Field(description="its name: the secret to steer it by")
    status: Literal["queued", "running", "paused", "ended"]
    place: int | None = Field(None, description="place in the queue, from 1")
    reason: str
    message: str
    prompt: str
    pending: str | None
    method: str
    options: dict[str, Any]
    seed: int
    height: int
    width: int
    fps: float
    title: str | None
    start: float
    chunks: int
    made: float
    position: float
    ahead: float
    ahead_limit: float
    speed: float | None
    kv_bytes: int
    codec: str
    shots: list[ShotOut]
    receipts: list[ReceiptOut]


class ScriptOut(BaseModel):
    title: str | None
    yaml: str
    seconds: float
    settings: dict[str, Any] = Field(
        description="method, seed, size and the like, where the script says them"
    )
    shots: list[dict[str, Any]]
    notes: list[str]


class Problem(BaseModel):
    detail: Any = Field(description="what is wrong and what to do about it")
