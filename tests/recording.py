"""Cases in the format of the recorded ones, with random settings: what all kinds of them have in common."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

HEADS = [(2, 12), (1, 24), (3, 16), (1, 32), (1, 64), (1, 128)]  # number, size
GRIDS = [(2, 2), (1, 3), (3, 2), (1, 1)]  # tokens of a latent frame


def drawn_model(draw: random.Random, **changes) -> dict:
    """A `model` section."""
    heads, head_dim = draw.choice(HEADS)
    pairs = head_dim // 2
    return {
        "model_type": "t2v",
        "dim": heads * head_dim,
        "num_heads": heads,
        "head_dim": head_dim,
        "ffn_dim": draw.choice([16, 48]),
        "num_layers": draw.choice([1, 2, 2, 3]),
        "in_dim": 16,
        "out_dim": 16,
        "patch_size": [1, 2, 2],
        "text_dim": draw.choice([12, 24]),
        "text_len": draw.randint(3, 9),
        "freq_dim": draw.choice([8, 32]),
        "qk_norm": True,
        "cross_attn_norm": draw.random() < 0.8,
        "eps": draw.choice([1e-6, 1e-5]),
        "rope_theta": 10000,
        "rope_complex_pairs_t_h_w": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
        **changes,
    }


def random_text(model: dict, rows: list[int], random_: torch.Generator) -> torch.Tensor:
    """Text-encoder output `[B, text_len, text_dim]`, with so many rows of text per video."""
    text = torch.randn(len(rows), model["text_len"], model["text_dim"], generator=random_)
    for video, length in enumerate(rows):
        text[video, length:] = 0
    return text


def write_case(
    folder: Path, settings: dict, inputs: dict, outputs: dict, weights: dict | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(settings))
    files = {"inputs": inputs, "outputs": outputs, **({} if weights is None else {"weights": weights})}
    for name, tensors in files.items():
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / f"{name}.safetensors")
