"""A denoising loop that does what the releases do, as a baseline: the same numbers, with copies and questions to the device.

For every layer and forward it clones the past keys and values, concatenates the block's, re-indexes sink and recent
frames, asks index tensors for their values, and turns keys by a float64 complex product; x0 is computed in float64.
Prompts' keys are computed once, as in the releases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from streamvid.noise import NoiseSource
from streamvid.rope import rotation
from streamvid.transformer import PromptKV


class NaiveCache:
    """Sink and recent frames of LongLive (absolute positions) by concatenation."""

    def __init__(self, layers: int, grid: tuple[int, int], head_dim: int, window: int, sink: int):
        self.grid, self.head_dim = grid, head_dim
        tokens = grid[0] * grid[1]
        self.window_tokens, self.sink_tokens = window * tokens, sink * tokens
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers
        self.end = [torch.zeros(1, dtype=torch.long) for _ in range(layers)]
        self.first_frame, self.frames, self.writing = 0, 0, False

    def begin(self, first_frame: int, frames: int) -> None:
        self.first_frame, self.frames = first_frame, frames

    def attend(self, layer: int, q_BLHD, k_BLHD, v_BLHD) -> torch.Tensor:
        positions = range(self.first_frame, self.first_frame + self.frames)
        turn = rotation(positions, *self.grid, self.head_dim)
        phases = torch.complex(turn.cos.double(), turn.sin.double())
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * phases).flatten(-2)
            for x in (q_BLHD, k_BLHD)
        )
        q, keys, values = q.to(q_BLHD), k.to(k_BLHD), v_BLHD
        if self.end[layer].item() > 0:
            past_keys, past_values = self.keys[layer], self.values[layer]
            assert past_keys is not None and past_values is not None
            keys = torch.cat([past_keys.clone(), keys], 1)
            values = torch.cat([past_values.clone(), values], 1)
        if keys.shape[1] > self.window_tokens:
            recent = self.window_tokens - self.sink_tokens
            keys, values = (torch.cat([x[:, : self.sink_tokens], x[:, -recent:]], 1) for x in (keys, values))
        if self.writing:
            self.keys[layer], self.values[layer] = keys.clone(), values.clone()
            self.end[layer] += k_BLHD.shape[1]
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))
        return attended.transpose(1, 2)


@torch.no_grad()
def naive_blocks(pipe, method, prompt_kv: PromptKV, noise: NoiseSource, blocks: int):
    """Clean latents of block after block."""
    model, scheduler, size = pipe.transformer, pipe.scheduler, method.frames_per_block
    steps = [(t, float(scheduler.sigma(torch.tensor(t)))) for t in scheduler.steps]
    cache: NaiveCache | None = None
    for block in range(blocks):
        x_t = noise(block, 0, size).to(device=model.device, dtype=model.dtype)
        if cache is None:
            config = model.config
            grid = model.token_grid(*x_t.shape[-2:])
            cache = NaiveCache(config.num_layers, grid, config.attention_head_dim, method.window, method.sink)
        cache.begin(block * size, size)
        x_0 = x_t
        for index, (t, sigma) in enumerate(steps):
            timestep = torch.full((x_t.shape[0], size), t, device=model.device)
            output = model(x_t, timestep, prompt_kv=prompt_kv, context=cache).sample
            x_0 = scheduler.x0_from_output(output.double(), x_t.double(), sigma).to(x_t.dtype)
            if index + 1 < len(steps):
                fresh = noise(block, index + 1, size).to(x_t)
                x_t = scheduler.add_noise(x_0, fresh, steps[index + 1][1])
        cache.writing = True
        model(x_0, torch.zeros(x_0.shape[0], size, device=model.device), prompt_kv=prompt_kv, context=cache)
        cache.writing = False
        yield x_0
