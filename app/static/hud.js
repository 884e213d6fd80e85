// Measurements of the active stream: tiles, stage bars, chunk chart, window map, receipts.

const STAGES = [
  ["denoise", "transformer", "var(--s1)"],
  ["context", "context pass", "var(--s2)"],
  ["switch", "prompt switch", "var(--s3)"],
  ["decode", "decode", "var(--s4)"],
  ["encode", "encode", "var(--s5)"],
  ["wait", "waiting for a turn", "var(--s6)"],
];
const $ = (id) => document.getElementById(id);

export function percentile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

export const work = (chunk) => (chunk.timings.total ?? 0) + (chunk.timings.encode ?? 0);

const seconds = (value) => value === null || value === undefined ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;

export function bytes(count) {
  if (!count) return "–";
  const power = Math.min(3, Math.floor(Math.log2(count) / 10));
  return `${(count / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KB", "MB", "GB"][power]}`;
}

export function drawHud(view) {
  const put = (id, text) => { const element = $(id); if (element && element.textContent !== text) element.textContent = text; };
  const costs = view.chunks.slice(-60).map(work);
  put("hud-fps", view.player.playing && !view.ended ? view.fps.toFixed(1) : "–");
  put("hud-speed", view.state.speed ? view.state.speed.toFixed(2) : "–");
  put("hud-latency", seconds(view.latency));
  put("hud-buffer", seconds(view.player.ahead));
  put("hud-p50", seconds(percentile(costs, 0.5)));
  put("hud-p95", seconds(percentile(costs, 0.95)));
  put("hud-kv", bytes(view.chunks.at(-1)?.kv_bytes));
  put("hud-stalls", String(view.stalls));
}

export function drawChunk(view, info) {
  const chunk = view.chunks.at(-1);
  if (!chunk) return;
  drawStages(view);
  drawChart(view);
  drawWindow(view, chunk, info);
}

function drawStages(view) {
  const recent = view.chunks.slice(-8);
  const mean = (name) => recent.reduce((sum, chunk) => sum + Math.max(0, chunk.timings[name] ?? 0), 0) / recent.length;
  const rides = mean("context") < 0.02 * mean("denoise"); // the context pass goes with the next block's first step
  const shares = STAGES.map(([stage, label, colour]) => {
    if (rides && stage === "denoise") return ["transformer, context pass", colour, mean(stage) + mean("context")];
    return [label, colour, rides && stage === "context" ? 0 : mean(stage)];
  });
  const total = shares.reduce((sum, [, , value]) => sum + value, 0);
  const media = recent.reduce((sum, chunk) => sum + chunk.seconds, 0) / recent.length;
  const full = Math.max(total, media);
  $("hud-total").textContent = `${seconds(total)} for ${seconds(media)} of video`;
  $("hud-stages").innerHTML = shares.map(([label, colour, value]) =>
    `<i style="width:${(100 * value / full).toFixed(2)}%;background:${colour}" title="${label} ${seconds(value)}"></i>`).join("");
  $("hud-legend").innerHTML = shares.filter(([, , value]) => value > 0.0005).map(([label, colour, value]) =>
    `<span><i style="background:${colour}"></i>${label} <b>${seconds(value)}</b></span>`).join("");
}

function drawChart(view) {
  const canvas = $("hud-chart");
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width) return;
  canvas.width = width * scale; canvas.height = height * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const recent = view.chunks.slice(-60);
  const limit = recent.at(-1).seconds;
  const top = Math.max(limit * 1.25, ...recent.map(work));
  const step = width / 60;
  recent.forEach((chunk, index) => {
    const tall = Math.max(1, (work(chunk) / top) * (height - 2));
    const late = work(chunk) > chunk.seconds;
    context.fillStyle = style.getPropertyValue(chunk.events.length ? "--accent" : late ? "--bad" : "--bar");
    context.beginPath();
    context.roundRect(index * step + 0.5, height - tall, Math.max(1, step - 2), tall, 1.5);
    context.fill();
  });
  const y = Math.round(height - (limit / top) * (height - 2)) + 0.5;
  context.strokeStyle = style.getPropertyValue("--line-strong");
  context.setLineDash([3, 3]);
  context.beginPath(); context.moveTo(0, y); context.lineTo(width, y); context.stroke();
}

// frames that the latest block attended: those of the sink, those of the past, its own; gaps are what was forgotten
function drawWindow(view, chunk, info) {
  const method = info.methods.find((one) => one.name === view.state.method);
  const sink = view.state.options.sink ?? method?.sink ?? 0;
  const attended = [...chunk.attended].sort((a, b) => a - b);
  if (!attended.length) return;
  const own = view.state.options.frames_per_block ?? method?.frames_per_block ?? 3;
  const newest = attended.at(-1);
  let html = "", last = attended[0] - 1;
  for (const frame of attended) {
    if (frame > last + 1) html += `<em title="${frame - last - 1} frames are out of the window">${frame - last - 1}</em>`;
    const kind = frame > newest - own ? "own" : frame < sink ? "sink" : "past";
    html += `<i class="${kind}" title="latent frame ${frame}"></i>`;
    last = frame;
  }
  $("hud-window").innerHTML = html;
  const kept = attended.filter((frame) => frame < sink && frame <= newest - own).length;
  $("hud-window-note").textContent = `${kept} sink · ${attended.length - kept - Math.min(own, attended.length)} past · ${Math.min(own, attended.length)} new`;
}

export function drawReceipts(view) {
  const list = [...view.receipts.values()].slice(-6).reverse();
  $("hud-receipts").innerHTML = !list.length ? '<li class="sv-none">What you type is acknowledged here.</li>' : list.map((receipt) => {
    const where = receipt.status === "applied" ? `chunk ${receipt.chunk} · ${receipt.media_time.toFixed(2)} s`
      : receipt.status === "pending" ? "at the next block" : receipt.status;
    const seen = receipt.latency ? `<b>seen after ${seconds(receipt.latency)}</b>` : "";
    const line = document.createElement("span");
    line.textContent = receipt.text;
    return `<li data-status="${receipt.status}" data-receipt="${receipt.receipt}">${line.outerHTML}<small>${receipt.policy ? `${escapeHtml(receipt.policy)} · ` : ""}${where}</small>${seen}</li>`;
  }).join("");
}

export function escapeHtml(text) {
  const box = document.createElement("span");
  box.textContent = text;
  return box.innerHTML;
}
