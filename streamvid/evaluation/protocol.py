"""Protocols: which prompts, how long, which metrics, and what differs from the publication. YAML in configs/evaluation.

    name: longlive_interactive_60s
    suite: {kind: scripts, file: null, need: "..."}     # world | prompts | scripts; need: what the user must give
    generation: {latents: 240, switches: [40, 80], fps: 16, size: [480, 832], samples: 1, seed: 0}
    metrics: [drift.*, {name: interactive.clip_segment, fps: 2}]
    primary: [interactive.clip_segment]
    deviations: ["the 160 scripts are not public"]

Seeds come from (base, prompt number, sample), whatever the order and the number of processes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from streamvid.errors import UserError
from streamvid.evaluation.registry import MetricRequest, resolve
from streamvid.evaluation.types import Video
from streamvid.world.prompts import describe
from streamvid.world.scene import change_scene, sample_scene

KINDS = ("world", "prompts", "scripts")


@dataclass(frozen=True)
class Suite:
    """Where prompts come from.

    Attributes:
        kind: world (scripts of the embedded world, made here), prompts (one per video) or scripts (several per video).
        file: JSONL with `prompt` (and optionally `generate`, `dimensions`, `labels`) or `prompts`, or a text file of lines;
            null: the user gives one.
        need: what to give, in words; count: the first so many; shots: prompts per script of the world;
        dimensions: only prompts of these; returning: the last prompt of a world script is its first again.
    """

    kind: str = "world"
    file: str | None = None
    need: str = ""
    count: int | None = None
    shots: int = 1
    dimensions: tuple[str, ...] = ()
    returning: bool = False


@dataclass(frozen=True)
class Generation:
    """What is generated: length in latent frames or seconds, switches in latent frames (empty: equal shots)."""

    latents: int | None = None
    seconds: float | None = None
    switches: tuple[int, ...] = ()
    fps: float | None = None
    size: tuple[int, int] | None = None
    samples: int = 1
    seed: int = 0
    method: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    name: str
    about: str
    suite: Suite
    generation: Generation
    metrics: tuple[Any, ...]
    primary: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    version: int = 1

    def requests(self) -> list[MetricRequest]:
        return resolve(self.metrics)


def _folder():
    return resources.files("streamvid.configs") / "evaluation"


def protocol_names() -> list[str]:
    return sorted(entry.name[:-5] for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_protocol(name: str, changes: Mapping[str, Any] | None = None) -> Protocol:
    """A shipped protocol by name, or a YAML file; `changes` such as `{"generation.samples": 2}` override single fields."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(
                f"protocol = {name!r} is not a file; give one, or one of {', '.join(protocol_names())}"
            )
        text = path.read_text(encoding="utf-8")
    elif name in protocol_names():
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(name, protocol_names(), n=1, cutoff=0.0)
        raise UserError(f"protocol = {name!r} is not known: did you mean {near[0]}? (streamvid eval list)")
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"protocol {name}: {' '.join(str(error).split())[:150]}: mend the YAML") from error
    if not isinstance(record, dict):
        raise UserError(f"protocol {name} is no mapping: give name, suite, generation, metrics")
    for key, value in (changes or {}).items():
        part, _, option = key.partition(".")
        if option:
            record.setdefault(part, {})[option] = value
        else:
            record[part] = value
    return _build(record, name)


def _build(record: dict[str, Any], source: str) -> Protocol:
    def typed(cls: Any, values: Any, where: str) -> Any:
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict):
            raise UserError(f"protocol {source}: {where} must be a mapping of {', '.join(sorted(known))}")
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise UserError(f"protocol {source}: {where}.{name} is not known: did you mean {near}?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    values = {"about": "", **record}
    for name, cls in (("suite", Suite), ("generation", Generation)):
        values[name] = typed(cls, values.get(name, {}), name)
    if not values.get("name") or not values.get("metrics"):
        raise UserError(f"protocol {source}: name and metrics are needed: add them")
    protocol: Protocol = typed(Protocol, values, "protocol")
    length = protocol.generation
    if (length.latents is None) == (length.seconds is None):
        raise UserError(f"protocol {source}: generation needs either latents or seconds: give one")
    if protocol.suite.kind not in KINDS:
        raise UserError(
            f"protocol {source}: suite.kind = {protocol.suite.kind!r} must be one of {', '.join(KINDS)}"
        )
    if length.samples < 1 or (protocol.suite.count or 1) < 1:
        raise UserError(f"protocol {source}: samples and count must be at least 1")
    protocol.requests()
    return protocol


@dataclass(frozen=True)
class Job:
    """A video to make: its manifest entry so far, and the prompts that it is generated from (maybe rewritten ones)."""

    video: Video
    prompts: tuple[str, ...]


def seed_of(base: int, number: int, sample: int) -> int:
    """A 32-bit seed from the base, the prompt's number and the sample."""
    return int(hashlib.sha256(f"{base},{number},{sample}".encode()).hexdigest()[:8], 16)


def jobs(protocol: Protocol, folder: Path, suite_file: str | None = None) -> list[Job]:
    """The videos of a protocol, to be made in `folder`."""
    entries = _entries(replace(protocol.suite, file=suite_file or protocol.suite.file), protocol.name)
    found = []
    for number, entry in enumerate(entries):
        prompts = tuple(entry.get("prompts") or (entry.get("generate") or entry["prompt"],))
        for sample in range(protocol.generation.samples):
            name = f"p{number:04d}-{sample}"
            video = Video(
                name,
                str(folder / f"{name}.mp4"),
                prompt=entry.get("prompt") or prompts[0],
                sample=sample,
                group=f"p{number:04d}",
                seed=seed_of(protocol.generation.seed, number, sample),
                dimensions=tuple(entry.get("dimensions", ())),
                labels=entry.get("labels", {}),
            )
            found.append(Job(video, prompts))
    return found


def _entries(suite: Suite, name: str) -> list[dict[str, Any]]:
    if suite.kind == "world":
        return [{"prompts": world_script(i, suite.shots, suite.returning)} for i in range(suite.count or 16)]
    if suite.file is None:
        raise UserError(f"protocol {name} ships no prompts ({suite.need}): give them with --suite FILE")
    path = Path(suite.file)
    inside = _folder() / "suites" / suite.file
    if not path.is_file() and not inside.is_file():
        raise UserError(
            f"suite = {suite.file!r} is not a file: give JSONL or a text file with one prompt per line"
        )
    text = path.read_text("utf-8") if path.is_file() else inside.read_text("utf-8")
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            if not isinstance(entry, dict) or not (entry.get("prompt") or entry.get("prompts")):
                raise ValueError("it has neither prompt nor prompts")
        except ValueError as error:
            raise UserError(f"suite {suite.file}:{number}: {error}: mend the line") from error
        if not suite.dimensions or set(suite.dimensions) & set(entry.get("dimensions", ())):
            entries.append(entry)
    return entries[: suite.count]


def world_script(number: int, shots: int, returning: bool = False) -> list[str]:
    """Prompts of a held-out scene of the embedded world that changes in one or two attributes from shot to shot."""
    rng = np.random.default_rng([2025, number])  # the first scripts are the same for any number of them
    scene = sample_scene(rng, held_out=True)
    prompts = [describe(scene, rng)]
    for shot in range(1, shots):
        scene = change_scene(rng, scene, 1 + (number + shot) % 2, held_out=None)
        prompts.append(describe(scene, rng))
    if returning and shots > 2:
        prompts[-1] = prompts[0]
    return prompts


def script_of(prompts: tuple[str, ...], generation: Generation, fps: float, ratio: int = 4) -> dict[str, Any]:
    """The script (`load_script`) of a video: equal shots, or switches where the protocol says."""

    def seconds(latent: int) -> float:
        return (0 if latent == 0 else ratio * latent - (ratio - 1)) / fps

    total = generation.seconds if generation.seconds is not None else seconds(generation.latents or 0)
    if generation.switches and len(generation.switches) == len(prompts) - 1:
        starts = [0.0, *(seconds(latent) for latent in generation.switches)]
    else:
        starts = [total * i / len(prompts) for i in range(len(prompts))]
    ends = [*starts[1:], total]
    return {
        "shots": [
            {"prompt": prompt, "duration": round(end - start, 6)}
            for prompt, start, end in zip(prompts, starts, ends, strict=True)
        ]
    }
