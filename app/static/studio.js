// The page: streams side by side, what the buttons and keys do, and who draws what when.

import { api } from "./api.js";
import { drawChunk, drawHud, drawReceipts } from "./hud.js";
import { supportsH264 } from "./player.js";
import { ScriptEditor } from "./script.js";
import { Timeline, clock } from "./timeline.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const PRESETS = { // method, window, sink, steps (null: the method's own)
  Balanced: (info) => [info.method, null, null, 0],
  Fast: (info) => [info.method, 6, 3, 2],
  Careful: (info) => [info.method, null, null, 6],
  "Long memory": () => ["deep_sink", null, null, 0],
};
const LINGER = 0.6; // seconds: a tab that is closed frees its streams
const APART = 0.12; // seconds that streams side by side may be apart

class Studio {
  constructor(info) {
    this.info = info;
    this.views = [];
    this.active = null;
    this.together = false; // a prompt goes to all views, in a comparison
    this.settings = {};
    this.draft = document.querySelector("#sv-prompt textarea")?.value ?? "";
    this.kind = new URLSearchParams(location.search).get("player") ?? (supportsH264() ? "mse" : "canvas");
    this.timeline = new Timeline($("sv-timeline"), (prompt) => this.setPrompt(prompt, true));
    this.editor = new ScriptEditor($("sv-script"), info.transitions, {
      play: (script) => this.startScript(script),
      take: () => this.needed() && api.script(this.active.name),
      tell: (message, bad) => this.tell(message, bad),
    });
    document.addEventListener("click", (event) => this.click(event));
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("pagehide", () => { for (const view of this.views) api.leave(view.name); });
    $("sv-open-file").addEventListener("change", (event) => this.restore(event.target));
    setInterval(() => this.tick(), 100);
    this.openTab("live");
    this.draw();
  }

  // --- settings, from Gradio's forms ------------------------------------------------------------------------------

  configure(names, values) { names.forEach((name, index) => { this.settings[name] = values[index]; }); }

  method(name) { return this.info.methods.find((method) => method.name === name); }

  methodDefaults(name) {
    const method = this.method(name);
    return method ? [Math.min(method.window, this.info.max_window), method.sink] : [12, 3];
  }

  preset(name) {
    const [method, window, sink, steps] = PRESETS[name](this.info);
    const own = this.methodDefaults(method);
    return [method, window ?? own[0], sink ?? own[1], steps];
  }

  request(changes) {
    const { method, window, sink, steps, ahead, seed, width, height } = this.settings;
    const own = this.method(method);
    const overrides = {};
    if (own && window !== own.window) overrides.window = window;
    if (own && sink !== own.sink) overrides.sink = sink;
    return { method, overrides, steps: steps || null, ahead, seed, width, height, linger: LINGER, ...changes };
  }

  // --- streams ----------------------------------------------------------------------------------------------------

  async start(changes = {}) {
    await this.clear();
    this.together = false;
    return this.add(await api.create(this.request({ prompt: this.draft, ...changes })));
  }

  async startScript(script) {
    const { prompt, ...rest } = this.request({});
    const own = JSON.parse(script); // what a script says goes before what is set up
    for (const name of ["method", "seed", "width", "height"]) if (own[name] !== undefined) delete rest[name];
    if (own.method !== undefined || own.overrides !== undefined) for (const name of ["overrides", "steps"]) delete rest[name];
    await this.clear();
    this.add(await api.create({ ...rest, script }));
    this.openTab("live");
  }

  async compare() {
    const other = this.settings.other;
    const prompt = this.active && !this.active.ended ? this.active.prompt : this.draft;
    await this.clear();
    const first = await api.create(this.request({ prompt }));
    const left = this.add(first);
    this.together = true;
    const right = this.add(await api.create(this.request({ prompt, method: other, overrides: {}, beside: first.stream })));
    for (const view of [left, right]) view.label.textContent = view.state.method;
    this.select(left);
  }

  async fork() {
    if (!this.needed()) return;
    if (this.views.length > 1) return this.tell("Two streams stand side by side already: start anew, then fork.", true);
    const parent = this.active;
    const child = this.add(await api.fork(parent.name));
    this.together = false;
    parent.label.textContent = "original";
    child.label.textContent = `fork at ${clock(child.state.start)}`;
    this.tell("What you type now goes to the fork; click the other picture to steer that one.");
  }

  async restore(input) {
    const file = input.files[0];
    input.value = "";
    if (!file) return;
    try {
      await this.clear();
      this.add(await api.restore(file));
    } catch (error) { this.tell(error.message, true); }
  }

  add(state) {
    const view = new View(state, this.kind, (one, event) => this.changed(one, event));
    this.views.push(view);
    view.root.tabIndex = 0;
    $("sv-views").append(view.root);
    view.root.addEventListener("click", () => this.select(view));
    this.select(view);
    return view;
  }

  async clear() {
    const old = this.views.splice(0);
    this.active = null;
    for (const view of old) { view.close(); api.remove(view.name).catch(() => {}); }
    this.draw();
  }

  select(view) {
    this.active = view;
    for (const one of this.views) one.root.classList.toggle("sv-active", one === view && this.views.length > 1);
    this.draw();
    drawReceipts(view);
  }

  needed() {
    if (this.active && this.active.status !== "queued") return true;
    this.tell(this.active ? "The stream still waits in the queue." : "Start a stream first.", true);
    return false;
  }

  // --- steering ---------------------------------------------------------------------------------------------------

  async apply(text, policy) {
    const typed = performance.now();
    this.draft = text;
    try {
      if (!this.active || this.active.ended) return void await this.start({ prompt: text });
      const chosen = policy && policy !== "method's" ? policy : null;
      for (const view of this.together ? this.views : [this.active]) {
        view.typed(await api.prompt(view.name, text, chosen), typed);
        this.changed(view, { event: "receipt" });
      }
    } catch (error) { this.tell(error.message, true); }
  }

  async act(action) {
    const simple = { start: () => this.start(), restart: () => this.start(), compare: () => this.compare(), fork: () => this.fork(),
      theme: () => this.theme(), open: () => $("sv-open-file").click(), toggle: () => this.toggle() };
    try {
      if (simple[action]) return await simple[action]();
      if (action !== "stop" && !this.needed()) return; // stop also leaves the queue
      const { name } = this.active, live = this.together ? this.views : [this.active];
      if (action === "stop") for (const view of this.views) { view.hold(); await api.stop(view.name); }
      if (action === "cut") for (const view of live) view.typed(await api.cut(view.name), performance.now());
      if (action === "reset") for (const view of live) await api.reset(view.name);
      if (action === "save") await this.fetchFile(`saved?mode=${(this.settings.file ?? "exact").toLowerCase()}`);
      if (action === "film") await this.fetchFile("export.mp4");
      if (action === "script") await this.fetchFile("script.yaml");
      this.draw();
    } catch (error) { this.tell(error.message, true); }
  }

  async toggle() {
    if (!this.active || this.active.ended) return this.start();
    const pausing = this.views.some((view) => view.status === "running");
    for (const view of this.views.filter((one) => !one.ended && one.status !== "queued")) {
      if (pausing) view.hold(); else view.go();
      view.state.status = pausing ? "paused" : "running";
      await (pausing ? api.pause(view.name) : api.resume(view.name));
    }
    this.draw();
  }

  async fetchFile(path) {
    await api.state(this.active.name); // a stream that is gone is told here, not as a file
    const link = document.createElement("a");
    link.href = api.url(this.active.name, path);
    link.download = "";
    link.click();
  }

  theme() {
    const dark = document.body.classList.toggle("dark");
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    localStorage.setItem("streamvid-theme", dark ? "dark" : "light");
  }

  setPrompt(text, focus = false) {
    const box = document.querySelector("#sv-prompt textarea");
    Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(box, text);
    box.dispatchEvent(new Event("input", { bubbles: true }));
    if (focus) box.focus();
    this.draft = text;
  }

  async example(index) {
    const example = this.info.examples[index];
    try {
      if (example.script) return await this.start({ prompt: null, script: example.script, seed: example.seed });
      this.setPrompt(example.prompt);
      if (this.active && !this.active.ended) await this.apply(example.prompt);
      else await this.start({ prompt: example.prompt, seed: example.seed });
    } catch (error) { this.tell(error.message, true); }
  }

  click(event) {
    const data = event.target.closest("[data-action], [data-example], [role=tab]")?.dataset;
    if (data?.tab) this.openTab(data.tab);
    if (data?.action) this.act(data.action);
    if (data?.example !== undefined) this.example(Number(data.example));
    document.activeElement?.closest?.(".sv-button, .sv-chip, .sv-play")?.blur(); // Space is for pausing
  }

  key(event) {
    const typing = event.target.closest?.("input, textarea, select, button, [contenteditable], [role=listbox]");
    const focused = this.views.find((view) => view.root === event.target);
    if (event.code === "Enter" && focused) this.select(focused);
    if (event.code === "Space" && !typing && !event.repeat) { event.preventDefault(); this.act("toggle"); }
  }

  openTab(name) {
    $("sv-side").dataset.tab = name;
    for (const tab of document.querySelectorAll("[data-tab][role=tab]")) tab.setAttribute("aria-selected", String(tab.dataset.tab === name));
    if (this.active) drawChunk(this.active, this.info);
  }

  // --- drawing ----------------------------------------------------------------------------------------------------

  changed(view, event) {
    if (event.event === "ended" && event.message) this.tell(event.message, true);
    else if (event.event === "ended" && ["idle", "too long", "connection lost"].includes(event.reason)) this.tell(`The stream has ended: ${event.reason}.`, true);
    if (view.ended && view.state.reason === "stopped") view.hold();
    if (["shot", "chunk", "receipt", "ended"].includes(event.event)) this.timeline.draw(this.views);
    if (event.event === "chunk" && view === this.active) drawChunk(view, this.info);
    if (["receipt", "seen"].includes(event.event) && view === this.active) drawReceipts(view);
    if (event.event !== "chunk") this.draw();
  }

  draw() {
    const view = this.active;
    const state = view?.status ?? "idle";
    const words = { idle: "ready", queued: `queue: ${view?.place ?? "…"} of ${view?.length ?? "…"}`, running: "live", paused: "paused", ended: view?.state.reason || "ended" };
    Object.assign($("sv-status"), { textContent: words[state] });
    $("sv-status").dataset.state = state;
    $("sv-stage").dataset.views = this.views.length;
    $("sv-stage").dataset.state = state;
    $("sv-empty").hidden = Boolean(view) && state !== "ended";
    $("sv-queue").hidden = state !== "queued";
    $("sv-queue").textContent = state === "queued" ? `You are number ${view.place ?? "…"} in the queue. It starts by itself.` : "";
    const toggle = document.querySelector('[data-action="toggle"] path');
    toggle.setAttribute("d", state === "running" ? "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z" : "M8 5.5v13l11-6.5z");
    document.querySelector('[data-action="stop"]').disabled = !["queued", "running", "paused"].includes(state);
    for (const name of ["cut", "reset", "fork", "save"]) document.querySelector(`[data-action="${name}"]`).disabled = !["running", "paused"].includes(state);
    for (const name of ["film", "script"]) document.querySelector(`[data-action="${name}"]`).disabled = !view?.chunks.length;
  }

  tick() {
    const view = this.active;
    if (!view) return;
    this.keepTogether();
    if (!view.began && view.player.began) { view.began = true; this.draw(); }
    $("sv-clock").textContent = clock(view.position);
    for (const one of this.views) one.caption();
    const slow = view.state.speed && view.player.rate < 0.98 && view.status === "running";
    $("sv-rate").hidden = !slow;
    if (slow) $("sv-rate").textContent = `${view.player.rate.toFixed(2)}× · ${(view.player.rate * view.state.fps).toFixed(0)} fps`;
    this.timeline.move(this.views);
    if ((this.ticks = (this.ticks ?? 0) + 1) % 3 === 0) { drawHud(view); this.glow(view); }
  }

  // side by side means at the same moment: who is in front waits
  keepTogether() {
    const [a, b] = this.views;
    if (!b || [a, b].some((view) => view.status !== "running" || !view.player.began)) return;
    const apart = a.position - b.position;
    for (const [view, lead] of [[a, apart], [b, -apart]]) {
      if (lead > APART && view.player.playing) view.hold();
      else if (lead <= APART / 3 && !view.player.playing) view.go();
    }
  }

  glow(view) {
    const picture = view.player.picture();
    if (picture) $("sv-glow").getContext("2d").drawImage(picture, 0, 0, 16, 9);
  }

  tell(message, bad = false) {
    const toast = document.createElement("div");
    toast.className = `sv-toast${bad ? " sv-bad" : ""}`;
    toast.setAttribute("role", bad ? "alert" : "status");
    toast.textContent = message;
    document.querySelectorAll(".sv-toast").forEach((old) => old.remove());
    document.querySelector(".gradio-container").append(toast);
    setTimeout(() => toast.remove(), 8000);
  }
}

async function ready() {
  document.body.classList.toggle("dark", document.documentElement.dataset.theme === "dark");
  while (!["sv-stage", "sv-timeline", "sv-script", "hud-chart"].every($) || !document.querySelector("#sv-prompt textarea")) {
    await new Promise((resolve) => setTimeout(resolve, 30)); // Gradio builds the page
  }
  window.studio = new Studio(await api.info());
  if (window.studioSettings) window.studio.configure(...window.studioSettings);
  document.body.dataset.ready = "yes";
}

ready();
