"""Wan's decoder walked in half precision with nothing wasted: the weights of `AutoencoderKLWan.decoder`, fewer passes.

What diffusers' modules do in many copies is done here in few: activations stay channels-last, convolutions pad by
themselves, norm and SiLU take four passes, and a nearest upsampling followed by a 3x3 convolution is four 2x2 convolutions
of the picture before it is upsampled (the same sums, 4/9 of the products). Equal to `vae.decode` up to the rounding of half
precision, which is why float32 keeps to diffusers' own modules (streamvid.decoding).

The walk has two stages of about equal cost, so that two threads can work on two chunks of a stream (streamvid.ahead).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, WanResidualUpBlock

MEMORY = 2  # input frames that a causal convolution of three taps remembers


class Memory:
    """Past input frames of a stream's causal convolutions, read and replaced one after the other in visiting order."""

    def __init__(self, features: list, index: int = 0):
        self.features, self.index = features, index

    def extend(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """`x` with the frames before it in front (zeros at the start of a stream); its last ones are remembered."""
        past = self.features[self.index]
        extended = torch.cat([self._before(x_BCTHW) if past is None else past, x_BCTHW], 2)
        self.features[self.index] = extended[:, :, -MEMORY:].clone(memory_format=torch.channels_last_3d)
        self.index += 1
        return extended

    def extend_but_first(self, x_BCTHW: torch.Tensor) -> torch.Tensor | None:
        """As `extend`, but the very first frame of a stream gives None and is not remembered."""
        if self.features[self.index] is not None:
            return self.extend(x_BCTHW)
        self.features[self.index] = self._before(x_BCTHW).contiguous(memory_format=torch.channels_last_3d)
        self.index += 1
        return None

    def _before(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_BCTHW[:, :, :1]).expand(-1, -1, MEMORY, -1, -1)


def first_stage(decoder: WanDecoder3d, x_BCFHW: torch.Tensor, features: list) -> tuple[torch.Tensor, int]:
    """All but the last block: activations, and how many of the features it has used."""
    memory = Memory(features)
    x = x_BCFHW.contiguous(memory_format=torch.channels_last_3d)
    x = _causal_conv(decoder.conv_in, memory.extend(x))
    middle: Any = decoder.mid_block
    x = _residual(middle.resnets[0], x, memory)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = _residual(resnet, attention(x), memory)
    for block in decoder.up_blocks[:-1]:
        x = _up_block(block, x, memory)
    return x, memory.index


def last_stage(decoder: WanDecoder3d, x_BCTHW: torch.Tensor, features: list, used: int) -> torch.Tensor:
    """From the output of `first_stage` to pixels `[B, channels, T, H, W]`, neither clamped nor unpatched."""
    memory = Memory(features, used)
    x = _up_block(decoder.up_blocks[-1], x_BCTHW, memory)
    return _causal_conv(decoder.conv_out, memory.extend(_norm_silu(decoder.norm_out, x)))


def _norm_silu(norm: Any, x_BCTHW: torch.Tensor) -> torch.Tensor:
    """SiLU of the channels over their root mean square."""
    length = torch.linalg.vector_norm(x_BCTHW, dim=1, keepdim=True)
    y = x_BCTHW * length.clamp_min_(1e-12).reciprocal_()
    return F.silu(y.mul_(norm.gamma * norm.scale))  # not in place, which takes twice as long on a CPU


def _causal_conv(conv: Any, x_BCTHW: torch.Tensor) -> torch.Tensor:
    """The convolution over what `Memory.extend` gave; rows and columns are padded here."""
    columns, _, rows, *_ = conv._padding
    return F.conv3d(x_BCTHW, conv.weight, conv.bias, padding=(0, rows, columns))


def _residual(block: Any, x: torch.Tensor, memory: Memory) -> torch.Tensor:
    shortcut = x if isinstance(block.conv_shortcut, torch.nn.Identity) else block.conv_shortcut(x)
    y = _causal_conv(block.conv1, memory.extend(_norm_silu(block.norm1, x)))
    y = _causal_conv(block.conv2, memory.extend(_norm_silu(block.norm2, y)))
    return y.add_(shortcut)


def _up_block(block: Any, x: torch.Tensor, memory: Memory) -> torch.Tensor:
    y = x
    for resnet in block.resnets:
        y = _residual(resnet, y, memory)
    if not isinstance(block, WanResidualUpBlock):
        for resample in block.upsamplers or ():
            y = _upsample(resample, y, memory)
    elif block.upsampler is not None:
        y = _upsample(block.upsampler, y, memory, x, block.avg_shortcut)
    return y


def _upsample(
    resample: Any,
    x_BCTHW: torch.Tensor,
    memory: Memory,
    before: torch.Tensor | None = None,
    shortcut: Any = None,
) -> torch.Tensor:
    """Twice the rows and columns, and but for the first frame of a stream twice the frames; plus a shortcut of `before`."""
    extended = memory.extend_but_first(x_BCTHW) if resample.mode == "upsample3d" else None
    if extended is not None:
        pairs = _causal_conv(resample.time_conv, extended).unflatten(1, (2, -1))
        x_BCTHW = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    frames = x_BCTHW.transpose(1, 2)
    first = resample.mode == "upsample3d" and extended is None
    added = None if before is None else _repeated(before, shortcut, first)
    doubled = doubling_conv(resample.resample[1], frames.flatten(0, 1), added)
    return doubled.unflatten(0, frames.shape[:2]).transpose(1, 2)


def doubling_conv(
    conv: torch.nn.Conv2d, x_NCHW: torch.Tensor, added: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """The 3x3 convolution `conv` of the picture doubled by nearest neighbours, without doubling it first.

    An even row of the doubled picture sees the row above its own, its own, and its own again; an odd one its own twice and
    the row below. The taps that fall on one row are added up. So it is with columns.

    Args:
        added: four pictures of the size of `x`, added to the pixels of even and odd rows and columns, in this order.
    """
    weight = conv.weight.float()
    for axis in (-2, -1):
        before, own, after = weight.unbind(axis)
        weight = torch.stack(
            [torch.stack([before, own + after], axis), torch.stack([before + own, after], axis)]
        )
    # column parity, row parity, C_out, C_in, 2, 2: one convolution for all four parities
    weight = weight.flatten(0, 2).to(x_NCHW.dtype).contiguous(memory_format=torch.channels_last)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    parities = F.conv2d(x_NCHW.contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    batch, _, rows, columns = x_NCHW.shape
    size = (batch, conv.out_channels, 2 * rows, 2 * columns)
    doubled = torch.empty(size, dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=torch.channels_last)
    shortcut = None if added is None else torch.empty_like(doubled)
    for parity, part in enumerate(parities.split(conv.out_channels, 1)):
        column, row = divmod(parity, 2)
        part = part[:, :, row : row + rows, column : column + columns]
        doubled[:, :, row::2, column::2] = part
        if shortcut is not None and added is not None:
            shortcut[:, :, row::2, column::2] = added[2 * row + column]
    # added at once: a sum of every other pixel takes ten times as long as copies of them and a sum of all
    return doubled if shortcut is None else doubled.add_(shortcut)


def _repeated(x_BCTHW: torch.Tensor, shortcut: Any, first: bool) -> list[torch.Tensor]:
    """What the residual shortcut `DupUp3D` adds to the pixels of each parity (row, column): `[B * T, C, H, W]` each.

    Channels of `x` are dealt out over the pixels that each of its positions becomes; with as many channels as the result
    has, each simply repeats. Of the first frame of a stream only the last copy in time counts.
    """
    time, space = shortcut.factor_t, shortcut.factor_s
    repeated = (
        x_BCTHW.repeat_interleave(shortcut.repeats, 1)
        if shortcut.in_channels != shortcut.out_channels
        else None
    )
    parities = []
    for row in range(space):
        for column in range(space):
            if repeated is None:
                dealt = x_BCTHW[:, :, None].expand(-1, -1, time, -1, -1, -1)
            else:
                dealt = repeated.unflatten(1, (-1, time, space, space))[:, :, :, row, column]
            dealt = dealt[:, :, -1:] if first else dealt
            # B C t T H W -> (B T t) C H W, channels last
            parities.append(dealt.permute(0, 3, 2, 4, 5, 1).flatten(0, 2).permute(0, 3, 1, 2))
            if repeated is None:
                return parities * space**2
    return parities
