"""What code costs, counted while it runs on the meta device: nothing is computed and no memory is taken.

    with Meter() as meter:
        model(latents, ...)      # weights and inputs on the meta device
    meter.flop, meter.bytes, meter.peak

Attention counts as a fused kernel, as every backend but `reference` is: scores are never written out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

SMALL = 2**25
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Call(NamedTuple):
    """One kernel: multiplications and additions of its products, bytes read and written, and how often it is called."""

    flop: int
    bytes: int
    times: int


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch would take attention apart into products and a softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return FUSED(*args, **kwargs)[0]
        return function(*args, **kwargs)


class Meter(TorchDispatchMode):
    """Counts calls, products, traffic and live memory of everything that runs inside.

    Args:
        host: also count the memory of tensors on the CPU (where the CPU is the device that is meant).

    Attributes:
        calls: every kernel, in order; views are none.
        times: as how many calls the next ones count (of layers that are alike, one is enough).
        live, peak: bytes of tensors made inside, now and at most. Tensors from outside do not count.
        small, small_peak: of those, tensors below `SMALL`, which glibc keeps when they are freed; larger ones it gives back.
    """

    def __init__(self, host: bool = True):
        super().__init__()
        self.host = host
        self.calls: list[Call] = []
        self.times = 1
        self.live = self.peak = self.small = self.small_peak = 0
        self._known: set[int] = set()
        self._attention = _FusedAttention()

    def __enter__(self) -> Meter:
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    @property
    def flop(self) -> int:
        return sum(call.flop * call.times for call in self.calls)

    @property
    def bytes(self) -> int:
        return sum(call.bytes * call.times for call in self.calls)

    def seconds(self, flop_rate: float, byte_rate: float, call_seconds: float = 0.0) -> float:
        """If every call took as long as the slower of its products and its traffic, and a little besides."""
        return sum(
            times * (max(flop / flop_rate, moved / byte_rate) + call_seconds)
            for flop, moved, times in self.calls
        )

    def restart(self) -> None:
        """Forget the calls so far, and take what lives now for the peak so far."""
        self.calls.clear()
        self.peak = self.live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        for tensor in given:
            self._meet(tensor, 0)
        fresh = sum([self._meet(tensor, tensor.untyped_storage().nbytes()) for tensor in made])
        if fresh or function._schema.is_mutable:
            moved = sum(tensor.numel() * tensor.itemsize for tensor in (*given, *made))
            self.calls.append(Call(_flop(function, args, kwargs, result), moved, self.times))
        return result

    def _meet(self, tensor: torch.Tensor, size: int) -> bool:
        """Whether its memory is new; `size` bytes of it count as made inside."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return False
        self._known.add(storage._cdata)
        size = size if tensor.is_meta or self.host else 0
        self._hold(size)
        weakref.finalize(storage, self._forget, storage._cdata, size).atexit = False
        return True

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._hold(-size)

    def _hold(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        if abs(size) < SMALL:
            self.small += size
            self.small_peak = max(self.small_peak, self.small)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _flop(function, args, kwargs, result) -> int:
    packet = function._overloadpacket
    if packet is FUSED:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    return flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
