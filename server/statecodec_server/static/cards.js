// One card for each upload and each job.

import { el } from "./plots.js";

const $ = (id) => document.getElementById(id);
const UNDO_SECONDS = 8;
const cards = new Map();
const leaving = new Map(); // key -> what to do when its time is over

export const announce = (text) => { $("announce").textContent = text; };
export const has = (key) => cards.has(key);

export function card(key) {
  if (cards.has(key)) return cards.get(key);
  const root = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => root.querySelector(`.${name}`);
  const found = {
    root, name: part("name"), state: part("state"), meta: part("meta"), meter: part("meter"), detail: part("detail"),
    outcome: part("outcome"), actions: part("actions"), foldButton: part("fold"),
  };
  found.foldButton.addEventListener("click", () => fold(found, !found.root.classList.contains("folded")));
  cards.set(key, found);
  return found;
}

export function place(found) {
  $("work").prepend(found.root);
  $("empty").hidden = true;
}

export function drop(key) {
  cards.get(key)?.root.remove();
  cards.delete(key);
  $("empty").hidden = cards.size > 0;
}

export function fold(found, folded) {
  found.root.classList.toggle("folded", folded);
  found.foldButton.hidden = false;
  found.foldButton.textContent = folded ? "Details" : "Less";
  found.foldButton.setAttribute("aria-expanded", String(!folded));
  if (!folded) found.redraw?.();
}

export function state(found, id, text) {
  found.state.className = `state ${id}`;
  found.state.textContent = text;
}

export function meter(found, fraction, label) {
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

export function action(found, text, run, quiet = true) {
  const button = el("button", { type: "button", ...(quiet ? { class: "quiet" } : {}) }, text);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try { await run(button); } catch (error) { found.detail.textContent = error.message; announce(error.message); }
    button.disabled = false;
  });
  found.actions.append(button);
  return button;
}

// Take a card away, with a while to take that back; `act` is done when the while is over, or the page is left.
export function dropLater(key, title, act) {
  const found = cards.get(key), bar = el("li", { class: "undo" }, el("span", {}, `${title} is being deleted`));
  const button = el("button", { type: "button", class: "quiet" }, "Undo");
  bar.append(button);
  found.root.replaceWith(bar);
  button.focus();
  announce(`${title} is being deleted`);
  const end = async () => {
    clearTimeout(timer);
    leaving.delete(key);
    try {
      await act();
      bar.remove();
      drop(key);
    } catch (error) {
      bar.replaceWith(found.root);
      found.detail.textContent = error.message;
    }
  };
  const timer = setTimeout(end, UNDO_SECONDS * 1000);
  leaving.set(key, end);
  button.addEventListener("click", () => {
    clearTimeout(timer);
    leaving.delete(key);
    bar.replaceWith(found.root);
    announce(`${title} is kept`);
  });
}

addEventListener("pagehide", () => { for (const end of leaving.values()) end(); });
