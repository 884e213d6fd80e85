"""Tiny models with random weights: every class of the real thing, built in a fraction of a second.

What is cached here is shared between tests: streams never change weights (test_stream.py says so).
"""

from functools import cache

import torch
from diffusers import AutoencoderKLWan
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from streamvid.context import ContextCache
from streamvid.schedule import FewStepFlowScheduler
from streamvid.transformer import CausalWanTransformer3DModel
from streamvid.window import WindowOptions

WORDS = [
    "a",
    "red",
    "blue",
    "fox",
    "cat",
    "bird",
    "walks",
    "runs",
    "sleeps",
    "in",
    "the",
    "snow",
    "rain",
    "night",
    "day",
    "city",
    "falls",
]
LATENT = (16, 4, 4)  # C, H, W of a latent frame
GRID = (2, 2)  # token rows and columns of it
TOKENS = GRID[0] * GRID[1]
PIXELS = 32  # height and width
TEXT_LENGTH, TEXT_DIM = 8, 16


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`."""
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def text_encoder(seed: int = 0) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(WORDS) + 2,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def transformer(seed: int = 0, **changes) -> CausalWanTransformer3DModel:
    """Two layers, two heads of 12; modulation as large as the signal, so that no term goes unnoticed."""
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "text_len": TEXT_LENGTH,
        **changes,
    }
    model = CausalWanTransformer3DModel(**config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("scale_shift_table"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.5)
    return model.eval()


def vae(seed: int = 0, residual: bool = False) -> AutoencoderKLWan:
    """Wan 2.1's plain VAE, or Wan 2.2's residual one on 2 x 2 pixel patches; both compress 4 x 8 x 8."""
    torch.manual_seed(seed)
    config = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1}
    if residual:
        config |= {
            "is_residual": True,
            "dim_mult": [1, 2, 2],
            "temperal_downsample": [True, True],
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
        }
    return AutoencoderKLWan(**config).eval()


def scheduler(**changes) -> FewStepFlowScheduler:
    return FewStepFlowScheduler(**{"denoising_steps": (1000, 500), **changes})


def new_pipeline(**changes) -> StreamVidPipeline:
    """Two denoising steps, 32 x 32 pixels, the `longlive` method; `changes` are those of the transformer."""
    model = transformer(**changes)
    pipe = StreamVidPipeline(
        tokenizer(), text_encoder(), model, vae(), scheduler(), height=PIXELS, width=PIXELS
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def pipeline(**changes) -> StreamVidPipeline:
    """`new_pipeline`, made once."""
    return new_pipeline(**changes)


@cache
def shared_transformer() -> CausalWanTransformer3DModel:
    return transformer().requires_grad_(False)


def context_cache(options: WindowOptions, batch: int = 1, **changes) -> ContextCache:
    """A cache that fits `transformer()` and `LATENT`."""
    return ContextCache(options, 2, 2, 12, GRID, LATENT, batch=batch, **changes)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip(seed: int, frames: int, batch: int = 1) -> torch.Tensor:
    """Random latents `[B, C, F, H, W]`."""
    return normal(seed, batch, LATENT[0], frames, *LATENT[1:])


def text(seed: int, *groups: int) -> torch.Tensor:
    """Random text embeddings `[*groups, text length, D]`, the last rows zero as behind a prompt's end."""
    rows = normal(seed, *groups, TEXT_LENGTH, TEXT_DIM)
    rows[..., -2:, :] = 0
    return rows


def run_blocks(
    cache: ContextCache,
    noisy_BCFHW: torch.Tensor,
    clean_BCFHW: torch.Tensor,
    timestep_F: torch.Tensor | None = None,
    text_BNLD: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cached route: a prediction for every noisy block of a clip, each followed by its clean context pass.

    `text_BNLD` has one prompt per block; the default is one prompt for all.
    """
    model, size = shared_transformer(), cache.options.frames_per_block
    batch, _, frames, *_ = noisy_BCFHW.shape
    timestep = torch.full((frames,), 500.0) if timestep_F is None else timestep_F
    rows = text(0, batch, 1).expand(-1, frames // size, -1, -1) if text_BNLD is None else text_BNLD
    outputs = []
    for block in range(frames // size):
        own = slice(block * size, (block + 1) * size)
        prompt_kv = model.prompt_kv(rows[:, block])
        plan = cache.planner.plan()
        cache.begin(plan)
        times = timestep[own].expand(batch, -1)
        outputs.append(model(noisy_BCFHW[:, :, own], times, prompt_kv=prompt_kv, context=cache).sample)
        model(clean_BCFHW[:, :, own], torch.zeros_like(times), prompt_kv=prompt_kv, context=cache)
        cache.commit(plan, clean_BCFHW[:, :, own])
    return torch.cat(outputs, 2)
