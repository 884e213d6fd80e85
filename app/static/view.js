// One stream on the page: its socket, its player, what it told, and the rate that it is played at.

import { api } from "./api.js";
import { createPlayer } from "./player.js";

const REPORT_MS = 250;
const STALL_MS = 500;

export class View {
  constructor(state, kind, onchange) {
    this.name = state.stream;
    this.kind = kind;
    this.onchange = onchange;
    this.state = state;
    this.shots = new Map(state.shots.map((shot) => [shot.shot, shot]));
    this.receipts = new Map(state.receipts.map((receipt) => [receipt.receipt, receipt]));
    this.sent = new Map();       // receipt -> when it was typed (performance.now)
    this.chunks = [];            // the latest, for percentiles and the chart
    this.made = state.made;
    this.firstEvent = 0;
    this.frames = [];            // performance.now of the latest shown frames
    this.mediaTimes = [];
    this.stalls = 0;
    this.longestGap = 0;
    this.latency = null;
    this.waiting = [];           // receipts that are applied but not yet on the screen
    this.player = createPlayer(kind, state.start);
    this.player.onframe = (time) => this.frame(time);
    this.root = document.createElement("figure");
    this.root.className = "sv-view";
    this.root.innerHTML = '<figcaption class="sv-caption"><span class="sv-label"></span><span class="sv-words" aria-live="polite"></span></figcaption>';
    this.root.prepend(this.player.element);
    this.connect();
    this.timer = setInterval(() => this.steer(), 100);
    this.reported = 0;
  }

  get status() { return this.state.status; }
  get ended() { return this.status === "ended"; }
  get position() { return this.player.position; }
  get label() { return this.root.querySelector(".sv-label"); }

  // the prompt of what is on the screen
  get prompt() {
    const shots = [...this.shots.values()].sort((a, b) => a.shot - b.shot);
    return (shots.findLast((shot) => shot.start <= this.position + 0.02) ?? shots[0])?.prompt ?? this.state.prompt;
  }

  caption() {
    const words = this.chunks.length ? this.prompt : "", shown = this.root.querySelector(".sv-words");
    if (shown.textContent !== words) shown.textContent = words;
  }

  connect() {
    const socket = this.socket = api.socket(this.name, this.kind, this.firstEvent);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => typeof data === "string" ? this.event(JSON.parse(data)) : this.media(data);
    socket.onclose = () => { if (!this.closed && !this.ended) { this.state.status = "ended"; this.state.reason = "connection lost"; this.onchange(this, { event: "ended", reason: "connection lost" }); } };
  }

  media(data) {
    const head = new DataView(data, 0, 9);
    this.player.push(head.getUint8(0), head.getFloat64(1), data.slice(9));
  }

  event(event) {
    if (event.number !== undefined) this.firstEvent = event.number + 1;
    const handle = {
      queued: () => { this.state.status = "queued"; this.place = event.place; this.length = event.length; },
      started: () => { this.state.status = "running"; this.place = null; },
      paused: () => { this.state.status = "paused"; },
      resumed: () => { this.state.status = "running"; },
      shot: () => this.shots.set(event.shot, { ...event, version: event.number }),
      receipt: () => this.receipt(event),
      chunk: () => this.chunk(event),
      reset: () => {},
      ended: () => { Object.assign(this.state, { status: "ended", reason: event.reason, message: event.message }); },
    }[event.event];
    if (!handle) return;
    handle();
    this.onchange(this, event);
  }

  receipt(event) {
    const before = this.receipts.get(event.receipt);
    if (before && before.status !== "pending" && event.status === "pending") return;
    this.receipts.set(event.receipt, { ...before, ...event });
    if (event.status === "applied") this.waiting.push(this.receipts.get(event.receipt));
  }

  chunk(event) {
    this.chunks.push(event);
    if (this.chunks.length > 120) this.chunks.shift();
    this.made = event.media_time + event.seconds;
    this.state.speed = event.speed;
  }

  typed(receipt, when) {
    this.sent.set(receipt.receipt, when);
    this.receipt({ ...receipt, event: "receipt" });
  }

  frame(time) {
    const now = performance.now();
    const last = this.frames.at(-1);
    if (last !== undefined && this.player.playing && !this.skipGap && !document.hidden) {
      const gap = now - last;
      this.longestGap = Math.max(this.longestGap, gap);
      const spacing = 1000 / (this.state.fps * this.player.rate); // of frames that are played slowly on purpose
      if (gap > Math.max(STALL_MS, 2.5 * spacing)) this.stalls += 1;
    }
    this.skipGap = false;
    this.frames.push(now);
    this.mediaTimes.push(time);
    if (this.frames.length > 400) { this.frames.shift(); this.mediaTimes.shift(); }
    this.waiting = this.waiting.filter((receipt) => {
      if (time < receipt.media_time - 1e-3) return true;
      const typed = this.sent.get(receipt.receipt);
      receipt.seen = time;
      if (typed !== undefined) receipt.latency = this.latency = (now - typed) / 1000;
      this.onchange(this, { event: "seen", receipt });
      return false;
    });
  }

  // frames per second on the screen over the last two seconds
  get fps() {
    const now = performance.now();
    const recent = this.frames.filter((at) => now - at < 2000);
    return recent.length > 1 ? (recent.length - 1) / ((recent.at(-1) - recent[0]) / 1000) : 0;
  }

  // honest rate: where the machine is slower than real time, play at its pace in place of freezing at every chunk
  steer() {
    const { player, state } = this;
    if (state.status !== "paused" && player.began && player.playing) {
      const goal = Math.max(0.5, state.ahead_limit);
      const speed = state.speed ?? 1;
      let rate = 1;
      if (!this.ended) {
        if (speed < 1) rate = Math.min(1, speed * (1 + 0.3 * (player.ahead - goal) / goal));
        else if (player.ahead > goal + 2) rate = 1.08; // a tab that slept catches up
      }
      player.rate = Math.min(1.08, Math.max(0.15, rate));
    }
    const now = performance.now();
    if (player.began && now - this.reported > REPORT_MS && this.socket.readyState === 1) {
      this.reported = now;
      this.socket.send(JSON.stringify({ position: player.position, rate: player.rate }));
    }
  }

  hold() { this.player.pause(); this.skipGap = true; }
  go() { this.skipGap = true; this.player.play(); }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    this.socket.close();
    this.player.close();
    this.root.remove();
  }
}
