"""Training of the embedded model's text encoder: a small UMT5 that knows the world's grammar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from streamvid.training.trainer import Stage
from streamvid.world.prompts import VOCABULARY, describe
from streamvid.world.scene import ATTRIBUTES, sample_scene

TEXT_LENGTH = 40  # rows of text the transformer attends; the longest prompt of the grammar has fewer words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, lower case; words outside the grammar become `<unk>`."""
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


class _Classifier(nn.Module):
    """The encoder and a linear head per attribute, read from every token: each row of text carries the whole prompt."""

    def __init__(self, encoder: UMT5EncoderModel):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.d_model, len(v)) for v in ATTRIBUTES.values())


class TextStage(Stage):
    """Every token's output must tell all attributes of the scene that the prompt describes.

    Args:
        encoder: configuration of `UMT5Config` without the vocabulary size.
        batch_size: prompts per step.
        word_dropout: share of words replaced by `<unk>`, so that unknown words do no harm.
    """

    def __init__(self, encoder: dict[str, Any], batch_size: int = 128, word_dropout: float = 0.02):
        super().__init__()
        self.tokenizer = build_tokenizer()
        config = UMT5Config(vocab_size=len(self.tokenizer), pad_token_id=0, **encoder)
        self.classifier = _Classifier(UMT5EncoderModel(config))
        self.batch_size, self.word_dropout = batch_size, word_dropout

    def trainable(self) -> nn.Module:
        return self.classifier

    def batch(self, seed: int, step: int, process: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, step, process])
        return self._prompts(rng, self.batch_size, self.word_dropout, held_out=None)

    def _prompts(self, rng, count: int, dropout: float, held_out: bool | None) -> dict[str, torch.Tensor]:
        scenes = [sample_scene(rng, held_out=held_out) for _ in range(count)]
        tokens = self.tokenizer([describe(scene, rng) for scene in scenes], padding=True, return_tensors="pt")
        ids = tokens["input_ids"]
        drop = torch.from_numpy(rng.random(ids.shape) < dropout) & (ids > 1)
        # attributes whose word is lost cannot be told: dropping is for robustness, the loss tolerates it
        return {
            "ids": ids.masked_fill(drop, 1),
            "mask": tokens["attention_mask"],
            "labels": torch.tensor([scene.labels() for scene in scenes]),
        }

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = self.classifier.encoder(batch["ids"], batch["mask"]).last_hidden_state
        told = batch["mask"].bool()
        losses, right = [], []
        for head, labels in zip(self.classifier.heads, batch["labels"].unbind(1), strict=True):
            logits = head(hidden)[told]
            target = labels[:, None].expand_as(told)[told]
            losses.append(F.cross_entropy(logits, target))
            right.append((logits.argmax(-1) == target).float().mean())
        return torch.stack(losses).mean(), {"accuracy": torch.stack(right).mean().detach()}

    def validate(self, output: Path, step: int) -> dict[str, float]:
        _, metrics = self(self._prompts(np.random.default_rng(99), 1024, 0.0, held_out=True))
        return {"held_out_accuracy": round(float(metrics["accuracy"]), 4)}

    def export(self, output: Path) -> None:
        self.classifier.encoder.save_pretrained(output / "text_encoder")
        self.tokenizer.save_pretrained(output / "tokenizer")
