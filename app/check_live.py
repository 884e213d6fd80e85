"""Measures the studio in real Chromium against its bounds: `python -m streamvid.app.check_live --json live.json`.

Starts `streamvid app`, plays as a person would, and prints PASS or FAIL for every bound; exit code 1 if one fails. The
bounds are those of an idle machine: anything else that computes at the same time is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from streamvid.app.chromium import app_server, apply_prompt, chromium, open_page

from streamvid import __version__

DAY, NIGHT = "A large red ball floats on a meadow by day", "A large red ball floats on a meadow at night"
VISITORS = 20
RECORD = """
() => {  // 8 x 8 pixels of every frame that reaches the screen, with its media time and when it was shown
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 8;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const view = studio.active, told = view.player.onframe;
  window.record = [];
  view.player.onframe = (time) => {
    told(time);
    context.drawImage(view.player.element, 0, 0, 8, 8);
    window.record.push([time, performance.now(), ...context.getImageData(0, 0, 8, 8).data]);
  };
}
"""
DURATION = """
async (url) => {  // as a player sees it
  const video = document.createElement("video");
  video.muted = true;
  video.src = url;
  await new Promise((resolve, reject) => {
    video.onloadedmetadata = resolve;
    video.onerror = () => reject("does not play");
  });
  await video.play();
  await new Promise((resolve) => video.requestVideoFrameCallback(resolve));
  return video.duration;
}
"""


@dataclass(frozen=True)
class Bound:
    """A measured value that must lie between two others."""

    name: str
    words: str
    value: float
    least: float
    most: float
    unit: str

    @property
    def passed(self) -> bool:
        return bool(self.least <= self.value <= self.most)

    def __str__(self) -> str:
        bounds = f"at most {self.most:g}" if self.least <= 0 else f"{self.least:g} to {self.most:g}"
        return f"{'PASS' if self.passed else 'FAIL'}  {self.words}: {self.value:.3g} {self.unit} ({bounds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="diorama")
    parser.add_argument(
        "--seconds", type=float, default=20, help="length of the watch for stalls (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 2)
    with app_server("--model", options.model) as url, chromium() as browser:
        bounds, notes = check(browser, url, options.seconds)
        bounds.append(check_memory(url))
    print(*bounds, *(f"      {name}: {value}" for name, value in notes.items()), sep="\n")
    if options.json:
        command = f"python -m streamvid.app.check_live --model {options.model} --seconds {options.seconds:g}"
        result = {"command": command, "load_average_before": load, **as_dict(bounds, notes)}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(not all(bound.passed for bound in bounds))


def as_dict(bounds: list[Bound], notes: dict[str, Any]) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "version": __version__,
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "passed": all(bound.passed for bound in bounds),
        "bounds": [{**asdict(bound), "passed": bound.passed} for bound in bounds],
        **notes,
    }


def check(
    browser: Any, url: str, seconds: float, prompts: tuple[str, str] = (DAY, NIGHT)
) -> tuple[list[Bound], dict[str, Any]]:
    """One person's visit.

    Args:
        browser: of `chromium()`.
        url: of the server.
        seconds: how long stalls are looked for.
        prompts: two that look different.

    Returns:
        Bounds, and numbers without one.
    """
    page = open_page(browser, url)
    bounds = [first_frame(page, prompts[0]), *watch(page, seconds), *switch(page, prompts[1])]
    notes = page.evaluate(
        "Object.fromEntries(['fps', 'speed', 'p50', 'p95', 'kv'].map((id) => "
        "[`hud_${id}`, document.getElementById(`hud-${id}`).textContent]))"
    )
    notes["prompt_to_pixel_s"] = round(page.evaluate("studio.active.latency"), 3)
    bounds += hold(page)
    bounds.append(export(page))
    bounds.append(leave(page, url))
    return bounds, notes


def first_frame(page: Any, prompt: str) -> Bound:
    """From the click to the first frame on the screen."""
    page.evaluate("prompt => studio.setPrompt(prompt)", prompt)
    clicked = page.evaluate("performance.now()")
    page.click("#sv-start")
    page.wait_for_function("studio.active?.frames.length > 0")
    value = (page.evaluate("studio.active.frames[0]") - clicked) / 1000
    return Bound("first_frame_s", "first frame after the click on Start", value, 0, 3.0, "s")


def watch(page: Any, seconds: float) -> Iterator[Bound]:
    """Frames that come evenly, at real time."""
    page.wait_for_function("studio.active.position > 1.5")
    page.evaluate(RECORD)
    page.wait_for_timeout(1000 * seconds)
    times, shown = np.array(page.evaluate("window.record.map((row) => row.slice(0, 2))")).T
    gaps = np.diff(shown)
    words = f"longest time without a new frame in {seconds:g} s"
    yield Bound("longest_gap_ms", words, float(gaps.max()), 0, 500, "ms")
    pace = 1000 * (times[-1] - times[0]) / (shown[-1] - shown[0])
    yield Bound("pace", "media time that passes per second", float(pace), 0.95, 1.05, "x")
    fps = page.evaluate("studio.active.state.fps")
    rate = 1000 * len(gaps) / (shown[-1] - shown[0]) / fps
    yield Bound("frames_shown", "share of the frames that reached the screen", float(rate), 0.95, 1.05, "")


def switch(page: Any, prompt: str) -> Iterator[Bound]:
    """A prompt shows where its receipt says: pictures are compared with those before and those well after it."""
    receipt = apply_prompt(page, prompt, 3)
    rows = np.array(page.evaluate("window.record"))
    times, pictures, at = rows[:, 0], rows[:, 2:], receipt["media_time"]
    before = pictures[(times >= at - 1.5) & (times < at - 1e-3)].mean(0)
    after = pictures[times >= at + 2].mean(0)
    new = np.linalg.norm(pictures - after, axis=1) < np.linalg.norm(pictures - before, axis=1)
    block = page.evaluate("studio.active.chunks.at(-1).seconds")
    late = (times[new & (times >= at - 1.5)].min() - at) / block
    yield Bound(
        "switch_blocks", "blocks from the receipt until the new prompt is seen", late, -0.01, 2, "blocks"
    )


def hold(page: Any) -> Iterator[Bound]:
    """Space: neither picture nor generation moves."""
    page.keyboard.press("Space")
    page.wait_for_function("studio.active.status === 'paused'")
    page.wait_for_timeout(1000)  # a chunk in the making is finished
    state = "[studio.active.position, studio.active.made]"
    before = page.evaluate(state)
    page.wait_for_timeout(2000)
    moved = sum(page.evaluate(state)) - sum(before)
    yield Bound("pause_moved_s", "media time made or shown in 2 s of pause", moved, 0, 0, "s")


def export(page: Any) -> Bound:
    """The MP4 of a paused stream lasts as long as what was made."""
    page.wait_for_selector("[data-action=film]:enabled")
    seconds = page.evaluate(DURATION, page.evaluate("`/api/streams/${studio.active.name}/export.mp4`"))
    made = page.evaluate("studio.active.made - studio.active.state.start")
    return Bound(
        "export_error_s",
        "length of the exported MP4 against what was made",
        abs(seconds - made),
        0,
        0.05,
        "s",
    )


def leave(page: Any, url: str) -> Bound:
    """Closing the tab frees the stream's caches."""
    assert health(url)["in_memory"] == 1
    began = time.monotonic()
    page.close()
    while health(url)["in_memory"] and time.monotonic() - began < 30:
        time.sleep(0.02)
    passed = time.monotonic() - began
    return Bound("freed_s", "memory freed after closing the tab", passed, 0, 1.0, "s")


def check_memory(url: str, visitors: int = VISITORS) -> Bound:
    """Many people at once, most of them in the queue; then resident memory is back where it was after as many."""
    for _ in range(2):  # the process keeps what it needs for several at once
        visit_at_once(url, visitors)
    before = resident(url)
    visit_at_once(url, visitors)
    words = f"resident memory after {visitors} more queued sessions"
    growth = max(0.0, resident(url) - before)
    return Bound("resident_growth_mb", words, growth, 0, 0.05 * before, "MB more")


def visit_at_once(url: str, visitors: int) -> None:
    """So many clients that each see a video to its end."""
    import httpx

    lengths: list[int] = []

    def visit(seed: int) -> None:
        body = {"script": f"{DAY} [1.5s]", "seed": seed, "ahead": 10}
        name = client.post("/api/streams", json=body).raise_for_status().json()["stream"]
        video = client.get(f"/api/streams/{name}/video.mp4?start=beginning").content
        client.delete(f"/api/streams/{name}").raise_for_status()
        lengths.append(len(video))

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(visitors)]
    own = httpx.Limits(max_keepalive_connections=0)  # one that waits may be closed just as it is used again
    with httpx.Client(base_url=url, timeout=None, limits=own) as client:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(lengths) < visitors or min(lengths) < 1000:
        raise RuntimeError(f"only {len(lengths)} of {visitors} visitors were served")
    while health(url)["in_memory"]:
        time.sleep(0.05)


def health(url: str) -> dict[str, Any]:
    with urlopen(f"{url}/healthz") as answer:
        return json.load(answer)


def resident(url: str) -> float:
    """Megabytes that the server's process has in memory."""
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    value = next(line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes "))
    return float(value) / 1e6


if __name__ == "__main__":
    main()
