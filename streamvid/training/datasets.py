"""What stages are fed with: prompts, and clips of latents or of ODE states in sharded files with a manifest.

A prompt set is a text file with one prompt per line, or a JSONL file whose lines have a `prompt`, or `prompts`: the first
and those that a stream switches to, in order.

A shard folder holds `manifest.json` and safetensors files. A shard has a tensor `clips` `[N, ...]` (with `weights: true` in
the manifest also `weights` `[N, F, H, W]`, of the loss) and, as JSON in its metadata, one list of prompts per clip.
Shards are written whole or not at all, and the manifest after them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streamvid.errors import UserError
from streamvid.io.files import replace_atomically

Prompts = tuple[str, ...]  # the first, and those that follow it


def load_prompts(path: str | Path) -> list[Prompts]:
    """The prompts of a text or JSONL file.

    Raises:
        UserError: there is no such file, it is empty, or a line is wrong.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts = {str(path)!r} cannot be read ({type(error).__name__}): give a text or JSONL file"
        ) from None
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"prompts = {str(path)!r} is empty: write one prompt per line")
    if path.suffix != ".jsonl":
        return [(line,) for _, line in rows]
    return [_row_prompts(path, number, line) for number, line in rows]


def _row_prompts(path: Path, number: int, line: str) -> Prompts:
    try:
        row = json.loads(line)
        given = row["prompts"] if "prompts" in row else [row["prompt"]]
        if (
            not isinstance(given, list)
            or not given
            or not all(isinstance(p, str) and p.strip() for p in given)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{path}, line {number}: must be an object such as {{"prompt": "a fox"}} or '
            '{"prompts": ["a fox", "a fox in the snow"]}'
        ) from None
    return tuple(given)


class ShardWriter:
    """Writes a shard folder; shards that are there and listed are kept, so a killed job goes on.

    Args:
        folder: where to; facts: what holds for all clips, e.g. their shape and which VAE made them.

    Raises:
        UserError: the folder holds clips of another kind.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest: dict[str, Any] = {**facts, "shards": {}}
        path = self.folder / "manifest.json"
        if path.is_file():
            before = _read_manifest(self.folder)
            changed = [key for key, value in facts.items() if before.get(key) != value]
            if changed:
                raise UserError(
                    f"output = {str(folder)!r} holds clips with another {changed[0]} ({before.get(changed[0])!r} and not "
                    f"{facts[changed[0]]!r}): give an empty folder"
                )
            self.manifest["shards"] = before["shards"]

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["shards"]

    def write(
        self, name: str, clips: torch.Tensor, prompts: Sequence[Sequence[str]], **more: torch.Tensor
    ) -> None:
        """One shard: clips `[N, ...]`, the prompts of each, and more tensors `[N, ...]`."""
        path = self.folder / f"{name}.safetensors"
        with replace_atomically(path) as temporary:
            tensors = {name: tensor.contiguous() for name, tensor in {"clips": clips, **more}.items()}
            save_file(tensors, temporary, {"prompts": json.dumps([list(p) for p in prompts])})
        self.manifest["shards"][name] = {"clips": len(clips), "bytes": path.stat().st_size}
        with replace_atomically(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(self.manifest, indent=1, ensure_ascii=False))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert isinstance(manifest["shards"], dict)
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no manifest.json: make the clips with `streamvid train` first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(
            f"{folder / 'manifest.json'} is damaged: delete it and make the clips again"
        ) from None
    return manifest


class ClipShards:
    """Random access to the clips of a shard folder, or of several one after the other.

    Args:
        folder: of shards, or a list of folders; kind: what the manifest must say (`latents` or `ode`).

    Raises:
        UserError: no such folder, no clips, a shard that is not as it was written, or folders of different clips.
    """

    def __init__(self, folder: str | Path | Sequence[str | Path], kind: str = "latents"):
        folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(f) for f in folder]
        self.folder = ", ".join(map(str, folders))
        self.places: list[tuple[Path, int]] = []
        self.prompts: list[Prompts] = []
        self.manifest: dict[str, Any] = {}
        for one in folders:
            manifest = _read_manifest(one)
            if manifest.get("kind") != kind:
                raise UserError(
                    f"{one} holds clips of kind {manifest.get('kind')!r}: give a folder of {kind!r}"
                )
            if self.manifest and manifest.get("shape") != self.manifest["shape"]:
                raise UserError(
                    f"{one} holds clips of shape {manifest.get('shape')} and {folders[0]} of {self.manifest['shape']}: "
                    "give folders of one shape"
                )
            weights = bool(manifest.get("weights")) and self.manifest.get("weights", True)
            self.manifest = {**manifest, "weights": weights}
            for name, facts in sorted(manifest["shards"].items()):
                self._open(one, name, facts)
        if not self.places:
            raise UserError(f"{self.folder} holds no clips: make some first")

    def _open(self, folder: Path, name: str, facts: Mapping[str, Any]) -> None:
        path = folder / f"{name}.safetensors"
        fix = f"delete it and its entry in {folder / 'manifest.json'}, and make it again"
        if not path.is_file():
            raise UserError(f"shard {path} is missing: {fix}")
        if path.stat().st_size != facts["bytes"]:
            raise UserError(f"shard {path} has {path.stat().st_size} bytes and not {facts['bytes']}: {fix}")
        try:
            with safe_open(path, "pt") as file:
                count = file.get_slice("clips").get_shape()[0]
                prompts = json.loads(file.metadata()["prompts"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise UserError(f"shard {path} is damaged: {fix}") from None
        if count != facts["clips"] or len(prompts) != count:
            raise UserError(f"shard {path} does not hold {facts['clips']} clips with prompts: {fix}")
        self.places += [(path, index) for index in range(count)]
        self.prompts += [tuple(p) for p in prompts]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one clip."""
        return tuple(self.manifest["shape"])

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read("clips", index)

    def _read(self, tensor: str, index: int) -> torch.Tensor:
        path, place = self.places[index]
        with safe_open(path, "pt") as file:
            return file.get_slice(tensor)[place].float()

    def weights(self, indices: Sequence[int]) -> torch.Tensor:
        """Loss weights of clips, to be multiplied with their errors: `[B, 1, F, H, W]`.

        Raises:
            UserError: the clips have none.
        """
        if not self.manifest["weights"]:
            raise UserError(
                f"weighted = true needs clips with weights, and {self.folder} has none: set it to false"
            )
        return torch.stack([self._read("weights", i) for i in indices])[:, None]

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
        """Clips `[B, ...]` and the first prompt of each."""
        return torch.stack([self[i] for i in indices]), [self.prompts[i][0] for i in indices]


def check_frames(shards: ClipShards, frames: int, latent_shape: Sequence[int], frames_per_block: int) -> None:
    """Whether clips `[..., F, C, H, W]` serve a model.

    Raises:
        UserError: too short, of another size, or blocks do not fill them.
    """
    length, *size = shards.shape[-4:]
    if size != list(latent_shape):
        raise UserError(
            f"{shards.folder} holds latents of {size} per frame and the model's are {list(latent_shape)}: "
            "make them with the model's own VAE and size"
        )
    if frames > length:
        raise UserError(
            f"frames = {frames} is more than the {length} of the clips in {shards.folder}: lower it"
        )
    if frames % frames_per_block:
        raise UserError(f"frames = {frames} must be a multiple of frames_per_block = {frames_per_block}")


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of `size` items, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
