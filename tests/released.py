"""The released caches and loops, restated from their description, to be compared with the engine.

Nothing here is ours, or knows of plans, slots of a ring or a cache that rotates relative positions: buffers shift as they
do in the releases, sets of keys are concatenated, softmax is written out. All lengths are in latent frames, `f` tokens each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from released_network import Network, rope, softmax_attention


@dataclass
class Release:
    """Settings of one run, as a recorded case names them.

    `kind`: self_forcing, longlive, infinite (LongLive with keys stored before RoPE), reward, deep_sink, deep_compression.
    """

    kind: str
    block: int
    window: int  # -1: nothing is evicted
    sink: int = 0
    capacity: int = 21
    decay: float = 0.999
    budget: int = 0
    recent: int = 0
    fusion: str = "sum"
    reuse: int = 7
    literal: int = 21
    global_sink: bool = True
    switches: tuple[int, ...] = ()
    context_noise: float = 0.0


def shift_in_time(x_BLHD: torch.Tensor, by: float) -> torch.Tensor:
    """Turn rotated keys further along the temporal channels only."""
    return rope(x_BLHD, [by] * x_BLHD.shape[1], (1, 1))


@dataclass
class Layer:
    k: torch.Tensor
    v: torch.Tensor
    end: int = 0  # frames in the buffer
    seen: int = 0  # frames of the stream that were ever written
    queries: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    uses: torch.Tensor | None = None
    base: float | None = None


@dataclass
class ReleasedCache:
    """The buffers of all layers, as an attention context of the transformer: `start` is the first frame of a forward."""

    release: Release
    layers: list[Layer]
    grid: tuple[int, int]
    start: int = 0
    rewrites_sink: bool = False
    compressions: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)
    rotations: list[float] = field(default_factory=list)

    @property
    def f(self) -> int:
        return self.grid[0] * self.grid[1]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        r, c, f = self.release, self.layers[layer], self.f
        new = q.shape[1] // f
        stop = self.start + new
        raw = r.kind in ("infinite", "reward")
        own = range(self.start, stop)
        key = k if raw else rope(k, own, self.grid)
        if r.kind == "deep_compression":
            return self._attend_compressed(layer, rope(q, own, self.grid), key, v)
        again = r.kind in ("longlive", "infinite") and stop <= c.seen and self.start > 0
        end = c.end + stop - c.seen
        gone = None
        if r.window != -1 and stop > c.seen and c.end + new > r.capacity:
            evicted = c.end + new - r.capacity
            kept = c.end - evicted - r.sink
            gone = [t[:, r.sink * f : (r.sink + evicted) * f].clone() for t in (c.k, c.v)]
            for t in (c.k, c.v):
                moved = t[:, (r.sink + evicted) * f : (r.sink + evicted + kept) * f].clone()
                t[:, r.sink * f : (r.sink + kept) * f] = moved
            end -= evicted
        begin = end - new
        first = max(begin, r.sink) if again and not self.rewrites_sink else begin
        c.k[:, first * f : end * f] = key[:, (first - begin) * f :]
        c.v[:, first * f : end * f] = v[:, (first - begin) * f :]
        if gone is not None and r.kind == "deep_sink":
            self._move_sink(layer, self.start - (end - r.sink) - r.sink, 0.0)
        if gone is not None and r.kind == "reward":
            self._average(c, gone)
        c.end, c.seen = end, max(stop, c.seen)
        # what is attended
        span = 21 if r.window == -1 else r.window
        if r.kind in ("longlive", "infinite", "reward") and r.sink:
            local = slice(max(r.sink, end - (span - r.sink)) * f, end * f)
            keys, values = (torch.cat([t[:, : r.sink * f], t[:, local]], 1) for t in (c.k, c.v))
        else:
            keys, values = (t[:, max(0, end - span) * f : end * f] for t in (c.k, c.v))
        total = keys.shape[1] // f
        if raw:
            at = total - new if r.kind == "reward" else begin
            keys = rope(keys, range(total), self.grid)
            query = rope(q, range(at, at + new), self.grid)
        else:
            query = rope(q, own, self.grid)
        return softmax_attention(query, keys, values)

    def _average(self, c: Layer, gone: list[torch.Tensor]) -> None:
        r, f = self.release, self.f
        for t, old in zip((c.k, c.v), gone, strict=True):
            if old.shape[1] == r.sink * f:
                t[:, : r.sink * f] = r.decay * t[:, : r.sink * f] + (1 - r.decay) * old
            else:
                n = min(old.shape[1], r.sink * f)
                t[:, :n] = old[:, :n]

    def _move_sink(self, layer: int, desired: int, first: float) -> None:
        c, f = self.layers[layer], self.f
        by = first if c.base is None else desired - c.base
        sink = slice(0, self.release.sink * f)
        c.k[:, sink] = shift_in_time(c.k[:, sink], by)
        c.base = desired
        if layer == 0:
            self.rotations.append(by)

    def _attend_compressed(self, layer: int, q, key, v) -> torch.Tensor:
        r, c, f = self.release, self.layers[layer], self.f
        new = q.shape[1]
        stop = self.start * f + new
        ids = torch.arange(self.start * f, stop).expand(q.shape[0], -1)
        rows = q if c.queries is None else torch.cat([c.queries, q], 1)
        c.queries = rows[:, max(0, rows.shape[1] - r.recent * f) :]
        if c.ids is None:
            c.ids = torch.zeros(c.k.shape[:2], dtype=torch.long)
            c.uses = torch.zeros_like(c.ids)
        stored = c.end * f
        if stop > c.seen * f and stored + new > r.capacity * f:
            old = [(c.k, key), (c.v, v), (c.ids, ids), (c.uses, torch.zeros_like(ids))]
            keys, values, ids, uses = (torch.cat([a[:, :stored], b], 1) for a, b in old)
            total, sink, recent = keys.shape[1], r.sink * f, r.recent * f
            length = max(min(r.budget, r.capacity), r.sink + r.recent) * f
            flat = keys.flatten(2)
            products = torch.einsum("brc,blc->brl", c.queries.flatten(2), flat)
            scores = products.sum(1) if r.fusion == "sum" else products.amax(1)
            scores = scores / (math.sqrt(q.shape[-1]) * q.shape[2])
            score = scores[:, sink : total - recent]
            masked = score.masked_fill(uses[:, sink : total - recent] >= r.reuse, float("-inf"))
            best = masked.topk(length - sink - recent, 1).indices.sort(1).values + sink
            if layer == 0:
                self.compressions.append({})
            self.compressions[-1][layer] = (score, best)
            for b in range(len(keys)):
                order = [*range(sink), *best[b].tolist(), *range(total - recent, total)]
                c.k[b, :length], c.v[b, :length] = keys[b, order], values[b, order]
                c.ids[b, :length] = ids[b, order]
                uses[b, best[b]] += 1
                c.uses[b, :length] = uses[b, order]
            c.end, c.seen = length // f, stop // f
            self._move_sink(layer, self.start - (c.end - r.sink) - r.sink, r.literal - r.budget)
            return softmax_attention(q, c.k[:, :length], c.v[:, :length])
        end = stored + stop - c.seen * f
        c.k[:, end - new : end], c.v[:, end - new : end] = key, v
        c.ids[:, end - new : end], c.uses[:, end - new : end] = ids, 0
        c.end, c.seen = end // f, stop // f
        return softmax_attention(q, c.k[:, :end], c.v[:, :end])


class Levels:
    """The schedule: warped levels and their noise."""

    def __init__(
        self, steps, shift: float = 5.0, warp: bool = True, sigma_min: float = 0.0, extra: bool = True
    ):
        u = torch.linspace(1, sigma_min, 1000 + extra)[:1000]
        self.table = shift * u / (1 + (shift - 1) * u)
        times = torch.cat([1000 * self.table, torch.zeros(1)])
        self.steps = [float(times[1000 - round(v)]) if warp else float(v) for v in steps]

    def sigma(self, t: float) -> float:
        return float(self.table[(1000 * self.table - t).abs().argmin()])

    def clean(self, x, flow, t: float):
        return (x.double() - self.sigma(t) * flow.double()).float()

    def noisy(self, x0, noise, t: float):
        return (1 - self.sigma(t)) * x0 + self.sigma(t) * noise


def new_layers(network: Network, batch: int, grid, capacity: int) -> list[Layer]:
    shape = (batch, capacity * grid[0] * grid[1], network.heads, network.head_dim)
    return [Layer(torch.zeros(shape), torch.zeros(shape)) for _ in range(network.layers)]


def stored_tensors(cache: ReleasedCache, prefix: str) -> dict[str, torch.Tensor]:
    got = {}
    for number, c in enumerate(cache.layers):
        got[f"{prefix}/{number}/k"] = c.k[:, : c.end * cache.f].clone()
        got[f"{prefix}/{number}/v"] = c.v[:, : c.end * cache.f].clone()
        if c.ids is not None:
            got[f"{prefix}/{number}/token_id"] = c.ids[:, : c.end * cache.f].clone()
    return got


@torch.no_grad()
def play(
    release: Release, network: Network, inputs: dict[str, torch.Tensor], levels: Levels, grid
) -> tuple[dict, dict]:
    """Block by block, with recaches: what a case records, and which frame sits in which slot at the end."""
    noise, block = inputs["noise"], release.block
    batch, frames = noise.shape[:2]
    cache = ReleasedCache(release, new_layers(network, batch, grid, release.capacity), grid)
    out, got = torch.zeros_like(noise), {}
    waiting, segment, applied = list(release.switches), 0, []
    slots: list[int] = []
    for number in range(frames // block):
        start = number * block
        if waiting and start >= waiting[0]:
            waiting.pop(0)
            segment += 1
            applied.append(start)
            if start:
                slots = _recache(release, network, cache, out, start, inputs[f"prompt/{segment}"], slots)
            got |= stored_tensors(cache, f"cache_after_switch/{segment - 1}")
        prompt = inputs[f"prompt/{segment}"]
        cache.start = start
        x = noise[:, start : start + block]
        for step, t in enumerate(levels.steps):
            flow = network(x, [t] * block, prompt, cache.attend)
            if number == step == 0:
                got["flow/first"] = flow
            x0 = levels.clean(x, flow, t)
            got[f"x0/{number}/{step}"] = x0
            if step + 1 < len(levels.steps):
                x = levels.noisy(x0, inputs[f"renoise/{number}/{step}"], levels.steps[step + 1])
        out[:, start : start + block] = x0
        network(x0, [release.context_noise] * block, prompt, cache.attend)
        slots += range(start, start + block)
        surplus = len(slots) - cache.layers[0].end
        del slots[release.sink : release.sink + surplus]
    got |= stored_tensors(cache, "cache")
    got["latents"] = out
    for roll, layers in enumerate(cache.compressions):
        for number, (score, best) in layers.items():
            got[f"pc/{roll}/{number}/scores"], got[f"pc/{roll}/{number}/selected"] = score, best
    return got, {"slots": slots, "applied": applied, "rotations": cache.rotations}


def _recache(
    release: Release, network, cache: ReleasedCache, out, start: int, prompt, slots: list[int]
) -> list[int]:
    """One forward over the last clean frames under the new prompt; the frames then in the slots."""
    count = start if release.window == -1 else min(release.window, start)
    if not release.global_sink:
        for c in cache.layers:
            c.k.zero_()
            c.v.zero_()
    cache.start, cache.rewrites_sink = start - count, not release.global_sink
    network(out[:, start - count : start], [release.context_noise] * count, prompt, cache.attend)
    cache.rewrites_sink = False
    return slots if release.global_sink else list(range(start - count, start))


# --- Rolling Forcing --------------------------------------------------------------------------------------------------


@dataclass
class RollingCache:
    """The anchor before RoPE, everything else rotated; one block is written per forward."""

    block: int
    sink: int
    span: int
    layers: list[Layer]
    grid: tuple[int, int]
    capacity: int
    start: int = 0
    context: bool = False

    def attend(self, layer: int, q, k, v) -> torch.Tensor:
        c, f = self.layers[layer], self.grid[0] * self.grid[1]
        frames, n = q.shape[1] // f, self.block
        stop = self.start + n
        end = c.end + stop - c.seen
        if stop > c.seen and c.end + n > self.capacity:
            gone = c.end + n - self.capacity
            for t in (c.k, c.v):
                t[:, self.sink * f : (c.end - gone) * f] = t[:, (self.sink + gone) * f : c.end * f].clone()
            end -= gone
        begin = end - n
        own = range(self.start, self.start + frames)
        query, key = rope(q, own, self.grid), rope(k, own, self.grid)
        c.k[:, begin * f : end * f] = (k if begin == 0 else key)[:, : n * f]
        c.v[:, begin * f : end * f] = v[:, : n * f]
        c.end, c.seen = end, max(stop, c.seen)
        if begin == 0:
            return softmax_attention(query, key, v)
        anchor_k, anchor_v = c.k[:, : self.sink * f], c.v[:, : self.sink * f]
        if not self.context:
            room = max(0, self.span - frames - self.sink)
            first = max(self.sink, begin - room)
            at = self.start - (begin - first) - self.sink
            keys = [rope(anchor_k, range(at, at + self.sink), self.grid), c.k[:, first * f : begin * f], key]
            values = [anchor_v, c.v[:, first * f : begin * f], v]
        elif end <= self.span:
            keys = [rope(anchor_k, range(self.sink), self.grid), c.k[:, self.sink * f : end * f]]
            values = [c.v[:, : end * f]]
        else:
            keys, values = ([t[:, (end - self.span) * f : end * f]] for t in (c.k, c.v))
        return softmax_attention(query, torch.cat(keys, 1), torch.cat(values, 1))


@torch.no_grad()
def roll(
    network: Network,
    inputs,
    levels: Levels,
    grid,
    block: int,
    sink: int,
    span: int,
    capacity: int,
    context_noise: float = 0.0,
) -> tuple[dict, dict]:
    """Rolling Forcing's windows, for streams of at least as many blocks as levels."""
    noise, prompt = inputs["noise"], inputs["prompt/0"]
    batch, frames = noise.shape[:2]
    count, deep = frames // block, len(levels.steps)
    cache = RollingCache(block, sink, span, new_layers(network, batch, grid, capacity), grid, capacity)
    buffered, out, got = torch.zeros_like(noise), torch.zeros_like(noise), {}
    for window in range(count + deep - 1):
        first, last = max(0, window - deep + 1), min(count - 1, window)
        where = slice(first * block, (last + 1) * block)
        x = buffered[:, where].clone()
        if last == window:
            x[:, -block:] = noise[:, last * block : (last + 1) * block]
        stages = [window - b for b in range(first, last + 1)]
        cache.start, cache.context = first * block, False
        flow = network(x, [levels.steps[s] for s in stages for _ in range(block)], prompt, cache.attend)
        if window == 0:
            got["flow/first"] = flow
        pieces = []
        for index, stage in enumerate(stages):
            here = slice(index * block, (index + 1) * block)
            pieces.append(levels.clean(x[:, here], flow[:, here], levels.steps[stage]))
        x0 = torch.cat(pieces, 1)
        got[f"x0/{window}"] = x0
        out[:, where] = x0
        for index, stage in enumerate(stages):
            if stage + 1 < deep:
                b = first + index
                fresh = inputs[f"renoise/{b}/{stage}"]
                buffered[:, b * block : (b + 1) * block] = levels.noisy(
                    pieces[index], fresh, levels.steps[stage + 1]
                )
        cache.context = True
        network(pieces[0], [context_noise] * block, prompt, cache.attend)
    for number, c in enumerate(cache.layers):
        f = grid[0] * grid[1]
        got[f"cache/{number}/k"], got[f"cache/{number}/v"] = c.k[:, : c.end * f], c.v[:, : c.end * f]
    end = cache.layers[0].end
    return got | {"latents": out}, {"slots": [*range(sink), *range(frames - end + sink, frames)]}
