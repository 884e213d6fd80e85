"""From outcomes of videos to numbers of a run, the same bytes whichever processes measured what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamvid.evaluation.registry import all_metrics
from streamvid.evaluation.types import Outcome


@dataclass(frozen=True)
class Aggregate:
    """A metric over videos: its mean, how many videos have a value, how many it applies to."""

    value: float | None
    used: int
    of: int


def aggregate(metric: str, outcomes: Sequence[Outcome]) -> Aggregate:
    """The mean over videos, or over frames where the metric says so; videos without a value count as neither."""
    told = [outcome for outcome in outcomes if outcome.status == "ok" and outcome.score is not None]
    if not told:
        return Aggregate(None, 0, len(outcomes))
    by_frames = all_metrics()[metric].aggregate == "frames"
    weights = [outcome.weight if by_frames else 1.0 for outcome in told]
    scores = [outcome.score for outcome in told if outcome.score is not None]
    return Aggregate(float(np.average(scores, weights=weights)), len(told), len(outcomes))
