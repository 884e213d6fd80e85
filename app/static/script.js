// The script editor: shots as a list, in the browser; the server only reads and writes the formats.

import { api } from "./api.js";
import { escapeHtml } from "./hud.js";

export class ScriptEditor {
  // play(shots, settings): start a stream; take(): the text of what really happened, or null; tell(message, bad)
  constructor(root, transitions, { play, take, tell }) {
    Object.assign(this, { root, transitions, play, take, tell });
    this.settings = {};
    this.list = root.querySelector("#sv-shots");
    this.note = root.querySelector("#sv-script-note");
    this.file = root.querySelector("#sv-script-file");
    this.shots = [
      { prompt: "A large orange ball bounces on a meadow by day", duration: 5 },
      { prompt: "A large orange ball bounces on a meadow at sunset in the rain", duration: 5 },
    ];
    root.addEventListener("click", (event) => {
      const { script, index } = event.target.closest("[data-script]")?.dataset ?? {};
      if (script) this.act(script, Number(index)).catch((error) => this.tell(error.message, true));
    });
    this.list.addEventListener("input", (event) => this.edit(event.target));
    this.file.addEventListener("change", async () => {
      const file = this.file.files[0];
      this.file.value = "";
      if (!file) return;
      try { await this.load(await file.text()); this.tell(`${file.name}: ${this.shots.length} shots`); }
      catch (error) { this.tell(error.message, true); }
    });
    this.draw();
  }

  async act(action, index) {
    if (action === "load") this.file.click();
    else if (action === "add") { this.shots.push({ prompt: this.shots.at(-1)?.prompt ?? "", duration: 5 }); this.draw(); this.list.lastElementChild.querySelector("textarea").focus(); }
    else if (action === "up") { this.shots.splice(index - 1, 0, ...this.shots.splice(index, 1)); this.draw(); }
    else if (action === "forget") { this.settings = {}; this.draw(); }
    else if (action === "remove") { this.shots.splice(index, 1); this.draw(); }
    else if (action === "play") await this.play(this.document(0));
    else if (action === "from") await this.play(this.document(index));
    else if (action === "save") download("script.yaml", (await api.checkScript(this.document(0))).yaml);
    else if (action === "take") {
      const text = await this.take();
      if (text) await this.load(text);
    }
  }

  async load(text) {
    const script = await api.checkScript(text);
    this.settings = script.settings;
    this.shots = script.shots.map(({ prompt, duration, transition, seed, overrides }) => ({ prompt, duration, transition, seed, overrides }));
    this.draw(script.notes.join("; "));
  }

  // the script from shot `first` on, as JSON
  document(first) {
    const shots = this.shots.slice(first).map((shot) => Object.fromEntries(Object.entries(shot).filter(([, value]) => value !== undefined && value !== "")));
    return JSON.stringify({ ...this.settings, shots });
  }

  // what the script itself says, which then goes before what is set up
  said() {
    const { title, method, seed, width, height, fps, overrides } = this.settings;
    const parts = [title, method, seed !== undefined && `seed ${seed}`, width && `${width} × ${height}`, fps && `${fps} fps`,
      ...Object.entries(overrides ?? {}).map(([name, value]) => `${name} ${JSON.stringify(value)}`)];
    return parts.filter(Boolean).join(" · ");
  }

  edit(field) {
    const shot = this.shots[field.closest("li")?.dataset.index];
    if (!shot) return;
    shot[field.name] = field.name === "duration" ? Number(field.value) : field.value || undefined;
    this.total();
  }

  total() {
    const seconds = this.shots.reduce((sum, shot) => sum + (Number(shot.duration) || 0), 0);
    this.note.textContent = `${this.shots.length} shots, ${seconds.toFixed(1)} s`;
  }

  draw(note) {
    this.list.innerHTML = this.shots.map((shot, index) => {
      const known = !shot.transition || this.transitions.includes(shot.transition) ? [] : [shot.transition];
      const options = ["", ...this.transitions, ...known].map((name) =>
        `<option value="${escapeHtml(name)}"${name === (shot.transition ?? "") ? " selected" : ""}>${name ? escapeHtml(name) : "method's"}</option>`).join("");
      return `<li data-index="${index}"><span class="sv-number">${index + 1}</span>`
        + `<textarea name="prompt" rows="2" aria-label="Prompt of shot ${index + 1}">${escapeHtml(shot.prompt)}</textarea>`
        + `<div class="sv-shot-row"><label><input name="duration" type="number" min="0.1" step="0.25" value="${Number(shot.duration)}" aria-label="Seconds"> s</label>`
        + `<select name="transition" aria-label="Transition">${options}</select><span class="sv-grow"></span>`
        + `<button class="sv-button" data-script="from" data-index="${index}" title="Play from this shot on">▸ from here</button>`
        + `<button class="sv-button" data-script="up" data-index="${index}" aria-label="Move shot ${index + 1} up"${index ? "" : " disabled"}>↑</button>`
        + `<button class="sv-button" data-script="remove" data-index="${index}" aria-label="Remove shot ${index + 1}">✕</button></div></li>`;
    }).join("");
    const said = this.said();
    this.root.querySelector("#sv-script-settings").hidden = !said;
    this.root.querySelector("#sv-script-settings span").textContent = said;
    this.total();
    if (note) this.note.textContent += ` · ${note}`;
  }
}

export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
