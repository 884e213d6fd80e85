"""`streamvid eval run` and `score`: a folder of videos in, results and a report out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamvid.errors import UserError
from streamvid.evaluation.backbones import BACKBONES, Backbones
from streamvid.evaluation.manifest import MANIFEST, find_videos, name_problem, read_beside, write_manifest
from streamvid.evaluation.protocol import Protocol, jobs
from streamvid.evaluation.registry import MetricRequest, all_metrics
from streamvid.evaluation.report import write_report
from streamvid.evaluation.results import build, to_json, write_all, write_text
from streamvid.evaluation.run import Evaluation, outcomes_of, processes
from streamvid.evaluation.types import Video
from streamvid.io.files import prepare_output_folder
from streamvid.io.manifest import environment


def run_protocol(
    protocol: Protocol,
    output: str | Path,
    *,
    model: str | None = None,
    method: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    suite: str | None = None,
    limit: int | None = None,
    weights: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Generate a protocol's videos with a model and method, and measure them; what is there already is kept.

    Args:
        output: folder of the run; suite: file of prompts in place of the protocol's; limit: the first so many videos;
        weights: folder of backbones. The others are those of `streamvid.generate.generate`.

    Returns:
        The results, on the main process.
    """
    from streamvid.evaluation.produce import Producer  # with the pipeline, which measuring does not need
    from streamvid.methods import load_method
    from streamvid.models import DEFAULT_MODEL, model_method

    folder = prepare_output_folder(output)
    model = model or DEFAULT_MODEL
    chosen = method or protocol.generation.method or model_method(model)
    if chosen is not None:
        load_method(chosen, {**protocol.generation.overrides, **(overrides or {})})
    wanted = jobs(protocol, folder / "videos", suite)[:limit]
    settings = {
        "protocol": protocol.name,
        "protocol_version": protocol.version,
        "model": model,
        "method": chosen,
        "overrides": {**protocol.generation.overrides, **(overrides or {})},
        "suite": suite or protocol.suite.file or protocol.suite.kind,
        "deviations": list(protocol.deviations),
        "primary": list(protocol.primary),
    }
    _same_run(folder, {**settings, "generation": _plain(protocol.generation)})
    producer = Producer(wanted, protocol.generation, model, chosen, dict(overrides or {}), device, dtype)
    videos = [job.video for job in wanted]
    return evaluate(
        folder, videos, protocol.requests(), settings, weights=weights, produce=producer, quiet=quiet
    )


def score_videos(
    paths: Sequence[str | Path],
    output: str | Path,
    requests: Sequence[MetricRequest],
    *,
    prompts: Mapping[str, str] | None = None,
    primary: Sequence[str] = (),
    weights: str | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Measure videos that exist: files, folders of them, frame folders, or the folder of a run."""
    problems: list[str] = []
    videos = find_videos(paths, problems, prompts)
    if not videos:
        raise UserError(
            f"videos = {', '.join(map(str, paths))}: none is found; give video files or folders of them"
        )
    official = any(request.name.startswith("vbench") for request in requests)
    if official:
        long = any(request.name.startswith("vbench_long") for request in requests)
        for video in videos:
            trouble = name_problem(video.prompt, long)
            if trouble:
                problems.append(f"{video.id}: VBench would misread its name: {trouble}")
    settings = {"protocol": None, "model": None, "method": None, "deviations": [], "primary": list(primary)}
    return evaluate(
        prepare_output_folder(output),
        videos,
        requests,
        settings,
        problems=problems,
        weights=weights,
        quiet=quiet,
    )


def evaluate(
    folder: Path,
    videos: Sequence[Video],
    requests: Sequence[MetricRequest],
    settings: Mapping[str, Any],
    *,
    problems: Sequence[str] = (),
    weights: str | None = None,
    produce: Callable[[Video], Video] | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Measure, merge and write everything under `folder`; returns the results on the main process, else None."""
    backbones = Backbones(weights)
    evaluation = Evaluation(folder, videos, requests, backbones, produce, quiet)
    evaluation.run()
    if not processes().is_main_process:
        return None
    if produce is not None:
        described = [read_beside(Path(v.path).with_suffix(".video.json")) for v in videos]
        videos = [replace(d, path=v.path) if d else v for d, v in zip(described, videos, strict=True)]
    videos = sorted(videos, key=lambda video: video.id)
    outcomes, trouble = outcomes_of(folder, videos, requests, backbones)
    results, timing = build(requests, outcomes, videos, [*problems, *trouble], settings)
    write_manifest(folder / MANIFEST, videos)
    write_all(folder, results, timing, outcomes, videos)
    metrics = all_metrics()
    used = sorted({need for request in requests for need in metrics[request.name].needs})
    licences = {name: BACKBONES[name].licence for name in used if backbones.problem([name]) is None}
    about = {**settings, **environment(), "licences": licences}
    write_text(folder / "run.json", to_json({**_read(folder / "run.json"), **about}))
    write_report(folder)
    return results


def plan_table(videos: Sequence[Video], requests: Sequence[MetricRequest], weights: str | None = None) -> str:
    """What would be done: videos, and each metric with what it lacks."""
    backbones = Backbones(weights)
    lines = [f"{len(videos)} videos, {len(requests)} metrics"]
    for request in requests:
        cls = all_metrics()[request.name]
        missing = backbones.problem(cls.needs)
        lines.append(
            f"  {request.name:34} {cls.fidelity:11} {'skipped: ' + missing if missing else 'measured'}"
        )
    return "\n".join(lines)


def _same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what a folder's videos are made with; a folder of other settings is refused."""
    path = folder / "run.json"
    known = _read(path)
    text = json.loads(json.dumps(settings))
    for name in ("protocol", "model", "method", "overrides", "suite", "generation"):
        if known and known.get(name) != text[name]:
            raise UserError(
                f"output = {str(folder)!r} holds a run with {name} = {known.get(name)!r} and this one has "
                f"{text[name]!r}: give another folder"
            )
    if processes().is_main_process and not known:
        write_text(path, to_json(text))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _plain(generation: Any) -> dict[str, Any]:
    return json.loads(json.dumps(generation.__dict__, default=str))
