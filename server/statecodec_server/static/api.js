// Talking to the service: requests with the token, resumable uploads, live jobs.

const TUS = { "Tus-Resumable": "1.0.0" };
const CHUNK = 8 * 1024 * 1024;
const NOTES = "statecodec.uploads";

export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.detail || `the service answered ${status}`);
    this.status = status;
    this.code = problem.code || "http";
  }
}

let token = "";
export const useToken = (text) => { token = text; };

const headers = (more = {}) => ({ ...(token ? { Authorization: `Bearer ${token}` } : {}), ...more });

async function refusal(answer) {
  let problem = {};
  try { problem = await answer.json(); } catch { /* a body that is no JSON says no more than the status does */ }
  return new Refusal(answer.status, problem);
}

let lost = () => {}; // told when the service does not answer at all
export const onLost = (run) => { lost = run; };

// `keepalive`: finish even when the page is left.
export async function call(method, path, body, more = {}, keepalive = false) {
  const json = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await fetch(path, {
    method, keepalive, headers: headers({ ...json, ...more }), body: body === undefined ? undefined : JSON.stringify(body),
  }).catch(() => { lost(); throw new Error("the service does not answer"); });
  if (!answer.ok) throw await refusal(answer);
  return answer.status === 204 ? null : answer.json();
}

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// Events of a job until it ends. EventSource cannot send a token, so the stream is read by hand; when it breaks, poll.
export async function follow(id, tell) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const answer = await fetch(`/v1/jobs/${id}/events`, { headers: headers({ Accept: "text/event-stream" }) });
      if (!answer.ok) throw await refusal(answer);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        text += value;
        const events = text.split("\n\n");
        text = events.pop();
        for (const event of events) {
          const data = event.split("\n").find((line) => line.startsWith("data: "));
          if (!data) continue;
          const job = JSON.parse(data.slice(6));
          wait = 500;
          tell(job);
          if (["succeeded", "failed", "cancelled"].includes(job.state)) return job;
        }
      }
    } catch (error) {
      if (error instanceof Refusal && error.status < 500) throw error;
      lost();
    }
    await sleep(wait);
  }
}

const notes = () => { try { return JSON.parse(localStorage.getItem(NOTES)) || {}; } catch { return {}; } };
const note = (key, value) => {
  const all = notes();
  if (value) all[key] = value; else delete all[key];
  localStorage.setItem(NOTES, JSON.stringify(all));
};

// What is noted of uploads that have not ended: where they are, and what was to be done with them.
export const pending = () => Object.entries(notes()).filter(([key, value]) => key.startsWith(`${location.origin}|`) && value.url)
  .map(([key, value]) => ({ key, ...value }));
export const discard = (key) => note(key, null);

const running = new Set(); // keys of the uploads of this page
export const isRunning = (key) => running.has(key);

const encode = (bytes) => btoa(String.fromCharCode(...bytes));

// One file on its way up. It may be paused, the connection may break, the page may be closed: it goes on where it was.
export class Upload {
  constructor(file, name, tell, about, key) {
    Object.assign(this, { file, name, tell, about, offset: 0, paused: false, stopped: false, request: null, url: null });
    this.key = key || `${location.origin}|${name}|${file.size}|${file.lastModified}`;
  }

  pause() { this.paused = true; this.request?.abort(); this.tell(this); }
  resume() { this.paused = false; this.wake?.(); this.tell(this); }
  stop() { this.stopped = true; this.request?.abort(); this.wake?.(); }

  async run() {
    running.add(this.key);
    try { return await this.toTheEnd(); } finally { running.delete(this.key); }
  }

  async toTheEnd() {
    let wait = 500;
    while (!this.stopped) {
      if (this.paused) { await new Promise((wake) => { this.wake = wake; }); continue; }
      try {
        if (!this.url) await this.open();
        await this.ask();
        while (this.offset < this.file.size && !this.paused && !this.stopped) {
          await this.send();
          wait = 500;
        }
        if (this.offset >= this.file.size) return await this.settle();
      } catch (error) {
        if (this.paused || this.stopped) continue;
        if (error instanceof Refusal && error.status < 500 && ![404, 408, 409, 410, 423, 429, 460].includes(error.status)) throw error;
        if (error instanceof Refusal && error.status === 507) throw error;
        if (error.status === 404 || error.status === 410) { note(this.key, null); this.url = null; }
        this.trouble = error.message;
        if (!(error instanceof Refusal)) lost();
        this.tell(this);
        await sleep(wait);
        wait = Math.min(wait * 2, 10000);
      }
    }
    if (this.url) await call("DELETE", this.url, undefined, TUS).catch(() => {});
    note(this.key, null);
    return null;
  }

  async open() {
    this.url = notes()[this.key]?.url || null;
    if (this.url) return;
    const name = encode(new TextEncoder().encode(this.name.split("/").pop()));
    const answer = await fetch("/v1/uploads", {
      method: "POST",
      headers: headers({ ...TUS, "Upload-Length": String(this.file.size), "Upload-Metadata": `filename ${name}` }),
    });
    if (!answer.ok) throw await refusal(answer);
    this.url = new URL(answer.headers.get("Location"), location.href).pathname;
    note(this.key, { url: this.url, name: this.name, size: this.file.size, about: this.about });
  }

  async ask() {
    const answer = await fetch(this.url, { method: "HEAD", headers: headers(TUS) });
    if (!answer.ok) throw new Refusal(answer.status, {});
    this.offset = Number(answer.headers.get("Upload-Offset"));
    this.trouble = null;
    this.tell(this);
  }

  async send() {
    const start = this.offset;
    const piece = this.file.slice(start, Math.min(start + CHUNK, this.file.size));
    const extra = { ...TUS, "Upload-Offset": String(start), "Content-Type": "application/offset+octet-stream" };
    if (globalThis.crypto?.subtle) { // only on https and localhost
      const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await piece.arrayBuffer()));
      extra["Upload-Checksum"] = `sha256 ${encode(digest)}`;
    }
    this.offset = await new Promise((resolve, reject) => {
      const request = this.request = new XMLHttpRequest(); // fetch cannot report how much has been sent
      request.open("PATCH", this.url);
      for (const [key, value] of Object.entries(headers(extra))) request.setRequestHeader(key, value);
      request.upload.onprogress = (event) => { this.sent = start + event.loaded; this.tell(this); };
      request.onload = () => {
        if (request.status === 204) return resolve(Number(request.getResponseHeader("Upload-Offset")));
        let problem = {};
        try { problem = JSON.parse(request.responseText); } catch { /* the status has to do */ }
        return reject(new Refusal(request.status, problem));
      };
      request.onerror = () => reject(new Error("the connection was lost"));
      request.onabort = () => reject(new Error("stopped"));
      request.send(piece);
    });
    this.sent = this.offset;
    this.tell(this);
  }

  async settle() {
    for (;;) {
      const upload = await call("GET", this.url);
      if (upload.state === "ready") { note(this.key, null); return upload; }
      if (upload.state !== "finishing") throw new Refusal(422, { detail: "the upload was refused", code: "upload.digest" });
      await sleep(300);
    }
  }
}
