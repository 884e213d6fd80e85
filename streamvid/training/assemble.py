"""Put trained parts together: the model folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

from streamvid.methods import load_method
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from streamvid.schedule import FewStepFlowScheduler
from streamvid.training.card import write_assembled_card
from streamvid.transformer import CausalWanTransformer3DModel


def assemble(
    vae: str, text: str, student: str, output: str, method: str, fps: float, height: int, width: int
) -> None:
    """Write a pipeline folder from the folders that the training stages exported, weights in float16, with a card."""
    load_method(method)
    half = {"dtype": torch.float16}
    pipe = StreamVidPipeline(
        tokenizer=AutoTokenizer.from_pretrained(f"{text}/tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(f"{text}/text_encoder", dtype=torch.float16),
        transformer=CausalWanTransformer3DModel.from_pretrained(f"{student}/transformer", **half),
        vae=AutoencoderKLWan.from_pretrained(vae, **half),
        scheduler=FewStepFlowScheduler.from_pretrained(f"{student}/scheduler"),
        method=method,
        fps=fps,
        height=height,
        width=width,
    )
    pipe.save_pretrained(Path(output))
    write_assembled_card(Path(output), [Path(vae), Path(text), Path(student)])
