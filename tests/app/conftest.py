"""Browsers and servers that the tests of the studio share."""

import pytest
from barcode import FakeEngine
from server import serving
from streamvid.app import chromium as real
from streamvid.app.limits import Limits


@pytest.fixture(scope="session")
def chromium():
    """One headless Chromium for all tests; each opens contexts of its own."""
    with real.chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def fake_server():
    """The page over the bar-coded engine, four times as fast as real time."""
    limits = Limits(sessions=4, queue=4, prompt_characters=200)
    with serving(FakeEngine(4.0, limits), limits) as server:
        yield server


@pytest.fixture
def open_page(chromium):
    """Open a tab on a server and wait until the page is ready."""
    contexts = []

    def open_page(server, query="", **options):
        context = chromium.new_context(
            viewport={"width": 1280, "height": 800}, accept_downloads=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(server.url + "/" + query)
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
