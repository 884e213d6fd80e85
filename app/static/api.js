// The HTTP API, as the page uses it.

export class ApiError extends Error {}

async function request(method, path, body) {
  const options = { method, headers: {} };
  if (body instanceof Blob || body instanceof ArrayBuffer) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) {
    let detail = `${response.status} ${response.statusText}`;
    try { detail = (await response.json()).detail ?? detail; } catch { /* not JSON */ }
    throw new ApiError(typeof detail === "string" ? detail : JSON.stringify(detail));
  }
  if (response.status === 204) return null;
  const kind = response.headers.get("Content-Type") ?? "";
  return kind.includes("json") ? response.json() : response.text();
}

const stream = (name) => `/api/streams/${encodeURIComponent(name)}`;

export const api = {
  info: () => request("GET", "/api/info"),
  create: (body) => request("POST", "/api/streams", body),
  restore: (file) => request("POST", "/api/streams/resume?linger=0.6", file),
  state: (name) => request("GET", stream(name)),
  prompt: (name, text, policy) => request("POST", `${stream(name)}/prompt`, { text, policy }),
  cut: (name, text) => request("POST", `${stream(name)}/cut`, { text }),
  pause: (name) => request("POST", `${stream(name)}/pause`),
  resume: (name) => request("POST", `${stream(name)}/resume`),
  reset: (name, seed) => request("POST", `${stream(name)}/reset`, { seed }),
  fork: (name) => request("POST", `${stream(name)}/fork`),
  stop: (name) => request("POST", `${stream(name)}/stop`),
  remove: (name) => request("DELETE", stream(name)),
  script: (name) => request("GET", `${stream(name)}/script.yaml`),
  checkScript: (text) => request("POST", "/api/scripts/check", { text }),
  // a tab that goes can only post, and cannot wait
  leave: (name) => navigator.sendBeacon(`${stream(name)}/close`),
  url: (name, path) => `${stream(name)}/${path}`,
  socket: (name, player, firstEvent) => {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    return new WebSocket(`${scheme}://${location.host}${stream(name)}/socket?player=${player}&first_event=${firstEvent}`);
  },
};
