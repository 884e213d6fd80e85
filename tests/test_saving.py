"""Saved, forked and reset streams go on as if nothing had happened, and files that cannot be trusted are refused."""

import json
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass, replace
from itertools import islice

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_stream import Trap, same
from test_stream_methods import SMALL

from streamvid.decoding import channels_last
from streamvid.errors import UserError
from streamvid.methods import load_method, method_names
from streamvid.noise import SeededNoise
from streamvid.saving import pack, unpack
from streamvid.tiny_decoder import TinyDecoder

FOX, CAT, SNOW = "a red fox walks", "the blue cat sleeps", "the snow falls"
STORED = {f"kv_dtype {kind}": {"kv_dtype": kind} for kind in ("int8", "fp8", "kivi2")}
OPTIONS = {
    **{name: {"method": name} for name in method_names()},
    **{f"small {name}": {"method": name, "overrides": SMALL[name]} for name in SMALL},
    **{name: {"overrides": {**changes, "window": 9}} for name, changes in STORED.items()},
    "pinned shot": {
        "method": "longlive2_multishot",
        "overrides": {"frames_per_block": 2, "sink": 2, "window": 8},
    },
    "reference noise": {"noise": "reference", "blocks": 30},
    "several videos": {"prompt": [FOX, CAT]},
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DIFFERENT = (
    "longlive",
    "small longlive_infinite",
    "rolling_forcing",
    "small deep_forcing",
    "memrope",
    "krea",
    "pinned shot",
    "kv_dtype kivi2",
    "several videos",
)
SOME = pytest.mark.parametrize("options", [OPTIONS[name] for name in DIFFERENT], ids=DIFFERENT)


def start(prompt=FOX, **options):
    return tiny.pipeline().stream(prompt, **{"decode_pixels": False, **options})


def in_the_middle(prompt=FOX, **options):
    """A stream with a full window, prompts behind it, one of them still on its way, and another one asked for."""
    stream = start(prompt, **options)
    full = stream.method.window // stream.method.frames_per_block
    list(islice(stream, 2))
    stream.prompt(CAT)
    list(islice(stream, full - 1))
    stream.prompt(SNOW, "blend(4)")
    next(stream)
    stream.prompt(CAT, "cross_only" if options.get("method") == "krea" else "blend(3)")
    return stream


def go_on(stream) -> list:
    chunks = list(islice(stream, 2))
    stream.prompt(FOX)
    return chunks + list(islice(stream, 2))


# --- what is remembered ---------------------------------------------------------------------------------------------

# what no block needs of the one before it, and what a stream shares with its copies
SCRATCH = {
    "VideoStream": {"pipe", "_running", "_making", "room", "times", "told"},
    "Director": {"pipe"},
    "PromptKeys": {"pipe", "latest"},
    "Mailbox": {"_lock", "_taken"},
    "ContextCache": {"_own", "_rotation", "_length", "_mask", "_raw_tokens", "_plan", "_begun", "_frozen_runs",
                     "_query_rotation", "_key_scale", "spare", "companions", "_slots", "_parts", "_decoded",
                     "fused_keys", "fused_values", "sink_update", "attention"},
    "TokenLedger": {"spare_ids", "spare_uses", "scores", "selected"},
    "QuantisedKV": {"scratch", "codecs"},
    "RollingSampler": {"_next"},
    "Receipt": {"accepted_at", "_settled"},
}  # fmt: skip


def parts(thing) -> dict | None:
    """What a container or an object of ours consists of."""
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, (list, tuple)):
        return dict(enumerate(thing))
    if type(thing).__module__.startswith("streamvid") or is_dataclass(thing):
        return {k: v for k, v in vars(thing).items() if k not in SCRATCH.get(type(thing).__name__, ())}
    return None


def differences(one, other, where="stream"):
    """Where two object graphs differ."""
    if isinstance(one, torch.Generator):
        one, other = one.get_state(), other.get_state()
    if isinstance(one, torch.Tensor):
        if (
            one.dtype != other.dtype
            or one.shape != other.shape
            or not torch.equal(one.float(), other.float())
        ):
            yield where
    elif type(one) is not type(other):
        yield where
    elif (inside := parts(one)) is not None:
        others = parts(other)
        if list(inside) != list(others):
            yield where
        for name in inside.keys() & others.keys():
            yield from differences(inside[name], others[name], f"{where}.{name}")
    elif one != other and not callable(one):
        yield where


@EVERY
def test_an_exact_file_holds_everything(options, tmp_path):
    """Also what a later version adds: a stream from the file has the same objects inside, and makes the same chunks."""
    stream = in_the_middle(**options)
    stream.save(tmp_path / "it.stream")
    copies = [tiny.pipeline().load_stream(tmp_path / "it.stream"), stream, stream.fork(), stream.fork()]
    for copy in copies:
        assert list(differences(stream, copy)) == []
    first, *others = [go_on(copy) for copy in copies]  # none disturbs another
    for chunks in others:
        assert len(chunks) == 4 and all(map(same, first, chunks))
    for copy in copies:
        assert list(differences(stream, copy)) == []


def test_an_exact_file_goes_on_in_another_process(tmp_path):
    stream = start(decode_pixels=True)
    list(islice(stream, 3))
    stream.prompt(CAT)
    stream.save(tmp_path / "it.stream")
    tiny.pipeline().save_pretrained(tmp_path / "model")
    program = """
from itertools import islice

import numpy as np
from streamvid.pipelines.pipeline_streamvid import StreamVidPipeline

pipe = StreamVidPipeline.from_pretrained("model")
chunks = list(islice(pipe.load_stream("it.stream"), 2))
np.savez("chunks.npz", **{str(c.index): c.latents for c in chunks}, videos=np.concatenate([c.videos for c in chunks], 1))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    there, here = np.load(tmp_path / "chunks.npz"), list(islice(stream, 2))
    for chunk in here:
        assert np.array_equal(there[str(chunk.index)], chunk.latents)
    assert np.array_equal(there["videos"], np.concatenate([chunk.videos for chunk in here], 1))


def test_the_pixels_of_copies_follow_on_the_same_frames(tmp_path):
    stream = start(decode_pixels=True)
    list(islice(stream, 3))
    stream.save(tmp_path / "it.stream")
    copies = [stream.fork(), stream, tiny.pipeline().load_stream(tmp_path / "it.stream")]
    first, *others = [go_on(copy) for copy in copies]
    assert first[0].videos.shape[1] == 12 and all(all(map(same, first, chunks)) for chunks in others)


def test_differences_are_found_in_every_part():
    stream = in_the_middle(method="deep_forcing")
    for change in (
        lambda s: s.cache.ledger.uses.add_(1),
        lambda s: s.cache.planner.__dict__.update(roll=5),
        lambda s: s.cache.planner.slot_of.popitem(),
        lambda s: s.decoder.features.pop(),
        lambda s: s.cache.__dict__.update(something_new=1),
        lambda s: s.noise.seeds.append(1),
    ):
        other = stream.fork()
        change(other)
        assert len(list(differences(stream, other))) == 1


@pytest.mark.parametrize("method", SMALL)
def test_a_stream_whose_block_failed_can_be_saved(method, tmp_path):
    """The failed block may have overwritten what it evicts."""
    options = {"method": method, "overrides": SMALL[method]}
    expected = go_on(in_the_middle(**options))
    for call in (1, 3):
        stream = in_the_middle(**options)
        with Trap(tiny.pipeline()) as trap, pytest.raises(MemoryError):
            trap.left, trap.error = call, MemoryError()
            next(stream)
        stream.save(tmp_path / "it.stream")
        for copy in (stream, tiny.pipeline().load_stream(tmp_path / "it.stream")):
            assert all(map(same, expected, go_on(copy)))


def test_a_script_goes_on_where_it_was(tmp_path):
    script = f"{FOX} [2s] | {CAT} [2s] | # {SNOW} [2s]"
    whole = list(start(script))
    for cut_at in (0, 3, len(whole) - 3):
        stream = start(script)
        list(islice(stream, cut_at))
        for mode in ("exact", "compact"):
            stream.save(tmp_path / "it.stream", mode)
            chunks = list(tiny.pipeline().load_stream(tmp_path / "it.stream"))
            assert [(c.index, c.prompt, c.media_time) for c in chunks] == [
                (c.index, c.prompt, c.media_time) for c in whole[cut_at:]
            ]
            assert mode == "compact" or all(map(same, chunks, whole[cut_at:]))


def layout(tensor: torch.Tensor) -> list[int]:
    """Dimensions in the order in which they lie in memory."""
    axes = [axis for axis in range(tensor.ndim) if tensor.shape[axis] > 1]
    return sorted(axes, key=lambda axis: -tensor.stride(axis))


def test_weights_in_another_layout_do_not_change_the_picture(tmp_path):
    pipe = tiny.new_pipeline()
    channels_last(pipe.vae)
    stream = pipe.stream(FOX)
    next(stream)
    stream.save(tmp_path / "it.stream")
    loaded = pipe.load_stream(tmp_path / "it.stream")
    for one, other in zip(stream.decoder.features, loaded.decoder.features, strict=True):
        assert not isinstance(one, torch.Tensor) or layout(one) == layout(other)
    assert same(next(stream), next(loaded))


def test_trees_come_back_as_they_were():
    tree = {
        "a": [1, 2.5, None, True, "x", (1, (2,))],
        "b": {3: torch.arange(6).view(2, 3).T, (1, 2): torch.zeros(0, 2)},
        "c": {"tensor": "t", "pairs": torch.tensor(1.5), "tuple": (), "dict": {}},
        "d": torch.arange(120.0).view(1, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(tree, tensors, "")))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again = unpack(packed, tensors)
    assert list(differences(tree, again)) == []
    assert again["b"][3].stride() == (1, 3) and again["d"].stride() == tree["d"].stride()


# --- compact --------------------------------------------------------------------------------------------------------


def latents(stream, blocks: int = 2) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in islice(stream, blocks)], 2)


def resumed(stream, path, mode="compact"):
    stream.save(path, mode)
    return tiny.pipeline().load_stream(path)


@SOME
def test_a_compact_file_is_exact_while_nothing_is_lost(options, tmp_path):
    """While the window holds the whole stream, made under one prompt, everything follows from the clean latents."""
    stream = start(**options)
    held = stream.method.budget or stream.method.window
    jointly = stream.cache.options.joint_blocks  # noisy blocks push clean ones out of sight early
    list(islice(stream, max(1, held // stream.method.frames_per_block - 1 - jointly)))
    loaded = resumed(stream, tmp_path / "it.stream")
    for one, other in zip(islice(stream, 2), islice(loaded, 2), strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=2e-4, rtol=0)
        assert (one.index, one.attended, one.first_frame) == (other.index, other.attended, other.first_frame)


def test_the_pixels_of_a_compact_file_follow_too(tmp_path):
    """While all of the scene is kept, the decoder's memory is made anew exactly; after that nearly."""
    for blocks, most in ((3, 0), (8, 4)):
        stream = start(decode_pixels=True, context_pass="separate")
        list(islice(stream, blocks))
        loaded = resumed(stream, tmp_path / "it.stream")
        loaded.cache.load_state_dict(stream.cache.state_dict())  # only the decoder counts here
        assert abs(next(stream).videos.astype(int) - next(loaded).videos).mean() <= most


@SOME
def test_a_compact_file_goes_on_near_the_original(options, tmp_path):
    stream = in_the_middle(**options)
    small = resumed(stream, tmp_path / "small.stream")
    stream.save(tmp_path / "large.stream")
    assert (tmp_path / "small.stream").stat().st_size < 0.8 * (tmp_path / "large.stream").stat().st_size
    assert small.state().pending == stream.state().pending
    other = stream.fork()
    other.noise = SeededNoise([99] * len(stream.current.prompts), tiny.LATENT)
    expected, near, far = latents(stream), latents(small), latents(other)
    assert (near - expected).square().mean() < 0.25 * (far - expected).square().mean()


@pytest.mark.parametrize("method", ["longlive", "self_forcing"])
def test_a_compact_file_of_a_full_size_video_has_a_few_megabytes(method, tmp_path):
    """480 x 832 in half precision, whatever the size of the model: keys and values make a file large."""
    pipe = tiny.new_pipeline().to(torch.bfloat16)
    stream = pipe.stream(FOX, method=method, height=480, width=832, decode_pixels=False)
    compact, exact = (stream.save(tmp_path / mode, mode).stat().st_size for mode in ("compact", "exact"))
    frames = stream.method.window + stream.method.sink
    assert compact < 2 * 16 * 60 * 104 * frames + 20_000 < 5e6
    assert exact - compact >= stream.cache.bytes


@pytest.mark.parametrize("sink_update", ["ema", "memory", "adaptive"])
def test_a_compact_file_holds_sinks_that_changed(sink_update, tmp_path):
    overrides = {"window": 9, "sink": 3, "sink_update": sink_update, "positions": "cache_relative"}
    overrides |= {"ema": {"sink_decay": 0.5}, "memory": {}, "adaptive": {"refresh_below": 1.0}}[sink_update]
    stream = in_the_middle(overrides=overrides)
    loaded = resumed(stream, tmp_path / "it.stream")
    size = stream.cache.raw_keys.shape[2]
    assert size and torch.equal(stream.cache.raw_keys, loaded.cache.raw_keys)
    assert torch.equal(stream.cache.sink_values, loaded.cache.sink_values)


def test_a_compact_file_may_change_the_precision(tmp_path):
    in_the_middle(method="reward_forcing").save(tmp_path / "it.stream", "compact")
    loaded = tiny.new_pipeline().to(torch.bfloat16).load_stream(tmp_path / "it.stream")
    assert loaded.cache.keys.dtype == torch.bfloat16 and next(loaded).latents.dtype == torch.bfloat16


# --- reset ----------------------------------------------------------------------------------------------------------


@SOME
def test_a_reset_stream_is_a_new_one_under_the_current_prompt(options):
    stream = in_the_middle(**options)
    stream.prompt([CAT] * len(stream.current.prompts))
    stream.reset()
    expected = list(islice(start(**{**options, "prompt": stream.mailbox.pending[0].prompts}), 5))
    chunks = list(islice(stream, 5))
    assert chunks[0].events == ("reset",) and chunks[0].new_scene
    chunks[0] = replace(chunks[0], events=(), new_scene=False)
    assert all(map(same, expected, chunks))


def test_a_reset_takes_another_seed_and_keeps_it():
    stream, other = start(seed=1), start(seed=5)
    expected = [next(other).latents for _ in range(2)]
    for seed in (5, None):
        list(islice(stream, 3))
        stream.reset(seed)
        assert all(torch.equal(next(stream).latents, latents) for latents in expected)


def test_a_script_that_is_reset_begins_with_its_first_shot_also_after_its_end():
    script = f"{FOX} [2s] | # {CAT} [2s]"
    stream = start(script)
    first = list(stream)
    assert list(stream) == []
    stream.reset()
    again = list(stream)
    assert again[0].events == ("reset",) and all(map(same, first[1:], again[1:]))
    stream.close()
    stream.reset()
    assert list(stream) == []


@pytest.mark.parametrize("method", SMALL)
def test_a_reset_that_fails_leaves_the_stream_at_the_previous_chunk(method):
    """It is still asked for; what it does not reach goes on as before."""
    stream = in_the_middle(method=method, overrides=SMALL[method])
    untouched = stream.fork()
    stream.reset(seed=3)
    with Trap(tiny.pipeline()) as trap:
        for call in (0, 3):
            trap.left, trap.error = call, MemoryError()
            with pytest.raises(MemoryError):
                next(stream)
            assert stream.block == untouched.block
    twin = stream.fork()
    assert next(stream).index == next(twin).index == 0
    stream = untouched.fork()
    stream.reset()
    with Trap(tiny.pipeline()) as trap, pytest.raises(MemoryError):
        trap.left, trap.error = 4, MemoryError()
        next(stream)
    stream.mailbox.restart = None
    assert all(map(same, go_on(untouched), go_on(stream)))


def test_what_is_wrong_with_a_reset_is_said_at_once():
    with pytest.raises(UserError, match="seed = -1 must be a whole number"):
        start().reset(-1)
    with pytest.raises(UserError, match="seed of a reset needs noise = seeded"):
        start(noise="reference", blocks=3).reset(2)


# --- threads and modes ----------------------------------------------------------------------------------------------


def test_forks_and_files_from_another_thread_are_of_whole_chunks(tmp_path):
    stream, copies = start(seed=3, decode_pixels=False), []
    whole = list(islice(start(seed=3, decode_pixels=False), 14))

    def copy():
        for n in range(4):
            copies.append(stream.fork())
            copies.append(tiny.pipeline().load_stream(stream.save(tmp_path / f"{n}.stream")))

    thread = threading.Thread(target=copy)
    thread.start()
    while thread.is_alive() and stream.block < 10:
        next(stream)
    thread.join()
    assert len(copies) == 8
    for fork in copies:
        assert same(next(fork), whole[fork.block - 1])


def test_a_block_in_the_making_cannot_be_copied_from_within(tmp_path):
    stream = start(decode_pixels=False)
    denoise = stream.sampler.denoise

    def meanwhile(inputs):
        for copy in (stream.fork, lambda: stream.save(tmp_path / "it.stream"), lambda: next(stream)):
            with pytest.raises(UserError, match="between two chunks"):
                copy()
        return denoise(inputs)

    stream.sampler.denoise = meanwhile
    next(stream)
    del stream.sampler.denoise
    assert stream.fork().block == 1


@pytest.mark.parametrize("made_inside", [False, True])
def test_streams_may_pass_in_and_out_of_inference_mode(made_inside):
    """Tensors made there could not be written to outside."""
    expected = list(islice(start(method="reward_forcing"), 6))
    with torch.inference_mode(made_inside):
        stream = start(method="reward_forcing")
        chunks = list(islice(stream, 2))
    with torch.inference_mode(not made_inside):
        chunks += islice(stream.fork(), 2)
    twin = stream.fork()
    list(islice(twin, 2))
    chunks += islice(twin, 2)
    assert all(map(same, expected, chunks))


# --- files that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    stream = start()
    list(islice(stream, 2))
    return stream.save(tmp_path_factory.mktemp("streams") / "it.stream")


def refused(path, message, pipe=None):
    with pytest.raises(UserError, match=message) as error:
        (pipe or tiny.pipeline()).load_stream(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_damaged_files_are_refused(file, tmp_path):
    content, bad = bytearray(file.read_bytes()), tmp_path / "bad.stream"
    for at in range(50, len(content), len(content) // 20):
        changed = bytearray(content)
        changed[at] ^= 4
        bad.write_bytes(changed)
        refused(bad, "is damaged or no stream file|has format")
    for length in (0, 4, 1000, len(content) - 1):
        bad.write_bytes(content[:length])
        refused(bad, "is damaged or no stream file")
    refused(tmp_path / "none.stream", "does not exist")
    save_file({"a": torch.zeros(2)}, bad)
    refused(bad, "is damaged or no stream file")


def rewritten(file, path, change):
    """The file with another content and a checksum that fits."""
    from streamvid.stream_file import _checksum

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tree = json.loads(metadata["stream"])
    metadata |= change(tree["dict"], tensors) or {}
    metadata["stream"] = json.dumps(tree)
    metadata["checksum"] = str(_checksum(metadata["stream"], tensors))
    save_file(tensors, path, metadata)
    return path


CHANGES = {
    "shape": lambda tree, tensors: tensors.update({"state.cache.tensors.keys": torch.zeros(2, 3)}),
    "missing tensor": lambda tree, tensors: tensors.pop("state.cache.tensors.keys").new_zeros(()) and None,
    "missing part": lambda tree, tensors: tree["state"]["dict"].pop("sampler") and None,
    "method": lambda tree, tensors: tree["settings"]["dict"]["method"]["dict"].update(colour=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_with_a_false_content_are_refused(file, tmp_path, change):
    assert tiny.pipeline().load_stream(rewritten(file, tmp_path / "it.stream", lambda *_: None)).block == 2
    refused(rewritten(file, tmp_path / "bad.stream", CHANGES[change]), "is damaged or no stream file")


def test_files_of_another_version_are_refused(file, tmp_path):
    path = rewritten(file, tmp_path / "it.stream", lambda *_: {"format": "streamvid-stream-9"})
    refused(path, "has format streamvid-stream-9, this version reads streamvid-stream-1")


def test_files_of_another_model_are_refused(file, tmp_path):
    refused(file, r"from another model \(transformer num_layers = 2, here 3\)", tiny.pipeline(num_layers=3))
    other = tiny.pipeline(seed=1)
    refused(file, "exactly and with other weights", other)
    refused(file, "exactly and in another precision", tiny.new_pipeline().to(torch.bfloat16))
    small = tiny.new_pipeline()
    small.register_modules(tiny_decoder=TinyDecoder(widths=(8, 8, 8, 8), blocks=(1, 1, 1)))
    refused(file, "exactly and with another decoder", small)
    own = small.stream(FOX).save(tmp_path / "small.stream")
    small.register_modules(tiny_decoder=TinyDecoder(widths=(8, 8, 8, 8), blocks=(1, 1, 1)))
    refused(own, "exactly and with other weights", small)
    compact = tiny.pipeline().load_stream(file).save(tmp_path / "it.stream", "compact")
    assert next(other.load_stream(compact)).index == 2


def test_what_cannot_be_saved_is_said_and_leaves_no_file(tmp_path):
    stream = start(noise=lambda block, step, frames: tiny.clip(step, frames), decode_pixels=False)
    next(stream)
    path = tmp_path / "it.stream"
    with pytest.raises(UserError, match=r"noise = <function .* cannot be saved"):
        stream.save(path)
    with pytest.raises(UserError, match="mode = 'fast' is not known: choose one of exact, compact"):
        stream.save(path, "fast")
    with pytest.raises(UserError, match="it is a folder"):
        start().save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(next(stream.fork()).latents, next(stream).latents)  # a fork shares it


def test_a_save_that_fails_keeps_the_file_before(tmp_path, monkeypatch):
    stream, path = start(), tmp_path / "it.stream"
    next(stream)
    before = stream.save(path).read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("streamvid.stream_file.save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        stream.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_options_of_a_method_survive(tmp_path):
    method = load_method("memrope")
    stream = start(method=method)
    loaded = resumed(stream, tmp_path / "it.stream", "exact")
    assert {f.name: getattr(loaded.method, f.name) for f in fields(method)} == vars(method)
