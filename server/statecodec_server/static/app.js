// The page: choose, drop, watch, download.

import { Refusal, Upload, call, follow, useToken } from "./api.js";
import { bytes, el, percent, size, table, updates } from "./plots.js";

const $ = (id) => document.getElementById(id);
const PRESETS = {
  lossless: ["Lossless", "bit for bit the same file"],
  resume: ["Resume", "1 % of a step; training goes on as before"],
  small: ["Small", "10 % of a step; smaller, at a reported cost"],
  tiny: ["Tiny", "30 % of a step; for keeping many"],
  live: ["Live", "as the live optimizers hold it"],
  weights: ["Weights", "moments dropped; cannot resume"],
};
const LABELS = { inspect: "Inspect", compress: "Compress", restore: "Restore", verify: "Verify", analyze: "Analyze" };
const ORDER = ["compress", "restore", "inspect", "verify", "analyze"];
const cards = new Map();
let operations = {};

const announce = (text) => { $("announce").textContent = text; };
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
const clock = (seconds) => {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
};

// Cards

function card(key) {
  if (cards.has(key)) return cards.get(key);
  const root = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => root.querySelector(`.${name}`);
  const found = {
    root, name: part("name"), state: part("state"), meta: part("meta"), meter: part("meter"), detail: part("detail"),
    outcome: part("outcome"), actions: part("actions"),
  };
  cards.set(key, found);
  return found;
}

function place(found) {
  $("work").prepend(found.root);
  $("empty").hidden = true;
}

function drop(key) {
  cards.get(key)?.root.remove();
  cards.delete(key);
  $("empty").hidden = cards.size > 0;
}

function state(found, id, text) {
  found.state.className = `state ${id}`;
  found.state.textContent = text;
}

function meter(found, fraction, label) {
  found.meter.hidden = fraction === null;
  found.meter.classList.toggle("unknown", fraction === undefined);
  found.meter.setAttribute("aria-label", label);
  if (typeof fraction === "number") {
    found.meter.setAttribute("aria-valuenow", String(Math.round(100 * fraction)));
    found.meter.firstElementChild.style.width = `${100 * fraction}%`;
  } else {
    found.meter.removeAttribute("aria-valuenow");
    found.meter.firstElementChild.style.removeProperty("width");
  }
}

function action(found, text, run, quiet = true) {
  const button = el("button", { type: "button", ...(quiet ? { class: "quiet" } : {}) }, text);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try { await run(button); } catch (error) { found.detail.textContent = error.message; announce(error.message); }
    button.disabled = false;
  });
  found.actions.append(button);
  return button;
}

// Uploading

async function begin(files, title) {
  const operation = chosen("operation") || "compress";
  const options = settings(operation);
  const total = files.reduce((sum, [file]) => sum + file.size, 0);
  const key = `upload-${performance.now()}`, found = card(key);
  let active = null, finished = 0, rate = 0, before = [performance.now(), 0], stopped = false;

  const show = () => {
    const sent = finished + (active ? Math.max(active.sent || 0, active.offset) : 0);
    const now = performance.now();
    if (now - before[0] > 400) {
      const fresh = ((sent - before[1]) / (now - before[0])) * 1000;
      rate = rate ? 0.7 * rate + 0.3 * fresh : fresh;
      before = [now, sent];
    }
    const paused = Boolean(active?.paused);
    state(found, paused ? "paused" : "uploading", paused ? "Paused" : "Uploading");
    meter(found, total ? Math.min(sent / total, 1) : undefined, `Upload of ${title}`);
    const speed = rate > 0 && !paused ? `, ${size(rate)}/s, ${clock((total - sent) / rate)} left` : "";
    found.detail.textContent = active?.trouble && !paused ? `${active.trouble}; trying again` : `${size(sent)} of ${size(total)}${speed}`;
  };

  found.name.textContent = title;
  found.meta.textContent = files.length > 1 ? `${files.length} files, ${size(total)}` : size(total);
  const toggle = action(found, "Pause", () => {
    if (!active) return;
    if (active.paused) { active.resume(); toggle.textContent = "Pause"; } else { active.pause(); toggle.textContent = "Resume"; }
    announce(`${title}: ${active.paused ? "paused" : "uploading"}`);
    show();
  });
  action(found, "Cancel", () => { stopped = true; active?.stop(); drop(key); announce(`${title}: upload cancelled`); });
  place(found);
  announce(`Uploading ${title}`);
  try {
    const members = [];
    for (const [file, path] of files) {
      if (stopped) return;
      active = new Upload(file, path, show);
      show();
      const upload = await active.run();
      if (!upload) return;
      finished += file.size;
      active = null;
      members.push({ upload: upload.id, path });
    }
    const source = files.length === 1 && !files[0][1].includes("/") ? { upload: members[0].upload } : { uploads: members };
    const job = await call("POST", "/v1/jobs", { operation, source, options }, { "Idempotency-Key": crypto.randomUUID?.() || String(Math.random()) });
    drop(key);
    watch(job);
  } catch (error) {
    state(found, "failed", "Failed");
    meter(found, null, "");
    found.actions.replaceChildren();
    action(found, "Dismiss", () => drop(key));
    found.detail.textContent = error.message;
    announce(`${title}: ${error.message}`);
    refuseToken(error);
  }
}

function settings(operation) {
  const taken = operations[operation]?.options.properties || {};
  const options = {};
  if ("preset" in taken) options.preset = chosen("preset") || "resume";
  if ("verify" in taken) options.verify = $("measure").checked;
  const rules = $("rules").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if ("rules" in taken && rules.length) options.rules = rules;
  const budget = Number($("budget").value);
  if ("max_step_error" in taken && budget > 0) options.max_step_error = budget;
  return options;
}

// Jobs

const VERBS = { compress: "Compressing", restore: "Restoring", inspect: "Inspecting", verify: "Verifying", diff: "Comparing" };

function draw(job) {
  const found = card(job.id);
  const preset = job.options.preset ? `, preset ${job.options.preset}` : "";
  found.name.textContent = job.name;
  found.meta.textContent = `${LABELS[job.operation] || job.operation}${preset} \u00b7 ${size(job.bytes_in)} \u00b7 ${new Date(job.created).toLocaleString()}`;
  const words = { queued: "Queued", running: VERBS[job.operation] || "Running", succeeded: "Done", failed: "Failed", cancelled: "Cancelled" };
  state(found, job.state, job.cancelling ? "Cancelling" : words[job.state]);
  const { stage, done, total, rate, eta } = job.progress;
  if (job.state === "running" || job.state === "queued") {
    meter(found, total ? done / total : undefined, `${words[job.state]} ${job.name}`);
    const left = eta === null ? "" : `, ${clock(eta)} left`;
    found.detail.textContent = job.state === "queued" ? "Waiting for a worker" : `${stage}${total ? `: ${size(done)} of ${size(total)}` : ""}${rate > 0 ? `, ${size(rate)}/s` : ""}${left}`;
  } else {
    meter(found, null, "");
    found.detail.textContent = job.error ? `${job.error.message} (${job.error.code})` : "";
    found.detail.classList.toggle("bad", Boolean(job.error));
  }
  return found;
}

async function watch(job) {
  const found = draw(job);
  place(found);
  if (job.state === "queued" || job.state === "running") {
    found.actions.replaceChildren();
    action(found, "Cancel", () => call("POST", `/v1/jobs/${job.id}/cancel`));
    try { job = await follow(job.id, draw); } catch (error) { found.detail.textContent = error.message; return; }
    announce(`${job.name}: ${found.state.textContent}${job.error ? `, ${job.error.message}` : ""}`);
  }
  await finish(job, found);
}

async function finish(job, found) {
  found.actions.replaceChildren();
  if (job.state === "succeeded") {
    const report = await call("GET", `/v1/jobs/${job.id}/report`).catch(() => null);
    if (report) outcome(job, report, found);
    if (job.files.length) {
      action(found, `Download ${size(job.bytes_out)}`, async () => {
        const link = await call("POST", `/v1/jobs/${job.id}/link`);
        const anchor = el("a", { href: link.href, download: "" });
        document.body.append(anchor);
        anchor.click();
        anchor.remove();
        announce(`Downloading ${job.name}`);
      }, false);
    }
    action(found, "Report as JSON", () => save(`${job.name}.report.json`, report));
  }
  action(found, "Delete", async () => {
    await call("DELETE", `/v1/jobs/${job.id}`);
    drop(job.id);
    announce(`${job.name} deleted`);
    $("work-title").focus?.();
  });
}

function save(name, document_) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(document_, null, 2)], { type: "application/json" }));
  const anchor = el("a", { href: url, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function outcome(job, report, found) {
  const figures = [];
  const add = (label, value, unit = "") => figures.push(el("div", { class: "figure" }, el("dt", {}, label), el("dd", {}, value, " ", el("small", {}, unit))));
  if (job.operation === "compress") {
    add("smaller by", `${(job.bytes_in / job.bytes_out).toFixed(2)}\u00d7`);
    add("size now", size(job.bytes_out), `from ${size(job.bytes_in)}`);
    if (report.bytes_per_param) add("per parameter", report.bytes_per_param.toFixed(2), "bytes");
    if (report.total?.u_rms !== undefined) add("error of the next step", percent(report.total.u_rms), "rms");
  } else if (job.files.length) {
    add("result", size(job.bytes_out));
  } else if (report.tensors) {
    add("tensors", String(report.tensors.length));
    if (report.num_params) add("parameters", report.num_params.toLocaleString());
  }
  const plots = [];
  if (report.tensors?.length && report.tensors[0].bytes_before !== undefined) plots.push(bytes(report));
  const moved = updates(report);
  if (moved) plots.push(moved);
  const parts = [el("dl", { class: "headline" }, ...figures), el("div", { class: "plots" }, ...plots)];
  if (report.tensors?.length && report.tensors[0].bytes_before !== undefined) parts.push(table(report));
  if (report.notes?.length) parts.push(el("ul", { class: "notes" }, ...report.notes.slice(0, 50).map((note) => el("li", {}, note))));
  found.outcome.replaceChildren(...parts);
  found.outcome.hidden = false;
}

// Choosing files

async function entries(entry, prefix = "") {
  if (entry.isFile) return [[await new Promise((done, fail) => entry.file(done, fail)), prefix + entry.name]];
  const reader = entry.createReader(), found = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return found;
    for (const inner of some) found.push(...await entries(inner, `${prefix}${entry.name}/`));
  }
}

function choose() {
  $("choose-file").addEventListener("click", () => $("file").click());
  $("choose-folder").addEventListener("click", () => $("folder").click());
  $("file").addEventListener("change", (event) => {
    for (const file of event.target.files) begin([[file, file.name]], file.name);
    event.target.value = "";
  });
  $("folder").addEventListener("change", (event) => {
    const files = [...event.target.files].map((file) => [file, file.webkitRelativePath]);
    if (files.length) begin(files, files[0][1].split("/")[0]);
    event.target.value = "";
  });
  const zone = $("drop");
  for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, (event) => { event.preventDefault(); zone.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
  zone.addEventListener("drop", async (event) => {
    event.preventDefault();
    const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    for (const entry of dropped) begin(await entries(entry), entry.name);
  });
  for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
}

// Starting

function radios() {
  const names = ORDER.filter((name) => operations[name] && !operations[name].other_required);
  $("operations").append(...names.map((name, index) => {
    const input = el("input", { type: "radio", name: "operation", value: name });
    input.checked = index === 0;
    input.addEventListener("change", () => { $("presets").hidden = $("more").hidden = name !== "compress"; });
    return el("label", { class: "pill" }, input, el("span", {}, LABELS[name]));
  }));
  const preset = operations.compress?.options.properties.preset;
  $("presets").append(...(preset?.enum || []).map((name) => {
    const input = el("input", { type: "radio", name: "preset", value: name });
    input.checked = name === (preset.default || "resume");
    const [label, text] = PRESETS[name] || [name, ""];
    return el("label", { class: "preset" }, input, el("span", { class: "mark", "aria-hidden": "true" }), el("strong", {}, label), el("span", { class: "hint" }, text));
  }));
  $("budget-field").hidden = !("max_step_error" in (operations.compress?.options.properties || {}));
}

function refuseToken(error) {
  if (!(error instanceof Refusal) || error.status !== 401) return false;
  $("access").open = true;
  $("token-problem").textContent = error.code === "auth.missing" ? "This service asks for a token." : error.message;
  $("token").focus();
  return true;
}

async function enter() {
  try {
    if (!Object.keys(operations).length) {
      operations = Object.fromEntries((await call("GET", "/v1/operations")).map((item) => [item.name, item]));
      radios();
    }
    $("token-problem").textContent = "";
    $("access").open = false;
    for (const job of (await call("GET", "/v1/jobs")).slice(0, 20).reverse()) if (!cards.has(job.id)) watch(job);
  } catch (error) {
    if (!refuseToken(error)) announce(error.message);
  }
}

async function health() {
  let text = "not reachable", good = false;
  try {
    const answer = await fetch("/readyz");
    const found = await answer.json();
    good = answer.ok;
    const bad = Object.entries(found.checks).find(([, check]) => !check.ok);
    text = good ? "ready" : `${bad?.[0]}: ${bad?.[1].detail}`;
  } catch { /* the text says it */ }
  $("health").className = `health ${good ? "good" : "bad"}`;
  if ($("health-text").textContent !== text) $("health-text").textContent = text;
}

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("statecodec.token", given);
  history.replaceState(null, "", location.pathname); // out of the address bar and the history
}
useToken(sessionStorage.getItem("statecodec.token") || "");
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("statecodec.token", $("token").value.trim());
  useToken($("token").value.trim());
  $("token").value = "";
  enter();
});
choose();
enter();
health();
setInterval(health, 10000);
