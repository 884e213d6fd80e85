"""Pictures of the studio for the documents: `python -m streamvid.app.screenshots docs/pictures`.

Starts a server with the embedded model, plays in headless Chromium (`make browser`), and photographs what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from streamvid.app.chromium import app_server, apply_prompt, chromium, open_page

DAY = "A large orange ball bounces on the sand by day"
SHOTS = (
    "A large orange ball bounces on the sand at sunset",
    "A large blue ball bounces on the sand at night",
)
SNOW = "A large blue ball bounces on the ice at night while it is snowing"
HEART = "A large pink heart floats on the ice at dawn"
BOTH_PLAY = "studio.views.length === 2 && studio.views.every((view) => view.player.began)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="diorama")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with app_server("--model", options.model) as url, chromium() as browser:
        photograph(browser, url, options.folder)


def photograph(browser: Any, url: str, folder: Path, seconds: float = 4) -> None:
    """Desktop in both themes, fork, comparison, phone; every scene is on the screen for so many seconds before."""
    page = open_page(browser, url, "?theme=dark")
    start(page, DAY, seconds)
    for prompt in SHOTS:
        apply_prompt(page, prompt, seconds)
    page.screenshot(path=folder / "studio_dark.png")
    page.click('[data-action="theme"]')
    page.screenshot(path=folder / "studio_light.png")
    page.click('[data-action="theme"]')
    page.click('[data-action="fork"]')
    page.wait_for_function(BOTH_PLAY)
    apply_prompt(page, SNOW, seconds)
    page.wait_for_selector(".sv-toast", state="detached")
    page.screenshot(path=folder / "studio_fork.png")
    page.evaluate("prompt => studio.setPrompt(prompt)", DAY)
    page.click("[data-action=stop]")
    page.wait_for_function("studio.views.every((view) => view.ended)")
    page.click('[data-action="compare"]')
    page.wait_for_function(f"{BOTH_PLAY} && studio.active.position > {seconds / 2}")
    apply_prompt(page, SHOTS[0], seconds)
    page.screenshot(path=folder / "studio_compare.png")
    page.context.close()
    page = open_page(browser, url, "?theme=dark", 390, 844)
    start(page, HEART, seconds)
    page.screenshot(path=folder / "studio_phone.png")
    page.context.close()


def start(page: Any, prompt: str, seconds: float) -> None:
    """Begin with a prompt and let it play."""
    page.evaluate("prompt => studio.setPrompt(prompt)", prompt)
    page.click("#sv-start")
    page.wait_for_function("studio.active?.player.began && studio.active.position > " + str(seconds))
    page.evaluate("document.activeElement.blur()")


if __name__ == "__main__":
    main()
