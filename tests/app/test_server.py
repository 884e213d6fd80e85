"""What `streamvid app` does before it serves: addresses, the share tunnel, and what is left when that fails."""

import shutil
import socket
import sys
import tempfile

import pytest
from barcode import FakeEngine
from streamvid.app.limits import Limits
from streamvid.app.server import check_auth, open_tunnel, serve

from streamvid.errors import UserError

FRPC = """#!{python}
import pathlib, sys, time
pathlib.Path({log!r}).write_text(" ".join(sys.argv[1:]))
print({answer!r}, flush=True)
time.sleep(60)
"""


@pytest.fixture
def frpc(tmp_path, monkeypatch):
    """Gradio's own tunnel code, with another program in place of its client `frpc` and no server to be asked."""
    from gradio import networking, tunneling

    log, program = tmp_path / "frpc.log", tmp_path / "frpc"

    def answering(answer):
        program.write_text(FRPC.format(python=sys.executable, log=str(log), answer=answer))
        program.chmod(0o755)
        return log

    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", "192.0.2.1:7000")
    monkeypatch.setattr(tunneling, "BINARY_PATH", str(program))
    yield answering
    for tunnel in tunneling.CURRENT_TUNNELS:
        tunnel.kill()


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("192.0.2.7", "192.0.2.7")]
)
def test_share_asks_gradios_tunnel_for_this_servers_port(frpc, host, local):
    log = frpc("start proxy success: https://abc.gradio.live")
    assert open_tunnel(host, 7861) == "https://abc.gradio.live"
    words = log.read_text().split()
    assert words[words.index("-i") + 1] == local and words[words.index("-l") + 1] == "7861"
    assert words[words.index("--server_addr") + 1] == "192.0.2.1:7000"
    assert len(words[words.index("-n") + 1]) >= 32  # the tunnel's own secret


def test_a_refused_tunnel_is_one_sentence(frpc):
    frpc("login to server failed: no room\nand more")
    with pytest.raises(UserError) as refused:
        open_tunnel("127.0.0.1", 7861)
    assert "\n" not in str(refused.value) and "leave --share out" in str(refused.value)


def test_without_a_network_share_is_one_sentence_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    from gradio import networking

    with socket.socket() as nobody:  # an address at which nobody answers
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
        monkeypatch.setattr(networking, "GRADIO_API_SERVER", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(UserError) as refused:
            serve(FakeEngine(), Limits(), "127.0.0.1", 0, share=True)
    sentence = str(refused.value)
    assert sentence.startswith("share:") and "check the network, or leave --share out" in sentence
    assert "\n" not in sentence and len(sentence) < 250
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} .* --port"):
            serve(FakeEngine(), Limits(), "127.0.0.1", port)


@pytest.mark.parametrize("auth", ["ada", "ada:", ":secret", ""])
def test_half_a_password_is_refused(auth):
    with pytest.raises(UserError, match="user:password"):
        check_auth(auth)


@pytest.mark.parametrize(
    ("host", "auth", "warned"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "a:b", False)],
)
def test_an_open_address_without_a_password_is_said(monkeypatch, capsys, host, auth, warned):
    import uvicorn
    from streamvid.app import server

    studios, made = [], server.Studio
    monkeypatch.setattr(server, "Studio", lambda *options: studios.append(made(*options)) or studios[-1])
    listened = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: listened.extend(s.getsockname()[0] for s in sockets)
    )
    serve(FakeEngine(), Limits(), host, 0, auth)
    assert listened == [host]
    assert ("no password" in capsys.readouterr().out) == warned
    for studio in studios:
        studio.close()
        shutil.rmtree(studio.workspace, ignore_errors=True)
