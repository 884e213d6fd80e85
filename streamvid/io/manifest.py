"""The JSON file beside a video that tells how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamvid.errors import UserError
from streamvid.io.files import output_error, prepare_output_file, replace_atomically

logger = logging.getLogger(__name__)

FORMAT = "streamvid-manifest-1"
PACKAGES = ("streamvid", "torch", "diffusers", "transformers", "numpy", "imageio-ffmpeg")


def manifest_path(video: str | Path) -> Path:
    """`story.mp4` -> `story.json`; `story.manifest.json` where a file of that name is not a manifest.

    (A script may well be called `story.json`; it must survive.)
    """
    path = Path(video).with_suffix(".json")
    return path if not path.exists() or is_manifest(path) else path.with_suffix(".manifest.json")


def is_manifest(path: Path) -> bool:
    """Whether `path` is a manifest of ours, which may be overwritten."""
    with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
        return FORMAT in file.read(200)
    return False


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions of what makes the picture, platform and device."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"versions": versions, "platform": platform.platform(), "device": device}


class Manifest:
    """Record of one run, on the disk from its first moment; a context manager that notes how it ended.

    The file is replaced atomically, so that it is valid JSON at any moment: at the start, then at most
    once a second and for at most 2% of the time, and at the end. `status` is "running", then "complete",
    "interrupted" (Ctrl-C) or "failed" (with `error`); a killed run keeps saying "running".

    Args:
        path: file to write, see `manifest_path`.
        fps: frames per second of the video.
        video: name of the video, relative to the manifest.
        config, script: plain dictionaries; values that JSON does not know are written as text.
        timeline: one dictionary per shot.
        device: name of the device, as the run uses it.
    """

    seconds_between_updates = 1.0
    share_of_time = 0.02

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        video: str | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int | None = None,
        script: Mapping[str, Any] | None = None,
        timeline: Sequence[Mapping[str, Any]] = (),
        device: str | None = None,
    ) -> None:
        self.path = prepare_output_file(path)
        self._started = time.monotonic()
        self._next_update = 0.0
        self._frames = 0
        self.fps = float(fps)
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "status": "running",
            "error": None,
            "video": video,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            **environment(device),
            "fps": self.fps,
            "seed": seed,
            "config": dict(config or {}),
            "script": dict(script or {}),
            "timeline": [dict(row) for row in timeline],
            "totals": {},
            "chunks": [],
        }
        self._save()

    def add_chunk(
        self,
        *,
        frames: int,
        prompt: str,
        timings: Mapping[str, float] | None = None,
        events: Sequence[Any] = (),
    ) -> None:
        """Note a chunk whose `frames` are in the video; `timings` are seconds by stage.

        When the file cannot be updated now (the disk is full), that waits: the end will tell.
        """
        chunk = {
            "index": len(self.record["chunks"]),
            "start_seconds": round(self._frames / self.fps, 6),
            "frames": frames,
            "prompt": prompt,
            "timings": {name: round(seconds, 6) for name, seconds in (timings or {}).items()},
        }
        if events:
            chunk["events"] = list(events)
        self.record["chunks"].append(chunk)
        self._frames += frames
        if time.monotonic() >= self._next_update:
            try:
                self._save()
            except UserError as error:
                logger.warning("%s", error)

    def finish(self, status: str = "complete", error: str | None = None, **totals: Any) -> None:
        """Write the last state; `totals` are added to those that are counted here."""
        self.record.update(status=status, error=error)
        self.record["totals"].update(totals)
        self._save()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        if kind is None:
            if self.record["status"] == "running":
                self.finish()
            return
        interrupted = issubclass(kind, (KeyboardInterrupt, GeneratorExit))
        try:
            self.finish("interrupted" if interrupted else "failed", str(error) or kind.__name__)
        except UserError as consequence:  # the exception on its way is the one to show
            logger.warning("%s", consequence)

    def _save(self) -> None:
        begin = time.monotonic()
        wall_seconds = begin - self._started
        self.record["totals"].update(
            chunks=len(self.record["chunks"]),
            frames=self._frames,
            media_seconds=round(self._frames / self.fps, 6),
            wall_seconds=round(wall_seconds, 3),
            frames_per_second=round(self._frames / wall_seconds, 3) if wall_seconds > 0 else 0.0,
        )
        text = json.dumps(self.record, indent=1, ensure_ascii=False, default=str)
        try:
            with replace_atomically(self.path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise output_error(error, self.path) from error
        end = time.monotonic()
        self._next_update = end + max(self.seconds_between_updates, (end - begin) / self.share_of_time)
