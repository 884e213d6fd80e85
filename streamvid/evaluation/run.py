"""Measure many videos: planned, shared between processes, resumed where it was stopped, merged to the same bytes always.

A run is a folder. `shards/rank<r>.jsonl` gets one line per finished (video, metric), keyed by all that the value depends on;
what is there is not computed again. Results are merged from these files by rank 0, sorted, in float64.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate import PartialState
from tqdm import tqdm

from streamvid.evaluation.backbones import Backbones, MissingWeights
from streamvid.evaluation.engine import measure
from streamvid.evaluation.manifest import check_video
from streamvid.evaluation.registry import MetricRequest, all_metrics
from streamvid.evaluation.sources import BadVideo, open_source
from streamvid.evaluation.types import Outcome, Video

RANK_FILE = "rank{}.jsonl"


@dataclass
class Stored:
    """What the shards of a run hold.

    Attributes:
        records: by key; contents: (size, mtime) and hash by video; problems: lines that cannot be read.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_shards(folder: Path) -> Stored:
    """All finished work of a run; a torn line (a kill, a full disk) is told and its work done again."""
    stored = Stored()
    for file in sorted((folder / "shards").glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                if "content" in record:
                    stored.contents[record["video"]] = record
                else:
                    stored.records[record["key"]] = {name: record[name] for name in RECORD}
            except (ValueError, KeyError, TypeError):
                stored.problems.append(f"{file.name}:{number}: cannot be read and is computed again")
    return stored


def processes() -> PartialState:
    """The processes that share a run. They only wait for one another, which needs no GPU; whoever asks first decides."""
    return PartialState(cpu=True)


RECORD = ("key", "video", "metric", "seconds", *Outcome.__dataclass_fields__)


class Shard:
    """The file that one process appends its results to; a line is written whole, a torn last one is closed first."""

    def __init__(self, folder: Path, rank: int):
        path = folder / "shards" / RANK_FILE.format(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def assigned(videos: Sequence[Video], costs: Sequence[float], rank: int, ranks: int) -> list[Video]:
    """The share of one of `ranks` processes: dearest first, each to the one with the least to do so far."""
    loads = [0.0] * ranks
    mine = []
    order = sorted(range(len(videos)), key=lambda i: (-costs[i], videos[i].id))
    for index in order:
        target = loads.index(min(loads))
        loads[target] += costs[index]
        if target == rank:
            mine.append(videos[index])
    return mine


def content_of(video: Video, stored: Stored) -> tuple[str, dict[str, Any] | None]:
    """Hash of a video's file, from the shards where size and time are as they were; and the record to store if not."""
    path = Path(video.path)
    try:
        state = path.stat()
    except OSError:
        return "missing", None
    stamp = [state.st_size, state.st_mtime_ns]
    known = stored.contents.get(video.id)
    if known and known["stamp"] == stamp and not path.is_dir():
        return known["content"], None
    try:
        content = open_source(path).content()
    except (BadVideo, OSError) as error:
        content = f"unreadable: {error}"
    return content, {"video": video.id, "content": content, "stamp": stamp}


def keys_of(
    video: Video, requests: Sequence[MetricRequest], content: str, backbones: Backbones
) -> dict[str, str]:
    """The key of every metric on a video; missing weights have a key of their own, so that those that come later count."""
    keys = {}
    facts = video.facts()
    for request in requests:
        cls = all_metrics()[request.name]
        try:
            weights = backbones.fingerprint(cls.needs)
        except MissingWeights as error:
            weights = f"missing: {error}"
        own = "" if cls.frames_needed else json.dumps(video.timings, sort_keys=True)
        keys[request.name] = request.key(facts, content + own, weights)
    return keys


@dataclass
class Evaluation:
    """The work of a run.

    Attributes:
        folder: of the run; videos, requests: what to measure; backbones: networks.
        produce: makes a video that is not there yet and tells what became of it; None: all are there.
        computed: (video, metric) that this process has computed, for those who want to know.
    """

    folder: Path
    videos: Sequence[Video]
    requests: Sequence[MetricRequest]
    backbones: Backbones
    produce: Callable[[Video], Video] | None = None
    quiet: bool = False
    computed: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Measure this process's share; afterwards the shards hold everything."""
        state = processes()
        share = max(1, (os.cpu_count() or 1) // state.num_processes)
        torch.set_num_threads(min(torch.get_num_threads(), share))
        cv2.setNumThreads(min(torch.get_num_threads(), share))
        stored = read_shards(self.folder)
        state.wait_for_everyone()  # nobody writes before everybody has read
        costs = [_cost(video) for video in self.videos]
        mine = assigned(self.videos, costs, state.process_index, state.num_processes)
        shard = Shard(self.folder, state.process_index)
        began = time.monotonic()
        with tqdm(
            total=len(mine), unit="video", disable=self.quiet or not state.is_main_process, file=sys.stderr
        ) as bar:
            for video in mine:
                bar.set_description_str(video.id[:40], refresh=False)
                self._one(video, stored, shard)
                bar.update()
                if not bar.disable and not sys.stderr.isatty():
                    left = (time.monotonic() - began) / bar.n * (len(mine) - bar.n)
                    print(f"{bar.n}/{len(mine)} videos, {left:.0f} s left", file=sys.stderr, flush=True)
        shard.close()
        state.wait_for_everyone()

    def _one(self, video: Video, stored: Stored, shard: Shard) -> None:
        if self.produce is not None:
            video = self.produce(video)
        content, record = content_of(video, stored)
        if record is not None:
            shard.write([record])
        keys = keys_of(video, self.requests, content, self.backbones)
        missing = [request for request in self.requests if keys[request.name] not in stored.records]
        if not missing:
            return
        outcomes = measure_file(video, missing, self.backbones)
        self.computed += [(video.id, name) for name in outcomes]
        shard.write(
            [
                {"key": keys[n], "video": video.id, "metric": n, "seconds": round(s, 6), **asdict(o)}
                for n, (o, s) in outcomes.items()
            ]
        )


def measure_file(
    video: Video, requests: Sequence[MetricRequest], backbones: Backbones
) -> dict[str, tuple[Outcome, float]]:
    """`measure` on a video's file; one that cannot be read fails every metric that needs frames, with one reason."""
    metrics = all_metrics()
    try:
        source = open_source(video.path, video.fps if Path(video.path).is_dir() else None)
        problem = check_video(video, source.measure.frames, source.measure.fps)
        if problem:
            raise BadVideo(problem)
    except (BadVideo, OSError) as error:
        reason = str(error)
        failed = {
            r.name: (Outcome("failed", reason=reason), 0.0) for r in requests if metrics[r.name].frames_needed
        }
        others = [request for request in requests if request.name not in failed]
        return {**failed, **measure(video, None, others, backbones)}
    return measure(video, source, requests, backbones)


def _cost(video: Video) -> float:
    """What a video costs, relative to others: frames where they are known, else bytes."""
    if video.segments:
        return float(video.segments[-1].stop)
    path = Path(video.path)
    return float(path.stat().st_size) if path.is_file() else 1.0


def outcomes_of(
    folder: Path, videos: Sequence[Video], requests: Sequence[MetricRequest], backbones: Backbones
) -> tuple[dict[str, dict[str, Outcome]], list[str]]:
    """Everything that the shards know of these videos: outcome by metric and video, and problems with the shards."""
    stored = read_shards(folder)
    found: dict[str, dict[str, Outcome]] = {request.name: {} for request in requests}
    for video in sorted(videos, key=lambda v: v.id):
        content, _ = content_of(video, stored)
        for name, key in keys_of(video, requests, content, backbones).items():
            record = stored.records.get(key)
            if record is not None:
                found[name][video.id] = Outcome(**{f: record[f] for f in Outcome.__dataclass_fields__})
    return found, stored.problems
