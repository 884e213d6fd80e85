"""The metrics by name. A metric is a class with a docstring whose first sentence is its definition.

    @register("long.freeze", fidelity="own", better="down", unit="share")
    class Freeze(Metric):
        \"\"\"Share of frames that repeat the one before.\"\"\"

One object measures one video: `begin`, `add` for every batch of frames in order, `end`. It holds a bounded number of frames.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streamvid.errors import UserError
from streamvid.evaluation.types import Batch, Clip, Fidelity, Outcome, digest

if TYPE_CHECKING:
    from streamvid.evaluation.backbones import Backbones

Better = Literal["up", "down", ""]
METRICS: dict[str, type[Metric]] = {}
MODULES = (  # in the order of reports
    "vbench_quality",
    "vbench_semantic",
    "vbench_long",
    "drift",
    "motion",
    "repetition",
    "interactive",
    "timing",
)


class Metric:
    """Base of the metrics.

    Class attributes: `name`; `version`, raised when values change; `fidelity`; `better` (up, down, or neither); `unit`;
    `needs`, names of backbones; `aggregate`: the mean over videos, or over frames (by `Outcome.weight`).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    fidelity: ClassVar[Fidelity]
    better: ClassVar[Better]
    unit: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    aggregate: ClassVar[Literal["videos", "frames"]] = "videos"
    frames_needed: ClassVar[bool] = True

    def __init__(self, backbones: Backbones):
        self.backbones = backbones

    def begin(self, clip: Clip) -> str | None:
        """Prepare for a video; a reason if the metric does not apply to it."""
        self.clip = clip
        return None

    def add(self, batch: Batch) -> None:
        """Look at the next frames."""

    def end(self) -> Outcome:
        """What was found."""
        raise NotImplementedError


def register(
    name: str,
    *,
    fidelity: Fidelity,
    better: Better,
    unit: str = "",
    needs: Sequence[str] = (),
    aggregate: Literal["videos", "frames"] = "videos",
    version: int = 1,
) -> Callable[[type[Metric]], type[Metric]]:
    """Put a class under a name."""

    def put(cls: type[Metric]) -> type[Metric]:
        cls.name, cls.fidelity, cls.better, cls.unit = name, fidelity, better, unit
        cls.needs, cls.aggregate, cls.version = tuple(needs), aggregate, version
        if name in METRICS:
            raise ValueError(f"two metrics are called {name}")
        METRICS[name] = cls
        return cls

    return put


def all_metrics() -> dict[str, type[Metric]]:
    """Every metric, in the order of reports."""
    for module in MODULES:
        import_module(f"streamvid.evaluation.metrics.{module}")
    return METRICS


@dataclass(frozen=True)
class MetricRequest:
    """A metric and its options, as a protocol asks for them."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, backbones: Backbones) -> Metric:
        try:
            return all_metrics()[self.name](backbones, **self.options)
        except TypeError as error:
            raise UserError(
                f"metric {self.name}: options {dict(self.options)} do not fit ({error})"
            ) from error

    def key(self, facts: str, content: str, weights: str) -> str:
        """What a stored value depends on: the video's facts and content, the metric, its options and weights."""
        cls = all_metrics()[self.name]
        return digest([facts, content, self.name, cls.version, dict(self.options), weights])[:32]


def resolve(patterns: Sequence[str | Mapping[str, Any]]) -> list[MetricRequest]:
    """Names, globs (`drift.*`) and `{name: ..., option: ...}` to requests, in the order of reports.

    A later entry with options takes the place of an earlier one; `!pattern` takes names away.
    """
    known = all_metrics()
    chosen: dict[str, MetricRequest] = {}
    for entry in patterns:
        options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        pattern = str(options.pop("name", ""))
        names = fnmatch.filter(known, pattern.removeprefix("!"))
        if not names:
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
            raise UserError(
                f"metrics: {pattern!r} names no metric; did you mean {near[0] if near else 'vbench.*'}? "
                "(streamvid eval list shows all)"
            )
        for name in names:
            if pattern.startswith("!"):
                chosen.pop(name, None)
            else:
                chosen[name] = MetricRequest(name, options)
    return [chosen[name] for name in known if name in chosen]
