"""Networks that metrics look through, loaded from local weights by maintained libraries. Nothing here downloads.

A backbone's weights are sought in `FOLDER/<name>`, then, where it has a hub id, in the local Hugging Face cache. FOLDER is
$STREAMVID_EVAL_WEIGHTS, else ~/.cache/streamvid/eval. Weights that are not there are a reason to skip, and a line of
`streamvid eval doctor`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamvid.evaluation.networks import (
    load_action,
    load_aesthetic_head,
    load_captioner,
    load_clip,
    load_detector,
    load_dino,
    load_dinov2,
    load_dreamsim,
    load_musiq,
    load_raft,
    load_scripted,
    load_video_text,
    load_world_probe,
)


@dataclass(frozen=True)
class Backbone:
    """Where a network comes from.

    Attributes:
        what: the network; hub: id of a model in the format of `transformers`; files: what its
            folder must hold ("a|b": one of both).
        get: what to fetch, in words; licence: of the weights; library: importable package that runs it.
        load: makes the callable from a folder and a device.
    """

    name: str
    what: str
    get: str
    licence: str
    files: tuple[str, ...]
    load: Callable[[Path, str], Any]
    hub: str | None = None
    library: str = "transformers"
    embedded: Path | None = None  # shipped with this package


class MissingWeights(Exception):
    """A backbone that cannot be had; the text says why and what to do."""


class Backbones:
    """The backbones of a run, each loaded at its first use and shared.

    Args:
        folder: of weights, one folder per backbone.
        device: where networks run.
    """

    def __init__(self, folder: str | Path | None = None, device: str = "cpu"):
        default = os.environ.get("STREAMVID_EVAL_WEIGHTS") or Path.home() / ".cache" / "streamvid" / "eval"
        self.folder, self.device = Path(folder or default), device
        self._loaded: dict[str, Any] = {}

    def find(self, name: str) -> Path:
        """The folder of a backbone's weights. Raises MissingWeights."""
        spec = BACKBONES[name]
        if spec.embedded is not None:
            return spec.embedded
        if importlib.util.find_spec(spec.library) is None:
            raise MissingWeights(f"{spec.what} needs the package {spec.library}: pip install {spec.library}")
        own = self.folder / name
        places = [own]
        if spec.hub and (cached := _cached(spec.hub)):
            places.append(cached)
        for place in places:
            if all(any((place / name).exists() for name in file.split("|")) for file in spec.files):
                return place
        lacking = ", ".join(file.replace("|", " or ") for file in spec.files)
        raise MissingWeights(f"{spec.what} has no weights here: put {spec.get} ({lacking}) into {own}")

    def problem(self, names: Sequence[str]) -> str | None:
        """Why one of the backbones cannot be had, or None."""
        for name in names:
            if name not in self._loaded:
                try:
                    self.find(name)
                except MissingWeights as error:
                    return str(error)
        return None

    def get(self, name: str) -> Any:
        """The network as a callable. Raises MissingWeights, also for files that cannot be read."""
        if name not in self._loaded:
            place = self.find(name)
            try:
                with torch.inference_mode():
                    self._loaded[name] = BACKBONES[name].load(place, self.device)
            except Exception as error:  # whatever a library makes of a torn file
                reason = " ".join(str(error).split())[:160]
                raise MissingWeights(
                    f"{BACKBONES[name].what} in {place} cannot be loaded: {reason}"
                ) from error
        return self._loaded[name]

    def fingerprint(self, names: Sequence[str]) -> str:
        """Tells weights apart: SHA-256 over the weight files of the backbones."""
        total = hashlib.sha256()
        for name in names:
            total.update(name.encode())
            for file in sorted(self.find(name).iterdir()):
                if file.suffix in (".safetensors", ".bin", ".pth", ".pt", ".pt2", ".npz"):
                    total.update(_file_hash(file.resolve()).encode())
        return total.hexdigest()[:16] if names else ""


def _file_hash(path: Path, known: dict[tuple[str, int, int], str] = {}) -> str:  # noqa: B006 - a cache on purpose
    entry = (str(path), path.stat().st_size, path.stat().st_mtime_ns)
    if entry not in known:
        with path.open("rb") as file:
            known[entry] = (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(file.read()).hexdigest()
            )
    return known[entry]


def _cached(hub: str) -> Path | None:
    """Folder of a model in the local Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, "config.json")
    return Path(found).parent if isinstance(found, str) else None


HUB_FILES = ("config.json", "model.safetensors")
PROCESSOR = "preprocessor_config.json|processor_config.json"  # as the hub has it, as transformers 5 saves it
BACKBONES = {
    spec.name: spec
    for spec in (
        Backbone(
            "dino",
            "DINO ViT-B/16",
            "facebook/dino-vitb16",
            "Apache-2.0",
            HUB_FILES,
            load_dino,
            "facebook/dino-vitb16",
        ),
        Backbone(
            "clip_b",
            "CLIP ViT-B/32",
            "openai/clip-vit-base-patch32",
            "MIT",
            (*HUB_FILES, "tokenizer.json"),
            load_clip("clip_b"),
            "openai/clip-vit-base-patch32",
        ),
        Backbone(
            "clip_l",
            "CLIP ViT-L/14",
            "openai/clip-vit-large-patch14",
            "MIT",
            (*HUB_FILES, "tokenizer.json"),
            load_clip("clip_l"),
            "openai/clip-vit-large-patch14",
        ),
        Backbone(
            "aesthetic_head",
            "LAION's aesthetic head",
            "sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor",
            "MIT",
            ("sa_0_4_vit_l_14_linear.pth",),
            load_aesthetic_head,
            library="torch",
        ),
        Backbone(
            "musiq",
            "MUSIQ-SPAQ",
            "musiq_spaq_ckpt-358bb6af.pth of IQA-PyTorch's weights",
            "CC BY-NC-SA 4.0, pyiqa PolyForm-Noncommercial",
            ("musiq_spaq_ckpt-358bb6af.pth",),
            load_musiq,
            library="pyiqa",
        ),
        Backbone(
            "amt",
            "AMT-S",
            "AMT-S as TorchScript that takes two pictures in 0..1 and gives the one between them",
            "CC BY-NC 4.0",
            ("amt-s.ts",),
            load_scripted("amt-s.ts"),
            library="torch",
        ),
        Backbone(
            "raft",
            "RAFT",
            "torchvision's raft_large weights (C_T_V2), saved under this name",
            "BSD-3-Clause",
            ("raft_large.pth",),
            load_raft,
            library="torchvision",
        ),
        Backbone(
            "dinov2",
            "DINOv2 ViT-B/14",
            "facebook/dinov2-base",
            "Apache-2.0",
            HUB_FILES,
            load_dinov2,
            "facebook/dinov2-base",
        ),
        Backbone(
            "dreamsim",
            "DreamSim (ensemble)",
            "the folder `models` that dreamsim 0.2 unpacks",
            "MIT",
            ("ensemble_lora",),
            load_dreamsim,
            library="dreamsim",
        ),
        Backbone(
            "probe",
            "attribute probe of diorama",
            "",
            "Apache-2.0",
            ("probe.safetensors",),
            load_world_probe,
            library="torch",
            embedded=Path(__file__).parents[1] / "embedded" / "diorama" / "probe",
        ),
        Backbone(
            "detector",
            "OWLv2",
            "google/owlv2-base-patch16-ensemble",
            "Apache-2.0",
            (*HUB_FILES, PROCESSOR),
            load_detector,
            "google/owlv2-base-patch16-ensemble",
        ),
        Backbone(
            "action",
            "VideoMAE (Kinetics-400)",
            "MCG-NJU/videomae-base-finetuned-kinetics",
            "CC BY-NC 4.0",
            HUB_FILES,
            load_action,
            "MCG-NJU/videomae-base-finetuned-kinetics",
        ),
        Backbone(
            "captioner",
            "BLIP",
            "Salesforce/blip-image-captioning-base",
            "BSD-3-Clause",
            (*HUB_FILES, PROCESSOR),
            load_captioner,
            "Salesforce/blip-image-captioning-base",
        ),
        Backbone(
            "video_text",
            "X-CLIP ViT-B/32",
            "microsoft/xclip-base-patch32",
            "MIT",
            (*HUB_FILES, "tokenizer.json"),
            load_video_text,
            "microsoft/xclip-base-patch32",
        ),
    )
}


def doctor(backbones: Backbones) -> list[tuple[str, bool, str]]:
    """For every backbone: name, whether it can be loaded from here, and where it is or what to do."""
    lines = []
    for name, spec in BACKBONES.items():
        try:
            lines.append((name, True, f"{spec.what}: {backbones.find(name)} ({spec.licence})"))
        except MissingWeights as error:
            lines.append((name, False, f"{error} ({spec.licence})"))
    return lines
