"""The causal Wan transformer: Wan2.1's text-to-video network with per-frame timesteps and an explicit attention context.

Parameter names are those of diffusers' `WanTransformer3DModel`, so published weights load by a rename table. The network
holds weights only. What a query may attend, at which positions, and where keys and values are kept, is the business of the
`AttentionContext` passed to `forward`: full attention, a training window, or a stream's cache (streamvid.context).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from streamvid.kernels.attention import AttentionFunction, attention_backend
from streamvid.kernels.companions import PLAIN, companions, rms_norm
from streamvid.rope import rotate, rotation


class AttentionContext(Protocol):
    """What the self-attention of every layer runs against.

    It may have more: `companions`, the functions around attention (streamvid.kernels.companions) that the forward is to use,
    and `attend_projected`, which takes queries, keys and values `[B, L, C]` as they are projected, with their norms.
    """

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output `[B, L, H, D]` of this forward's tokens; q and k arrive normalised and not rotated."""
        ...


class PromptKV(NamedTuple):
    """Cross-attention keys and values of one prompt, computed once: per layer `[B * N, text length, H, D]`."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


class TimeEmbedding(NamedTuple):
    """What the network makes of timesteps, computed once: the embedding `[B, F, C]` and its projection `[B, F, 6, C]`."""

    embedding: torch.Tensor
    modulation: torch.Tensor


class FullAttention:
    """Bidirectional attention over all frames of the forward, at temporal positions 0, 1, 2, ..."""

    def __init__(self, frames: int, height: int, width: int, head_dim: int, device, backend: str = "auto"):
        self.rotation = rotation(range(frames), height, width, head_dim, device)
        self.attention = attention_backend(backend)
        self.companions = companions(backend, device)

    def attend(
        self, layer: int, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor
    ) -> torch.Tensor:
        return self.attention(rotate(q_BLHD, self.rotation), rotate(k_BLHD, self.rotation), v_BLHD)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride, as the product of patches and weights that it is.

    oneDNN 3.12, in PyTorch 2.13, computes something else on CPUs with AMX, in bfloat16, of 16 channels in patches of 4 x 4.
    """

    def forward(self, x_BCFHW: torch.Tensor) -> torch.Tensor:
        frames, rows, columns = self.kernel_size
        patches = x_BCFHW.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, frames))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # B C F f H h W w -> B F H W (C f h w)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


class WanRMSNorm(nn.Module):
    """RMS norm over the whole model width: normalised in float32, cast back, then scaled (the order of the release)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.eps) * self.weight


class WanAttention(nn.Module):
    """Projections of self- or cross-attention; the attention itself happens in a context or against a `PromptKV`."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = WanRMSNorm(dim, eps)
        self.norm_k = WanRMSNorm(dim, eps)

    def query(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return self.norm_q(self.to_q(x_BLC)).unflatten(-1, (self.heads, -1))

    def key_value(self, x_BLC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.norm_k(self.to_k(x_BLC)).unflatten(-1, (self.heads, -1))
        return key, self.to_v(x_BLC).unflatten(-1, (self.heads, -1))

    def project(self, o_BLHD: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](o_BLHD.flatten(-2))


class CausalWanBlock(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward.

    Called with text only, a block gives its cross-attention keys and values: sharding, offloading, casting and compilation
    act on calls of a block, and would miss a call of one of its parts.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, cross_attn_norm: bool, eps: float, layer: int):
        super().__init__()
        self.layer = layer
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = WanAttention(dim, heads, eps)
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BLC: torch.Tensor,
        modulation_BF6C: torch.Tensor | None = None,
        prompt_key: torch.Tensor | None = None,
        prompt_value: torch.Tensor | None = None,
        context: AttentionContext | None = None,
        attention: AttentionFunction | None = None,
        known_frames: int = 0,
    ):
        """With `known_frames` the first so many frames only leave their keys and values in the context."""
        if modulation_BF6C is None:
            return self.attn2.key_value(x_BLC)
        assert prompt_key is not None and context is not None and attention is not None
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (
            self.scale_shift_table + modulation_BF6C
        ).unbind(2)

        fused = getattr(context, "companions", PLAIN)
        y = fused.modulated_norm(x_BLC, shift_sa, scale_sa, self.norm1.eps)
        attend = _attend_untraced if torch.compiler.is_compiling() else CausalWanBlock._attend
        attended = attend(self, context, y)
        if known_frames:
            tokens = known_frames * x_BLC.shape[1] // modulation_BF6C.shape[1]
            x_BLC, attended = x_BLC[:, tokens:], attended[:, tokens:]
            if x_BLC.shape[1] == 0:
                return x_BLC
            gate_sa, shift_ff, scale_ff, gate_ff = (
                part[:, known_frames:] for part in (gate_sa, shift_ff, scale_ff, gate_ff)
            )
        x_BLC = fused.gated_sum(x_BLC, self.attn1.project(attended), gate_sa)

        # prompts may differ along the sequence: N equal groups of frames, each with its own text
        groups = prompt_key.shape[0] // x_BLC.shape[0]
        q = self.attn2.query(self.norm2(x_BLC))
        if groups == 1:
            attended = attention(q, prompt_key, prompt_value)
        else:
            q = q.unflatten(1, (groups, -1)).flatten(0, 1)
            attended = attention(q, prompt_key, prompt_value).unflatten(0, (-1, groups)).flatten(1, 2)
        x_BLC = x_BLC + self.attn2.project(attended)

        y = fused.modulated_norm(x_BLC, shift_ff, scale_ff, self.norm3.eps)
        return fused.gated_sum(x_BLC, self.ffn(y), gate_ff)

    def _attend(self, context: AttentionContext, y_BLC: torch.Tensor) -> torch.Tensor:
        """Self-attention of the block's tokens, `[B, L, H, D]`."""
        attn = self.attn1
        projected = getattr(context, "attend_projected", None)
        if projected is None:
            return context.attend(self.layer, attn.query(y_BLC), *attn.key_value(y_BLC))
        return projected(
            self.layer, attn.to_q(y_BLC), attn.to_k(y_BLC), attn.to_v(y_BLC), attn.norm_q, attn.norm_k
        )


# a compiled block that knew its number or its context would be compiled anew for every layer and every block of a stream
_attend_untraced = torch.compiler.disable(CausalWanBlock._attend)


class ConditionEmbedder(nn.Module):
    """Time and text embeddings (names as in diffusers' `WanTimeTextImageEmbedding`)."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")

    def time(self, timestep_BF: torch.Tensor, dtype: torch.dtype) -> TimeEmbedding:
        half = self.freq_dim // 2
        # MPS has no float64; everywhere else the sinusoid keeps the precision of the release
        wide = torch.float32 if timestep_BF.device.type == "mps" else torch.float64
        exponent = torch.arange(half, dtype=wide, device=timestep_BF.device) / half
        angle = timestep_BF.to(wide)[..., None] * 10000.0**-exponent
        embedding = self.time_embedder(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))
        return TimeEmbedding(embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1)))


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin):
    """Wan2.1 text-to-video transformer for block-by-block generation (CausVid, Self Forcing and their successors).

    Args:
        patch_size: latent frames, rows and columns per token.
        num_attention_heads, attention_head_dim: their product is the model width.
        in_channels, out_channels: latent channels.
        text_dim: width of the text encoder's output; freq_dim: width of the time sinusoid; ffn_dim: feed-forward width.
        num_layers: number of blocks; cross_attn_norm: affine layer norm before cross-attention; eps: of all norms.
        text_len: rows of text the network was trained with; shorter prompts are padded with zero rows, all attended.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]
    _skip_keys = ["context", "prompt_kv"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        text_len: int = 512,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = PatchEmbedding(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            CausalWanBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, layer)
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * patch_size[0] * patch_size[1] * patch_size[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.attention_name = "auto"

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent frame of `height` x `width`."""
        return height // self.config.patch_size[1], width // self.config.patch_size[2]

    def prompt_kv(self, text_BLD: torch.Tensor) -> PromptKV:
        """Cross-attention keys and values of text `[B, text length, text_dim]` or `[B, N, text length, text_dim]`.

        With N groups, the frames of a forward are split into N equal runs, each attending its own text.
        """
        return self(encoder_hidden_states=text_BLD)

    def time_embedding(self, timestep_BF: torch.Tensor) -> TimeEmbedding:
        """What `forward` takes in place of timesteps, to be computed once where they come again and again."""
        return self(timestep=timestep_BF)

    @property
    def device(self) -> torch.device:
        """Where forwards run, also while an offload hook keeps the weights elsewhere."""
        if hasattr(self, "_hf_hook"):
            for module in self.modules():
                device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                if device is not None:
                    return torch.device(device)
        return super().device

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention of `streamvid.kernels` by name, for the transformer and for streams that name none.

        Raises:
            UserError: it does not exist or cannot run here.
        """
        attention_backend(backend)
        self.attention_name = backend

    def reset_attention_backend(self) -> None:
        """Back to the choice that suits this machine."""
        self.attention_name = "auto"

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | TimeEmbedding | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        prompt_kv: PromptKV | None = None,
        context: AttentionContext | None = None,
        return_dict: bool = True,
        known_frames: int = 0,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor] | PromptKV | TimeEmbedding:
        """Prediction `[B, C, F, H, W]` for latents `[B, C, F, H, W]` at timesteps `[B]` or `[B, F]` in [0, 1000].

        Text comes as `encoder_hidden_states` or, computed before, as `prompt_kv`; given alone, its `PromptKV` is returned.
        Of timesteps given alone their `TimeEmbedding` is returned, which may be given in their place.
        Without a `context` all frames attend each other, as in the bidirectional Wan.
        Of the first `known_frames` nothing is predicted: they only leave their keys and values in the context.
        """
        if hidden_states is None and timestep is not None:
            assert isinstance(timestep, torch.Tensor)
            return self.condition_embedder.time(timestep, self.dtype)
        if prompt_kv is None:
            assert encoder_hidden_states is not None, "give encoder_hidden_states or prompt_kv"
            text = self.condition_embedder.text_embedder(encoder_hidden_states.flatten(0, -3))
            prompt_kv = PromptKV(*map(list, zip(*(block(text) for block in self.blocks), strict=True)))
        if hidden_states is None:
            return prompt_kv
        assert timestep is not None, "latents need timesteps"
        frames = hidden_states.shape[2]
        if context is None:
            context = FullAttention(
                frames,
                *self.token_grid(*hidden_states.shape[-2:]),
                self.config.attention_head_dim,
                hidden_states.device,
                self.attention_name,
            )
        predict = (hidden_states, timestep, prompt_kv, context, known_frames)
        # on the meta device costs are counted, for which calls have to come in their parts
        if torch.is_grad_enabled() or hidden_states.is_meta:
            sample = self._predict(*predict)
        else:
            # nothing notes down versions and views of tensors (benchmarks.parts)
            with torch.inference_mode():
                sample = self._predict(*predict)
            sample = sample.clone()  # a tensor like any other
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _predict(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | TimeEmbedding,
        prompt_kv: PromptKV,
        context: AttentionContext,
        known_frames: int,
    ) -> torch.Tensor:
        """Through all layers: what `forward` predicts."""
        attention = attention_backend(self.attention_name)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        batch, _, frames, height, width = hidden_states.shape
        if isinstance(timestep, torch.Tensor):
            if timestep.ndim == 1:
                timestep = timestep[:, None].expand(batch, frames)
            timestep = self.condition_embedder.time(timestep, x.dtype)
        embedding, modulation = timestep

        for block, key, value in zip(self.blocks, prompt_kv.keys, prompt_kv.values, strict=True):
            # nobody uses what the last block makes of known frames
            known = known_frames if block is self.blocks[-1] else 0
            inputs = (x, modulation, key, value, context, attention, known)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *inputs)
            else:
                x = block(*inputs)

        if known_frames == frames:
            return hidden_states[:, :, :0]
        shift, scale = (self.scale_shift_table + embedding[:, known_frames:, None]).unbind(2)
        fused = getattr(context, "companions", PLAIN)
        x = self.proj_out(fused.modulated_norm(x, shift, scale, self.norm_out.eps))
        return self._unpatchify(x, frames - known_frames, *self.token_grid(height, width))

    def _unpatchify(self, x_BLC: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        _, patch_rows, patch_columns = self.config.patch_size
        x = x_BLC.unflatten(1, (frames, rows, columns)).unflatten(-1, (1, patch_rows, patch_columns, -1))
        # B F h w pt ph pw C -> B C F pt h ph w pw
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
