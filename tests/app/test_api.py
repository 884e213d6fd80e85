"""The HTTP API: what each route does, what it refuses, and that nothing a client sends breaks the server."""

import base64
import itertools
import json
import os
import re
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
from barcode import FPS, FRAMES, FakeEngine
from server import serving, slowness, wait_for
from streamvid.app.engine import StreamRequest
from streamvid.app.limits import Limits
from websockets.sync.client import connect

from streamvid.io import read_video

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def server():
    limits = Limits(sessions=50, queue=100, prompt_characters=300, upload_bytes=10_000)
    with serving(FakeEngine(20.0, limits), limits, page=False) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client
    for name in list(server.studio._streams):  # what runs on would slow down the next test
        server.studio.remove(name)


def create(client, **body):
    answer = client.post("/api/streams", json={"prompt": "red", **body})
    assert answer.status_code == 201, answer.text
    return answer.json()["stream"]


def test_a_stream_over_http_from_start_to_end(client, tmp_path):
    name = create(client, seed=3)
    wait_for(lambda: client.get(f"/api/streams/{name}").json()["chunks"] >= 2)
    receipt = client.post(f"/api/streams/{name}/prompt", json={"text": "green", "policy": "cut"}).json()
    assert receipt["status"] in ("pending", "applied") and receipt["text"] == "green"
    state = wait_for(
        lambda: (s := client.get(f"/api/streams/{name}").json())["prompt"] == "green" and s, what="the switch"
    )
    assert (
        state["receipts"][0]["media_time"] == state["shots"][1]["start"] == state["shots"][1]["chunk"] * 0.75
    )
    picture = client.get(f"/api/streams/{name}/thumbnails/1.jpg")
    assert picture.headers["content-type"] == "image/jpeg" and picture.content[:2] == b"\xff\xd8"
    with client.stream("GET", f"/api/streams/{name}/video.mp4?start=beginning") as video:
        data = b""
        for part in video.iter_bytes():
            data += part
            if len(data) > 5_000:
                break
    (tmp_path / "live.mp4").write_bytes(data)
    assert next(read_video(tmp_path / "live.mp4")).shape == (128, 128, 3)
    assert client.delete(f"/api/streams/{name}").status_code == 204
    assert client.get(f"/api/streams/{name}").status_code == 404


def test_events_are_numbered_and_can_be_resumed(client):
    name = create(client)

    def events(first=None):
        headers = {} if first is None else {"Last-Event-ID": str(first)}
        with client.stream("GET", f"/api/streams/{name}/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    seen = []
    for event in events():
        seen.append(event)
        if event["event"] == "chunk" and event["chunk"] == 2:
            break
    assert [e["number"] for e in seen] == list(range(len(seen)))
    assert {"started", "shot", "chunk"} <= {e["event"] for e in seen}
    chunk = next(e for e in seen if e["event"] == "chunk")
    assert chunk["frames"] == FRAMES and chunk["seconds"] == FRAMES / FPS and "denoise" in chunk["timings"]
    assert next(iter(events(first=2)))["number"] == 3


def test_pause_and_position_hold_generation_back(client):
    name = create(client)
    wait_for(lambda: client.get(f"/api/streams/{name}").json()["chunks"] >= 1)
    assert client.post(f"/api/streams/{name}/pause").status_code == 204
    time.sleep(0.2)
    before = client.get(f"/api/streams/{name}").json()
    time.sleep(0.5)
    after = client.get(f"/api/streams/{name}").json()
    assert before["status"] == "paused" and before["made"] == after["made"]
    client.post(f"/api/streams/{name}/resume")
    wait_for(lambda: client.get(f"/api/streams/{name}").json()["made"] > after["made"])
    assert client.post(f"/api/streams/{name}/position", json={"position": 0.1}).status_code == 204


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/api/streams", {}, 422, "prompt and script"),
        ("POST", "/api/streams", {"prompt": "   "}, 422, "empty"),
        ("POST", "/api/streams", {"prompt": "x" * 301}, 422, "300"),
        ("POST", "/api/streams", {"prompt": "red", "sead": 1}, 422, "sead"),
        ("POST", "/api/streams", {"prompt": "red", "seed": -1}, 422, "seed"),
        ("POST", "/api/streams", {"script": "shots: [{promt: a}]"}, 422, "promt"),
        ("POST", "/api/streams", {"prompt": "red", "beside": "nobody"}, 404, "nobody"),
        ("POST", "/api/scripts/check", {"text": "shots: 3"}, 422, "shots"),
        ("GET", "/api/streams/nobody", None, 404, "does not exist"),
        ("POST", "/api/streams/nobody/prompt", {"text": "a"}, 404, "does not exist"),
        ("POST", "/api/streams/nobody/prompt", {"text": "a", "policy": "sideways"}, 422, "sideways"),
        ("GET", "/api/streams/../../etc/passwd", None, 404, ""),
    ],
)
def test_mistakes_are_answered_in_one_sentence(client, method, path, body, status, words):
    answer = client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.text and "Traceback" not in answer.text


def test_a_script_is_never_taken_for_the_name_of_a_file(client, tmp_path):
    secret = tmp_path / "secret.yaml"
    secret.write_text("shots: [{prompt: the secret, duration: 3}]")
    for text in (str(secret), f"{secret}#1", "../../pyproject.toml"):
        answer = client.post("/api/scripts/check", json={"text": text})
        assert "the secret" not in answer.text
        answer = client.post("/api/streams", json={"script": text})
        assert "the secret" not in answer.text
    name = create(client, prompt=str(secret))  # a prompt that looks like a file is a prompt
    state = wait_for(lambda: (s := client.get(f"/api/streams/{name}").json())["prompt"] and s)
    assert state["prompt"] == str(secret)


def test_what_was_stopped_can_still_be_exported(client, tmp_path):
    name = create(client, seed=4, linger=0.5)
    wait_for(lambda: client.get(f"/api/streams/{name}").json()["chunks"] >= 2)
    assert client.post(f"/api/streams/{name}/stop").status_code == 204
    wait_for(lambda: client.get(f"/api/streams/{name}").json()["status"] == "ended")
    state = client.get(f"/api/streams/{name}").json()
    assert state["reason"] == "stopped"
    (tmp_path / "film.mp4").write_bytes(client.get(f"/api/streams/{name}/export.mp4").content)
    assert len(list(read_video(tmp_path / "film.mp4"))) == state["chunks"] * FRAMES
    assert "prompt: red" in client.get(f"/api/streams/{name}/script.yaml").text
    assert client.post(f"/api/streams/{name}/prompt", json={"text": "green"}).status_code == 409


def test_a_script_keeps_what_it_says_beside_its_shots(client):
    text = "method: longlive\nseed: 5\noverrides: {sink: 0}\nshots: [{prompt: red, duration: 3}]"
    checked = client.post("/api/scripts/check", json={"text": text}).json()
    assert checked["settings"] == {"method": "longlive", "seed": 5, "overrides": {"sink": 0}}
    assert checked["shots"] == [{"prompt": "red", "duration": 3, "start": 0}]


def test_uploads_are_bounded_and_checked(client):
    assert client.post("/api/streams/resume", content=b"").status_code == 422
    assert client.post("/api/streams/resume", content=b"nonsense").status_code == 422
    too_much = client.post("/api/streams/resume", content=b"x" * 20_000)
    assert too_much.status_code == 422 and "10000" in too_much.text
    name = create(client, seed=2)
    wait_for(lambda: client.get(f"/api/streams/{name}").json()["chunks"] >= 1)
    saved = client.get(f"/api/streams/{name}/saved")
    resumed = client.post("/api/streams/resume", content=saved.content).json()
    assert resumed["seed"] == 2
    wait_for(lambda: client.get(f"/api/streams/{resumed['stream']}").json()["chunks"] >= 1)
    assert "went on from a saved one" in client.get(f"/api/streams/{resumed['stream']}/script.yaml").text
    assert "went on" not in client.get(f"/api/streams/{name}/script.yaml").text


def test_a_full_house_says_when_to_come_again():
    limits = Limits(sessions=1, queue=1)
    with (
        serving(FakeEngine(20.0, limits), limits, page=False) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        names = [create(client), create(client)]
        assert client.get(f"/api/streams/{names[1]}").json()["place"] == 1
        answer = client.post("/api/streams", json={"prompt": "red"})
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
        assert client.post(f"/api/streams/{names[1]}/prompt", json={"text": "a"}).status_code == 409


def test_health_and_metrics(client):
    create(client)
    assert client.get("/healthz").json()["status"] == "ok"
    wait_for(lambda: "streamvid_frames_total" in client.get("/metrics").text)
    text = client.get("/metrics").text
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"
    }
    assert values["streamvid_frames_total"] >= FRAMES
    assert values['streamvid_chunk_seconds_count{stage="denoise"}'] >= 1
    assert values['streamvid_streams{status="running"}'] >= 1
    assert values["streamvid_streams_in_memory"] == client.get("/healthz").json()["in_memory"] >= 1
    assert values["process_resident_memory_bytes"] > 50e6


def test_a_password_is_asked_for_everywhere_but_at_healthz():
    limits = Limits()
    with serving(FakeEngine(20.0, limits), limits, page=False, auth="ada:secret") as server:
        bare = httpx.Client(base_url=server.url)
        for path in ("/api/info", "/metrics", "/openapi.json", "/studio/studio.js"):
            assert bare.get(path).status_code == 401
        assert bare.get("/healthz").status_code == 200 and not bare.cookies
        wrong = base64.b64encode(b"ada:wrong").decode()
        assert bare.get("/api/info", headers={"Authorization": f"Basic {wrong}"}).status_code == 401
        known = bare.get("/api/info", auth=("ada", "secret"))
        assert known.status_code == 200
        ticket = known.cookies["streamvid"]
        attributes = known.headers["set-cookie"]
        assert "HttpOnly" in attributes and "SameSite=Strict" in attributes and "secret" not in attributes
        for cookie, status in ((ticket, 200), (ticket[:-1], 401), ("", 401)):
            with httpx.Client(base_url=server.url, cookies={"streamvid": cookie}) as other:
                assert other.get("/api/info").status_code == status
                assert "set-cookie" not in other.get("/api/info").headers
        tunnelled = httpx.get(
            f"{server.url}/api/info", auth=("ada", "secret"), headers={"X-Forwarded-Proto": "https"}
        )
        assert "Secure" in tunnelled.headers["set-cookie"] and "Secure" not in attributes


def test_pages_of_other_sites_cannot_steer(client):
    name = create(client)
    url = f"/api/streams/{name}/prompt"
    answer = client.post(url, json={"text": "green"}, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    own = client.post(url, json={"text": "green"}, headers={"Origin": str(client.base_url).rstrip("/")})
    assert own.status_code == 200


def test_twenty_clients_at_once_are_all_served_none_mixed(tmp_path):
    """Over HTTP, two seats: every client gets the video of its own seed."""
    limits = Limits(sessions=2, queue=32)
    with serving(FakeEngine(40.0, limits), limits, page=False) as server:
        results = {}

        def visit(seed):
            with httpx.Client(base_url=server.url, timeout=None) as client:
                name = create(client, seed=seed % 16, script="red [1.5s]", prompt=None, ahead=5)
                with client.stream("GET", f"/api/streams/{name}/video.mp4?start=beginning") as video:
                    results[seed] = b"".join(video.iter_bytes())
                client.delete(f"/api/streams/{name}")

        threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30 * slowness())
        assert len(results) == 20
        for seed, data in results.items():
            path = tmp_path / f"{seed}.mp4"
            path.write_bytes(data)
            frames = list(read_video(path))
            codes = [int("".join(str(int(f[16, 8 * i + 4, 1] > 128)) for i in range(16)), 2) for f in frames]
            assert codes == [((seed % 16) << 12) + n for n in range(2 * FRAMES)]
        wait_for(lambda: not server.engine.alive, what="freeing memory")


def test_fuzzed_requests_give_no_server_error(server):
    """Schemathesis against the OpenAPI document: whatever is sent, never a 500."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(
        path_regex="(video.mp4|events)$"  # they do not end
    )
    statuses: dict[str, set[int]] = {}
    for operation in schema.get_all_operations():
        run_operation(operation.ok(), server, statuses.setdefault(operation.ok().label, set()))
    assert {200, 404, 422} <= set.union(*statuses.values())
    steering = {label: seen for label, seen in statuses.items() if "{name}" in label}
    unmet = [label for label, seen in steering.items() if not seen & {200, 201, 204}]
    assert len(steering) >= 15 and not unmet  # each of them met a stream that lives
    for name in list(server.studio._streams):
        server.studio.remove(name)


def living(studio):
    """The name of a stream that runs and has shown something."""
    alive = [stream for stream, _ in studio._streams.values() if stream.status == "running"]
    stream = alive[-1] if alive else studio.create(StreamRequest(prompt="red", linger=3000))
    wait_for(lambda: stream.chunks >= 1)
    return stream.name


def run_operation(operation, server, statuses):
    """A dozen generated requests of one operation, two of three to a stream that lives."""
    from hypothesis import HealthCheck, Phase, given, settings

    numbers = itertools.count()

    @given(case=operation.as_strategy())
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        number = next(numbers)
        if "name" in (case.path_parameters or {}) and number % 3:
            case.path_parameters["name"] = living(server.studio)
            if "shot" in case.path_parameters and number % 2:
                case.path_parameters["shot"] = 0
        response = case.call(base_url=server.url, timeout=30)
        statuses.add(response.status_code)
        allowed = response.status_code < 500 or response.status_code == 503
        assert allowed, f"{case.as_curl_command()}\n{response.status_code} {response.text}"

    check()


@pytest.mark.parametrize(
    "message",
    ["", "nonsense", "3", "[]", '{"position": NaN}', '{"position": 1e999}', '{"rate": 1}', b"\x00\xff"],
)
def test_a_socket_passes_by_what_is_no_position(client, server, message):
    name = create(client)
    stream = wait_for(lambda: (s := server.studio.get(name)).chunks >= 1 and s)
    with connect(f"ws{server.url[4:]}/api/streams/{name}/socket?player=none") as socket:
        socket.send(message)
        socket.send('{"position": 0.5, "rate": 0.25}')
        wait_for(lambda: stream.clock._rate == 0.25)
        assert client.get(f"/api/streams/{name}").json()["position"] < 1
        while json.loads(socket.recv(10))["event"] != "chunk":
            pass


def test_the_client_of_the_guide_works_as_it_stands(tmp_path, monkeypatch, capsys):
    """docs/http.md: its ten lines, with this server's address."""
    code = re.search(r"```python\n(.*?)```", (DOCS / "http.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) == 10
    limits = Limits()
    monkeypatch.chdir(tmp_path)
    with serving(FakeEngine(20.0, limits), limits, page=False) as server:
        exec(compile(code.replace("http://localhost:7860", server.url), "docs/http.md", "exec"), {})
    assert json.loads(capsys.readouterr().out.replace("'", '"').replace("None", "null"))["status"] in (
        "pending",
        "applied",
    )
    assert len(list(read_video(tmp_path / "live.mp4"))) >= 4 * FRAMES


def test_the_curl_commands_of_the_guide_work(tmp_path):
    """docs/http.md: every line, in order, in a shell."""
    block = re.search(r"```sh\n(.*?)```", (DOCS / "http.md").read_text(), re.DOTALL).group(1)
    limits = Limits(sessions=4)
    with serving(FakeEngine(20.0, limits), limits, page=False) as server:
        first, *rest = (
            block.replace("localhost:7860", server.url).replace("curl -s", "curl -sSf").strip().splitlines()
        )
        made = json.loads(
            subprocess.run(first, shell=True, check=True, capture_output=True, cwd=tmp_path).stdout
        )
        wait_for(lambda: server.studio.get(made["stream"]).chunks >= 2)
        for line in rest:
            answer = subprocess.run(
                line,
                shell=True,
                capture_output=True,
                cwd=tmp_path,
                env={**os.environ, "STREAM": made["stream"]},
            )
            assert answer.returncode == 0, (line, answer.stderr)
    assert len(list(read_video(tmp_path / "film.mp4"))) >= FRAMES


def test_openapi_names_every_route(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path in (
        "prompt",
        "cut",
        "pause",
        "resume",
        "reset",
        "fork",
        "saved",
        "video.mp4",
        "events",
        "export.mp4",
    ):
        assert f"/api/streams/{{name}}/{path}" in paths
    assert json.dumps(paths).count('"404"') >= 15
    guide = (DOCS / "http.md").read_text()
    for path in paths:  # as the guide writes it
        short = path.replace("/api/streams/{name}/", "…/").replace("{name}", "{stream}")
        assert f" {short}`" in guide or f"`{short}`" in guide, path


def test_gradios_own_uploads_files_and_proxies_are_closed(fake_server, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    with httpx.Client(base_url=fake_server.url) as client:
        upload = client.post("/gradio_api/upload", files={"files": ("a.txt", b"a")})
        assert upload.status_code == 404
        for path in (
            f"/gradio_api/file={tmp_path}/secret",
            "/gradio_api/file=pyproject.toml",
            "/gradio_api/info",
        ):
            answer = client.get(path)
            assert answer.status_code == 404 and "the secret" not in answer.text


def test_the_page_may_load_nothing_from_elsewhere(fake_server):
    with urllib.request.urlopen(fake_server.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "https:" not in policy.split("frame-ancestors")[0]
