"""Live control of a stream: receipts tell the truth, pauses hold, ends are told."""

import json
import signal
import threading
import time
from dataclasses import replace
from itertools import islice

import pytest
import tiny
from test_stream import same

from streamvid.context import ContextCache
from streamvid.errors import UserError
from streamvid.window import WindowPlanner

FOX, CAT, BIRD = "a red fox walks", "the blue cat sleeps", "a bird runs"


def start(**options):
    return tiny.pipeline().stream(FOX, method="longlive", decode_pixels=False, **options)


def told(receipt):
    return receipt.status, receipt.chunk


def test_a_receipt_says_which_chunk_was_first():
    stream = start()
    chunks = list(islice(stream, 2))
    before = time.time()
    receipt = stream.prompt(CAT, "recache")
    assert told(receipt) == ("pending", None) and before <= receipt.accepted_at <= time.time()
    assert not receipt.wait(0)
    chunks += islice(stream, 2)
    assert told(receipt) == ("applied", 2) and receipt.wait(0)
    assert receipt.media_time == chunks[2].media_time and receipt.applied_at >= receipt.accepted_at
    assert [chunk.prompt for chunk in chunks] == [FOX, FOX, CAT, CAT]
    assert chunks[2].events == ("switch:recache",) and (receipt.prompts, receipt.policy) == (
        (CAT,),
        "recache",
    )


def test_a_later_prompt_replaces_one_that_waits():
    stream = start()
    next(stream)
    first, second = stream.prompt(CAT), stream.prompt(BIRD)
    assert told(first) == ("replaced", None) and not first.wait(0)
    assert next(stream).prompt == BIRD and told(second) == ("applied", 1) and told(first)[0] == "replaced"


def test_a_prompt_that_comes_while_a_block_is_made_is_for_the_next():
    stream = start()
    next(stream)
    first, late = stream.prompt(CAT), []
    denoise = stream.sampler.denoise

    def interrupted(inputs):
        if not late:
            late.append(stream.prompt(BIRD))
        return denoise(inputs)

    stream.sampler.denoise = interrupted
    assert [next(stream).prompt, next(stream).prompt] == [CAT, BIRD]
    assert told(first) == ("applied", 1) and told(late[0]) == ("applied", 2)


@pytest.mark.parametrize("late", [False, True])
def test_a_block_that_fails_keeps_the_prompt_unless_a_later_one_came(late):
    stream, later = start(), []
    next(stream)
    first = stream.prompt(CAT)

    def fails(*_):
        if late:
            later.append(stream.prompt(BIRD))
        raise RuntimeError("broken")

    stream._pixels = fails
    with pytest.raises(RuntimeError):
        next(stream)
    del stream._pixels
    assert told(first) == (("replaced", None) if late else ("pending", None))
    assert next(stream).prompt == (BIRD if late else CAT)
    assert told(later[0] if late else first) == ("applied", 1)


@pytest.mark.parametrize("how", ["close", "end"])
def test_what_a_stream_does_not_live_to_see_is_dropped(how):
    stream = start(blocks=1)
    next(stream)
    early = stream.prompt(CAT)
    assert told(early) == ("dropped", None)  # the stream is over
    other = start()
    next(other)
    waiting = other.prompt(CAT)
    if how == "close":
        other.close()
        other.close()
    else:
        other.blocks = 1
        assert list(other) == []
    assert told(waiting) == ("dropped", None) and told(other.prompt(CAT)) == ("dropped", None)
    with pytest.raises(StopIteration):
        next(other)


def test_a_prompt_that_is_refused_leaves_the_one_before():
    stream = start()
    first = stream.prompt(CAT)
    with pytest.raises(UserError):
        stream.prompt(" ")
    assert told(first) == ("pending", None)


def test_a_cut_begins_a_scene_under_the_same_prompt_or_another():
    stream = start()
    list(islice(stream, 3))
    same = stream.cut()
    chunk = next(stream)
    assert chunk.new_scene and chunk.prompt == FOX and chunk.attended == chunk_frames(3) and same.chunk == 3
    stream.cut(CAT)
    assert next(stream).prompt == CAT


def chunk_frames(index: int) -> tuple[int, ...]:
    return tuple(range(3 * index, 3 * index + 3))


@pytest.mark.parametrize("ends", ["resume", "close"])
def test_a_paused_stream_waits(ends):
    stream, made = start(), []
    next(stream)
    stream.pause()
    thread = threading.Thread(target=lambda: made.extend(islice(stream, 1)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and made == [] and stream.state().paused
    getattr(stream, ends)()
    thread.join(20)
    assert not thread.is_alive() and len(made) == (1 if ends == "resume" else 0)
    assert not stream.state().paused


def test_a_pause_does_not_hold_up_the_end():
    stream, seen = start(blocks=1), []
    next(stream)
    stream.pause()
    thread = threading.Thread(target=lambda: seen.append(list(stream)), daemon=True)
    thread.start()
    thread.join(20)
    assert seen == [[]]


@pytest.mark.parametrize("policy", ["cut", "recache", None])
def test_the_state_in_the_middle_of_a_block_is_that_of_the_latest_chunk(policy):
    stream, seen = start(), []
    list(islice(stream, 3))
    before = replace(stream.state(), pending=None)
    if policy is None:
        stream.reset(seed=5)
    else:
        stream.prompt(CAT, policy)
    stream.sampler.on_step_end = lambda _, latents: (seen.append(stream.state()), latents)[1]
    next(stream)
    assert len(seen) == 2 and {replace(state, pending=None) for state in seen} == {before}
    assert replace(stream.state(), pending=None) != before


@pytest.fixture
def ctrl_c():
    """What Ctrl-C does in a terminal: in the background it may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["commit", "undo"])
def test_an_interrupt_comes_between_two_chunks_or_within_one_but_never_in_a_commit(
    where, monkeypatch, ctrl_c
):
    """Ctrl-C strikes between any two lines of Python: not where half of a block would be remembered."""
    expected = list(islice(start(seed=1), 5))
    stream = start(seed=1)
    list(islice(stream, 2))

    def then_interrupted(method):
        def call(self, *arguments):
            method(self, *arguments)
            signal.raise_signal(signal.SIGINT)

        return call

    if where == "commit":
        monkeypatch.setattr(WindowPlanner, "commit", then_interrupted(WindowPlanner.commit))
    else:
        stream.reset()
        monkeypatch.setattr(ContextCache, "load_state_dict", then_interrupted(ContextCache.load_state_dict))
        monkeypatch.setattr(stream, "_pixels", lambda *_: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    stream.mailbox.restart = None
    assert stream.block == (3 if where == "commit" else 2)
    assert all(map(same, expected[stream.block :], stream))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_prompts_from_many_threads_are_each_settled_once():
    stream, receipts = start(), []
    threads = [
        threading.Thread(target=lambda n=n: receipts.append(stream.prompt((FOX, CAT, BIRD)[n % 3])))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
        next(stream)
    for thread in threads:
        thread.join()
    next(stream)
    assert len(receipts) == 12 and {receipt.status for receipt in receipts} <= {"applied", "replaced"}
    chunks = [receipt.chunk for receipt in receipts if receipt.status == "applied"]
    assert chunks and len(set(chunks)) == len(chunks)


def test_the_state_is_plain_values():
    stream = start()
    chunks = list(islice(stream, 2))
    stream.prompt(CAT)
    state = stream.state()
    assert (state.block, state.prompts, state.pending, state.method) == (2, (FOX,), (CAT,), "longlive")
    assert state.media_time == chunks[1].media_time + 12 / stream.fps
    assert state.attended == (*chunk_frames(0), *chunk_frames(1)) and state.kv_bytes == stream.cache.bytes
    assert json.loads(json.dumps(state.to_dict()))["block"] == 2
    stream.close()
    assert stream.state().closed and stream.state().pending is None
