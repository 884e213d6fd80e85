"""The naive loop is a fair baseline: it makes the very latents of a stream."""

import tiny
import torch

from benchmarks.naive import naive_blocks
from streamvid.methods import load_method
from streamvid.noise import SeededNoise


def test_it_makes_what_a_stream_makes():
    pipe, method = tiny.pipeline(), load_method("longlive")
    blocks = 7  # the window is full after four
    stream = pipe.stream("a red fox walks", method=method, seed=2, blocks=blocks, decode_pixels=False)
    with torch.no_grad():
        prompt_kv = pipe.transformer.prompt_kv(pipe.encode_prompt("a red fox walks"))
    naive = list(naive_blocks(pipe, method, prompt_kv, SeededNoise([2], tiny.LATENT), blocks))
    chunks = [chunk.latents for chunk in stream]
    torch.testing.assert_close(torch.cat(naive, 2), torch.cat(chunks, 2), atol=1e-4, rtol=1e-4)
