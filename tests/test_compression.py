"""Participative compression against the same thing written token by token (Deep Forcing, section 3.3)."""

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.compression import IMPORTANCE
from streamvid.context import ContextCache
from streamvid.rope import rotate, rotation
from streamvid.switching import switch_policy
from streamvid.window import WindowOptions

LAYERS, BATCH, HEADS, DIM, GRID, PER_FRAME = 2, 2, 2, 6, (1, 2), 2
SMALL = WindowOptions(2, 9, 2, "sink_before_window", budget=7, recent=3)


def new_cache(options: WindowOptions, **changes) -> ContextCache:
    return ContextCache(options, LAYERS, HEADS, DIM, GRID, (1, 1, 1), batch=BATCH, **changes)


def random_qkv(seed: int, frames: int) -> torch.Tensor:
    """Queries, keys and values per layer `[LAYERS, 3, B, L, H, D]`; the first channel of a value is left to the test."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 3, BATCH, frames * PER_FRAME, HEADS, DIM, generator=generator)


@dataclass
class Token:
    """A token of one layer and video: which one, its key as it came and rotated, its value, how often it was chosen."""

    id: int
    raw: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    uses: int = 0


class LiteralVideo:
    """One layer of one video: a list of tokens."""

    def __init__(self, options: WindowOptions, importance: str, max_reuse: int):
        self.options, self.importance, self.max_reuse = options, importance, max_reuse
        self.tokens: list[Token] = []
        self.queries: list[torch.Tensor] = []  # of every forward, rotated

    def score(self, token: Token, queries: list[torch.Tensor]) -> float:
        products = [float((query.double() * token.key.double()).sum()) for query in queries]
        fused = sum(products) if self.importance == "sum" else max(products)
        return fused / (math.sqrt(DIM) * HEADS)

    def compress(self) -> None:
        sink, recent = self.options.sink * PER_FRAME, self.options.recent_frames * PER_FRAME
        candidates = self.tokens[sink:-recent]
        wanted = self.options.budget * PER_FRAME - sink - recent
        allowed = [token for token in candidates if token.uses < self.max_reuse]
        assert len(allowed) >= wanted
        ranked = sorted(allowed, key=lambda token: -self.score(token, self.queries[-recent:]))
        chosen = {token.id for token in ranked[:wanted]}
        for token in candidates:
            token.uses += token.id in chosen
        self.tokens = self.tokens[:sink] + [t for t in candidates if t.id in chosen] + self.tokens[-recent:]

    def forward(self, plan, q, k, v, first: bool) -> torch.Tensor:
        """Attention of the block's tokens `[L, H, D]`."""
        at = {slot.frame: slot.position for slot in plan.window}
        own = [at[slot.frame] for slot in plan.own]
        query, key = (rotate(x[None], rotation(own, *GRID, DIM))[0] for x in (q, k))
        self.queries += list(query)
        if not first:
            self.tokens = self.tokens[: -len(k)]
        first_id = plan.frames[0] * PER_FRAME
        self.tokens += [Token(first_id + n, k[n], key[n], v[n]) for n in range(len(k))]
        for index, token in enumerate(self.tokens[: self.options.sink * PER_FRAME]):
            frame, part = divmod(index, PER_FRAME)
            if token.id < first_id:
                by = rotation([at[frame]], *GRID, DIM)
                token.key = rotate(token.raw.expand(1, PER_FRAME, -1, -1), by)[0, part]
        if first and len(self.tokens) > self.options.window * PER_FRAME:
            self.compress()
        keys, values = (torch.stack([getattr(t, name) for t in self.tokens]) for name in ("key", "value"))
        weights = (torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(DIM)).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)


OPTIONS = [
    SMALL,
    replace(SMALL, positions="absolute", recent=2),
    replace(SMALL, positions="deep_forcing_release", first_sink_shift=2),
    WindowOptions(3, 7, 1, "sink_before_window", budget=4),  # nothing but sink and block: no token is chosen
    WindowOptions(1, 8, 1, "sink_before_window", budget=8, recent=5),  # compresses at every block
]


# a window compressed at every block may drop so few tokens that no choice would be left without those used up
@pytest.mark.parametrize(("max_reuse", "options"), [*product([1, 2], OPTIONS[:-1]), *product([100], OPTIONS)])
@pytest.mark.parametrize("importance", sorted(IMPORTANCE))
@torch.no_grad()
def test_compression_keeps_the_tokens_it_should(options, importance, max_reuse):
    cache = new_cache(options, importance=importance, max_reuse=max_reuse)
    videos = [[LiteralVideo(options, importance, max_reuse) for _ in range(BATCH)] for _ in range(LAYERS)]
    compressions = 0
    for block in range(14):
        plan = cache.planner.plan()
        cache.begin(plan)
        compressions += bool(plan.compressed_from)
        for step in range(3):
            for layer, (q, k, v) in enumerate(random_qkv(3 * block + step, options.frames_per_block)):
                output = cache.attend(layer, q, k, v)
                for b, video in enumerate(videos[layer]):
                    expected = video.forward(plan, q[b], k[b], v[b], first=step == 0)
                    torch.testing.assert_close(output[b], expected, atol=1e-5, rtol=1e-5)
        cache.commit(plan, torch.zeros(BATCH, 1, len(plan.own), 1, 1))
        tokens = cache.ledger._tokens([slot.slot for slot in plan.window])
        for layer in range(LAYERS):
            for b, video in enumerate(videos[layer]):
                stored = video.tokens
                assert cache.ledger.ids[layer, b, tokens].tolist() == [token.id for token in stored]
                assert cache.ledger.uses[layer, b, tokens].tolist() == [token.uses for token in stored]
                # keys, values and ids lie together
                assert torch.equal(cache.values[layer, b, tokens], torch.stack([t.value for t in stored]))
                keys = torch.stack([token.key for token in stored])
                torch.testing.assert_close(cache.keys[layer, b, tokens], keys, atol=1e-6, rtol=0)
    assert compressions >= 3
    uses = max(token.uses for layer in videos for video in layer for token in video.tokens)
    assert uses <= max_reuse and (uses > 1 or max_reuse < 100 or options.budget == 4)


@torch.no_grad()
def test_layers_and_videos_choose_tokens_of_their_own():
    cache = new_cache(SMALL)
    play(cache, range(8))
    chosen = {tuple(ids.tolist()) for ids in cache.ledger.ids[:, :, 4:8].flatten(0, 1)}
    assert cache.planner.compressed == (2, 3) and len(chosen) == LAYERS * BATCH


def play(cache: ContextCache, blocks, fails=(), layers: int = LAYERS) -> list[torch.Tensor]:
    """Outputs of so many blocks; each of `fails` is begun once in vain, as far as `layers`."""
    outputs = []
    count = cache.options.frames_per_block
    for block in blocks:
        plan = cache.planner.plan()
        if block in fails:
            cache.begin(plan)
            for layer, qkv in enumerate(random_qkv(1000 + block, count)[:layers]):
                cache.attend(layer, *qkv)
        cache.begin(plan)
        for step in range(2):
            qkv = random_qkv(2 * block + step, count)
            outputs += [cache.attend(layer, *qkv[layer]) for layer in range(LAYERS)]
        cache.commit(plan, torch.full((BATCH, 1, count, 1, 1), float(block)))
    return outputs


def ledger_of(cache: ContextCache) -> tuple[torch.Tensor, torch.Tensor]:
    live = [*cache.planner.slot_of.values(), *cache.planner.compressed]
    tokens = cache.ledger._tokens(sorted(live))
    return cache.ledger.ids[:, :, tokens], cache.ledger.uses[:, :, tokens]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(OPTIONS), st.sets(st.integers(0, 11)), st.integers(1, LAYERS))
@torch.no_grad()
def test_a_block_that_failed_leaves_no_trace(options, fails, layers):
    one, other = new_cache(options), new_cache(options)
    for a, b in zip(play(one, range(12)), play(other, range(12), fails, layers), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ledger_of(one), ledger_of(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", ["recache", "recache(causal, reencode)"])
@torch.no_grad()
def test_a_replay_leaves_the_tokens_where_they_are(policy):
    """One that writes the keys and values again that were there; across shots, whose positions jump."""
    options = replace(SMALL, shot_offset=5)
    caches = [new_cache(options), new_cache(options)]
    for cache in caches:
        play(cache, range(4))
        cache.planner.start_shot()
        play(cache, range(4, 9))
    by_frame = {}
    for block in range(9):
        for n in range(2):
            part = slice(n * PER_FRAME, (n + 1) * PER_FRAME)
            by_frame[2 * block + n] = random_qkv(2 * block + 1, 2)[:, :, :, part]

    def replay(plan):
        qkv = torch.cat([by_frame[frame] for frame in plan.frames], 3)
        for layer in range(LAYERS):
            caches[0].attend(layer, *qkv[layer])

    assert caches[0].planner.compressed
    switch_policy(policy).apply(caches[0], replay)
    for a, b in zip(*(play(cache, range(9, 14)) for cache in caches), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(ledger_of(caches[0]), ledger_of(caches[1]), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_new_anchor_makes_all_tokens_new():
    cache = new_cache(SMALL, max_reuse=3)
    play(cache, range(9))
    before, uses = ledger_of(cache), cache.ledger.uses.clone()
    assert uses.max() > 0
    snapshot = cache.snapshot()
    switch_policy("recache(causal, reanchor)").apply(cache, lambda plan: None)
    ids, uses = ledger_of(cache)
    assert uses.max() == 0 and cache.planner.compressed == ()
    assert ids[0, 0].tolist() == list(range(9 * PER_FRAME, 18 * PER_FRAME))  # of the last nine frames
    cache.load_state_dict(snapshot)
    assert all(map(torch.equal, ledger_of(cache), before))


def test_memory_is_counted():
    cache = new_cache(SMALL)
    slot = 4 * LAYERS * BATCH * PER_FRAME * HEADS * DIM
    assert cache.bytes == slot * (2 * 9 + 2 * 9 + 2)  # two buffers, and raw keys of the sink
