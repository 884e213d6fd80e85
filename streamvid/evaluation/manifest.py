"""Which videos are measured: found in folders, described by what lies beside them, listed in `manifest.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamvid.errors import UserError
from streamvid.evaluation.sampling import prompt_of_name
from streamvid.evaluation.sources import PICTURES, VIDEOS
from streamvid.evaluation.types import Segment, Video
from streamvid.io.files import replace_atomically
from streamvid.io.manifest import FORMAT

MANIFEST = "manifest.jsonl"
LONGEST_NAME = 255  # bytes of a file name


def read_manifest(path: Path, problems: list[str]) -> list[Video]:
    """The videos of a manifest; a line that is none is a problem and not an end."""
    videos: dict[str, Video] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            video = Video.from_dict(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{path.name}:{number}: is no video ({' '.join(str(error).split())[:100]})")
            continue
        if video.id in videos:
            problems.append(f"{path.name}:{number}: {video.id} is listed twice; the first counts")
        else:
            videos[video.id] = replace(video, path=str(path.parent / video.path))
    return list(videos.values())


def write_manifest(path: Path, videos: Iterable[Video]) -> None:
    """One line per video, paths relative to the manifest where they can be."""
    lines = []
    for video in videos:
        place = Path(video.path)
        inside = place.resolve().is_relative_to(path.parent.resolve())
        short = str(place.resolve().relative_to(path.parent.resolve())) if inside else str(place)
        lines.append(json.dumps(replace(video, path=short).to_dict(), ensure_ascii=False, sort_keys=True))
    with replace_atomically(path) as temporary:
        Path(temporary).write_text("\n".join(lines) + "\n", encoding="utf-8")


def find_videos(
    paths: Sequence[str | Path], problems: list[str], prompts: Mapping[str, str] | None = None
) -> list[Video]:
    """The videos of files, frame folders, and folders of them (with or without `manifest.jsonl`).

    A prompt comes from `prompts` (by file name), else from the manifest that `streamvid generate` wrote beside the video,
    else from the file's name, as VBench reads it.
    """
    found: dict[str, Video] = {}
    for entry in map(Path, paths):
        if not entry.exists():
            problems.append(f"{entry}: there is no such file")
            continue
        if entry.is_dir() and (entry / MANIFEST).is_file():
            listed = read_manifest(entry / MANIFEST, problems)
            known = {Path(video.path).resolve() for video in listed}
            strays = [f for f in _video_files(entry) if f.resolve() not in known]
            problems += [f"{stray.name}: is not in {MANIFEST} and is left out" for stray in strays]
            videos = listed
        elif entry.is_dir() and not _is_frame_folder(entry):
            videos = [_describe(file, prompts) for file in _video_files(entry)]
            if not videos:
                problems.append(f"{entry}: the folder has no videos")
        else:
            videos = [_describe(entry, prompts)]
        for video in videos:
            if video.id in found:
                problems.append(f"{video.path}: has the same name as {found[video.id].path} and is left out")
            else:
                found[video.id] = video
    return list(found.values())


def _is_frame_folder(folder: Path) -> bool:
    return any(file.suffix.lower() in PICTURES for file in folder.iterdir()) and not any(
        file.suffix.lower() in VIDEOS for file in folder.iterdir()
    )


def _video_files(folder: Path) -> list[Path]:
    inside = sorted(folder.iterdir())
    files = [file for file in inside if file.suffix.lower() in VIDEOS and not file.name.startswith(".")]
    frames = [entry for entry in inside if entry.is_dir() and _is_frame_folder(entry)]
    return sorted([*files, *frames])


def _describe(path: Path, prompts: Mapping[str, str] | None) -> Video:
    """A video by its name, its prompt file and what `streamvid generate` wrote beside it."""
    index = re.search(r"-(\d+)$", path.stem)
    prompt = (prompts or {}).get(path.name) or prompt_of_name(path.name)
    video = Video(path.stem, str(path), prompt, int(index[1]) if index else 0, group=prompt)
    for beside in (path.with_suffix(".json"), path.with_suffix(".manifest.json")):
        try:
            record = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("format") == FORMAT:
            return from_record(video, record, keep_prompt=bool(prompts and path.name in prompts))
    return video


def from_record(video: Video, record: Mapping[str, Any], keep_prompt: bool = False) -> Video:
    """The video with what the manifest of its generation tells: segments, chunk borders, times."""
    chunks = record["chunks"]
    segments: list[Segment] = []
    borders, position, switches = [], 0, []
    for number, chunk in enumerate(chunks):
        if number:
            borders.append(position)
        if not segments or segments[-1].prompt != chunk["prompt"]:
            if segments:
                switches.append(number)
            segments.append(Segment(position, position, chunk["prompt"]))
        position += chunk["frames"]
        segments[-1] = replace(segments[-1], stop=position)
    timings = {
        "chunk_seconds": [chunk["timings"].get("total", 0.0) for chunk in chunks],
        "chunk_frames": [chunk["frames"] for chunk in chunks],
        "switches": switches,
        "peak_memory_mb": record["totals"].get("peak_memory_mb"),
    }
    prompt = video.prompt if keep_prompt or len(segments) != 1 else segments[0].prompt
    return replace(
        video,
        prompt=prompt,
        group=video.group or prompt,
        seed=record.get("seed"),
        fps=record.get("fps"),
        segments=tuple(segments) if len(segments) > 1 else (),
        borders=tuple(borders),
        timings=timings,
    )


def read_prompts(path: Path) -> dict[str, str]:
    """VBench's prompt file: a JSON object `{"file name": "prompt"}`."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
            raise ValueError("it is not an object of texts")
    except (OSError, ValueError) as error:
        raise UserError(f'prompts = {path}: {error}; give {{"file name": "prompt"}}') from error
    return table


def name_problem(name: str, long: bool = False) -> str | None:
    """Why VBench would misread a prompt used as a file's name, or None."""
    if not name.strip():
        return "the name is empty"
    if "/" in name or "\0" in name:
        return "it has a character that no file name may have"
    if len(f"{name}-00.mp4".encode()) > LONGEST_NAME:
        return f"it is longer than {LONGEST_NAME} bytes, which no file name may be"
    if re.search(r"-\d+$", name):
        return "its last '-<digits>' would be read as a sample's number"
    if long and "_" in name:
        return "VBench-Long cuts names at '_' and loses the clip-to-clip half"
    return None


def check_video(video: Video, frames: int, fps: float) -> str | None:
    """Why a file is no video, or where manifest and file do not fit together; or None."""
    if frames < 2:
        return "it has one frame, and a video has more"
    stop = max((segment.stop for segment in video.segments), default=frames)
    if stop != frames:
        return f"the manifest tells of {stop} frames and the file has {frames}"
    for a, b in zip(video.segments, video.segments[1:], strict=False):
        if a.stop != b.start:
            return f"the manifest's segments do not join at frame {a.stop}"
    if video.borders and max(video.borders) >= frames:
        return f"the manifest has a chunk border at frame {max(video.borders)} and the file has {frames}"
    if video.fps and fps and abs(video.fps - fps) > 0.01 * video.fps:
        return f"the manifest says {video.fps:g} frames per second and the file {fps:g}"
    return None


def read_beside(path: Path) -> Video | None:
    """The description beside a finished video."""
    try:
        return Video.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
