"""The page in real headless Chromium over the bar-coded engine: what is on the screen is read back from its pixels."""

import json
import time

import numpy as np
import pytest
from barcode import BITS_READER, FPS, FRAMES, FakeEngine
from server import serving, slowness, wait_for
from streamvid.app.limits import Limits

from streamvid.io import read_video

pytestmark = pytest.mark.flaky(reruns=2)  # bounds on real time, which other work on the machine can break

CHUNK = FRAMES / FPS


def start(page, prompt="red", seed=1, **options):
    """Start a stream from the page's own code; returns its name."""
    options = json.dumps({"prompt": prompt, "seed": seed, **options})
    page.evaluate(f"studio.start({options})")
    page.wait_for_function("studio.active?.player.began && studio.active.frames.length > 2")
    return page.evaluate("studio.active.name")


def apply(page, text):
    page.fill("#sv-prompt textarea", text)
    page.press("#sv-prompt textarea", "Enter")


def on_screen(page):
    return page.evaluate(BITS_READER)


@pytest.mark.parametrize("player", ["mse", "canvas"])
def test_the_picture_that_is_shown_is_the_one_of_its_time(fake_server, open_page, player):
    """Both players: bar code = media time, in order, at real time, and nothing is asked of another host."""
    page = open_page(fake_server, f"?player={player}")
    start(page, seed=5)
    assert page.locator(f"[data-player={player}]").count() == 1
    began = time.monotonic()
    first = page.evaluate(f"[studio.active.position, ({BITS_READER})()]")
    samples = []
    while time.monotonic() - began < 5:
        position, code = page.evaluate(f"[studio.active.position, ({BITS_READER})()]")
        samples.append((position, code["frame"]))
        assert code["seed"] == 5 and code["colour"] == "red"
        page.wait_for_timeout(150)
    passed = time.monotonic() - began
    positions, frames = np.array(samples).T
    assert (np.diff(frames) >= 0).all() and frames[-1] > first[1]["frame"]
    behind = (
        positions * FPS - frames
    )  # the screen is a frame or two behind the clock, more where nothing is drawn in time
    assert behind.min() > -2 and np.median(behind) <= 4 * slowness()
    moved = positions[-1] - first[0]
    slow = slowness()
    assert moved <= passed * 1.15 + 0.5  # real time
    assert moved >= (passed * 0.85 - 0.5) / slow
    assert page.errors == []
    assert all(url.startswith((fake_server.url, "data:", "blob:")) for url in page.asked), page.asked


def test_a_prompt_typed_is_seen_exactly_where_its_receipt_says(fake_server, open_page):
    page = open_page(fake_server)
    start(page, "red", ahead=0.75)
    page.wait_for_timeout(1500)
    page.evaluate(
        f"""() => {{
          const read = {BITS_READER};
          window.firstGreen = new Promise((resolve) => {{
            const look = () => {{
              const code = read();
              code.colour === "green" ? resolve(code) : requestAnimationFrame(look);
            }};
            look();
          }});
        }}"""
    )
    apply(page, "green")
    code = page.evaluate("window.firstGreen")
    page.wait_for_function("[...studio.active.receipts.values()].some((r) => r.status === 'applied')")
    receipt = page.evaluate("[...studio.active.receipts.values()][0]")
    late = code["frame"] - receipt["chunk"] * FRAMES
    assert 0 <= late <= 4 * slowness()  # frames that a loaded machine did not draw are not seen
    assert receipt["media_time"] == receipt["chunk"] * CHUNK
    page.wait_for_function("studio.active.latency !== null")
    # ahead of play-out 0.75 s and the chunk in the making, a chunk that waits, the player's own 0.2 s
    assert page.evaluate("studio.active.latency") < (0.75 + 2 * CHUNK + 0.5) * slowness()
    assert page.locator("#hud-receipts li[data-status=applied]").count() == 1
    assert page.locator(".sv-mark").count() == 1 and page.locator(".sv-shot").count() == 2
    page.wait_for_function("document.querySelector('.sv-words').textContent === 'green'")


def test_keyboard_path_space_pauses_and_typing_does_not(fake_server, open_page):
    page = open_page(fake_server)
    page.click("#sv-start")
    page.wait_for_function("studio.active?.player.began")
    page.fill("#sv-prompt textarea", "two words")
    page.press("#sv-prompt textarea", "Space")
    assert page.evaluate("studio.active.status") == "running"
    page.locator("#sv-stage").click(position={"x": 20, "y": 200})
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('#sv-status').dataset.state === 'paused'")
    page.wait_for_timeout(300)
    held = on_screen(page)
    stream = fake_server.studio.get(page.evaluate("studio.active.name"))
    chunks = stream.chunks
    page.wait_for_timeout(1200)
    assert on_screen(page) == held and stream.chunks <= chunks + 1
    page.keyboard.press("Space")
    page.wait_for_function(f"({BITS_READER})().frame > {held['frame'] + 4}")


def test_two_tabs_do_not_mix(fake_server, open_page):
    pages = [open_page(fake_server), open_page(fake_server)]
    for seed, (page, prompt) in enumerate(zip(pages, ("red", "blue"), strict=True), start=2):
        start(page, prompt, seed)
    for _ in range(8):
        for seed, (page, prompt) in enumerate(zip(pages, ("red", "blue"), strict=True), start=2):
            code = on_screen(page)
            assert (code["seed"], code["colour"]) == (seed, prompt)
        pages[0].wait_for_timeout(200)
    apply(pages[0], "green")
    pages[0].wait_for_function(f"({BITS_READER})().colour === 'green'")
    assert on_screen(pages[1])["colour"] == "blue"


def test_closing_a_tab_frees_its_stream_within_a_second(fake_server, open_page):
    page = open_page(fake_server)
    name = start(page)
    stream = fake_server.studio.get(name)
    assert len(fake_server.engine.alive) >= 1
    page.close(run_before_unload=False)
    began = time.monotonic()
    wait_for(lambda: stream.status == "ended" and stream._stream is None, 5, "freeing the stream")
    passed = time.monotonic() - began
    assert passed < 1.0 * slowness()
    wait_for(lambda: not stream.folder.exists())


def test_a_tab_that_vanishes_without_a_word_is_noticed_too(fake_server, open_page):
    page = open_page(fake_server)
    name = start(page)
    stream = fake_server.studio.get(name)
    page.evaluate("navigator.sendBeacon = () => true")
    page.goto("about:blank")
    wait_for(lambda: stream.status == "ended", 4, "noticing")


def test_export_plays_and_has_the_length_that_was_made(fake_server, open_page, tmp_path):
    page = open_page(fake_server)
    start(page, seed=7)
    page.wait_for_timeout(2500)
    with page.expect_download() as download:
        page.click("[data-action=film]")
    download.value.save_as(tmp_path / "film.mp4")
    frames = list(read_video(tmp_path / "film.mp4"))
    assert len(frames) % FRAMES == 0 and len(frames) >= 3 * FRAMES
    with page.expect_download() as download:
        page.click("[data-action=script]")
    download.value.save_as(tmp_path / "script.yaml")
    text = (tmp_path / "script.yaml").read_text()
    assert "prompt: red" in text and "seed: 7" in text
    seconds = page.evaluate(
        """async (url) => {
          const video = document.createElement("video");
          video.muted = true;
          video.src = url;
          await new Promise((resolve, reject) => { video.onloadedmetadata = resolve; video.onerror = reject; });
          await video.play();
          await new Promise((resolve) => video.requestVideoFrameCallback(resolve));
          return video.duration;
        }""",
        page.evaluate("`/api/streams/${studio.active.name}/export.mp4`"),
    )
    assert seconds >= len(frames) / FPS - 0.01 and seconds % CHUNK == pytest.approx(0, abs=0.02)


def test_bad_input_shows_a_message_and_leaves_the_stream_alive(fake_server, open_page):
    page = open_page(fake_server)
    start(page)
    page.evaluate("studio.apply('x'.repeat(201))")
    page.wait_for_selector(".sv-toast.sv-bad")
    assert "200" in page.text_content(".sv-toast")
    page.evaluate("studio.apply('green', 'sideways')")
    page.wait_for_function("document.querySelector('.sv-toast')?.textContent.includes('sideways')")
    before = on_screen(page)["frame"]
    page.wait_for_function(f"({BITS_READER})().frame > {before + 4}")


def test_fork_shows_two_continuations_of_one_moment_side_by_side(fake_server, open_page):
    page = open_page(fake_server)
    start(page, seed=9)
    page.wait_for_timeout(1000)
    page.click("[data-action=fork]")
    page.wait_for_function("studio.views.length === 2 && studio.views[1].player.began")
    apply(page, "blue")
    page.wait_for_function("studio.views[1].frames.length > 30 && studio.views[1].prompt === 'blue'")
    assert page.evaluate("studio.views[0].prompt") == "red"
    apart = page.evaluate("Math.abs(studio.views[0].position - studio.views[1].position)")
    assert apart < 0.6
    assert page.evaluate("studio.views[1].state.start") % CHUNK == 0
    # the first picture of the fork is the one after the last of the common past: read from its recording
    child = fake_server.studio.get(page.evaluate("studio.views[1].name"))
    frame = next(read_video(child.recording.path))
    code = int("".join(str(int(frame[16, 8 * i + 4, 1] > 128)) for i in range(16)), 2)
    assert code == (9 << 12) + round(child.start * FPS)


def test_compare_shows_two_methods_with_the_same_seed(fake_server, open_page):
    page = open_page(fake_server)
    page.click("[data-action=compare]")
    page.wait_for_function(
        "studio.views.length === 2 && studio.views.every((view) => view.frames.length > 5)"
    )
    a, b = page.evaluate("studio.views.map((view) => [view.state.seed, view.position])")
    assert a[0] == b[0] and abs(a[1] - b[1]) < 0.6
    apply(page, "green")  # goes to both
    page.wait_for_function("studio.views.every((view) => view.prompt === 'green')")


def test_cut_reset_stop_and_start_again(fake_server, open_page):
    page = open_page(fake_server)
    start(page, seed=3)
    page.click("[data-action=cut]")
    page.wait_for_function("[...studio.active.shots.values()].some((shot) => shot.policy === 'cut')")
    page.click("[data-action=reset]")
    made = page.evaluate("studio.active.made")
    page.wait_for_function(f"({BITS_READER})().frame < 40 && studio.active.position > {made}")
    page.click("[data-action=stop]")
    page.wait_for_function("document.querySelector('#sv-status').dataset.state === 'ended'")
    assert page.text_content("#sv-status") == "stopped"
    held = page.evaluate("studio.active.position")
    with page.expect_download() as download:  # what was made is still there
        page.click("[data-action=film]")
    assert download.value.path().stat().st_size > 1000
    assert page.evaluate("studio.active.position") == held
    page.click("#sv-start")
    page.wait_for_function("studio.active?.status === 'running' && studio.active.player.began")
    assert page.errors == []


def test_save_in_the_page_and_go_on_from_the_file(fake_server, open_page, tmp_path):
    page = open_page(fake_server)
    start(page, seed=6)
    with page.expect_download() as download:
        page.click("[data-action=save]")
    download.value.save_as(tmp_path / "saved.stream")
    _, _, _, frame = json.loads((tmp_path / "saved.stream").read_text())
    page.click("[data-action=stop]")
    page.set_input_files("#sv-open-file", tmp_path / "saved.stream")
    page.wait_for_function("studio.active?.player.began")
    code = on_screen(page)
    assert code["seed"] == 6 and frame <= code["frame"] <= frame + 3 * FRAMES


def test_script_editor_loads_edits_plays_from_a_shot_and_saves(fake_server, open_page, tmp_path):
    page = open_page(fake_server)
    (tmp_path / "mine.yaml").write_text(
        "shots:\n- {prompt: red, duration: 3}\n- {prompt: green, duration: 3, transition: cut}\n"
    )
    page.click("[data-tab=script]")
    page.set_input_files("#sv-script-file", tmp_path / "mine.yaml")
    page.wait_for_function("document.querySelectorAll('#sv-shots li').length === 2")
    page.fill("#sv-shots li:nth-child(2) textarea", "blue")
    with page.expect_download() as download:
        page.click("[data-script=save]")
    download.value.save_as(tmp_path / "out.yaml")
    assert "prompt: blue" in (tmp_path / "out.yaml").read_text()
    page.click("#sv-shots li:nth-child(2) [data-script=from]")
    page.wait_for_function(f"studio.active?.player.began && ({BITS_READER})().colour === 'blue'")
    page.wait_for_function("studio.active.status === 'ended'")
    assert page.evaluate("studio.active.state.reason") == "finished"
    page.wait_for_timeout(2000)  # longer than a stream lives whose tab has gone
    with page.expect_download() as download:
        page.click("[data-action=film]")
    download.value.save_as(tmp_path / "film.mp4")
    assert len(list(read_video(tmp_path / "film.mp4"))) == 3 * FPS
    (tmp_path / "bad.yaml").write_text("shots:\n- {promt: red}\n")
    page.click("[data-tab=script]")
    page.set_input_files("#sv-script-file", tmp_path / "bad.yaml")
    page.wait_for_function("document.querySelector('.sv-toast.sv-bad')?.textContent.includes('promt')")


def test_the_script_editor_keeps_the_settings_of_a_script(fake_server, open_page, tmp_path):
    """What a script says goes before Setup, is saved again, and can be forgotten; shots can be put in another order."""
    page = open_page(fake_server)
    (tmp_path / "mine.yaml").write_text(
        "seed: 6\nmethod: self_forcing\nshots:\n- {prompt: red, duration: 3}\n- {prompt: green, duration: 3}\n"
    )
    page.click("[data-tab=script]")
    page.set_input_files("#sv-script-file", tmp_path / "mine.yaml")
    page.wait_for_function(
        "document.querySelector('#sv-script-settings span').textContent.includes('seed 6')"
    )
    page.click("#sv-shots li:nth-child(2) [data-script=up]")
    with page.expect_download() as download:
        page.click("[data-script=save]")
    download.value.save_as(tmp_path / "out.yaml")
    saved = (tmp_path / "out.yaml").read_text()
    assert "seed: 6" in saved and "method: self_forcing" in saved
    assert saved.index("prompt: green") < saved.index("prompt: red")
    sent = []
    page.on(
        "request",
        lambda request: request.url.endswith("/api/streams") and sent.append(request.post_data_json),
    )
    page.click("[data-script=play]")
    page.wait_for_function("studio.active?.player.began")
    code = on_screen(page)
    assert code["seed"] == 6 and code["colour"] == "green" and "method" not in sent[0]
    page.click("[data-tab=script]")
    page.click("[data-script=forget]")
    assert page.locator("#sv-script-settings").is_hidden()
    page.click("[data-script=play]")
    page.wait_for_function("studio.active?.player.began && studio.active.state.seed === 3")  # Setup's
    assert sent[1]["method"] == "longlive"


def test_the_timeline_keeps_its_elements_while_it_grows(fake_server, open_page):
    """A click or the keyboard's focus is not lost at the next chunk, and a picture is loaded once."""
    page = open_page(fake_server)
    start(page)
    page.wait_for_selector(".sv-shot")
    page.evaluate(
        "window.shot = document.querySelector('.sv-shot'); shot.focus(); window.width = shot.offsetWidth"
    )
    made = page.evaluate("studio.active.made")
    page.wait_for_function(f"studio.active.made > {made} + 2.5")
    page.wait_for_function("shot.firstElementChild.style.backgroundImage.includes('thumbnails/0.jpg')")
    assert page.evaluate("document.activeElement === shot && shot.offsetWidth > width")
    assert sum("thumbnails" in url for url in page.asked) <= 2  # the second is the better picture
    apply(page, "green")
    page.wait_for_function("document.querySelectorAll('.sv-shot').length === 2")
    page.click(".sv-shot >> nth=0")
    assert page.input_value("#sv-prompt textarea") == "red"
    wide = page.evaluate(
        "[...document.querySelectorAll('.sv-ruler span')].map((s) => s.getBoundingClientRect().right)"
    )
    assert max(wide) <= page.evaluate("document.querySelector('#sv-timeline').getBoundingClientRect().right")


def test_compact_files_are_a_choice(fake_server, open_page):
    page = open_page(fake_server)
    start(page)
    page.click("[data-tab=setup]")
    page.click("#sv-set-file label:nth-of-type(2)")
    page.wait_for_function("studio.settings.file === 'Compact'")
    with page.expect_download() as download:
        page.click("[data-action=save]")
    assert download.value.suggested_filename == "compact.stream"


def test_phone_width_theme_and_no_sideways_scrolling(fake_server, open_page):
    page = open_page(fake_server, "?theme=light")
    page.set_viewport_size({"width": 390, "height": 844})
    start(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    box = page.locator(".sv-view video").bounding_box()
    assert box["width"] > 330 and box["y"] + box["height"] < 844
    for button in page.locator(".sv-transport .sv-button").all():
        assert button.bounding_box()["height"] >= 38  # a thumb can hit it
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("[data-action=theme]")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, light[4:-1].split(","))) > 600 > 120 > sum(map(int, dark[4:-1].split(",")))


def test_the_queue_shows_the_place_and_starts_by_itself(open_page):
    limits = Limits(sessions=1)
    with serving(FakeEngine(4.0, limits), limits) as server:
        first, second = open_page(server), open_page(server)
        start(first, "red", 1)
        second.click("#sv-start")
        second.wait_for_function("document.querySelector('#sv-queue').textContent.includes('number 1')")
        second.click("[data-action=stop]")  # leaves the queue
        second.wait_for_function("studio.active.ended")
        wait_for(lambda: server.studio.counts()["waiting_sessions"] == 0)
        second.click("#sv-start")
        second.wait_for_function("document.querySelector('#sv-queue').textContent.includes('number 1')")
        first.click("[data-action=stop]")
        second.wait_for_function("studio.active?.status === 'running' && studio.active.player.began")


def test_slower_than_real_time_plays_at_the_true_rate_without_freezing(open_page):
    """0.5 x real time: the player slows down in place of stopping at every chunk, and says so."""
    limits = Limits()
    with serving(FakeEngine(0.5, limits), limits) as server:
        page = open_page(server)
        start(page)
        page.wait_for_timeout(6000)
        page.evaluate("studio.active.longestGap = 0")
        page.wait_for_timeout(5000)
        assert 0.3 / slowness() < page.evaluate("studio.active.player.rate") < 0.6
        assert page.is_visible("#sv-rate") and "fps" in page.text_content("#sv-rate")
        # a chunk takes 1.5 s: a player at full speed would stand still for 0.75 s of it
        assert page.evaluate("studio.active.longestGap") < 700 * slowness()
