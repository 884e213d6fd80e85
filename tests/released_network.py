"""Wan2.1's transformer restated with plain functions of its checkpoint's tensors, in the checkpoint's names.

Nothing of streamvid is used: `released.py` plays the releases' loops with it, and recorded cases prove both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, D]` of each; written out."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def rope(x_BLHD: torch.Tensor, positions, grid) -> torch.Tensor:
    """Rotate the tokens of frames at `positions`: a complex product in float64."""
    rows, columns = grid
    pairs = x_BLHD.shape[-1] // 2
    space = pairs // 3
    parts = []
    for count, axis in ((pairs - 2 * space, 0), (space, 1), (space, 2)):
        omega = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
        where = [(p, r, c)[axis] for p in positions for r in range(rows) for c in range(columns)]
        parts.append(torch.tensor(where, dtype=torch.float64)[:, None] * omega)
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(parts, -1))[:, None]
    z = torch.view_as_complex(x_BLHD.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * turn).flatten(-2).to(x_BLHD.dtype)


class Network:
    """Velocity of latents `[B, F, C, H, W]`, one timestep per frame or `[B, F]` of them.

    Args:
        weights: without a prefix; a layer's cross-attention norm (`norm3`) may be absent.
        model: the `model` section of a case.
    """

    def __init__(self, weights: Weights, model: dict):
        self.w, self.heads = weights, model["num_heads"]
        self.layers, self.head_dim = model["num_layers"], model["head_dim"]
        self.freq_dim, self.eps = model["freq_dim"], model.get("eps", 1e-6)
        self.patch = tuple(model["patch_size"])

    def __call__(self, x, times, prompt, attend: Attend | None = None) -> torch.Tensor:
        return self.traced(x, times, prompt, attend)["flow"]

    def traced(self, x, times, prompt, attend: Attend | None = None) -> dict[str, torch.Tensor]:
        """The velocity, and the outputs of the parts that `wan_bidirectional` records; of time embeddings one per frame."""
        batch, frames, _, height, width = x.shape
        _, rows, columns = self.patch
        grid = (height // rows, width // columns)
        weight = self.w["patch_embedding.weight"]
        x = F.conv3d(x.transpose(1, 2), weight, self.w["patch_embedding.bias"], stride=self.patch)
        got = {"patch_embedding": x}
        x = x.flatten(2).transpose(1, 2)
        t = torch.as_tensor(times, dtype=torch.float32).expand(batch, frames).double()
        half = self.freq_dim // 2
        angles = t[..., None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        e = self._mlp("time_embedding", torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype), F.silu)
        e0 = self._linear("time_projection.1", F.silu(e))
        text = self._mlp("text_embedding", prompt, lambda y: F.gelu(y, approximate="tanh"))
        got |= {"time_embedding": e, "time_projection": e0, "text_embedding": text}
        self.grid, self.frames = grid, frames
        for layer in range(self.layers):
            x = self._block(layer, x, e0.unflatten(-1, (6, -1)), text, attend or self._attend_all)
            got[f"block/{layer}"] = x
        shift, scale = (self.w["head.modulation"] + e[:, :, None]).unbind(2)
        x = self._linear("head.head", self._modulated(x, shift, scale))
        got["head"] = x
        x = x.unflatten(1, (frames, *grid)).unflatten(-1, (rows, columns, -1))  # B F h w r c C
        got["flow"] = x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return got

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _mlp(self, name: str, x: torch.Tensor, act) -> torch.Tensor:
        return self._linear(f"{name}.2", act(self._linear(f"{name}.0", x)))

    def _modulated(self, x: torch.Tensor, shift, scale) -> torch.Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps).unflatten(1, (shift.shape[1], -1))
        return (y * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)

    def _rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.w[f"{name}.weight"]

    def _qkv(self, name: str, x: torch.Tensor, of: torch.Tensor):
        q = self._rms(f"{name}.norm_q", self._linear(f"{name}.q", x))
        k = self._rms(f"{name}.norm_k", self._linear(f"{name}.k", of))
        return [t.unflatten(-1, (self.heads, -1)) for t in (q, k, self._linear(f"{name}.v", of))]

    def _block(self, layer: int, x, e0, text, attend: Attend) -> torch.Tensor:
        name = f"blocks.{layer}"
        shift, scale, gate, shift2, scale2, gate2 = (self.w[f"{name}.modulation"] + e0).unbind(2)

        def gated(y, by):
            return (y.unflatten(1, (by.shape[1], -1)) * by[:, :, None]).flatten(1, 2)

        y = self._modulated(x, shift, scale)
        y = attend(layer, *self._qkv(f"{name}.self_attn", y, y)).flatten(2)
        x = x + gated(self._linear(f"{name}.self_attn.o", y), gate)
        norm = [self.w.get(f"{name}.norm3.{part}") for part in ("weight", "bias")]
        y = x if norm[0] is None else F.layer_norm(x, x.shape[-1:], *norm, eps=self.eps)
        y = softmax_attention(*self._qkv(f"{name}.cross_attn", y, text)).flatten(2)
        x = x + self._linear(f"{name}.cross_attn.o", y)
        y = self._mlp(
            f"{name}.ffn", self._modulated(x, shift2, scale2), lambda z: F.gelu(z, approximate="tanh")
        )
        return x + gated(y, gate2)

    def _attend_all(self, layer: int, q, k, v) -> torch.Tensor:
        """All frames attend each other (the bidirectional Wan)."""
        at = range(self.frames)
        return softmax_attention(rope(q, at, self.grid), rope(k, at, self.grid), v)


def random_weights(model: dict, seed: int) -> Weights:
    """Every parameter from a normal distribution, so that no term goes unnoticed."""
    random = torch.Generator().manual_seed(seed)
    dim, ffn = model["num_heads"] * model["head_dim"], model["ffn_dim"]
    w: Weights = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        w[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) / math.sqrt(inputs)
        w[f"{name}.bias"] = torch.randn(outputs, generator=random) * 0.2

    def norm(name: str, *parts: str) -> None:
        for part in parts:
            w[f"{name}.{part}"] = (part == "weight") + torch.randn(dim, generator=random) * 0.2

    patch = math.prod(model["patch_size"])
    linear("patch_embedding", model["in_dim"] * patch, dim)
    w["patch_embedding.weight"] = w["patch_embedding.weight"].view(dim, -1, *model["patch_size"])
    for name, inputs in (("text_embedding", model["text_dim"]), ("time_embedding", model["freq_dim"])):
        linear(f"{name}.0", inputs, dim)
        linear(f"{name}.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    for layer in range(model["num_layers"]):
        name = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{name}.{attention}.{part}", dim, dim)
            norm(f"{name}.{attention}.norm_q", "weight")
            norm(f"{name}.{attention}.norm_k", "weight")
        if model.get("cross_attn_norm", True):
            norm(f"{name}.norm3", "weight", "bias")
        linear(f"{name}.ffn.0", dim, ffn)
        linear(f"{name}.ffn.2", ffn, dim)
        w[f"{name}.modulation"] = torch.randn(1, 6, dim, generator=random) * 0.3
    linear("head.head", dim, model["out_dim"] * patch)
    w["head.modulation"] = torch.randn(1, 2, dim, generator=random) * 0.3
    return w
