"""Streams whose attention reads the window in place (backend triton) are those of the written-out reference."""

from functools import partial
from itertools import islice

import pytest
import tiny
import torch
from streamvid.kernels import windowed
from streamvid.kernels.companions import PLAIN, companions

from streamvid import compression, context
from streamvid.errors import UserError
from streamvid.rope import rotation
from streamvid.training.rollout import GradedContext
from streamvid.window import WindowOptions
from streamvid.window_parts import Seen, plan_parts

pytest.importorskip("triton")

FOX, CAT = "a red fox walks", "the blue cat sleeps"
TWO = {"frames_per_block": 2, "sink": 2}
RELATIVE = {"method": "longlive_infinite", **TWO, "window": 7}
AVERAGED = {"method": "reward_forcing", **TWO, "window": 6, "sink_decay": 0.5}
COMPRESSED = {"method": "deep_forcing", **TWO, "window": 8, "budget": 6, "recent": 3}
ROLLING = {"method": "rolling_forcing", **TWO, "window": 10, "denoising_steps": [1000, 800, 500]}
RELEASED = {**ROLLING, "method": "rolling_forcing_release", "sink": 3}
STREAMS = {
    "longlive": {"method": "longlive"},
    "longlive_infinite": RELATIVE,
    "reward_forcing": AVERAGED,
    "deep_forcing": COMPRESSED,
    "deep_forcing, largest products": {**COMPRESSED, "importance": "max"},
    "rolling_forcing": ROLLING,
    "rolling_forcing_release": RELEASED,
    "deep_forcing_release": {**COMPRESSED, "method": "deep_forcing_release", "recent": 1},
    "memrope": {"method": "memrope"},
    "krea": {"method": "krea", "past_bias": 0.3},  # the past is written anew, with a bias
    "ultravico": {"method": "ultravico", "window": 9, "trained_frames": 4, "far_scale": 0.5},
    "far frames decay": {"method": "longlive", "trained_frames": 5, "far_decay": 0.3, "past_bias": 0.5},
    "heads turn differently": {**RELATIVE, "head_jitter": 0.5},
    "frozen sink, empty frames": {"method": "longlive", "sink": 4, "sink_filling": "longlive_release"},
    "queries ahead": {"method": "longlive", "sink": 5, "sink_filling": "reward_forcing_release"},
    "multishot": {"method": "longlive2_multishot", "frames_per_block": 2, "window": 8, "sink": 2},
    **{f"longlive, {kind}": {"method": "longlive", "kv_dtype": kind} for kind in ("int8", "fp8", "kivi2")},
    "relative, int8": {**RELATIVE, "kv_dtype": "int8"},
    "relative, kivi2": {**RELATIVE, "kv_dtype": "kivi2"},
    "averaged, int8": {**AVERAGED, "kv_dtype": "int8"},
    "rolling, fp8": {**ROLLING, "kv_dtype": "fp8"},
    "frozen, int8": {"method": "longlive", "sink": 4, "sink_filling": "longlive_release", "kv_dtype": "int8"},
}


def start(attention: str, method: str = "longlive", prompt=FOX, **overrides):
    return tiny.pipeline().stream(
        prompt, method=method, overrides=overrides, attention=attention, decode_pixels=False
    )


def latents(stream, blocks: int, policy: str | None = None) -> torch.Tensor:
    chunks = list(islice(stream, blocks - 3))
    stream.prompt(CAT, policy)
    return torch.cat([chunk.latents for chunk in chunks + list(islice(stream, 3))], 2)


def same(one: torch.Tensor, other: torch.Tensor, rounded: bool = False) -> None:
    """A number that lies between two steps of a code may be rounded to either."""
    torch.testing.assert_close(one, other, atol=0.02 if rounded else 2e-4, rtol=0)


def in_pytorch(function, first, parts, backend="triton"):
    return function(first, parts, backend="reference")


@pytest.fixture
def twins(monkeypatch):
    """The PyTorch twins in place of all kernels: what is told to them is tested, and quickly."""
    monkeypatch.setattr(context, "companions", lambda attention, device: PLAIN)
    for module, name in ((context, "windowed_attention"), (compression, "key_importance")):
        monkeypatch.setattr(module, name, partial(in_pytorch, getattr(windowed, name)))


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_in_place_is_the_stream(name, twins):
    options = STREAMS[name]
    streams = [start(attention, **options) for attention in ("triton", "reference")]
    assert streams[0].cache.in_place and not streams[1].cache.in_place
    same(*(latents(stream, 9) for stream in streams), rounded="kv_dtype" in options)


RECACHES = [f"recache({how})" for how in ("bidirectional, reencode", "causal, reencode", "causal, reanchor")]


@pytest.mark.parametrize("policy", ["recache", *RECACHES, "flush", "cut"])
@pytest.mark.parametrize("name", ["longlive_infinite", "reward_forcing", "deep_forcing"])
def test_switches_in_place_are_the_switches(name, policy, twins):
    same(*(latents(start(a, **STREAMS[name]), 9, policy) for a in ("triton", "reference")))


# through Triton's interpreter: fewer, with everything that a launch can be told
@pytest.mark.parametrize(
    "name", ["longlive_infinite", "reward_forcing", "deep_forcing", "ultravico", "averaged, int8"]
)
def test_a_stream_through_the_kernels_is_the_stream(name):
    options = STREAMS[name]
    blocks = 5 if options["method"] != "ultravico" else 4
    same(
        *(latents(start(a, **options), blocks) for a in ("triton", "reference")),
        rounded="kv_dtype" in options,
    )


@pytest.mark.parametrize("name", ["longlive_infinite", "deep_forcing", "averaged, int8", "longlive, kivi2"])
def test_other_backends_take_the_fused_kernels_too(name, monkeypatch):
    """As on a GPU with any backend: written in one pass, attended as ever."""
    options, fused = STREAMS[name], companions("triton", "cpu")
    plain = start("sdpa", **options)
    monkeypatch.setattr(context, "companions", lambda attention, device: fused)
    stream = start("sdpa", **options)
    assert stream.cache.companions is fused and not stream.cache.in_place
    same(latents(stream, 5), latents(plain, 5), rounded="kv_dtype" in options)


def test_batches_have_windows_of_their_own(twins):
    streams = [start(a, prompt=[FOX, CAT], **COMPRESSED) for a in ("triton", "reference")]
    same(*(torch.cat([c.latents for c in islice(stream, 7)], 2) for stream in streams))


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_a_sink_that_moves_is_written_once(twins):
    stream = start("triton", **RELATIVE)
    list(islice(stream, 3))
    cache = stream.cache
    assert cache.raw_keys.numel() == 0 and cache.rotated_at[0] == cache.written_at[0]
    sink = slice(0, 2 * cache.tokens_per_frame)
    before = cache.keys[:, :, sink].clone()
    list(islice(stream, 3))
    assert torch.equal(cache.keys[:, :, sink], before)
    assert cache.rotated_at[0] - cache.written_at[0] == 12 - 7  # frames that have left the window
    _, phases = zip(*((part.buffer, part.facts.get("phase")) for part in cache._parts), strict=True)
    assert sum(phase is not None for phase in phases) == 1
    raw = cache.stored(0, [0], rotated=False)[0]
    list(islice(stream, 2))
    torch.testing.assert_close(cache.stored(0, [0], rotated=False)[0], raw)


def test_a_sink_without_positions_is_turned_back_token_by_token(twins):
    """As Rolling Forcing is released: a context pass sees what remains of the sink as it was before rotation."""
    stream, seen = start("triton", **RELEASED), []
    for _ in islice(stream, 8):
        seen += [part.facts["phase"].cos.shape for part in stream.cache._parts if "phase" in part.facts]
        assert all(part.facts["frame_tokens"] == 1 for part in stream.cache._parts if "phase" in part.facts)
    assert (3 * stream.cache.tokens_per_frame, 1, 6) in seen


def test_a_failed_block_and_a_saved_stream_go_on_in_place(twins, tmp_path):
    whole = torch.cat([chunk.latents for chunk in islice(start("triton", **RELATIVE), 8)], 2)
    stream = start("triton", **RELATIVE)
    made = [next(stream) for _ in range(5)]
    sound, stream.noise = stream.noise, None
    with pytest.raises(TypeError):
        next(stream)
    stream.noise = sound
    loaded = tiny.pipeline().load_stream(stream.save(tmp_path / "a.stream"))
    for other in (stream.fork(), loaded, stream):
        rest = [*made, *islice(other, 3)]
        assert torch.equal(torch.cat([chunk.latents for chunk in rest], 2), whole)


@pytest.mark.parametrize(("kind", "decoded"), [("int8", False), ("fp8", False), ("kivi2", True)])
def test_eight_bits_are_decoded_on_load(kind, decoded, twins, monkeypatch):
    stream = start("triton", kv_dtype=kind)
    list(islice(stream, 5))
    buffers = {part.buffer for part in stream.cache._parts}
    assert buffers == ({"window"} if decoded else {"window", "full", "encoded"})
    codec = stream.cache.quantised.codecs[0]
    monkeypatch.setattr(type(codec), "decode", lambda self, parts: pytest.fail("decoded"))
    if not decoded:
        next(stream)  # reads what is encoded, and decodes nothing beside


def test_queries_and_keys_are_written_in_one_pass_where_they_can(twins):
    passes = []

    def counting(*arguments):
        passes.append(arguments)
        return PLAIN.norm_rotate_write(*arguments)

    for options, missing in ((RELATIVE, 0), (COMPRESSED, 1)):  # not in a forward that compresses
        stream = start("triton", **options)
        stream.cache.companions = PLAIN._replace(norm_rotate_write=counting)
        list(islice(stream, 3))
        passes.clear()
        events = [bool(next(stream).attended) and bool(stream.cache._plan.compressed_from) for _ in range(3)]
        assert any(events) == bool(missing)
        assert len(passes) == 2 * (
            3 * 3 - missing * sum(events)
        )  # two layers; two steps and the context pass


def test_training_refuses_it():
    stream = start("triton")
    with pytest.raises(UserError, match="attention backend = triton has no gradient"):
        GradedContext(stream.cache)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_skip_what_is_dead_and_turn_what_moves():
    turn = rotation([2.0], 1, 1, 12)
    seen = [
        Seen("window", 0, turn=turn),
        Seen("window", 4, bias=-1.0),
        Seen("window", 3),
        Seen("own", 1, gain=0.5),
    ]
    own, still, turned = plan_parts(seen, 5, "cpu")
    assert [part.buffer for part in (own, still, turned)] == ["own", "window", "window"]
    assert [part.facts["runs"].tolist() for part in (own, still, turned)] == [[[5, 5]], [[15, 10]], [[0, 5]]]
    assert own.facts["gain"].tolist() == [1, 0.5] and "bias" not in own.facts and "phase" not in own.facts
    assert still.facts["bias"].tolist() == [0, 0, 0, 0, -1] and "gain" not in still.facts
    assert torch.equal(turned.facts["phase"].cos, rotation([2.0], 1, 1, 12).cos)


def test_dead_slots_are_not_read():
    """They hold no number at all."""
    cache = tiny.context_cache(WindowOptions(2, 6, 2, capacity=9), attention="triton")
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    tiny.run_blocks(cache, tiny.clip(1, 8), tiny.clip(2, 8))
    plan = cache.planner.plan()
    cache.begin(plan)
    q = tiny.normal(0, 1, 8, 2, 12)
    assert cache.attend(0, q, q, q).isfinite().all()
