"""Sessions: seats, the queue, who is forgotten, and what is left in memory afterwards."""

import time

import numpy as np
import pytest
from barcode import COLOURS, FPS, FRAMES, FakeEngine
from server import wait_for
from streamvid.app.engine import StreamRequest
from streamvid.app.export import export_mp4
from streamvid.app.limits import Limits
from streamvid.app.live import ENDED, PAUSED, QUEUED, RUNNING, Busy, StreamEnded
from streamvid.app.sessions import NotFound, Studio

from streamvid.errors import UserError
from streamvid.io import read_video

pytestmark = pytest.mark.flaky(reruns=2)  # bounds on real time, which other work on the machine can break


@pytest.fixture
def make():
    studios = []

    def make(speed=50.0, ballast=0, at_once=1, **limits):
        bounds = Limits(**{"sessions": 2, "ahead_seconds": 1.0, **limits})
        studios.append(Studio(FakeEngine(speed, bounds, ballast, at_once), bounds))
        return studios[-1]

    yield make
    for studio in studios:
        studio.close()


def ask(seed=1, prompt="red", **options):
    return StreamRequest(prompt=prompt, seed=seed, **options)


def test_generation_is_held_back_to_play_out(make):
    stream = make().create(ask())
    wait_for(lambda: stream.chunks >= 2)
    began = time.monotonic()
    samples = []
    while time.monotonic() - began < 2.0:
        samples.append(stream.clock.ahead(time.monotonic()))
        time.sleep(0.02)
    chunk = FRAMES / FPS
    assert (
        max(samples) <= 1.0 + chunk + 0.05 and np.median(samples) > 0.3
    )  # 50x real time would be 100 s ahead
    assert stream.clock.made < 2.0 + 1.0 + 2 * chunk + 0.5


def test_ahead_is_an_option_of_the_stream(make):
    studio = make()
    short, long = studio.create(ask(ahead=0.3)), studio.create(ask(ahead=4.0))
    wait_for(lambda: long.clock.made > 4.0)
    time.sleep(0.1)
    assert short.clock.ahead(time.monotonic()) <= 0.3 + FRAMES / FPS
    assert long.clock.ahead(time.monotonic()) > 3.0


def test_a_report_of_the_player_moves_generation(make):
    stream = make().create(ask())
    wait_for(lambda: stream.clock.made > 1.0)
    for _ in range(20):
        stream.report(0.0, 1.0)  # it has not begun to play
        time.sleep(0.05)
    assert stream.clock.made <= 1.0 + FRAMES / FPS + 1e-6


def test_pause_holds_and_resume_goes_on(make):
    stream = make().create(ask())
    wait_for(lambda: stream.chunks >= 2)
    stream.pause()
    time.sleep(0.1)
    chunks, position = stream.chunks, stream.clock.position(time.monotonic())
    time.sleep(0.8)
    assert (stream.chunks, stream.status) == (chunks, PAUSED)
    assert stream.clock.position(time.monotonic()) == position
    stream.resume()
    wait_for(lambda: stream.chunks > chunks + 1)
    assert stream.status == RUNNING


def test_a_prompt_is_acknowledged_and_lands_where_the_receipt_says(make):
    stream = make().create(ask(prompt="red"))
    wait_for(lambda: stream.chunks >= 2)
    first, second = stream.prompt("green"), stream.prompt("blue", "cut")
    assert first.receipt.status == "replaced" and second.to_dict()["status"] in ("pending", "applied")
    wait_for(lambda: second.chunk is not None)
    stream.close()
    wait_for(lambda: stream.status == ENDED)
    frames = [frame[90, 64].astype(int) for frame in read_video(stream.recording.path)]
    at = round(second.media_time * FPS)
    assert at == second.chunk * FRAMES
    assert np.abs(frames[at - 1] - COLOURS["red"]).max() < 24
    assert np.abs(frames[at] - COLOURS["blue"]).max() < 24
    assert [(s.prompt, s.policy) for s in stream.history.shots] == [("red", None), ("blue", "cut")]


def test_fork_goes_on_beside_its_parent_from_the_same_moment(make):
    studio = make()
    parent = studio.create(ask(seed=3))
    wait_for(lambda: parent.chunks >= 3)
    child = studio.fork(parent.name)
    wait_for(lambda: child.chunks > child.first_chunk + 1)
    assert child.status == parent.status == RUNNING
    assert child.start == child.first_chunk * FRAMES / FPS and child.recording.pieces[0].start == child.start
    number = bits(next(read_video(child.recording.path)))
    assert number == (3, child.first_chunk * FRAMES)  # the very next frame
    with pytest.raises(Busy, match="close one"):
        studio.fork(parent.name)
    child.prompt("green")
    wait_for(lambda: child.current_prompt == "green")
    assert parent.current_prompt == "red"


def bits(frame):
    value = int("".join(str(int(frame[16, 8 * i + 4, 1] > 128)) for i in range(16)), 2)
    return value >> 12, value & 4095


def test_the_film_of_a_fork_begins_before_the_fork(make):
    """Also of a fork's fork, and after the stream that was forked has been deleted with its files."""
    studio = make()
    first = studio.create(ask(seed=2))
    wait_for(lambda: first.chunks >= 2)
    second = studio.fork(first.name)
    wait_for(lambda: second.chunks >= second.first_chunk + 2)
    first.close()
    studio.remove(first.name)
    wait_for(lambda: not first.folder.exists())
    third = studio.fork(second.name)
    wait_for(lambda: third.chunks >= third.first_chunk + 1)
    third.close()
    wait_for(lambda: third.status == ENDED)
    film = export_mp4(third)
    numbers = [bits(frame) for frame in read_video(film)]
    assert numbers == [(2, number) for number in range(third.chunks * FRAMES)]
    assert third.script().duration == pytest.approx(len(numbers) / FPS)
    assert [path.name for path in third.folder.glob("export*")] == [film.name]


def test_an_ended_stream_that_can_still_be_exported_holds_no_caches(make):
    studio = make()
    parent = studio.create(ask(seed=3))
    wait_for(lambda: parent.chunks >= 1)
    child = studio.fork(parent.name)
    wait_for(lambda: child.chunks > child.first_chunk)
    assert studio.counts()["in_memory"] == 2
    for stream in (parent, child):
        stream.close()
        wait_for(lambda stream=stream: stream.status == ENDED)
    wait_for(lambda: not studio.engine.alive, what="freeing the caches")
    wait_for(lambda: studio.counts()["in_memory"] == 0)
    assert export_mp4(child).exists()


def test_an_ended_stream_stays_while_its_tab_does_but_not_for_ever(make, monkeypatch):
    studio = make()
    stream = studio.create(ask(linger=0.5))
    wait_for(lambda: stream.chunks >= 1)
    stream.viewers, stream.was_watched, stream.touched = 1, True, 0.0
    stream.close()
    wait_for(lambda: stream.status == ENDED)
    time.sleep(1.0)
    assert studio.get(stream.name) is stream
    monkeypatch.setattr("streamvid.app.sessions.FINISHED_SECONDS", 0.5)
    wait_for(lambda: not stream.folder.exists())


def test_save_and_go_on(make, tmp_path):
    studio = make()
    stream = studio.create(ask(seed=4))
    wait_for(lambda: stream.chunks >= 2)
    stream.pause()
    time.sleep(0.2)
    stream.save(tmp_path / "saved", "exact")
    stream.close()
    other = studio.resume_saved(tmp_path / "saved")
    wait_for(lambda: other.chunks >= 1)
    assert bits(next(read_video(other.recording.path))) == (4, stream.chunks * FRAMES)
    (tmp_path / "bad").write_text("nonsense")
    with pytest.raises(UserError, match="not a saved stream"):
        studio.resume_saved(tmp_path / "bad")


def test_reset_starts_anew_with_the_current_prompt(make):
    stream = make().create(ask(seed=5))
    wait_for(lambda: stream.chunks >= 2)
    stream.prompt("green")
    wait_for(lambda: stream.current_prompt == "green")
    made = stream.clock.made
    stream.reset(seed=6)
    wait_for(lambda: stream.clock.made >= made + 2)
    script = stream.script()
    assert [shot.prompt for shot in script.shots] == ["green"] and script.seed == 6
    assert stream.history.shots[-1].start >= made


def test_the_script_of_what_happened_has_the_shots_where_they_were(make):
    stream = make().create(ask(seed=9))
    wait_for(lambda: stream.chunks >= 2)
    receipt = stream.prompt("blue", "cut")
    wait_for(lambda: receipt.media_time is not None)
    script = stream.script()
    assert [(s.prompt, s.start, s.transition) for s in script.shots] == [
        ("red", 0.0, None),
        ("blue", receipt.media_time, "cut"),
    ]
    assert script.seed == 9 and script.duration == pytest.approx(stream.clock.made, abs=FRAMES / FPS + 1e-6)


def test_seats_and_queue(make):
    studio = make(sessions=1, queue=2)
    first, second, third = (studio.create(ask(seed)) for seed in (1, 2, 3))
    assert [studio.place(s) for s in (first, second, third)] == [None, 1, 2]
    assert (first.status, second.status) == (RUNNING, QUEUED)
    with pytest.raises(Busy, match="queue is full"):
        studio.create(ask(4))
    with pytest.raises(StreamEnded, match="waits in the queue"):
        second.prompt("green")
    first.close()
    wait_for(lambda: second.status == RUNNING)
    assert studio.place(third) == 1
    studio.remove(second.name)
    wait_for(lambda: third.status == RUNNING)
    with pytest.raises(NotFound):
        studio.get(second.name)


def test_a_stream_that_nobody_watches_ends_after_its_linger(make):
    studio = make(sessions=4)
    stream, kept = studio.create(ask(linger=0.5)), studio.create(ask(linger=100))
    for one in (stream, kept):
        one.was_watched = True
    wait_for(lambda: stream.status == ENDED, 3)
    wait_for(lambda: not stream.folder.exists())
    assert kept.status == RUNNING
    watched = studio.create(ask(linger=0.5))
    watched.viewers, watched.was_watched = 1, True
    time.sleep(1.2)
    assert watched.status == RUNNING
    watched.viewers, watched.touched = 0, time.monotonic()
    wait_for(lambda: watched.status == ENDED, 3)


def test_as_many_chunks_are_made_at_once_as_the_engine_says(make):
    """Blocks of 3 s: with one place the second stream waits, with two it does not."""
    for at_once in (1, 2):
        studio = make(speed=0.25, at_once=at_once)
        for seed in range(2):
            studio.create(ask(seed))
        if at_once == 1:
            wait_for(lambda studio=studio: studio._turns._waiting)
        else:
            wait_for(lambda studio=studio: studio._turns._free == 0)
            assert not studio._turns._waiting


def test_a_chunk_that_takes_too_long_refuses_what_has_to_wait_for_it(make, monkeypatch):
    """In one sentence, and what was refused is not done afterwards."""
    monkeypatch.setattr("streamvid.app.live.COMMAND_SECONDS", 0.3)
    studio = make(speed=0.25)
    stream = studio.create(ask())
    wait_for(lambda: studio._turns._free == 0)
    done = []
    with pytest.raises(Busy, match=r"longer than 0\.3 s"):
        stream.between_chunks(lambda: done.append("too late"))
    monkeypatch.setattr("streamvid.app.live.COMMAND_SECONDS", 60)
    stream.between_chunks(lambda: done.append("in time"))
    assert done == ["in time"] and stream.chunks >= 1


def test_a_closed_stream_does_not_finish_its_block(make):
    """A block takes 3 s, in four steps; neither it nor one that waits for its turn is finished for nobody."""
    studio = make(speed=0.25)
    first = studio.create(ask(seed=1))
    wait_for(lambda: studio._turns._free == 0)
    second = studio.create(ask(seed=2))
    wait_for(lambda: studio._turns._waiting)
    for stream in (first, second):
        stream.close()
    wait_for(lambda: studio.counts()["in_memory"] == 0, what="giving up")
    assert [(s.status, s.reason, s.chunks) for s in (first, second)] == [(ENDED, "closed", 0)] * 2
    wait_for(lambda: not studio.engine.alive, what="freeing the caches")


def test_limits_of_time(make):
    studio = make(idle_seconds=4.0, sessions=4)
    idle, busy = studio.create(ask()), studio.create(ask())
    while idle.status != ENDED:
        time.sleep(0.2)
        busy.prompt("green")
    assert idle.reason == "idle" and busy.status == RUNNING
    short = make(stream_seconds=1.0).create(ask())
    wait_for(lambda: short.status == ENDED)
    assert short.reason == "too long" and 1.0 <= short.clock.made <= 1.0 + FRAMES / FPS


def test_an_error_of_the_engine_ends_the_stream_with_a_message(make):
    studio = make()
    stream = studio.create(ask())
    wait_for(lambda: stream.chunks >= 1)
    stream._stream.work = -1.0  # time.sleep refuses it
    wait_for(lambda: stream.status == ENDED)
    assert stream.reason == "error" and "log" in stream.message
    assert studio.create(ask()).status == RUNNING


def test_twenty_sessions_are_all_served_in_order_none_mixed_and_memory_is_back(make):
    studio = make(speed=200.0, ballast=4 * 2**20, sessions=2, queue=32, linger_seconds=600)
    streams = [studio.create(ask(seed, prompt=["red", "green", "blue"][seed % 3])) for seed in range(15)]
    streams += [studio.create(ask(seed, prompt="red", ahead=3.0)) for seed in range(5)]
    most = 0
    order = []
    deadline = time.monotonic() + 300
    while any(s.status != ENDED for s in streams) and time.monotonic() < deadline:
        running = [s for s in streams if s.status == RUNNING]
        most = max(most, len(running))
        for stream in running:
            if stream.chunks >= 2 and stream not in order:  # it ends a moment after it is closed
                order.append(stream)
                stream.close()
        time.sleep(0.005)
    assert most <= 2 and len(order) == 20
    assert sorted(order, key=streams.index) == streams
    assert max(abs(order.index(s) - streams.index(s)) for s in streams) <= 2  # first come, first served
    for stream in streams:
        prompts, numbers = stream.opening, [bits(frame) for frame in read_video(stream.recording.path)]
        assert {seed for seed, _ in numbers} == {prompts.seed % 16}
        assert [number for _, number in numbers] == list(range(len(numbers)))
    for stream in streams:
        studio.remove(stream.name)
    wait_for(lambda: not studio.engine.alive, what="freeing the streams' memory")
    wait_for(lambda: not list(studio.workspace.iterdir()))
    assert studio.counts()["ended"] == 0
