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

import numpy as np
import torch
import torch.nn.functional as F

from streamvid.evaluation.sampling import for_clip, for_dino, for_dinov2, normalise, resize, to_tensor

BATCH = 16


@dataclass(frozen=True)
class Backbone:
    """Where a network comes from.

    Attributes:
        what: the network; hub: id of a model in the format of `transformers`; files: what its folder must hold.
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
            if all((place / file).exists() for file in spec.files):
                return place
        lacking = ", ".join(spec.files)
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


class ImageEncoder:
    """uint8 frames `[T, H, W, 3]` to features `[T, D]`, in batches; `text` to features, where the network has any."""

    def __init__(
        self,
        name: str,
        prepare: Callable[[np.ndarray], torch.Tensor],
        encode: Callable[[torch.Tensor], torch.Tensor],
        device: str,
        text: Callable[[Sequence[str]], torch.Tensor] | None = None,
    ):
        self.name, self.prepare, self.encode, self.device = name, prepare, encode, device
        self._text = text

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        parts = [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
        return torch.cat([self.encode(self.prepare(p).to(self.device)).float().cpu() for p in parts]).numpy()

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> torch.Tensor:
        assert self._text is not None
        return self._text(texts).float().cpu()


def load_dino(folder: Path, device: str) -> ImageEncoder:
    """DINO ViT-B/16: the class token of the last layer, position embeddings interpolated to the picture's size."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True).eval().to(device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return model(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    side = int(model.config.image_size)
    return ImageEncoder("dino", lambda frames: for_dino(frames, side), encode, device)


def load_dinov2(folder: Path, device: str) -> ImageEncoder:
    """DINOv2 ViT-B/14: the normalised class token."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(folder, local_files_only=True).eval().to(device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return model(images).pooler_output

    return ImageEncoder("dinov2", for_dinov2, encode, device)


def load_clip(name: str) -> Callable[[Path, str], ImageEncoder]:
    """A CLIP model with its tokenizer; features are the projected ones."""

    def load(folder: Path, device: str) -> ImageEncoder:
        from transformers import AutoTokenizer, CLIPModel

        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        longest = model.config.text_config.max_position_embeddings

        def text(texts: Sequence[str]) -> torch.Tensor:
            tokens = tokenizer(
                list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            return model.text_projection(model.text_model(**tokens.to(device)).pooler_output)

        def encode(images: torch.Tensor) -> torch.Tensor:
            return model.visual_projection(model.vision_model(images).pooler_output)

        side = int(model.config.vision_config.image_size)
        encoder = ImageEncoder(name, lambda frames: for_clip(frames, side), encode, device, text)
        encoder.tokens = lambda words: len(tokenizer(words)["input_ids"])  # type: ignore[attr-defined]
        encoder.longest = longest  # type: ignore[attr-defined]
        return encoder

    return load


def load_aesthetic_head(folder: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """LAION's linear head: features `[T, 768]` to scores `[T]`, about 0..10."""
    state = torch.load(folder / "sa_0_4_vit_l_14_linear.pth", map_location="cpu", weights_only=True)
    weight, bias = state["weight"].float(), state["bias"].float()
    return lambda rows: F.linear(rows, weight, bias)[:, 0]


def load_dreamsim(folder: Path, device: str) -> ImageEncoder:
    """DreamSim's ensemble through the package dreamsim (installed by the user): resized to 224 x 224, not normalised."""
    from dreamsim import dreamsim

    model, _ = dreamsim(pretrained=True, cache_dir=str(folder), device=device)
    return ImageEncoder(
        "dreamsim", lambda frames: resize(to_tensor(frames), 224, 224, "bilinear") / 255, model.embed, device
    )


def load_world_probe(folder: Path, device: str) -> Any:
    """The attribute probe that the embedded model ships with."""
    from streamvid.world.probe import AttributeProbe

    return AttributeProbe.load(folder / "probe.safetensors").to(device)


def load_musiq(folder: Path, device: str) -> Callable[[torch.Tensor], float]:
    """MUSIQ-SPAQ through pyiqa (PolyForm-Noncommercial; installed by the user): picture `[1, 3, h, w]` to 0..100."""
    import pyiqa

    weights = str(folder / "musiq_spaq_ckpt-358bb6af.pth")
    model = pyiqa.create_metric("musiq-spaq", device=device, pretrained_model_path=weights)
    return lambda image: float(model(image.to(device)))


def load_scripted(file: str) -> Callable[[Path, str], Callable[..., torch.Tensor]]:
    """A TorchScript file that the user has made from a network whose licence lets us ship no code for it."""

    def load(folder: Path, device: str) -> Callable[..., torch.Tensor]:
        model = torch.jit.load(str(folder / file), map_location=device).eval()

        @torch.inference_mode()
        def middle(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            height, width = first.shape[-2:]
            down, right = -height % 16, -width % 16
            edges = (right // 2, right - right // 2, down // 2, down - down // 2)
            padded = [F.pad(image.to(device), edges, mode="replicate") for image in (first, second)]
            found = model(*padded).cpu()
            return found[..., edges[2] : edges[2] + height, edges[0] : edges[0] + width]

        return middle

    return load


def load_raft(folder: Path, device: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """RAFT (Teed & Deng 2020) of torchvision, 20 iterations, padded to a multiple of 8."""
    from torchvision.models.optical_flow import raft_large

    model = raft_large(weights=None)
    model.load_state_dict(torch.load(folder / "raft_large.pth", map_location="cpu", weights_only=True))
    model.eval().to(device)

    @torch.inference_mode()
    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        height, width = first.shape[:2]
        edges = (0, max(-width % 8, 128 - width), 0, max(-height % 8, 128 - height))
        images = [
            F.pad(to_tensor(rgb[None]) / 127.5 - 1, edges, mode="replicate").to(device)
            for rgb in (first, second)
        ]
        return model(*images, num_flow_updates=20)[-1][0, :, :height, :width].permute(1, 2, 0).cpu().numpy()

    return flow


def load_detector(folder: Path, device: str) -> Callable[..., list[dict[str, list[list[float]]]]]:
    """OWLv2: boxes of named things, per frame."""
    from transformers import AutoProcessor, Owlv2ForObjectDetection

    model = Owlv2ForObjectDetection.from_pretrained(folder, local_files_only=True).eval().to(device)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def detect(frames: np.ndarray, names: Sequence[str], threshold: float = 0.2):
        found = []
        for frame in frames:
            texts = [f"a photo of a {name}" for name in names]
            inputs = processor(text=[texts], images=frame, return_tensors="pt").to(device)
            size = torch.tensor([frame.shape[:2]])
            told = processor.post_process_grounded_object_detection(
                model(**inputs), threshold=threshold, target_sizes=size
            )[0]
            boxes: dict[str, list[list[float]]] = {name: [] for name in names}
            for label, box in zip(told["labels"].tolist(), told["boxes"].tolist(), strict=True):
                boxes[names[label]].append(box)
            found.append(boxes)
        return found

    return detect


def load_action(folder: Path, device: str) -> Callable[[np.ndarray], dict[str, float]]:
    """VideoMAE fine-tuned on Kinetics-400: 16 frames to a score per action."""
    from transformers import VideoMAEForVideoClassification

    model = VideoMAEForVideoClassification.from_pretrained(folder, local_files_only=True).eval().to(device)
    side = int(model.config.image_size)

    @torch.inference_mode()
    def classify(frames: np.ndarray) -> dict[str, float]:
        images = for_dino(frames, round(side * 256 / 224))
        top, left = (images.shape[2] - side) // 2, (images.shape[3] - side) // 2
        logits = model(images[None, :, :, top : top + side, left : left + side].to(device)).logits[0]
        return {model.config.id2label[i]: float(p) for i, p in enumerate(logits.softmax(-1).cpu())}

    return classify


def load_captioner(folder: Path, device: str) -> Callable[[np.ndarray], list[str]]:
    """BLIP: one caption per frame."""
    from transformers import AutoProcessor, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval().to(device)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def caption(frames: np.ndarray) -> list[str]:
        texts = []
        for frame in frames:
            inputs = processor(images=frame, return_tensors="pt").to(device)
            tokens = model.generate(**inputs, max_new_tokens=24, num_beams=1, do_sample=False)
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
        return texts

    return caption


def load_video_text(folder: Path, device: str) -> Callable[[np.ndarray, str], tuple[float, bool]]:
    """X-CLIP: similarity of 8 frames and a prompt, and whether the prompt was cut."""
    from transformers import AutoTokenizer, XCLIPModel

    model = XCLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings
    side = int(model.config.vision_config.image_size)

    @torch.inference_mode()
    def compare(frames: np.ndarray, prompt: str) -> tuple[float, bool]:
        cut = len(tokenizer(prompt)["input_ids"]) > longest
        tokens = tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt").to(device)
        images = resize(to_tensor(frames), side, side, "bicubic").clamp(0, 255)
        images = normalise(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None].to(device)
        told = model(pixel_values=images, **tokens)
        return float(
            F.cosine_similarity(
                told.video_embeds[0], told.text_embeds.reshape(-1, told.video_embeds.shape[-1])[0], dim=-1
            )
        ), cut

    return compare


HUB_FILES = ("config.json", "model.safetensors")
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
            (*HUB_FILES, "preprocessor_config.json"),
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
            (*HUB_FILES, "preprocessor_config.json"),
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
