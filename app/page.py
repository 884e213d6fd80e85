"""The page: Gradio's forms around one live player. Forms speak to the page's own script, which speaks to the HTTP API."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from streamvid.app.examples import EXAMPLES

HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="color-scheme" content="dark light">
<script>
  // the theme is chosen before anything is drawn: ?theme= or the last choice or the system's
  (() => {
    const asked = new URLSearchParams(location.search).get("theme") || localStorage.getItem("streamvid-theme");
    const dark = asked ? asked === "dark" : !matchMedia("(prefers-color-scheme: light)").matches;
    window.streamvidTheme = dark ? "dark" : "light";
    const apply = () => document.body && document.body.classList.toggle("dark", window.streamvidTheme === "dark");
    document.addEventListener("DOMContentLoaded", apply);
    document.documentElement.dataset.theme = window.streamvidTheme;
  })();
</script>
<link rel="stylesheet" href="/studio/studio.css">
<script type="module" src="/studio/studio.js"></script>
"""

STAGE = """
<div id="sv-stage" class="sv-stage" data-views="0">
  <canvas id="sv-glow" width="16" height="9" aria-hidden="true"></canvas>
  <div id="sv-views" class="sv-views"></div>
  <div id="sv-empty" class="sv-empty">
    <button id="sv-start" class="sv-play" data-action="start" aria-label="Start">
      <svg viewBox="0 0 24 24"><path d="M8 5.5v13l11-6.5z"/></svg>
    </button>
    <p>Press play, then change the words while it runs.</p>
  </div>
  <div class="sv-top">
    <span id="sv-status" class="sv-pill" data-state="idle">ready</span>
    <span id="sv-rate" class="sv-pill sv-quiet" hidden></span>
  </div>
  <div id="sv-queue" class="sv-queue" hidden></div>
</div>
<div class="sv-transport" role="toolbar" aria-label="Stream">
  {buttons}
  <span class="sv-grow"></span>
  <span id="sv-clock" class="sv-clock">0:00.0</span>
</div>
"""

ICONS = {
    "start": "M8 5.5v13l11-6.5z",
    "pause": "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z",
    "stop": "M6.5 6.5h11v11h-11z",
    "cut": "M9.6 12.3 4 18.5M9.6 11.7 4 5.5M10 12l10 6M10 12l10-6",
    "reset": "M5 12a7 7 0 1 0 2.2-5.1M5 4.5V8h3.5",
    "fork": "M6 4v6a6 6 0 0 0 6 6h6M6 10v10M15 13l3.2 3L15 19",
    "compare": "M4 5h7v14H4zM13 5h7v14h-7z",
    "save": "M12 4v10m0 0-4-4m4 4 4-4M5 19h14",
    "open": "M12 15V5m0 0L8 9m4-4 4 4M5 19h14",
    "film": "M4 6h16v12H4zM8 6v12M16 6v12",
    "script": "M6 5h12M6 9.5h12M6 14h8M6 18.5h10",
}
SOLID = ("start", "pause", "stop")
BUTTONS = (
    ("toggle", "start", "Start or pause (Space)", ""),
    ("stop", "stop", "End the stream", ""),
    ("cut", "cut", "Cut: a new scene at the next block", "Cut"),
    ("reset", "reset", "Reset: start anew, prompt and settings stay", "Reset"),
    ("fork", "fork", "Fork: two continuations side by side", "Fork"),
    ("compare", "compare", "Compare: two methods, same seed, side by side", "Compare"),
    ("save", "save", "Save the stream to a file", "Save"),
    ("open", "open", "Go on with a saved stream", "Open"),
    ("film", "film", "Export the video so far as MP4", "MP4"),
    ("script", "script", "Export what happened as a script", "Script"),
)

HUD = """
<section class="sv-hud" aria-label="Measurements">
  <div class="sv-tiles">
    <div><b id="hud-fps">–</b><span>fps shown</span></div>
    <div><b id="hud-speed">–</b><span>× real time</span></div>
    <div><b id="hud-latency">–</b><span>prompt → pixel</span></div>
    <div><b id="hud-buffer">–</b><span>buffer</span></div>
    <div><b id="hud-p50">–</b><span>chunk p50</span></div>
    <div><b id="hud-p95">–</b><span>chunk p95</span></div>
    <div><b id="hud-kv">–</b><span>keys, values</span></div>
    <div><b id="hud-stalls">0</b><span>stalls</span></div>
  </div>
  <h4>Time per chunk <em id="hud-total"></em></h4>
  <div id="hud-stages" class="sv-stages"></div>
  <div id="hud-legend" class="sv-legend"></div>
  <h4>Chunks <em>against play-out</em></h4>
  <canvas id="hud-chart" class="sv-chart" aria-label="seconds per chunk"></canvas>
  <h4>Window <em id="hud-window-note">which frames are attended now</em></h4>
  <div id="hud-window" class="sv-window"></div>
  <h4>Receipts</h4>
  <ol id="hud-receipts" class="sv-receipts"><li class="sv-none">What you type is acknowledged here.</li></ol>
</section>
"""

SCRIPT = """
<div id="sv-script" class="sv-script">
  <div class="sv-script-bar">
    <button class="sv-button" data-script="load">Load</button>
    <button class="sv-button" data-script="save">Save</button>
    <button class="sv-button" data-script="take" title="Take over what the stream really did">From stream</button>
    <span class="sv-grow"></span>
    <button class="sv-button sv-accent" data-script="play">Play all</button>
    <input id="sv-script-file" type="file" accept=".yaml,.yml,.json,.jsonl,.txt" hidden>
  </div>
  <div id="sv-script-settings" class="sv-said" hidden>
    <span></span>
    <button class="sv-button" data-script="forget" title="Play with what Setup says" aria-label="Forget settings">✕</button>
  </div>
  <ol id="sv-shots" class="sv-shots"></ol>
  <button class="sv-button sv-add" data-script="add">+ Shot</button>
  <p id="sv-script-note" class="sv-note" role="status"></p>
</div>
"""

TABS = """
<nav class="sv-tabs" role="tablist">
  <button role="tab" data-tab="live" aria-selected="true">Live</button>
  <button role="tab" data-tab="setup" aria-selected="false">Setup</button>
  <button role="tab" data-tab="script" aria-selected="false">Script</button>
</nav>
"""


def theme() -> gr.themes.Base:
    """No font from elsewhere; what it looks like is in studio.css."""
    return gr.themes.Base(font=["ui-sans-serif", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(info: dict[str, Any]) -> gr.Blocks:
    """The Blocks of the studio.

    Args:
        info: what `/api/info` tells: model, methods, transitions, sizes, limits.
    """
    with gr.Blocks(title="streamvid", analytics_enabled=False, fill_width=True) as page:
        _html(_header(info))
        with gr.Row(elem_id="sv-body"):
            with gr.Column(scale=8, min_width=320, elem_id="sv-main"):
                _html(STAGE.replace("{buttons}", _buttons()))
                prompt, policy, apply = _prompt_row(info)
                _html(_chips())
                _html('<div id="sv-timeline" class="sv-timeline"></div>')
            with gr.Column(scale=4, min_width=300, elem_id="sv-side"):
                _html(TABS)
                with gr.Column(elem_id="sv-panel-live"):
                    _html(HUD)
                with gr.Column(elem_id="sv-panel-setup"):
                    settings, method, window, sink, restart = _setup(info)
                with gr.Column(elem_id="sv-panel-script"):
                    _html(SCRIPT)
        for trigger in (prompt.submit, apply.click):
            _in_page(trigger, [prompt, policy], "(text, policy) => { window.studio.apply(text, policy) }")
        _in_page(prompt.input, [prompt], "(text) => { window.studio.draft = text }")
        names = [component.elem_id.removeprefix("sv-set-") for component in settings]
        configure = f"(...values) => {{ window.studio.configure({names}, values) }}"
        for component in settings:
            _in_page(component.change, settings, configure)
        _in_page(
            method.input, [method], "(name) => window.studio.methodDefaults(name)", outputs=[window, sink]
        )
        _in_page(restart.click, [], "() => { window.studio.act('restart') }")
        _in_page(
            page.load,
            settings,
            f"(...values) => {{ window.studioSettings = [{names}, values]; window.studio?.configure({names}, values) }}",
        )
    return page


def _html(text: str) -> gr.HTML:
    """Our own markup, without Gradio's typography."""
    return gr.HTML(text, padding=False, apply_default_css=False)


def _in_page(event, inputs, js: str, outputs=None) -> None:
    """An event that the browser handles; Gradio's server never hears of it."""
    event(None, inputs, outputs, js=js, show_progress="hidden", api_visibility="private")


def _header(info: dict[str, Any]) -> str:
    size = f"{info['width']} × {info['height']} · {info['fps']:g} fps · {escape(info['device'])}"
    return f"""
<header class="sv-header">
  <a class="sv-logo" href="/" aria-label="streamvid"><i></i>streamvid</a>
  <span class="sv-model">{escape(info["model"])}<em>{size}</em></span>
  <span class="sv-grow"></span>
  <span class="sv-keys"><kbd>Enter</kbd> apply <kbd>Space</kbd> pause</span>
  <button class="sv-icon" data-action="theme" aria-label="Light or dark theme" title="Light or dark theme">
    <svg viewBox="0 0 24 24"><path d="M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z"/></svg>
  </button>
</header>"""


def _buttons() -> str:
    parts = []
    for action, icon, title, label in BUTTONS:
        kind = "sv-solid" if icon in SOLID else "sv-line"
        text = f"<span>{label}</span>" if label else ""
        parts.append(
            f'<button class="sv-button" data-action="{action}" title="{title}" aria-label="{title}">'
            f'<svg class="{kind}" viewBox="0 0 24 24"><path d="{ICONS[icon]}"/></svg>{text}</button>'
        )
    return "".join(parts) + '<input id="sv-open-file" type="file" hidden>'


def _chips() -> str:
    chips = "".join(
        f'<button class="sv-chip" data-example="{index}">{escape(example["name"])}</button>'
        for index, example in enumerate(EXAMPLES)
    )
    return f'<div class="sv-chips" aria-label="Examples">{chips}</div>'


def _prompt_row(info: dict[str, Any]) -> tuple[gr.Textbox, gr.Dropdown, gr.Button]:
    with gr.Row(elem_id="sv-prompt-row"):
        prompt = gr.Textbox(
            value=EXAMPLES[0]["prompt"],
            placeholder="What shall be seen next?",
            lines=1,
            max_lines=3,
            max_length=info["max_prompt_characters"],
            show_label=False,
            container=False,
            scale=8,
            elem_id="sv-prompt",
        )
        policy = gr.Dropdown(
            [("switch: method's", "method's"), *info["transitions"]],
            value="method's",
            label="Switch",
            show_label=False,
            container=False,
            allow_custom_value=True,
            scale=2,
            min_width=110,
            elem_id="sv-policy",
        )
        apply = gr.Button("Apply", variant="primary", scale=1, min_width=84, elem_id="sv-apply")
    return prompt, policy, apply


def _setup(info: dict[str, Any]):
    """Everything that a stream starts with."""
    own = next(m for m in info["methods"] if m["name"] == info["method"])
    names = [m["name"] for m in info["methods"]]
    most = info["max_window"]
    unit = info["size_unit"]
    preset = gr.Radio(
        ["Balanced", "Fast", "Careful", "Long memory"], value="Balanced", label="Preset", elem_id="sv-preset"
    )
    method = gr.Dropdown(names, value=own["name"], label="Method", elem_id="sv-set-method")
    with gr.Row():
        window = gr.Slider(
            own["frames_per_block"],
            most,
            value=own["window"],
            step=1,
            label="Window",
            elem_id="sv-set-window",
        )
        sink = gr.Slider(0, 24, value=own["sink"], step=1, label="Sink", elem_id="sv-set-sink")
    with gr.Row():
        steps = gr.Slider(0, 8, value=0, step=1, label="Steps (0: own)", elem_id="sv-set-steps")
        ahead = gr.Slider(
            0.25,
            5,
            value=info["ahead_seconds"],
            step=0.25,
            label="Ahead (s)",
            elem_id="sv-set-ahead",
        )
    with gr.Row():
        seed = gr.Number(
            min_width=70,
            value=EXAMPLES[0]["seed"],
            precision=0,
            minimum=0,
            label="Seed",
            elem_id="sv-set-seed",
        )
        width = gr.Number(
            min_width=70, value=info["width"], precision=0, step=unit, label="Width", elem_id="sv-set-width"
        )
        height = gr.Number(
            min_width=70,
            value=info["height"],
            precision=0,
            step=unit,
            label="Height",
            elem_id="sv-set-height",
        )
    other = gr.Dropdown(
        names,
        value="self_forcing" if "self_forcing" in names else names[0],
        label="Compare with",
        elem_id="sv-set-other",
    )
    file = gr.Radio(["Exact", "Compact"], value="Exact", label="Saved streams", elem_id="sv-set-file")
    restart = gr.Button("Start with these settings", elem_id="sv-restart")
    _in_page(
        preset.input,
        [preset],
        "(name) => window.studio.preset(name)",
        outputs=[method, window, sink, steps],
    )
    settings = [method, window, sink, steps, ahead, seed, width, height, other, file]
    return settings, method, window, sink, restart
