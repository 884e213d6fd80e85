"""Networks from local weights by maintained libraries: every loader takes a folder and a device and gives a callable.

What the callables take and give is all that metrics know of a network. Nothing here downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from streamvid.evaluation.sampling import for_clip, for_dino, for_dinov2, normalise, resize, to_tensor

BATCH = 16


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
            inputs = processor(text=[texts], images=frame, truncation=True, return_tensors="pt").to(device)
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
