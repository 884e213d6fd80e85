"""Folders that VBench's own tool reads, result files of its shape, and the way back."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamvid.errors import UserError
from streamvid.evaluation.manifest import MANIFEST, name_problem, read_manifest
from streamvid.evaluation.results import FORMAT, read_results, to_json, write_text
from streamvid.evaluation.score import DIMENSIONS, normalised, totals
from streamvid.evaluation.types import Video
from streamvid.io.files import prepare_output_folder

FORMATS = ("vbench", "vbench-long", "custom", "segments", "leaderboard")
GROUPS: dict[tuple[str, ...], str] = {  # VBench's folders of prompts, by the dimensions that they feed
    ("subject_consistency", "dynamic_degree", "motion_smoothness"): "subject_consistency",
    ("scene", "background_consistency"): "scene",
    ("overall_consistency", "aesthetic_quality", "imaging_quality"): "overall_consistency",
    **{
        (name,): name
        for name in (
            *("temporal_flickering", "object_class", "multiple_objects", "human_action", "color"),
            *("spatial_relationship", "appearance_style", "temporal_style"),
        )
    },
}
SCALE = {"imaging_quality": 100.0}  # of a video's value in official files


def export_run(run: Path, output: Path, form: str) -> str:
    """Export a run; says what was written.

    `vbench` and `vbench-long` write `<group>/<prompt>-<i>.mp4` and the results; `custom` safe names and a prompt file;
    `segments` one file per prompt of an interactive video; `leaderboard` the zip that the official scoring script takes.
    """
    if form not in FORMATS:
        raise UserError(f"format = {form!r} is not known: choose one of {', '.join(FORMATS)}")
    folder = prepare_output_folder(output)
    videos = read_manifest(run / MANIFEST, [])
    results = read_results(run)
    if form == "leaderboard":
        return _leaderboard(results, folder)
    if form == "segments":
        return _segments(videos, folder)
    if form == "custom":
        return _custom(videos, folder)
    return _official(videos, results, folder, long=form == "vbench-long")


def _official(videos: Sequence[Video], results: Mapping[str, Any], folder: Path, long: bool) -> str:
    problems = {video.id: name_problem(video.prompt, long) for video in videos}
    bad = [f"{name} ({reason})" for name, reason in problems.items() if reason]
    if bad:
        raise UserError(
            f"{len(bad)} videos have names that VBench misreads, first {bad[0]}: export them as custom"
        )
    places: dict[str, str] = {}
    for video in videos:
        group = GROUPS.get(tuple(video.dimensions), "")
        target = folder / "videos" / group / f"{video.prompt}-{video.sample}.mp4"
        if str(target) in places:
            raise UserError(
                f"{video.id} and {places[str(target)]} would be one file, {target.name}: give other samples"
            )
        places[str(target)] = video.id
        _copy(video, target)
    names = {video.id: str(Path("videos") / f"{video.prompt}-{video.sample}.mp4") for video in videos}
    families = official_results(results, names, "vbench_long" if long else "vbench")
    for dimension, told in families.items():
        write_text(folder / f"{dimension}_eval_results.json", to_json({dimension: told}))
    _recipe(folder, long)
    return f"wrote {len(places)} videos and {len(families)} result files to {folder}"


def _copy(video: Video, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = Path(video.path)
    if not source.is_file():
        raise UserError(f"{video.id}: {source} is no video file: export runs of files")
    shutil.copyfile(source, target)


def official_results(
    results: Mapping[str, Any], names: Mapping[str, str], family: str
) -> dict[str, list[Any]]:
    """`{dimension: [aggregate, [{video_path, video_results}, ...]]}` of the dimensions that have a value."""
    found = {}
    for name in DIMENSIONS:
        entry = results["metrics"].get(f"{family}.{name}")
        if not entry or entry["value"] is None:
            continue
        rows: list[dict[str, Any]] = []
        for video, told in entry["per_video"].items():
            if told["score"] is None:
                continue
            value: Any = told["score"] * SCALE.get(name, 1.0)
            if name == "dynamic_degree" and family == "vbench":
                value = bool(value)
            rows.append({"video_path": names.get(video, video), "video_results": value})
        found[name] = [entry["value"], rows]
    return found


def _leaderboard(results: Mapping[str, Any], folder: Path) -> str:
    told = official_results(results, {}, "vbench") or official_results(results, {}, "vbench_long")
    if not told:
        raise UserError("the run has no VBench dimension with a value: measure vbench.* first")
    path = folder / "leaderboard.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for dimension, value in told.items():
            entry = zipfile.ZipInfo(
                f"{dimension}_eval_results.json"
            )  # its time is fixed: same bytes every time
            archive.writestr(entry, json.dumps({dimension: value}))
    missing = [name for name in DIMENSIONS if name not in told]
    note = f"; without {', '.join(missing)}, which the official script counts as 0" if missing else ""
    return f"wrote {path}{note}"


def _custom(videos: Sequence[Video], folder: Path) -> str:
    prompts = {}
    for number, video in enumerate(videos):
        name = f"v{number:06d}-0.mp4"
        _copy(video, folder / "videos" / name)
        prompts[name] = video.prompt
    write_text(folder / "prompt_file.json", to_json(prompts))
    return f"wrote {len(prompts)} videos and prompt_file.json to {folder}"


def _segments(videos: Sequence[Video], folder: Path) -> str:
    from streamvid.evaluation.produce import ArchiveWriter
    from streamvid.evaluation.sources import open_source

    count = 0
    for video in videos:
        if not video.segments:
            continue
        source = open_source(video.path)
        writer, number = None, -1
        for index, rgb in enumerate(source.frames()):
            current = next((i for i, s in enumerate(video.segments) if s.start <= index < s.stop), -1)
            if current != number:
                if writer is not None:
                    writer.close()
                segment, number = video.segments[current], current
                reason = name_problem(segment.prompt)
                name = f"segment-{current}" if reason else segment.prompt
                target = folder / "segments" / f"{video.id}-s{current}" / f"{name}-0.mp4"
                target.parent.mkdir(parents=True, exist_ok=True)
                writer = ArchiveWriter(target, source.measure.fps, *rgb.shape[:2])
                count += 1
            assert writer is not None
            writer.write(rgb[None])
        if writer is not None:
            writer.close()
    if not count:
        raise UserError("no video of the run has several prompts: export it as vbench or custom")
    return f"wrote {count} segments to {folder}"


def _recipe(folder: Path, long: bool) -> None:
    """How to run the official tool on the folder; nobody has run this here."""
    official = (
        "vbench2_beta_long/eval_long.py --mode long_vbench_standard --dev_flag" if long else "evaluate.py"
    )
    text = f"""#!/bin/sh
# Untested here. In a checkout of the VBench repository (not its wheel), Python 3.10, with these versions:
#   torch==2.5.1 torchvision==0.20.1 transformers==4.33.2 numpy==1.26.4 setuptools==65.5.1 'moviepy<2'
# Remove split_clip and *_cat_firstframes_videos folders of earlier runs: they are reused silently.
V=${{1:?folder of videos}}
for D in {" ".join(DIMENSIONS)}; do
  python {official} --videos_path "$V" --dimension $D
done
"""
    write_text(folder / "run_official.sh", text)


def read_official(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Official results by dimension, from `*_eval_results.json` files, folders (one deep) or a zip of them."""
    found: dict[str, list[Any]] = {}

    def take(text: str, source: str) -> None:
        try:
            record = json.loads(text)
            for name, value in record.items():
                if name not in DIMENSIONS or not isinstance(value[0], (int, float, bool)):
                    raise ValueError(f"{name} is no dimension with a value")
                if name in found and found[name][0] != value[0]:
                    raise ValueError(f"{name} is told twice, with other values")
                found[name] = value
        except (ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
            raise UserError(
                f"{source}: is no official result ({error}): give *_eval_results.json files"
            ) from error

    for path in paths:
        if path.is_dir():
            for file in sorted([*path.glob("*_eval_results.json"), *path.glob("*/*_eval_results.json")]):
                take(file.read_text(), str(file))
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(n for n in archive.namelist() if n.endswith("_eval_results.json")):
                    take(archive.read(name).decode(), f"{path}:{name}")
        elif path.is_file():
            take(path.read_text(), str(path))
        else:
            raise UserError(f"{path}: there is no such file: give official result files")
    if not found:
        raise UserError(
            f"{', '.join(map(str, paths))}: no *_eval_results.json is found: give official result files"
        )
    return found


def import_official(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Official results as a run's results.json, so that they stand in reports and comparisons like our own."""
    told = read_official(paths)
    metrics: dict[str, dict[str, Any]] = {}
    for name, value in told.items():
        rows = value[1] if len(value) > 1 and isinstance(value[1], list) else []
        per_video = {
            re.sub(r"\.\w+$", "", Path(row["video_path"]).name): {
                "status": "ok",
                "score": float(row["video_results"]) / SCALE.get(name, 1.0),
            }
            for row in rows
            if isinstance(row, dict) and "video_results" in row
        }
        metrics[f"vbench.{name}"] = {
            "value": float(value[0]),
            "interval": None,
            "used": len(per_video),
            "of": len(per_video),
            "prompts": len(per_video),
            "seed_deviation": None,
            "fidelity": "exact",
            "better": "up",
            "unit": "",
            "version": 0,
            "aggregate": "videos",
            "options": {},
            "definition": "official value, imported",
            "without_value": {},
            "per_video": per_video,
        }
    raw = {name: float(value[0]) for name, value in told.items()}
    scores = {
        "dimensions": {name: {"raw": v, "normalised": normalised(name, v)} for name, v in raw.items()},
        "missing": [name for name in DIMENSIONS if name not in raw],
        "fidelity": ["exact"],
        **{key: {"value": v, "interval": None} for key, v in totals(raw).items()},
    }
    videos = {name for entry in metrics.values() for name in entry["per_video"]}
    results: dict[str, Any] = {
        "format": FORMAT,
        "protocol": "official",
        "model": None,
        "method": None,
        "deviations": [],
        "primary": [],
        "videos": len(videos),
        "scores": {"vbench": scores},
        "metrics": {f"vbench.{name}": metrics[f"vbench.{name}"] for name in DIMENSIONS if name in told},
        "problems": [],
    }
    folder = prepare_output_folder(output)
    write_text(folder / "results.json", to_json(results))
    write_text(folder / MANIFEST, "")
    return results
