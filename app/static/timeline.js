// Shots on a line of time, with pictures; receipts where they were applied; the playhead.
// Elements stay what they are while they grow, so that a click or the keyboard's focus is not lost at the next chunk.

import { api } from "./api.js";

const SPAN = 60;   // seconds shown once there are more
const LEAST = 16;

export const clock = (time) => {
  const tenths = Math.max(0, Math.floor(time * 10));
  return `${Math.floor(tenths / 600)}:${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
};

function element(kind, name, ...children) {
  const made = document.createElement(kind);
  made.className = name;
  made.append(...children);
  return made;
}

export class Timeline {
  constructor(root, onpick) {
    this.root = root;
    this.tracks = new Map(); // view -> its element and those in it by key
    this.ruler = element("div", "sv-ruler");
    root.replaceChildren(this.ruler, element("div", "sv-track sv-nothing", "Shots appear here with their pictures, and a mark where a prompt was applied."));
    root.addEventListener("click", (event) => {
      const shot = event.target.closest("[data-shot]");
      if (shot) onpick(shot.title);
    });
  }

  // called when shots, receipts or the end changed
  draw(views) {
    const made = Math.max(...views.map((view) => view.made), 0);
    this.to = Math.max(made + 1.5, LEAST);
    this.from = Math.max(0, this.to - SPAN);
    this.drawRuler();
    for (const view of this.tracks.keys()) if (!views.includes(view)) this.tracks.delete(view);
    for (const view of views) {
      if (!this.tracks.has(view)) {
        const track = element("div", "sv-track", element("span", "sv-head"));
        track.dataset.stream = view.name;
        this.tracks.set(view, { track, parts: new Map() });
      }
      this.drawTrack(view, this.tracks.get(view));
    }
    const tracks = views.map((view) => this.tracks.get(view).track);
    const shown = [...this.root.children].slice(1);
    if (tracks.length && (shown.length !== tracks.length || tracks.some((track, i) => track !== shown[i]))) this.root.replaceChildren(this.ruler, ...tracks);
    this.move(views);
  }

  x(time) { return 100 * (time - this.from) / (this.to - this.from); }

  drawRuler() {
    const step = this.to - this.from > 40 ? 10 : this.to - this.from > 20 ? 5 : 2;
    const labels = [];
    for (let t = Math.ceil(this.from / step) * step; this.x(t) < 96; t += step) {
      const label = element("span", "", clock(t).replace(/\.\d$/, ""));
      label.style.left = `${this.x(t)}%`;
      labels.push(label);
    }
    this.ruler.replaceChildren(...labels);
  }

  drawTrack(view, { track, parts }) {
    const wanted = new Set();
    const part = (key, make) => {
      wanted.add(key);
      if (!parts.has(key)) { parts.set(key, make()); track.append(parts.get(key)); }
      return parts.get(key);
    };
    const shots = [...view.shots.values()].sort((a, b) => a.shot - b.shot);
    shots.forEach((shot, index) => {
      const end = shots[index + 1]?.start ?? view.made;
      if (end < this.from) return;
      const left = this.x(Math.max(shot.start, this.from)), width = this.x(end) - left;
      const box = part(`shot ${shot.shot} ${shot.start}`, () => newShot(shot));
      Object.assign(box.style, { left: `${left}%`, width: `calc(${width}% - 2px)` });
      const picture = api.url(view.name, `thumbnails/${shot.shot}.jpg?v=${shot.version ?? 0}`);
      if (box.dataset.picture !== picture) showWhenThere(box, picture);
    });
    for (const receipt of view.receipts.values()) {
      if (receipt.status === "applied" && receipt.media_time >= this.from) {
        const mark = part(`applied ${receipt.receipt}`, () => element("span", "sv-mark"));
        mark.dataset.receipt = receipt.receipt;
        mark.title = `applied at ${receipt.media_time.toFixed(2)} s, chunk ${receipt.chunk}`;
        mark.style.left = `${this.x(receipt.media_time)}%`;
      } else if (receipt.status === "pending") {
        const ghost = part(`pending ${receipt.receipt}`, () => element("span", "sv-ghost", "…"));
        ghost.title = receipt.text;
        ghost.style.left = `${this.x(view.made)}%`;
      }
    }
    for (const [key, box] of parts) if (!wanted.has(key)) { box.remove(); parts.delete(key); }
  }

  // only the playheads, several times a second
  move(views) {
    for (const view of views) {
      const head = this.tracks.get(view)?.track.firstElementChild;
      if (head) head.style.left = `${this.x(view.position)}%`;
    }
  }
}

function newShot(shot) {
  const words = shot.policy ? [element("small", "", shot.policy), shot.prompt] : [shot.prompt];
  const box = element("button", "sv-shot", element("i", ""), element("b", "", ...words));
  box.dataset.shot = shot.shot;
  box.title = shot.prompt;
  return box;
}

// the old picture stays until the new one has been loaded
function showWhenThere(box, picture) {
  box.dataset.picture = picture;
  const image = new Image();
  image.onload = () => { if (box.dataset.picture === picture) box.firstElementChild.style.backgroundImage = `url("${image.src}")`; };
  image.src = picture;
}
