"""What the numbers beside the picture say: chunks of known cost are told to the page, and its words are read back."""

import pytest
from barcode import FPS
from server import slowness

CHUNK = """
(chunk) => studio.active.event({
  event: "chunk", chunk: 0, media_time: studio.active.made, seconds: 0.75, frames: 12, prompt: "red", events: [],
  attended: [0, 1, 2], kv_bytes: 0, speed: 2, ahead: 1, shot: 0, ...chunk,
})
"""


@pytest.fixture
def page(fake_server, open_page):
    """A stream that stands still, so that nothing but what a test tells is drawn."""
    page = open_page(fake_server)
    page.evaluate("studio.start({ prompt: 'red', seed: 1, ahead: 0.5 })")
    page.wait_for_function("studio.active?.player.began && studio.active.frames.length > 40")
    page.fps = float(page.text_content("#hud-fps"))
    page.evaluate("studio.toggle()")
    page.wait_for_function("studio.active.status === 'paused'")
    page.wait_for_timeout(800)  # a chunk in the making
    page.evaluate("studio.active.chunks = []")
    return page


def tell(page, **chunk):
    page.evaluate(CHUNK, chunk)


def words(page, name):
    return " ".join(page.inner_text(f"#hud-{name}").split())


def test_percentiles_speed_and_bytes(page):
    assert 0.7 * FPS / slowness() < page.fps < 1.3 * FPS
    for number in range(20):  # 10, 20, ... 200 ms, of which 4 ms are spent on encoding
        timings = {"denoise": 0.006 + 0.01 * number, "total": 0.006 + 0.01 * number, "encode": 0.004}
        tell(page, timings=timings, kv_bytes=3 * 2**20 // 2, speed=2.345)
    page.wait_for_function("document.querySelector('#hud-p50').textContent === '100 ms'")
    assert words(page, "p95") == "190 ms"
    assert words(page, "kv") == "1.5 MB" and words(page, "speed") in ("2.35", "2.34")
    assert words(page, "fps") == "–"  # nothing moves in a pause
    value, unit = words(page, "buffer").split()
    buffered = float(value) * {"s": 1, "ms": 0.001}[unit]
    assert buffered == pytest.approx(page.evaluate("studio.active.player.ahead"), abs=0.011)


def test_the_bars_are_the_stages_of_a_chunk(page):
    stages = {"denoise": 0.2, "context": 0.1, "switch": 0.05, "decode": 0.3, "encode": 0.04, "wait": 0.06}
    tell(page, timings={**stages, "total": 0.65})
    legend = page.locator("#hud-legend span").all_inner_texts()
    assert [" ".join(text.split()) for text in legend] == [
        "transformer 200 ms",
        "context pass 100 ms",
        "prompt switch 50 ms",
        "decode 300 ms",
        "encode 40 ms",
        "waiting for a turn 60 ms",
    ]
    assert words(page, "total") == "750 ms for 750 ms of video"
    whole = page.locator("#hud-stages").bounding_box()["width"]
    widths = [bar.bounding_box()["width"] for bar in page.locator("#hud-stages i").all()]
    assert sum(widths) == pytest.approx(whole, abs=8)  # the chunk took as long as it plays
    shares = [width / sum(widths) for width in widths]
    assert shares == pytest.approx([seconds / 0.75 for seconds in stages.values()], abs=0.02)


def test_a_context_pass_that_rides_along_is_said_to_be_in_the_transformers_time(page):
    tell(page, timings={"denoise": 0.199, "context": 0.001, "decode": 0.1, "total": 0.3})
    legend = [" ".join(text.split()) for text in page.locator("#hud-legend span").all_inner_texts()]
    assert legend == ["transformer, context pass 200 ms", "decode 100 ms"]


def test_the_window_shows_sink_past_own_frames_and_what_was_forgotten(page):
    tell(page, attended=[0, 1, 2, 9, 10, 11, 12, 13, 14], timings={"total": 0.1})
    kinds = page.evaluate(
        "[...document.querySelectorAll('#hud-window > *')].map((e) => e.className || e.textContent)"
    )
    assert kinds == ["sink"] * 3 + ["6"] + ["past"] * 3 + ["own"] * 3
    assert words(page, "window-note") == "3 sink · 3 past · 3 new"


def test_a_chunk_that_took_longer_than_it_plays_stands_out(page):
    """The chart: quiet bars, one in the colour of a switch, one in that of lateness."""
    for events, seconds in (([], 0.3), (["switch:recache"], 0.3), ([], 0.9)):
        tell(page, events=events, timings={"total": seconds, "encode": 0})
    colours = page.evaluate(
        """() => {
          const canvas = document.getElementById("hud-chart"), scale = devicePixelRatio || 1;
          const context = canvas.getContext("2d"), step = canvas.clientWidth / 60;
          const rgb = (context, x, y) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)];
          const at = (index) => rgb(context, scale * (index + 0.4) * step, canvas.height - 4 * scale);
          const probe = document.createElement("canvas").getContext("2d");
          const named = (name) => {
            probe.fillStyle = getComputedStyle(canvas).getPropertyValue(name);
            probe.fillRect(0, 0, 1, 1);
            return rgb(probe, 0, 0);
          };
          return [0, 1, 2].map(at).concat(["--bar", "--accent", "--bad"].map(named));
        }"""
    )
    for shown, meant in zip(colours[:3], colours[3:], strict=True):
        assert max(abs(a - b) for a, b in zip(shown, meant, strict=True)) < 12
