"""Random sequences of commands: whatever happened to a stream, its chunks are those of one that was left alone.

A sequence is played twice. The steered run does everything in it: prompts, cuts and resets, and between and within the
blocks saves, forks, pauses and failures. The calm run does what shapes the video only: prompts, cuts and resets at the same
chunks. Both must make the same chunks, bit for bit, and every receipt must say the truth about them.
"""

import threading
from contextlib import suppress
from itertools import count

import numpy as np
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_stream import Trap, same
from test_stream_methods import SMALL

FOX, CAT, SNOW = "a red fox walks", "the blue cat sleeps", "the snow falls"
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
STREAMS = {
    "longlive": {"overrides": {"window": 9}},
    "a script": {"prompt": f"{FOX} [3s] | # {CAT} [2s] | {SNOW} [1s]"},
    "from a picture": {"image": PICTURE, "decode_pixels": True, "overrides": {"window": 9}},
    "several videos": {"prompt": [FOX, CAT], "overrides": {"window": 6}},
    "rolling_forcing": {"method": "rolling_forcing", "overrides": SMALL["rolling_forcing"]},
    "deep_forcing": {"method": "deep_forcing", "overrides": SMALL["deep_forcing"]},
    "reward_forcing": {"method": "reward_forcing", "overrides": SMALL["reward_forcing"]},
    "2 bits": {"overrides": {"kv_dtype": "kivi2", "window": 9}},
}
POLICIES = [None, "cross_only", "recache", "recache(bidirectional, reanchor)", "flush", "blend(3)", "cut"]

disturbances = st.one_of(
    st.none(),
    st.tuples(st.just("fail"), st.integers(0, 14), st.sampled_from([MemoryError, KeyboardInterrupt])),
    st.tuples(st.just("callback"), st.integers(0, 3)),
    st.sampled_from([("pause",), ("save",), ("fork",), ("look",)]),
)
commands = st.one_of(
    st.tuples(st.just("next"), disturbances),
    st.tuples(st.just("next"), disturbances),
    st.tuples(st.just("prompt"), st.sampled_from([FOX, CAT, SNOW]), st.sampled_from(POLICIES)),
    st.tuples(st.just("cut"), st.sampled_from([None, SNOW])),
    st.tuples(st.just("reset"), st.sampled_from([None, 7])),
    st.just(("crash",)),
)


class Run:
    """One stream under a sequence of commands.

    Attributes:
        chunks: what was yielded; None where the stream was over.
        receipts: every receipt, with the number of chunks before it.
    """

    def __init__(self, name: str, folder=None):
        options = {"prompt": FOX, "seed": 3, "decode_pixels": False, **STREAMS[name]}
        self.stream = tiny.pipeline().stream(options.pop("prompt"), **options)
        self.folder, self.numbers = folder, count()
        self.chunks: list = []
        self.receipts: list = []

    def play(self, sequence) -> None:
        for name, *arguments in sequence:
            getattr(self, name)(*arguments)

    def next(self, disturbance) -> None:
        if self.folder is not None and disturbance is not None:
            kind, *arguments = disturbance
            getattr(self, kind)(*arguments)
            return
        self.chunks.append(next(self.stream, None))

    def prompt(self, text: str, policy: str | None) -> None:
        self._keep(self.stream.prompt(text, policy))

    def cut(self, text: str | None) -> None:
        self._keep(self.stream.cut(text))

    def _keep(self, receipt) -> None:
        if receipt.status == "dropped":
            assert list(self.stream) == []  # the stream is over
        else:
            self.receipts.append((len(self.chunks), receipt))

    def reset(self, seed: int | None) -> None:
        self.stream.reset(seed)

    def crash(self) -> None:
        """A block fails, and something else is asked for before it is tried again."""
        if self.folder is None:
            return
        before = self.stream.state()
        self.stream.sampler.on_step_end = lambda *_: 1 / 0
        with suppress(ZeroDivisionError):
            assert next(self.stream, None) is None  # the stream is over
        self.stream.sampler.on_step_end = None
        assert self.stream.state() == before and self.stream.block == before.block

    # disturbances, each with the chunk after it

    def fail(self, call: int, error: type[BaseException]) -> None:
        """Some module fails at some call; if the block has fewer calls, nothing happens."""
        with Trap(tiny.pipeline()) as trap:
            trap.left, trap.error = call, error()
            try:
                self.next(None)
            except error:
                pass
            else:
                return
        self.next(None)

    def callback(self, call: int) -> None:
        """A step callback fails."""
        left = [call]

        def fails(timesteps, latents):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("in a callback")
            return latents

        self.stream.sampler.on_step_end = fails
        try:
            self.next(None)
        except RuntimeError:
            self.stream.sampler.on_step_end = None
            self.next(None)
        self.stream.sampler.on_step_end = None

    def pause(self) -> None:
        self.stream.pause()
        before = self.stream.state()
        timer = threading.Timer(0.01, self.stream.resume)
        timer.start()
        self.next(None)
        timer.join()
        assert before.paused and not self.stream.state().paused

    def save(self) -> None:
        path = self.stream.save(self.folder / f"{next(self.numbers)}.stream")
        self._leave(tiny.pipeline().load_stream(path))

    def fork(self) -> None:
        self._leave(self.stream.fork())

    def _leave(self, copy) -> None:
        """Go on with the copy; what becomes of the original must not matter to it."""
        assert copy.state() == self.stream.state()
        self.receipts = [(at, receipt) for at, receipt in self.receipts if at < len(self.chunks)]
        self.stream.prompt(SNOW, "cut")
        next(self.stream, None)
        self.stream.close()
        self.stream = copy
        self.next(None)

    def look(self) -> None:
        """The state is that of the latest chunk, also in the middle of a block."""
        before, seen = self.stream.state(), []
        self.stream.sampler.on_step_end = lambda _, x: (seen.append(self.stream.state()), x)[1]
        self.next(None)
        self.stream.sampler.on_step_end = None
        assert all((s.block, s.media_time, s.prompts, s.attended) == told(before) for s in seen)


def told(state) -> tuple:
    return state.block, state.media_time, state.prompts, state.attended


@settings(max_examples=60, derandomize=True)
@given(st.sampled_from(list(STREAMS)), st.lists(commands, min_size=2, max_size=14))
@example(
    "from a picture",
    [("next", None), ("reset", None), ("next", ("fail", 1, MemoryError)), ("next", ("save",))],
)
@example(
    "longlive",
    [("next", None)] * 3
    + [("prompt", CAT, "recache"), ("crash",), ("prompt", SNOW, "cross_only"), ("next", None)]
    + [("reset", None), ("crash",)],
)
@example(
    "longlive", [("next", None)] * 3 + [("prompt", CAT, "blend(3)"), ("next", ("fork",)), ("next", ("save",))]
)
@example(
    "rolling_forcing", [("next", None)] * 4 + [("cut", SNOW), ("next", ("callback", 0)), ("next", ("look",))]
)
@example(
    "a script",
    [("next", None)] * 3
    + [("reset", 7), ("next", ("callback", 1)), ("prompt", SNOW, "flush"), ("next", ("fork",))],
)
def test_what_happens_to_a_stream_leaves_no_trace_in_its_chunks(tmp_path_factory, name, sequence):
    steered, calm = Run(name, tmp_path_factory.mktemp("streams")), Run(name)
    for run in (steered, calm):
        run.play([*sequence, ("next", None), ("next", None)])
    assert len(steered.chunks) == len(calm.chunks)
    for one, other in zip(steered.chunks, calm.chunks, strict=True):
        assert (one is None) == (other is None) and (one is None or same(one, other))
    for run in (steered, calm):
        for at, receipt in run.receipts:
            assert_true(receipt, at, run)
    for chunk in filter(None, steered.chunks):
        assert torch.isfinite(chunk.latents).all()


def assert_true(receipt, at: int, run: Run) -> None:
    """It was applied in the chunk that followed it, unless another prompt came before that."""
    if receipt is not [other for where, other in run.receipts if where == at][-1]:
        assert receipt.status == "replaced" and not receipt.wait(0)
        assert receipt.chunk is None and receipt.media_time is None
        return
    chunk = run.chunks[at]
    assert receipt.wait(0) and (receipt.chunk, receipt.media_time) == (chunk.index, chunk.media_time)
    assert chunk.prompt == receipt.prompts[0]
