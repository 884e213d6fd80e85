"""A password, in real Chromium: pages, requests, the WebSocket and the farewell of a closing tab all get through."""

import pytest
from barcode import BITS_READER, FakeEngine
from server import serving, wait_for
from streamvid.app.limits import Limits


@pytest.fixture(scope="module")
def server():
    limits = Limits()
    with serving(FakeEngine(4.0, limits), limits, auth="ada:secret") as server:
        yield server


def play(page, server):
    """Start from the page, see it move, switch, leave."""
    page.goto(server.url)
    page.wait_for_selector("body[data-ready=yes]")
    page.evaluate("studio.start({ prompt: 'red', seed: 4 })")
    page.wait_for_function(f"studio.active?.player.began && ({BITS_READER})().frame > 6")
    stream = server.studio.get(page.evaluate("studio.active.name"))
    page.evaluate("studio.apply('green')")
    page.wait_for_function(f"({BITS_READER})().colour === 'green'")
    page.close()
    wait_for(lambda: stream.status == "ended", 20, "the farewell")


def test_the_page_plays_with_a_password(chromium, server):
    context = chromium.new_context(http_credentials={"username": "ada", "password": "secret"})
    page = context.new_page()
    play(page, server)
    cookies = context.cookies()
    context.close()
    assert [(c["httpOnly"], c["sameSite"]) for c in cookies if c["name"] == "streamvid"] == [(True, "Strict")]
    # a browser that sends no password with a WebSocket is known by its cookie
    context = chromium.new_context()
    context.add_cookies(cookies)
    play(context.new_page(), server)
    context.close()


def test_without_it_nothing_is_shown(chromium, server):
    for credentials in (None, {"username": "ada", "password": "wrong"}):
        context = chromium.new_context(**({"http_credentials": credentials} if credentials else {}))
        page = context.new_page()
        try:
            answer = page.goto(server.url)
            assert answer.status == 401
        except Exception as error:  # Chromium gives up after too many wrong passwords
            assert "ERR_" in str(error)
        assert page.locator("#sv-stage").count() == 0
        context.close()
