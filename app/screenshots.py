"""Pictures of the studio for the documents: `python -m streamvid.app.screenshots docs/pictures`.

Starts a server with the embedded model, plays in headless Chromium (`make browser`), and photographs what is there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SEASIDE = "A large orange ball bounces on the sand by day"
SHOTS = (
    "A large orange ball bounces on the sand at sunset",
    "A large blue ball bounces on the sand at night",
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
SECONDS = 120_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="diorama")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "streamvid.cli", "app", "--port", "0", "--model", options.model]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        photograph(server.stdout.readline().split()[-1], options.folder)
    finally:
        server.terminate()
        server.wait()


def photograph(url: str, folder: Path) -> None:
    """Desktop in both themes, fork, phone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = opened(browser, url, "dark", 1440, 900)
        start(page, SEASIDE)
        for prompt in SHOTS:
            apply(page, prompt)
        page.screenshot(path=folder / "studio_dark.png")
        page.click('[data-action="theme"]')
        page.screenshot(path=folder / "studio_light.png")
        page.click('[data-action="theme"]')
        page.click('[data-action="fork"]')
        page.wait_for_function("studio.views.length === 2 && studio.views[1].player.began", timeout=SECONDS)
        apply(page, "A large blue ball bounces on the ice at night while it is snowing")
        page.screenshot(path=folder / "studio_fork.png")
        page.context.close()
        page = opened(browser, url, "dark", 390, 844)
        start(page, "A large pink heart floats on the ice at dawn")
        page.wait_for_timeout(4000)
        page.screenshot(path=folder / "studio_phone.png")
        browser.close()


def opened(browser: Any, url: str, theme: str, width: int, height: int) -> Any:
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.goto(f"{url}/?theme={theme}")
    page.wait_for_selector("body[data-ready=yes]", timeout=SECONDS)
    return page


def start(page: Any, prompt: str) -> None:
    """Begin with a prompt and let it play for a few seconds."""
    page.evaluate("prompt => studio.setPrompt(prompt)", prompt)
    page.click("#sv-start")
    page.wait_for_function("studio.active?.player.began && studio.active.position > 4", timeout=SECONDS)


def apply(page: Any, prompt: str) -> None:
    """Type a prompt and wait until it has been on the screen for a while."""
    before = page.evaluate("studio.active.receipts.size")
    page.fill("#sv-prompt textarea", prompt)
    page.press("#sv-prompt textarea", "Enter")
    page.wait_for_function(
        "(before) => { const all = [...studio.active.receipts.values()], last = all.at(-1);"
        " return all.length > before && last.seen !== undefined && studio.active.position > last.media_time + 4 }",
        arg=before,
        timeout=SECONDS,
    )
    page.evaluate("document.activeElement.blur()")


if __name__ == "__main__":
    main()
