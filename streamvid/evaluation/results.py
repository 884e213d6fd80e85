"""From outcomes of videos to a run's results: JSON and CSV, the same bytes whichever processes measured what."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamvid.errors import UserError
from streamvid.evaluation import stats
from streamvid.evaluation.registry import MetricRequest, all_metrics
from streamvid.evaluation.score import DIMENSIONS, normalised, totals
from streamvid.evaluation.types import Outcome, Video
from streamvid.io.files import replace_atomically

FORMAT = "streamvid-evaluation-1"
Outcomes = Mapping[str, Mapping[str, Outcome]]  # by metric and id of the video


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


def group_means(outcomes: Mapping[str, Outcome], videos: Mapping[str, Video]) -> dict[str, float]:
    """Mean value of every prompt (or script) that has one."""
    found: dict[str, list[float]] = {}
    for name, outcome in sorted(outcomes.items()):
        if outcome.status == "ok" and outcome.score is not None:
            found.setdefault(videos[name].group or name, []).append(outcome.score)
    return {group: float(np.mean(values)) for group, values in sorted(found.items())}


def metric_results(
    request: MetricRequest, outcomes: Mapping[str, Outcome], videos: Mapping[str, Video]
) -> dict[str, Any]:
    """One metric of a run."""
    cls = all_metrics()[request.name]
    whole = aggregate(request.name, [outcomes[name] for name in sorted(outcomes)])
    means = group_means(outcomes, videos)
    bounds = stats.interval(np.array(list(means.values()))) if means else None
    told = [(o.score, videos[v].group or v) for v, o in sorted(outcomes.items()) if o.score is not None]
    parts = stats.variance_parts(*zip(*told, strict=True)) if told else None  # type: ignore[arg-type]
    reasons: dict[str, int] = {}
    for outcome in outcomes.values():
        if outcome.status != "ok":
            key = f"{outcome.status}: {outcome.reason}"
            reasons[key] = reasons.get(key, 0) + 1
    return {
        "value": whole.value,
        "interval": [bounds.low, bounds.high] if bounds else None,
        "used": whole.used,
        "of": whole.of,
        "prompts": len(means),
        "seed_deviation": parts[1] if parts else None,
        "fidelity": cls.fidelity,
        "better": cls.better,
        "unit": cls.unit,
        "version": cls.version,
        "aggregate": cls.aggregate,
        "options": dict(request.options),
        "definition": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "without_value": dict(sorted(reasons.items())),
        "per_video": {
            name: {
                "status": outcome.status,
                "score": outcome.score,
                **({"reason": outcome.reason} if outcome.reason else {}),
                **({"details": dict(outcome.details)} if outcome.details else {}),
            }
            for name, outcome in sorted(outcomes.items())
        },
    }


def vbench_scores(
    metrics: Mapping[str, Mapping[str, Any]], outcomes: Outcomes, videos: Mapping[str, Video], family: str
) -> dict[str, Any] | None:
    """Normalised dimensions and totals of `vbench` or `vbench_long`, with intervals over prompts."""
    raw = {name: metrics[f"{family}.{name}"]["value"] for name in DIMENSIONS if f"{family}.{name}" in metrics}
    if not raw:
        return None
    samples = {
        name: np.array(list(group_means(outcomes[f"{family}.{name}"], videos).values()))
        for name in raw
        if raw[name] is not None
    }
    found: dict[str, Any] = {
        "dimensions": {
            name: None if value is None else {"raw": value, "normalised": normalised(name, value)}
            for name, value in raw.items()
        },
        "missing": [name for name in DIMENSIONS if raw.get(name) is None],
        "fidelity": sorted(
            {all_metrics()[f"{family}.{name}"].fidelity for name in raw if raw[name] is not None}
        ),
    }
    for key, value in totals(raw).items():
        bounds = None
        if value is not None:
            draw = stats.bootstrap_of(samples, partial(_total, key))
            bounds = [draw.low, draw.high]
        found[key] = {"value": value, "interval": bounds}
    return found


def _total(key: str, means: Mapping[str, float]) -> float:
    return totals(means)[key] or 0.0


def build(
    requests: Sequence[MetricRequest],
    outcomes: Outcomes,
    videos: Sequence[Video],
    problems: Sequence[str],
    about: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and, apart, what was measured in seconds, which no two runs have in common."""
    known = {video.id: video for video in videos}
    metrics = {r.name: metric_results(r, outcomes[r.name], known) for r in requests}
    timed = {name: metrics.pop(name) for name in list(metrics) if name.startswith("timing.")}
    trouble = list(problems)
    for video in sorted(known):
        reasons = sorted(
            {o[video].reason for o in outcomes.values() if video in o and o[video].status == "failed"}
        )
        trouble += [f"{video}: {reason}" for reason in reasons]
    scores = {}
    for family in ("vbench", "vbench_long"):
        told = vbench_scores(metrics, outcomes, known, family)
        if told:
            scores[family] = told
    results = {
        "format": FORMAT,
        **about,
        "videos": len(videos),
        "scores": scores,
        "metrics": metrics,
        "problems": trouble,
    }
    return results, {"format": FORMAT, "metrics": timed}


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    with replace_atomically(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_all(
    folder: Path, results: dict[str, Any], timing: dict[str, Any], outcomes: Outcomes, videos: Sequence[Video]
) -> None:
    """results.json, timing.json, scores.json, series.json and three CSV tables."""
    write_text(folder / "results.json", to_json(results))
    write_text(folder / "timing.json", to_json(timing))
    write_text(folder / "scores.json", to_json(results["scores"]))
    series = {
        metric: {name: dict(o.series) for name, o in sorted(found.items()) if o.series}
        for metric, found in sorted(outcomes.items())
        if not metric.startswith("timing.")
    }
    write_text(folder / "series.json", to_json({name: table for name, table in series.items() if table}))
    for name, rows in _tables(outcomes, {video.id: video for video in videos}).items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(folder / f"{name}.csv", text.getvalue())


def _tables(outcomes: Outcomes, videos: Mapping[str, Video]) -> dict[str, list[list[Any]]]:
    per_video: list[list[Any]] = [
        ["video", "group", "sample", "metric", "status", "score", "weight", "reason"]
    ]
    per_segment: list[list[Any]] = [["video", "metric", "segment", "prompt", "value"]]
    per_second: list[list[Any]] = [["video", "metric", "second", "value"]]
    for metric in sorted(outcomes):
        if metric.startswith("timing."):
            continue
        for name, o in sorted(outcomes[metric].items()):
            video = videos[name]
            per_video.append([name, video.group, video.sample, metric, o.status, o.score, o.weight, o.reason])
            prompts = [segment.prompt for segment in video.segments] or [video.prompt]
            for number, value in enumerate(o.series.get("per_segment", ())):
                per_segment.append([name, metric, number, prompts[number], value])
            for second, value in enumerate(o.series.get("per_second", ())):
                per_second.append([name, metric, second, value])
    return {"per_video": per_video, "per_segment": per_segment, "per_second": per_second}


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results of a run's folder, with its times."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != FORMAT:
            raise ValueError("it has another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run = {str(folder)!r} has no results that can be read ({error}): give the folder of `streamvid eval`"
        ) from error
    timing = Path(folder) / "timing.json"
    results["timing"] = json.loads(timing.read_text())["metrics"] if timing.is_file() else {}
    return results
