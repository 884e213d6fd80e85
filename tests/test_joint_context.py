"""Context passes that go with the next block's first step: the frames of separate ones, up to rounding."""

from itertools import islice

import numpy as np
import pytest
import tiny
import torch

from streamvid.errors import UserError
from streamvid.script import load_script

FOX, CAT = "a red fox walks in the snow", "a blue cat sleeps"


def start(script=FOX, **options):
    return tiny.pipeline().stream(script, **{"seed": 3, "decode_pixels": False, **options})


def forwards(stream, blocks: int) -> list[tuple[int, int]]:
    """Frames of every forward of the next blocks, and how many of them are known."""
    seen, call = [], type(stream.pipe.transformer).forward

    def spied(self, hidden_states=None, *args, known_frames=0, **kwargs):
        if hidden_states is not None:
            seen.append((hidden_states.shape[2], known_frames))
        return call(self, hidden_states, *args, known_frames=known_frames, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stream.pipe.transformer), "forward", spied)
        list(islice(stream, blocks))
    return seen


def close(one, other) -> bool:
    return len(one) == len(other) > 0 and all(
        torch.allclose(a.latents, b.latents, atol=2e-5) for a, b in zip(one, other, strict=True)
    )


# --- the same frames ------------------------------------------------------------------------------------------------

OPTIONS = {
    "absolute": {"method": "longlive"},
    "cache_relative": {"method": "longlive_infinite"},
    # a sink that ends within a block, and is turned while its last frame's key is being written
    "ragged": {
        "method": "longlive_infinite",
        "overrides": {"frames_per_block": 3, "window": 7, "sink": 4},
    },
    "no sink": {"method": "self_forcing"},
    "bidirectional levels": {"method": "longlive", "overrides": {"context_timestep": 100.0}},
    "shots": {"method": "longlive2_multishot", "overrides": {"frames_per_block": 2, "window": 8, "sink": 2}},
    "unipc": {"method": "longlive", "overrides": {"solver": "unipc"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_frames_are_those_of_separate_passes(name):
    joint, separate = (
        list(start(blocks=9, context_pass=way, **OPTIONS[name])) for way in ("joint", "separate")
    )
    assert close(joint, separate)


def test_of_a_batch():
    joint, separate = (list(start([FOX, CAT], blocks=6, context_pass=way)) for way in ("joint", "separate"))
    assert close(joint, separate)


@pytest.mark.parametrize(
    "policy", ["recache", "recache(bidirectional)", "flush", "cut", "cross_only", "blend(3)"]
)
@pytest.mark.parametrize("at", [1, 6])
def test_a_prompt_that_comes_between(policy, at):
    chunks = []
    for way in ("joint", "separate"):
        stream = start(method="longlive_infinite", blocks=11, context_pass=way)
        made = list(islice(stream, at))
        stream.prompt(CAT, policy)
        chunks.append(made + list(stream))
    assert close(*chunks)


def test_a_script_with_shots_and_a_reset():
    script = load_script(
        {"shots": [{"prompt": FOX, "duration": 2}, {"prompt": CAT, "duration": 2, "seed": 7}]}
    )
    chunks = []
    for way in ("joint", "separate"):
        stream = start(script, context_pass=way)
        made = list(islice(stream, 5))
        stream.reset()
        chunks.append(made + list(stream))
    assert close(*chunks)


# --- whose forwards are fewer ---------------------------------------------------------------------------------------


def test_a_block_is_as_many_forwards_as_it_has_steps():
    """And the last block of a stream has no context pass at all."""
    steps = [(3, 0)] * 2
    assert forwards(start(blocks=3, context_pass="separate"), 3) == [*steps, (3, 3)] * 3
    assert forwards(start(blocks=3, context_pass="joint"), 3) == [*steps, (6, 3), (3, 0), (6, 3), (3, 0)]
    assert forwards(start(blocks=3), 3) == [*steps, (6, 3), (3, 0), (6, 3), (3, 0)]


@pytest.mark.parametrize(("policy", "passes"), [("cut", 0), ("recache", 0), ("flush", 1), ("cross_only", 1)])
def test_a_switch_leaves_out_a_pass_that_nobody_reads(policy, passes):
    stream = start(context_pass="joint")
    list(islice(stream, 6))
    stream.prompt(CAT, policy)
    replays = 3 if policy == "recache" else 0  # of the window but for its sink
    assert forwards(stream, 1) == [(3, 3)] * (passes + replays) + [(3, 0)] * 2


def test_large_blocks_keep_their_own_pass(monkeypatch):
    monkeypatch.setattr("streamvid.joint_context.PAYS_UP_TO", 3 * tiny.TOKENS - 1)
    assert start().room is None and start(context_pass="joint").room is not None


@pytest.mark.parametrize("method", ["reward_forcing", "rolling_forcing", "deep_forcing", "krea"])
def test_methods_that_cannot_wait(method):
    overrides = {"denoising_steps": [1000, 800, 600, 400, 200]} if method == "rolling_forcing" else {}
    assert start(method=method, overrides=overrides).room is None
    with pytest.raises(UserError, match="context_pass = joint needs sampler = few_step"):
        start(method=method, overrides=overrides, context_pass="joint")


def test_another_name_is_refused():
    with pytest.raises(
        UserError, match="context_pass = 'both' is not known: choose one of auto, joint, separate"
    ):
        start(context_pass="both")


# --- state ----------------------------------------------------------------------------------------------------------


def test_a_stream_saved_between_goes_on_bit_for_bit(tmp_path):
    stream = start(method="longlive_infinite", context_pass="joint")
    list(islice(stream, 6))
    copies = [stream.fork(), tiny.pipeline().load_stream(stream.save(tmp_path / "it.stream"))]
    expected = list(islice(stream, 3))
    for copy in copies:
        assert copy.unwritten is not None
        got = list(islice(copy, 3))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("options", [OPTIONS["ragged"], OPTIONS["absolute"]])
def test_what_a_failed_block_overwrote_comes_back(options):
    """It fails in the joint forward, at its second layer, and after it; then the prompt changes."""
    chunks = []
    for failures in ((), (1, 3)):
        stream = start(context_pass="joint", blocks=8, **options)
        made = list(islice(stream, 4))
        for call in failures:
            left = call

            def fail(*_):
                nonlocal left
                left -= 1
                if left < 0:
                    raise MemoryError

            hooks = [block.register_forward_hook(fail) for block in stream.pipe.transformer.blocks]
            with pytest.raises(MemoryError):
                next(stream)
            for hook in hooks:
                hook.remove()
        made.append(next(stream))
        stream.prompt(CAT, "flush")
        chunks.append(made + list(stream))
    for one, other in zip(*chunks, strict=True):
        assert np.array_equal(one.latents.numpy(), other.latents.numpy())
