"""Gradio's own forms in real Chromium: what is chosen there is what the next stream is asked for."""

import pytest
from barcode import BITS_READER


@pytest.fixture
def page(fake_server, open_page):
    page = open_page(fake_server)
    page.sent = []
    page.on(
        "request",
        lambda request: request.url.endswith("/api/streams") and page.sent.append(request.post_data_json),
    )
    return page


def choose(page, field, value):
    """An option of one of Gradio's drop-down lists."""
    page.click(f"#{field} input")
    page.click(f"[role=option]:has-text('{value}')")


def test_every_setting_is_in_the_request(page):
    page.click("[data-tab=setup]")
    choose(page, "sv-set-method", "self_forcing")
    page.wait_for_function(
        "studio.settings.method === 'self_forcing' && studio.settings.sink === 0"
    )  # its own
    wanted = {"window": 15, "sink": 6, "steps": 3, "ahead": 2.5, "seed": 12, "width": 96, "height": 64}
    for name, value in wanted.items():
        box = f"#sv-set-{name} input[type=number]"
        page.fill(box, str(value))
        page.press(box, "Tab")
        page.wait_for_function(f"studio.settings.{name} === {value}")
    page.click("#sv-restart")
    page.wait_for_function("studio.active?.player.began")
    assert page.evaluate(BITS_READER)["seed"] == 12
    body = page.sent[0]
    assert body["method"] == "self_forcing" and body["overrides"] == {"window": 15, "sink": 6}
    assert {name: body[name] for name in ("steps", "ahead", "seed", "width", "height")} == {
        name: wanted[name] for name in ("steps", "ahead", "seed", "width", "height")
    }


def test_presets_fill_the_form(page):
    page.click("[data-tab=setup]")
    page.click("#sv-preset label:has-text('Fast')")
    page.wait_for_function("studio.settings.window === 6 && studio.settings.steps === 2")
    page.click("#sv-preset label:has-text('Careful')")
    page.wait_for_function("studio.settings.window === 12 && studio.settings.steps === 6")


def test_presets_can_be_chosen_by_keyboard(page):
    page.click("[data-tab=setup]")
    page.focus("#sv-preset input >> nth=0")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.wait_for_function("studio.settings.window === 6 && studio.settings.steps === 2")
    assert page.evaluate("studio.active") is None  # Space was not for the stream


def test_the_method_to_compare_with_is_chosen(page):
    page.click("[data-tab=setup]")
    choose(page, "sv-set-other", "longlive")
    page.wait_for_function("studio.settings.other === 'longlive'")
    page.click("[data-action=compare]")
    page.wait_for_function("studio.views.length === 2")
    assert [body["method"] for body in page.sent] == ["longlive", "longlive"]
    assert page.sent[1]["beside"] == page.evaluate("studio.views[0].name")


def test_the_policy_beside_the_prompt_reaches_the_stream(page):
    page.click("#sv-start")
    page.wait_for_function("studio.active?.player.began")
    choose(page, "sv-policy", "cross_only")
    page.fill("#sv-prompt textarea", "green")
    page.click("#sv-apply")
    page.wait_for_function("[...studio.active.shots.values()].some((shot) => shot.policy === 'cross_only')")


def test_a_policy_may_be_typed_with_its_options(page):
    page.click("#sv-start")
    page.wait_for_function("studio.active?.player.began")
    page.fill("#sv-policy input", "blend(8, slerp)")
    page.press("#sv-policy input", "Enter")
    page.fill("#sv-prompt textarea", "green")
    page.click("#sv-apply")
    page.wait_for_function(
        "[...studio.active.shots.values()].some((shot) => shot.policy === 'blend(8, slerp)')"
    )


def test_examples_play_at_one_click(page):
    page.click("[data-example='1']")
    page.wait_for_function("studio.active?.player.began")
    assert page.sent[0]["prompt"].startswith("A large yellow star") and page.sent[0]["seed"] == 7
    page.click("[data-example='4']")
    page.wait_for_function("studio.views.length === 1 && studio.active?.player.began")
    assert page.sent[1]["prompt"] is None and page.sent[1]["script"].count("[5s]") == 4


def test_without_h264_pictures_are_drawn_on_a_canvas(fake_server, chromium):
    context = chromium.new_context()
    context.add_init_script("MediaSource.isTypeSupported = () => false")
    page = context.new_page()
    page.goto(fake_server.url)
    page.wait_for_selector("body[data-ready=yes]")
    page.evaluate("studio.start({ prompt: 'red', seed: 5 })")
    page.wait_for_function(f"studio.active?.frames.length > 8 && ({BITS_READER})().seed === 5")
    assert page.evaluate("studio.kind") == "canvas" and page.locator("video").count() == 0
    context.close()
