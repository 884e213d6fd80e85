// Two players of one shape: Media Source Extensions with fragmented MP4, and pictures on a canvas where H.264 is missing.
//
//   position, ahead     seconds of media time: what is shown, and what is there behind it
//   rate                how fast it plays; pause(), play(), push(kind, time, bytes), close()
//   onframe(time)       called for every frame that reaches the screen

const HEADER = 0, PIECE = 1, PICTURE = 2;
const START_SECONDS = 0.35; // there before play-out begins
const KEEP_SECONDS = 20;    // behind the playhead, then the browser's buffer is cut

export function supportsH264() {
  return "MediaSource" in window && MediaSource.isTypeSupported('video/mp4; codecs="avc1.42c00b"');
}

export function createPlayer(kind, start) {
  return kind === "mse" ? new MsePlayer(start) : new CanvasPlayer(start);
}

class MsePlayer {
  constructor(start) {
    this.start = start;
    this.element = document.createElement("video");
    Object.assign(this.element, { muted: true, playsInline: true, disableRemotePlayback: true });
    this.element.dataset.player = "mse";
    this.queue = [];
    this.playing = true;
    this.began = false;
    this.onframe = () => {};
    this.closed = false;
    this.watch();
  }

  get position() { return this.began ? this.element.currentTime : this.start; }
  get ahead() {
    const ranges = this.element.buffered;
    return ranges.length ? Math.max(0, ranges.end(ranges.length - 1) - this.element.currentTime) : 0;
  }
  get rate() { return this.element.playbackRate; }
  set rate(value) { if (Math.abs(value - this.rate) > 0.015) this.element.playbackRate = value; }

  push(kind, time, bytes) {
    if (kind === HEADER) this.open(codecOf(bytes));
    this.queue.push(bytes);
    this.feed();
  }

  open(codec) {
    this.source = new MediaSource();
    this.element.src = URL.createObjectURL(this.source);
    this.source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(this.element.src);
      this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
      this.buffer.timestampOffset = this.start; // the file of a fork begins at 0, its time does not
      this.buffer.addEventListener("updateend", () => this.feed());
      this.feed();
    }, { once: true });
  }

  feed() {
    if (!this.buffer || this.buffer.updating || this.closed) return;
    this.begin();
    const behind = this.element.currentTime - KEEP_SECONDS;
    const ranges = this.buffer.buffered;
    if (ranges.length && behind - ranges.start(0) > KEEP_SECONDS) return this.buffer.remove(0, behind);
    if (!this.queue.length) return;
    try {
      this.buffer.appendBuffer(this.queue[0]);
      this.queue.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError" || !ranges.length) throw error;
      this.buffer.remove(0, Math.max(ranges.start(0) + 0.1, this.element.currentTime - 2));
    }
  }

  begin() {
    const ranges = this.element.buffered;
    if (this.began || !ranges.length || ranges.end(0) - ranges.start(0) < START_SECONDS) return;
    this.began = true;
    this.element.currentTime = ranges.start(0);
    if (this.playing) this.play();
  }

  watch() {
    this.element.requestVideoFrameCallback?.((_, frame) => {
      if (this.closed) return;
      this.onframe(frame.mediaTime);
      this.watch();
    });
  }

  seek(time) { this.element.currentTime = time; }
  play() { this.playing = true; if (this.began) this.element.play().catch(() => {}); }
  pause() { this.playing = false; this.element.pause(); }
  picture() { return this.element.readyState >= 2 ? this.element : null; }
  close() { this.closed = true; this.element.pause(); this.element.removeAttribute("src"); this.element.load(); }
}

class CanvasPlayer {
  constructor(start) {
    this.start = start;
    this.element = document.createElement("canvas");
    this.element.dataset.player = "canvas";
    this.context = this.element.getContext("2d");
    this.frames = []; // [time, ImageBitmap] in order
    this.began = false;
    this.playing = true;
    this.rate = 1;
    this.at = start;
    this.shown = start;
    this.last = 0;
    this.decoding = Promise.resolve();
    this.onframe = () => {};
    this.closed = false;
    requestAnimationFrame((now) => this.tick(now));
  }

  get position() { return this.shown; }
  get ahead() { return this.frames.length ? Math.max(0, this.frames.at(-1)[0] - this.shown) : 0; }

  push(kind, time, bytes) {
    if (kind !== PICTURE) return;
    const picture = createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    this.decoding = this.decoding.then(async () => { this.frames.push([time, await picture]); }).catch(() => {});
  }

  tick(now) {
    if (this.closed) return;
    requestAnimationFrame((next) => this.tick(next));
    if (!this.began) {
      if (this.ahead < START_SECONDS) return;
      this.began = true;
      this.at = this.frames[0][0];
    } else if (this.playing) {
      const end = this.frames.length ? this.frames.at(-1)[0] : this.shown;
      this.at = Math.min(this.at + (Math.min(now - this.last, 250) / 1000) * this.rate, Math.max(end, this.shown));
    }
    this.last = now;
    let frame;
    while (this.frames.length && this.frames[0][0] <= this.at + 1e-6) {
      frame?.[1].close();
      frame = this.frames.shift();
    }
    if (frame) this.show(frame);
  }

  show([time, picture]) {
    if (this.element.width !== picture.width || this.element.height !== picture.height) {
      Object.assign(this.element, { width: picture.width, height: picture.height });
    }
    this.context.drawImage(picture, 0, 0);
    picture.close();
    this.shown = time;
    this.onframe(time);
  }

  seek(time) { this.at = Math.max(this.at, time); } // frames behind are gone
  play() { this.playing = true; }
  pause() { this.playing = false; }
  picture() { return this.element.width ? this.element : null; }
  close() { this.closed = true; for (const [, picture] of this.frames) picture.close(); this.frames = []; }
}

// `avc1.PPCCLL` from the avcC box of an initialisation segment
function codecOf(bytes) {
  const data = new Uint8Array(bytes);
  for (let i = 0; i < data.length - 8; i++) {
    if (data[i] === 0x61 && data[i + 1] === 0x76 && data[i + 2] === 0x63 && data[i + 3] === 0x43) {
      return "avc1." + [...data.slice(i + 5, i + 8)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    }
  }
  throw new Error("no H.264 in the stream");
}
