"""The commands of docs/studio.md and docs/http.md start a server that is what they say."""

import os
import re
import shlex
import threading
from pathlib import Path

import httpx
import pytest
import tiny
import torch
import uvicorn
from gradio import networking
from server import wait_for

from streamvid.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
LINES = sorted(
    {
        line.partition("#")[0].strip()
        for name in ("studio.md", "http.md")
        for line in re.findall(r"^streamvid app.*$", (DOCS / name).read_text(), re.M)
    }
)


@pytest.fixture
def visited(monkeypatch):
    """`streamvid app` with a tiny model, visited once it listens and then stopped."""
    answers = {}
    run = uvicorn.Server.run

    def run_and_visit(self, sockets):
        thread = threading.Thread(target=run, args=(self, sockets))
        thread.start()
        try:
            wait_for(lambda: self.started)
            answers["address"], port = sockets[0].getsockname()[:2]
            for path in ("/healthz", "/api/info"):
                answers[path] = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60)
            answers["known"] = httpx.get(
                f"http://127.0.0.1:{port}/api/info", auth=("ada", "secret"), timeout=60
            )
        finally:
            self.should_exit = True
            thread.join()

    def load(*options, **named):
        answers["loaded"] = options, named
        return tiny.pipeline()

    monkeypatch.setattr(uvicorn.Server, "run", run_and_visit)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: answers.update(threads=count))
    monkeypatch.setattr("streamvid.models.load_pipeline", load)
    monkeypatch.setattr(networking, "setup_tunnel", lambda *options: "https://abc.gradio.live")
    return answers


def test_the_guides_have_commands():
    assert len(LINES) >= 5


@pytest.mark.parametrize("line", LINES)
def test_a_server_starts_as_the_guide_says(line, visited, capsys):
    words = shlex.split(line)[1:]
    if "--port" in words:
        words[words.index("--port") + 1] = "0"
    else:
        words += ["--port", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "streamvid studio: http://" in said and ("abc.gradio.live" in said) == ("--share" in words)
    assert visited["/healthz"].json()["status"] == "ok"
    assert visited["/api/info"].status_code == (401 if "--auth" in words else 200)
    assert 1 <= visited["threads"] <= max(1, os.cpu_count() - 1)
    assert visited["known"].json()["model"] == "diorama"
    assert visited["address"] == ("0.0.0.0" if "--host" in words else "127.0.0.1")
    assert visited["loaded"][0][3] == ("tiny" if "--decoder" in words else "exact")
    assert visited["loaded"][0][4] == ("fp8_dynamic" if "--weights" in words else "native")
    assert visited["loaded"][1] == {"compiled": "--compile" in words}
    if "--ahead-seconds" in words:
        assert visited["known"].json()["ahead_seconds"] == float(words[words.index("--ahead-seconds") + 1])
