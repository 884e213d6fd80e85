"""A real server in a thread, and real Chromium in front of it."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from streamvid.app.server import build_app
from streamvid.app.sessions import Studio


class Running:
    """A studio at an address."""

    def __init__(self, studio: Studio, url: str):
        self.studio, self.url = studio, url
        self.engine = studio.engine


@contextmanager
def serving(engine, limits, page=True, auth=None):
    """Serve an engine on a free port until the block ends."""
    studio = Studio(engine, limits)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = build_app(studio, auth=auth, page=page)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", ws="websockets-sansio", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 60)
    try:
        yield Running(studio, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(10)
        studio.close()


def wait_for(condition, seconds=60.0, what="it"):
    """Wait until `condition()` is true; returns what it gave. The default only keeps a hang from lasting."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def slowness() -> float:
    """How many times slower than alone this process is computing now: wall time over processor time of a short spin.

    About 1 on an idle machine. Where other work has the cores, a bound on real time cannot hold for any program; tests
    multiply theirs by this, and are strict where nothing else runs.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.1:
        sum(range(1000))
    return max(1.0, (time.perf_counter() - wall) / (time.process_time() - cpu))
