// The page: choose, drop, watch, download.

import { Refusal, call, onLost, sleep, useToken } from "./api.js";
import { announce, has } from "./cards.js";
import { NotUnderstood, build, known, plan, setSecond } from "./form.js";
import { el } from "./plots.js";
import { begin, listPending, onRefusal, watch } from "./jobs.js";

const $ = (id) => document.getElementById(id);
const HEALTH_SECONDS = 5;
const RETRY_SECONDS = 3;
const SHOWN = 30;

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

// `chosen`: [[files, title], ...]. Everything is understood before anything is sent.
function start(chosen) {
  try {
    let wanted = plan();
    if (wanted.operation === "diff" && !wanted.second && chosen.length === 2) {
      const [files, title] = chosen.pop();
      wanted = { ...wanted, second: { files, title } };
    }
    if (wanted.operation === "diff" && !wanted.second) throw new NotUnderstood("Choose the second checkpoint first, or drop both.", $("choose-second"));
    for (const [files, title] of chosen) if (files.length) begin(files, title, wanted);
    setSecond(null);
  } catch (error) {
    if (!(error instanceof NotUnderstood)) throw error;
    $("plan").textContent = error.message;
    $("plan").className = "plan bad";
    if (error.field?.closest("details")) error.field.closest("details").open = true;
    error.field?.focus();
    announce(error.message);
  }
}

function choose() {
  const single = (list) => [...list].map((file) => [[[file, file.name]], file.name]);
  for (const id of ["file", "folder", "second-file"]) {
    $(id === "second-file" ? "choose-second" : `choose-${id}`).addEventListener("click", () => $(id).click());
  }
  $("file").addEventListener("change", (event) => { start(single(event.target.files)); event.target.value = ""; });
  $("second-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) setSecond([[file, file.name]], file.name);
    event.target.value = "";
  });
  $("folder").addEventListener("change", (event) => {
    const files = [...event.target.files].map((file) => [file, file.webkitRelativePath]);
    if (files.length) start([[files, files[0][1].split("/")[0]]]);
    event.target.value = "";
  });
  const zone = $("drop");
  for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, (event) => { event.preventDefault(); zone.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
  zone.addEventListener("drop", async (event) => {
    event.preventDefault();
    const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    start(await Promise.all(dropped.map(async (entry) => [await entries(entry), entry.name])));
  });
  for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
}

// Starting

function refuseToken(error) {
  if (!(error instanceof Refusal) || error.status !== 401) return false;
  $("access").open = true;
  $("who").textContent = "Access token";
  $("token-problem").textContent = error.code === "auth.missing" ? "This service asks for a token." : error.message;
  $("token").focus();
  return true;
}

let visit = 0; // the newest call of enter(); older ones give up

async function enter() {
  const mine = visit += 1;
  while (mine === visit) {
    try {
      const who = await call("GET", "/v1/token");
      if (!known()) build(await call("GET", "/v1/operations"));
      if (who.name === "anonymous") $("who").textContent = "No token needed";
      else $("who").replaceChildren(el("span", { class: "long" }, "Signed in: "), who.name);
      $("token-problem").textContent = "";
      $("access").open = false;
      const jobs = (await call("GET", "/v1/jobs")).slice(0, SHOWN).filter((job) => !has(job.id));
      jobs.reverse().forEach((job, index) => watch(job, index < jobs.length - 1));
      await listPending();
      return;
    } catch (error) {
      if (refuseToken(error)) return;
      if (!known()) $("plan").textContent = `${error.message}; trying again`;
      await sleep(RETRY_SECONDS * 1000);
    }
  }
}

async function health() {
  let text = "not reachable", good = false;
  try {
    const answer = await fetch("/readyz", { signal: AbortSignal.timeout(HEALTH_SECONDS * 1000), cache: "no-store" });
    const found = await answer.json();
    good = answer.ok;
    const bad = Object.entries(found.checks).find(([, check]) => !check.ok);
    text = good ? "ready" : `${bad?.[0]}: ${bad?.[1].detail}`;
  } catch { /* the text says it */ }
  $("health").className = `health ${good ? "good" : "bad"}`;
  if ($("health-text").textContent !== text) $("health-text").textContent = text;
}

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return false;
  sessionStorage.setItem("statecodec.token", given);
  history.replaceState(null, "", location.pathname); // out of the address bar and the history
  return true;
}

takeToken();
addEventListener("hashchange", () => { if (takeToken()) location.reload(); }); // a link opened where the page is already
useToken(sessionStorage.getItem("statecodec.token") || "");
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("statecodec.token", $("token").value.trim());
  useToken($("token").value.trim());
  $("token").value = "";
  enter();
});
onRefusal(refuseToken);
onLost(health);
choose();
enter();
health();
setInterval(health, HEALTH_SECONDS * 1000);
