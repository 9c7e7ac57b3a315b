// Jobs: from the files that were dropped, over the upload, to the result.

import { Refusal, Upload, call, discard, follow, isRunning, pending } from "./api.js";
import { action, announce, card, drop, dropLater, fold, has, meter, place, state } from "./cards.js";
import { said } from "./form.js";
import { outcome } from "./outcome.js";
import { el, size } from "./plots.js";
import { words } from "./words.js";

const clock = (seconds) => {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
};
let refuse = () => false; // what to do about a token that is not taken

export const onRefusal = (run) => { refuse = run; };

function sending(found, title, total) {
  let finished = 0, rate = 0, before = [performance.now(), 0], active = null;
  const show = () => {
    const sent = finished + (active ? Math.max(active.sent || 0, active.offset) : 0), now = performance.now();
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
  return {
    show,
    get active() { return active; },
    async all(files, about, stopped, resumed) {
      const members = [];
      for (const [file, path] of files) {
        if (stopped()) return null;
        active = new Upload(file, path, show, about, resumed);
        drop(active.key); // it goes on here
        show();
        const upload = await active.run();
        if (!upload) return null;
        finished += file.size;
        active = null;
        members.push({ upload: upload.id, path });
      }
      return files.length === 1 && !files[0][1].includes("/") ? { upload: members[0].upload } : { uploads: members };
    },
  };
}

// Upload and submit. `plan` was read, and shown, before anything was sent.
export async function begin(files, title, plan) {
  const second = plan.second?.files || [];
  const total = [...files, ...second].reduce((sum, [file]) => sum + file.size, 0);
  const key = `upload-${performance.now()}`, found = card(key), progress = sending(found, title, total);
  let stopped = false;
  found.name.textContent = plan.second ? `${title} and ${plan.second.title}` : title;
  found.meta.textContent = `${said(plan.operation, plan.options)} \u00b7 ${files.length > 1 ? `${files.length} files, ` : ""}${size(total)}`;
  const toggle = action(found, "Pause", () => {
    const active = progress.active;
    if (!active) return;
    if (active.paused) { active.resume(); toggle.textContent = "Pause"; } else { active.pause(); toggle.textContent = "Resume"; }
    announce(`${title}: ${active.paused ? "paused" : "uploading"}`);
    progress.show();
  });
  action(found, "Cancel", () => { stopped = true; progress.active?.stop(); drop(key); announce(`${title}: upload cancelled`); });
  place(found);
  announce(`Uploading ${title}`);
  try {
    const about = { title, operation: plan.operation, options: plan.options };
    const source = await progress.all(files, about, () => stopped, plan.resumed);
    const other = second.length && source ? await progress.all(second, { ...about, title: plan.second.title, part: "second" }, () => stopped) : undefined;
    if (!source || other === null) return;
    const body = { operation: plan.operation, source, options: plan.options, ...(other ? { other } : {}) };
    const job = await call("POST", "/v1/jobs", body, { "Idempotency-Key": crypto.randomUUID?.() || String(Math.random()) });
    drop(key);
    watch(job);
  } catch (error) {
    state(found, "failed", "Failed");
    meter(found, null, "");
    found.actions.replaceChildren();
    action(found, "Dismiss", () => drop(key));
    found.detail.textContent = error.message;
    announce(`${title}: ${error.message}`);
    refuse(error);
  }
}

// Uploads that an earlier visit to this page left unfinished.
export async function listPending() {
  for (const { key, url, name, size: length, about } of pending()) {
    if (has(key) || about?.part) continue;
    const upload = await call("GET", url).catch((error) => (error instanceof Refusal && error.status === 404 ? null : undefined));
    if (upload === undefined || isRunning(key)) continue; // a file may be chosen before all is listed
    if (upload === null || upload.state !== "receiving") { discard(key); continue; }
    const found = card(key), file = el("input", { type: "file", class: "sr", tabindex: "-1", "aria-label": `The file ${name} again` });
    found.name.textContent = name;
    found.meta.textContent = about ? said(about.operation, about.options) : "";
    state(found, "paused", "Interrupted");
    meter(found, length ? upload.offset / length : 0, `Upload of ${name}`);
    found.detail.textContent = `${size(upload.offset)} of ${size(length)} are here. Go on with the same file.`;
    file.addEventListener("change", () => {
      const again = file.files[0];
      if (!again) return;
      if (again.name !== name.split("/").pop() || again.size !== length) {
        found.detail.textContent = `That is another file: ${again.name}, ${size(again.size)}; this upload is of ${name}, ${size(length)}.`;
        return;
      }
      drop(key);
      begin([[again, name]], about?.title || name, { ...(about || { operation: "compress", options: {} }), second: null, resumed: key });
    });
    found.root.append(file);
    action(found, "Go on", () => file.click(), false);
    action(found, "Discard", async () => {
      await call("DELETE", url, undefined, { "Tus-Resumable": "1.0.0" });
      discard(key);
      drop(key);
      announce(`The upload of ${name} is gone`);
    });
    place(found);
  }
}

function draw(job) {
  const found = card(job.id), about = words(job.operation);
  found.name.textContent = job.name;
  found.meta.textContent = `${said(job.operation, job.options)} \u00b7 ${size(job.bytes_in)} \u00b7 ${new Date(job.created).toLocaleString()}`;
  const labels = { queued: "Queued", running: about.running, succeeded: "Done", failed: "Failed", cancelled: "Cancelled" };
  state(found, job.state, job.cancelling ? "Cancelling" : labels[job.state]);
  const { stage, done, total, rate, eta } = job.progress;
  if (job.state === "running" || job.state === "queued") {
    meter(found, total ? done / total : undefined, `${labels[job.state]} ${job.name}`);
    const left = eta === null ? "" : `, ${clock(eta)} left`;
    found.detail.textContent = job.state === "queued" ? "Waiting for a worker" : `${stage}${total ? `: ${size(done)} of ${size(total)}` : ""}${rate > 0 ? `, ${size(rate)}/s` : ""}${left}`;
  } else {
    meter(found, null, "");
    found.detail.textContent = job.error ? `${job.error.message} (${job.error.code})` : "";
    found.detail.classList.toggle("bad", Boolean(job.error));
  }
  return found;
}

// A job's card from now on; `folded` for those that had ended before this visit.
export async function watch(job, folded = false) {
  const found = draw(job);
  place(found);
  if (job.state === "queued" || job.state === "running") {
    found.actions.replaceChildren();
    action(found, "Cancel", () => call("POST", `/v1/jobs/${job.id}/cancel`));
    try { job = await follow(job.id, draw); } catch (error) { found.detail.textContent = error.message; return; }
    announce(`${job.name}: ${found.state.textContent}${job.error ? `, ${job.error.message}` : ""}`);
    folded = false;
  }
  await finish(job, found, folded);
}

async function finish(job, found, folded) {
  found.actions.replaceChildren();
  if (job.state === "succeeded") {
    const report = await call("GET", `/v1/jobs/${job.id}/report`).catch(() => null);
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
    if (report) {
      found.redraw = () => outcome(job, report, found.outcome);
      action(found, "Report as JSON", () => save(`${job.name}.report.json`, report));
      fold(found, folded);
    }
  }
  action(found, "Delete", () => dropLater(job.id, job.name, () => call("DELETE", `/v1/jobs/${job.id}`, undefined, {}, true)));
}

function save(name, text) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(text, null, 2)], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
