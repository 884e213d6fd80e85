"""Smaller keys and values: how a finished frame is stored. Codecs are siblings of one signature.

    parts = codec.encode(x_FTHD)        # tensors whose first axes are those of x before T
    x_FTHD = codec.decode(parts)

| `kv_dtype` | stored | scale |
|---|---|---|
| int8 | 8 bits, symmetric | per token and head, float32 |
| fp8 | float8 e4m3 | per token and head, float32 |
| kivi2 | 2 bits with a zero point (KIVI, arXiv 2402.02750) | keys: per channel of a frame; values: per token and head |

The sink and the block being denoised stay in full precision, with kivi2 the last finished block too.
`QuantisedKV` keeps them. The windowed-attention kernel (backend triton) decodes int8 and fp8 as it loads them. Every other
backend, and kivi2, reads one layer's window at a time from a scratch buffer, so a layer is decoded in every forward: memory
is saved, time is not. Keys are stored rotated, as everywhere here (KIVI's are stored before rotation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from streamvid.errors import UserError
from streamvid.saving import copy_into

Parts = tuple[torch.Tensor, ...]


class Codec(Protocol):
    """Encodes frames `[..., T, H, D]` of keys or of values."""

    def encode(self, x: torch.Tensor) -> Parts: ...

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor: ...


class Scaled:
    """Numbers over the largest of their token and head: int8 (rounded) or float8."""

    def __init__(self, dtype: torch.dtype, largest: float):
        self.dtype, self.largest = dtype, largest

    def encode(self, x: torch.Tensor) -> Parts:
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / self.largest
        numbers = x.float() / scale
        return (numbers.round() if self.dtype == torch.int8 else numbers).to(self.dtype), scale

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        numbers, scale = parts
        return numbers.float() * scale


class TwoBits:
    """Four levels from the least to the largest of a group, four numbers to a byte (KIVI).

    Args:
        group: axis along which numbers share levels: -3 (the tokens of a frame, each channel by itself) or -1 (a token's
            channels in one head).
    """

    def __init__(self, group: int):
        self.group = group

    def encode(self, x: torch.Tensor) -> Parts:
        least, most = x.float().aminmax(dim=self.group, keepdim=True)
        least, step = least.to(x.dtype), ((most - least) / 3).clamp_min(1e-12).to(x.dtype)
        levels = ((x.float() - least.float()) / step.float()).round().clamp(0, 3).to(torch.uint8)
        first, second, third, fourth = levels.unflatten(-1, (-1, 4)).unbind(-1)
        return first | second << 2 | third << 4 | fourth << 6, least, step

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        packed, least, step = parts
        levels = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
        return levels.float() * step.float() + least.float()


KV_DTYPES = ("native", "int8", "fp8", "kivi2")


def codecs(kv_dtype: str) -> tuple[Codec, Codec]:
    """Of keys and of values."""
    if kv_dtype == "int8":
        return Scaled(torch.int8, 127), Scaled(torch.int8, 127)
    if kv_dtype == "fp8":
        return Scaled(torch.float8_e4m3fn, 448), Scaled(torch.float8_e4m3fn, 448)
    return TwoBits(-3), TwoBits(-1)


class QuantisedKV:
    """Keys and values of all slots, most of them encoded.

    Slots of the sink, and the `recent` slots that were written last, are kept in full precision; a slot that has to make
    room is encoded then, once. Without room (and with `recent` 0) a slot is encoded where it is written.

    Args:
        shape: `(layers, B, slots, T, H, D)`, T tokens of a frame.
        sink: the first slots, which stay in full precision.
        recent: how many others do.
    """

    def __init__(
        self,
        kv_dtype: str,
        shape: tuple[int, int, int, int, int, int],
        sink: int,
        recent: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        layers, batch, slots, tokens, heads, dim = shape
        if kv_dtype == "kivi2" and dim % 4:
            raise UserError(f"kv_dtype = kivi2 packs four channels and a head has {dim}: use int8")
        self.codecs = codecs(kv_dtype)
        probe = torch.zeros(1, tokens, heads, dim, dtype=dtype, device=device)
        try:
            samples = [codec.encode(probe) for codec in self.codecs]
        except (RuntimeError, TypeError):
            raise UserError(f"kv_dtype = {kv_dtype} cannot be had on device {device}: use int8") from None
        self.parts = [
            [
                torch.zeros(layers, batch, slots, *part.shape[1:], dtype=part.dtype, device=device)
                for part in sample
            ]
            for sample in samples
        ]
        self.full = torch.zeros(
            2, layers, batch, sink + recent, tokens, heads, dim, dtype=dtype, device=device
        )
        self.scratch = torch.zeros(2, batch, slots, tokens, heads, dim, dtype=dtype, device=device)
        self.sink = sink
        self.place: dict[int, int]  # slot -> where it is in `full`
        self.clear()

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        parts = {f"parts.{i}.{n}": part for i, both in enumerate(self.parts) for n, part in enumerate(both)}
        return {"full": self.full, **parts}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._tensors.values(), self.scratch))

    def clear(self) -> None:
        """No slot but those of the sink is in full precision."""
        self.place = {slot: slot for slot in range(self.sink)}

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self._tensors, "place": dict(self.place)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_into(self._tensors, state["tensors"])
        self.place = dict(state["place"])

    def begin(self, own: Sequence[int], live: Sequence[int]) -> None:
        """A block is about to write the slots `own`; `live` ones are finished and attended."""
        for slot in [slot for slot in self.place if slot >= self.sink and slot not in {*own, *live}]:
            del self.place[slot]
        for slot in own:
            if slot not in self.place and self.full.shape[3] > self.sink:
                free = set(range(self.sink, self.full.shape[3])).difference(self.place.values())
                if not free:
                    oldest = next((s for s in self.place if s >= self.sink and s not in own), None)
                    if oldest is None:
                        continue  # more slots than there is room for are encoded where they are written
                    free = {self._settle(oldest)}
                self.place[slot] = min(free)

    def _settle(self, slot: int) -> int:
        """Encode a slot that was in full precision; the place that it leaves."""
        place = self.place.pop(slot)
        for codec, parts, full in zip(self.codecs, self.parts, self.full, strict=True):
            for part, encoded in zip(parts, codec.encode(full[:, :, place]), strict=True):
                part[:, :, slot] = encoded
        return place

    @property
    def decoded_on_load(self) -> bool:
        """Whether the windowed-attention kernel can decode it; FP8 needs the number format in the device."""
        if not all(isinstance(codec, Scaled) for codec in self.codecs):
            return False
        eight_bits = self.parts[0][0]
        if eight_bits.dtype == torch.int8 or not eight_bits.is_cuda:
            return True
        return torch.cuda.get_device_capability(eight_bits.device) >= (8, 9)

    def where(self, slot: int) -> tuple[str, int]:
        """Name of the buffer that a finished slot lies in (of `buffer`), and its index there."""
        return ("full", self.place[slot]) if slot in self.place else ("encoded", slot)

    def buffer(self, name: str, layer: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of a layer `[B, slots * T, H, D]`; of `encoded` with the scales of both."""
        if name == "full":
            return self.full[0, layer].flatten(1, 2), self.full[1, layer].flatten(1, 2)
        numbers, scales = ([part[n][layer].flatten(1, 2) for part in self.parts] for n in (0, 1))
        return *numbers, *scales

    def layer(self, layer: int, decoded: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, `[B, slots * T, H, D]`, in the scratch buffer: good until the next call.

        Not `decoded`, there is just room for those of a block.
        """
        each = zip(self.codecs, self.parts, self.full, self.scratch, strict=True)
        for codec, parts, full, scratch in each if decoded else ():
            scratch.copy_(codec.decode([part[layer] for part in parts]))
            for slot, place in self.place.items():
                scratch[:, slot] = full[layer, :, place]
        return self.scratch[0].flatten(1, 2), self.scratch[1].flatten(1, 2)

    def keep(self, layer: int, own: Sequence[int]) -> None:
        """Store what was written to the scratch buffer's slots `own`."""
        for codec, parts, full, scratch in zip(self.codecs, self.parts, self.full, self.scratch, strict=True):
            for slot in own:
                if slot in self.place:
                    full[layer, :, self.place[slot]] = scratch[:, slot]
                else:
                    for part, encoded in zip(parts, codec.encode(scratch[:, slot]), strict=True):
                        part[layer, :, slot] = encoded

    def span(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a slot in all layers, `[layers, B, T, H, D]`: in full precision to write to, else a copy."""
        if slot in self.place:
            return self.full[0][:, :, self.place[slot]], self.full[1][:, :, self.place[slot]]
        keys, values = (
            codec.decode([part[:, :, slot] for part in parts]).to(self.full.dtype)
            for codec, parts in zip(self.codecs, self.parts, strict=True)
        )
        return keys, values
