"""The Wan2.2 VAE (TI2V-5B, LongLive 2): names, statistics and configuration of `Wan2.2_VAE.pth`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from streamvid.checkpoint_keys import RESAMPLE, RESIDUAL, Rules, vae_ends

MEAN = """
-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375 -0.1825
-0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230
-0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
"""
DEVIATION = """
0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978
0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093
0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""
RESIDUAL_BLOCKS, LEVELS = 2, 4


def rules() -> Rules:
    """Wan's names and those of diffusers: both nested by level; Wan puts a level's resampler last in its list."""
    places: list[tuple[str, str, Rules]] = [
        ("{net}.middle.0", "{net}.mid_block.resnets.0", RESIDUAL),
        ("{net}.middle.2", "{net}.mid_block.resnets.1", RESIDUAL),
    ]
    for level in range(LEVELS):
        for wan, ours, blocks, sampler in (
            ("encoder.downsamples", "encoder.down_blocks", RESIDUAL_BLOCKS, "downsampler"),
            ("decoder.upsamples", "decoder.up_blocks", RESIDUAL_BLOCKS + 1, "upsampler"),
        ):
            nested = "downsamples" if wan.startswith("encoder") else "upsamples"
            for block in range(blocks):
                places.append(
                    (f"{wan}.{level}.{nested}.{block}", f"{ours}.{level}.resnets.{block}", RESIDUAL)
                )
            places.append((f"{wan}.{level}.{nested}.{blocks}", f"{ours}.{level}.{sampler}", RESAMPLE))
    return (*vae_ends(), *((f"{w}.{a}", f"{d}.{b}") for w, d, parts in places for a, b in parts))


def is_vae22(names) -> bool:
    """Whether a checkpoint's names, in either naming, are those of this VAE."""
    nested = r"encoder\.downsamples\.\d+\.downsamples\.|encoder\.down_blocks\.\d+\.resnets\."
    return any(re.match(nested, name) for name in names)


def infer_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Config of the VAE whose weights (in diffusers' naming) these are; statistics are the published ones."""
    channels = state["post_quant_conv.weight"].shape[0]
    base = state["encoder.conv_in.weight"].shape[0]
    top = state["decoder.conv_in.weight"].shape[0]
    widths = [
        state[f"encoder.down_blocks.{level}.resnets.1.conv2.weight"].shape[0] for level in range(LEVELS)
    ]
    time = [
        f"encoder.down_blocks.{level}.downsampler.time_conv.weight" in state for level in range(LEVELS - 1)
    ]
    mean, deviation = ([float(value) for value in text.split()] for text in (MEAN, DEVIATION))
    return {
        "base_dim": base,
        "decoder_base_dim": top * base // widths[-1],
        "z_dim": channels,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": RESIDUAL_BLOCKS,
        "temperal_downsample": time,
        "is_residual": True,
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "patch_size": 2,
        "scale_factor_spatial": 2 ** (LEVELS - 1) * 2,
        "scale_factor_temporal": 2 ** sum(time),
        "latents_mean": mean[:channels],
        "latents_std": deviation[:channels],
    }
