// Shots on a line of time, with pictures; receipts where they were applied; the playhead.

import { api } from "./api.js";
import { escapeHtml } from "./hud.js";

const SPAN = 60;   // seconds shown once there are more
const LEAST = 16;

export const clock = (time) => {
  const tenths = Math.max(0, Math.floor(time * 10));
  return `${Math.floor(tenths / 600)}:${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
};

export class Timeline {
  constructor(root, onpick) {
    this.root = root;
    this.onpick = onpick;
    root.addEventListener("click", (event) => {
      const shot = event.target.closest("[data-shot]");
      if (shot) onpick(shot.dataset.prompt);
    });
  }

  // called when shots, receipts or the end changed
  draw(views) {
    const made = Math.max(...views.map((view) => view.made), 0);
    this.to = Math.max(made + 1.5, LEAST);
    this.from = Math.max(0, this.to - SPAN);
    this.root.innerHTML = this.ruler() + views.map((view) => this.track(view)).join("");
    this.move(views);
  }

  x(time) { return 100 * (time - this.from) / (this.to - this.from); }

  ruler() {
    const step = this.to - this.from > 40 ? 10 : this.to - this.from > 20 ? 5 : 2;
    let html = "";
    for (let t = Math.ceil(this.from / step) * step; t < this.to; t += step) {
      html += `<span style="left:${this.x(t)}%">${clock(t).replace(/\.\d$/, "")}</span>`;
    }
    return `<div class="sv-ruler">${html}</div>`;
  }

  track(view) {
    const shots = [...view.shots.values()].sort((a, b) => a.shot - b.shot);
    let html = "";
    shots.forEach((shot, index) => {
      const end = shots[index + 1]?.start ?? view.made;
      if (end < this.from) return;
      const left = this.x(Math.max(shot.start, this.from)), width = this.x(end) - left;
      const picture = `background-image:url('${api.url(view.name, `thumbnails/${shot.shot}.jpg?v=${shot.version ?? 0}`)}')`;
      const text = escapeHtml(shot.prompt).replaceAll('"', "&quot;");
      html += `<button class="sv-shot" data-shot="${shot.shot}" data-prompt="${text}" title="${text}" style="left:${left}%;width:calc(${width}% - 2px)">`
        + `<i style="${picture}"></i><b>${text}</b>${shot.policy ? `<small>${escapeHtml(shot.policy)}</small>` : ""}</button>`;
    });
    for (const receipt of view.receipts.values()) {
      if (receipt.status === "applied" && receipt.media_time >= this.from) {
        html += `<span class="sv-mark" data-receipt="${receipt.receipt}" style="left:${this.x(receipt.media_time)}%" title="applied at ${receipt.media_time.toFixed(2)} s, chunk ${receipt.chunk}"></span>`;
      } else if (receipt.status === "pending") {
        html += `<span class="sv-ghost" style="left:${this.x(view.made)}%" title="${escapeHtml(receipt.text).replaceAll('"', "&quot;")}">…</span>`;
      }
    }
    return `<div class="sv-track" data-stream="${view.name}">${html}<span class="sv-head"></span></div>`;
  }

  // only the playheads, several times a second
  move(views) {
    for (const view of views) {
      const head = this.root.querySelector(`[data-stream="${view.name}"] .sv-head`);
      if (head) head.style.left = `${this.x(view.position)}%`;
    }
  }
}
