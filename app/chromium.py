"""Real headless Chromium in front of a real server, for pictures, checks and tests of the studio (`make browser`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streamvid.errors import UserError

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]
WAIT = 120_000  # milliseconds, for what a loaded machine does late


def find_chromium() -> str:
    """The distribution's Chromium, or Chrome."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise UserError("Chromium is missing: `make browser` installs it")
    return path


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS, headless=True)
        yield browser
        browser.close()


@contextmanager
def app_server(*options: str) -> Iterator[str]:
    """The address of `streamvid app` with these options, in a process of its own."""
    command = [sys.executable, "-m", "streamvid.cli", "app", "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if "http" not in line:
            raise UserError("`streamvid app` did not start: its message is above")
        yield "http" + line.split("http", 1)[1].split()[0]
    finally:
        server.terminate()
        server.wait()


def open_page(browser: Any, url: str, query: str = "", width: int = 1440, height: int = 900) -> Any:
    """A tab of its own on the studio, once it can be used."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(WAIT)
    page.goto(f"{url}/{query}")
    page.wait_for_selector("body[data-ready=yes]")
    return page


def apply_prompt(page: Any, prompt: str, seconds: float) -> dict[str, Any]:
    """Type a prompt, press Enter, and wait until it has been on the screen for so long; its receipt."""
    before = page.evaluate("studio.active.receipts.size")
    page.fill("#sv-prompt textarea", prompt)
    page.press("#sv-prompt textarea", "Enter")
    page.wait_for_function(
        "([before, seconds]) => { const all = [...studio.active.receipts.values()], last = all.at(-1);"
        " return all.length > before && last.seen !== undefined && studio.active.position > last.media_time + seconds }",
        arg=[before, seconds],
    )
    page.evaluate("document.activeElement.blur()")
    return page.evaluate("[...studio.active.receipts.values()].at(-1)")
