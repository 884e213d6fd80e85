"""Sample videos of a model in training."""

from __future__ import annotations

from pathlib import Path

import torch

from streamvid.io.contact_sheet import ContactSheet
from streamvid.io.writers import open_writer
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline


@torch.no_grad()
def write_samples(pipe: StreamVidPipeline, script: str, blocks: int, seed: int, path: Path) -> None:
    """A video of at most `blocks` blocks at `path`, with its contact sheet beside it (.png).

    Args:
        script: what `pipe.stream` takes: a prompt, or a one-line script with durations and switches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = pipe.stream(script, blocks=blocks, seed=seed)
    sheet = ContactSheet(stream.fps, seconds_per_frame=0.75)
    with open_writer(path, stream.fps) as writer:
        for chunk in stream:
            writer.write(chunk.frames)
            sheet.add(chunk.frames, chunk.prompt)
    sheet.save(path.with_suffix(".png"))
