// The form: what is to be done, read from the service's own table of operations, and said in words before it starts.

import { el, size } from "./plots.js";
import { ORDER, optionExample, optionLabel, words } from "./words.js";

const $ = (id) => document.getElementById(id);
const QUIET = new Set(["verify"]); // asked for unless it is unticked
let operations = {};
let second = null; // [[file, path], ...] of the other checkpoint, and its title

export class NotUnderstood extends Error {
  constructor(text, field) { super(text); this.field = field; }
}

export const known = () => Object.keys(operations).length > 0;
const operation = () => document.querySelector('input[name="operation"]:checked')?.value || "compress";
const properties = (name) => operations[name]?.options.properties || {};

// Options of which exactly one is given.
const alternatives = (name) => (operations[name].options.oneOf || []).flatMap((one) => one.required);

// A number as people write it: 0.01, 0,01, 1e-2, 1 %.
export function number(text) {
  const found = /^([0-9]*[.,]?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%?)$/i.exec(text.trim());
  return found ? Number(found[1].replace(",", ".")) / (found[2] ? 100 : 1) : NaN;
}

function value(name, schema, input) {
  if (schema.type === "boolean") return input.checked === Boolean(schema.default) && !QUIET.has(name) ? undefined : input.checked;
  const text = input.value.trim();
  if (!text) return undefined;
  if (schema.type === "array") return text.split("\n").map((line) => line.trim()).filter(Boolean);
  if (schema.type !== "number") {
    if (schema.pattern && !new RegExp(schema.pattern).test(text)) throw new NotUnderstood(`${optionLabel(name)}: \u201c${text}\u201d is not understood`, input);
    return text;
  }
  const found = number(text);
  const low = schema.exclusiveMinimum ?? -Infinity, high = schema.maximum ?? Infinity;
  if (!(found > low && found <= high)) throw new NotUnderstood(`${optionLabel(name)}: \u201c${text}\u201d is no number above ${low} and at most ${high}`, input);
  return found;
}

// What would be done now: {operation, options, second}, or NotUnderstood.
export function plan() {
  if (!known()) throw new NotUnderstood("The service has not answered yet; nothing was started.");
  const name = operation(), options = {};
  for (const [option, schema] of Object.entries(properties(name))) {
    const input = option === "preset" ? document.querySelector('input[name="preset"]:checked') : $(`option-${option}`);
    if (!input) continue;
    const found = option === "preset" ? input.value : value(option, schema, input);
    if (found !== undefined) options[option] = found;
  }
  for (const needed of operations[name].options.required || []) {
    if (!(needed in options)) throw new NotUnderstood(`${words(name).label}: fill in \u201c${optionLabel(needed)}\u201d`, $(`option-${needed}`));
  }
  const choices = alternatives(name), given = choices.filter((option) => option in options);
  if (choices.length && given.length !== 1) {
    const named = choices.map((option) => `\u201c${optionLabel(option)}\u201d`).join(" or ");
    throw new NotUnderstood(`${words(name).label}: fill in ${named}${given.length ? ", not both" : ""}`, $(`option-${(given.length ? given : choices).at(-1)}`));
  }
  return { operation: name, options, second: operations[name].other ? second : null };
}

// The same in words, for the form and for the card.
export function said(operation, options) {
  const parts = [];
  for (const [name, found] of Object.entries(options)) {
    if (name === "preset") parts.push(`preset ${found}`);
    else if (found === true) parts.push({ verify: "checked afterwards", strict: "strict rules", safe_only: "safe files only" }[name] || optionLabel(name).toLowerCase());
    else if (found === false) parts.push({ verify: "not checked" }[name] || `no ${name}`);
    else if (name.startsWith("max_") && typeof found === "number") parts.push(`${optionLabel(name).toLowerCase()} ${found}`);
    else if (name === "to") parts.push(`to ${found.join(" ")}`);
    else if (Array.isArray(found)) parts.push(`${name} ${found.join(" ")}`);
    else parts.push(`${optionLabel(name).toLowerCase()} ${found}`);
  }
  return [words(operation).label, ...parts].join(", ");
}

function tell() {
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  const line = $("plan");
  try {
    const found = plan(), other = operations[found.operation];
    const missing = other.other_required && !found.second ? "; choose the second checkpoint, or drop both" : "";
    line.textContent = `Next: ${said(found.operation, found.options)}${found.second ? `, with ${found.second.title}` : ""}${missing}`;
    line.className = "plan";
  } catch (error) {
    if (!(error instanceof NotUnderstood)) throw error;
    error.field?.setAttribute("aria-invalid", "true");
    line.textContent = error.message;
    line.className = "plan bad";
  }
}

function field(name, schema) {
  const id = `option-${name}`, hint = el("span", { class: "hint", id: `${id}-hint` }, schema.description);
  if (schema.type === "boolean") {
    const input = el("input", { id, type: "checkbox" });
    input.checked = QUIET.has(name) || Boolean(schema.default);
    return el("p", { class: "check" }, input, el("label", { for: id }, optionLabel(name)));
  }
  const attributes = { id, spellcheck: "false", autocomplete: "off", placeholder: optionExample(name), "aria-describedby": `${id}-hint` };
  if (schema.enum) {
    const input = el("select", { id, "aria-describedby": `${id}-hint` }, el("option", { value: "" }, "\u2013"));
    input.append(...schema.enum.map((one) => el("option", { value: one }, `${one}: ${schema["x-meanings"]?.[one] || ""}`)));
    return el("p", {}, el("label", { for: id }, optionLabel(name)), input, hint);
  }
  const input = schema.type === "array" ? el("textarea", { ...attributes, rows: "2" }) : el("input", attributes);
  if (schema.type === "number") input.setAttribute("inputmode", "decimal");
  return el("p", {}, el("label", { for: id }, optionLabel(name)), input, hint);
}

function show() {
  const name = operation(), about = words(name), row = operations[name], found = Object.entries(properties(name));
  const required = new Set([...row.options.required, ...alternatives(name)]);
  $("more").before($("second")); // out of what is about to be replaced
  $("drop-title").textContent = about.drop;
  $("drop-hint").innerHTML = about.hint; // from words.js, nobody else's
  $("summary").textContent = row.summary;
  $("presets").hidden = !("preset" in properties(name));
  const fields = found.filter(([option]) => option !== "preset").map(([option, schema]) => [option, field(option, schema)]);
  $("needed").replaceChildren(...fields.filter(([option]) => required.has(option)).map(([, node]) => node));
  $("optional").replaceChildren(...fields.filter(([option]) => !required.has(option)).map(([, node]) => node));
  $("second").hidden = !row.other;
  $("second-hint").textContent = `${(row.other_help || "")[0]?.toUpperCase() ?? ""}${(row.other_help || "").slice(1)}.`;
  if (!row.other_required) $("optional").prepend($("second"));
  $("more").hidden = !$("optional").childElementCount || (!row.other && !fields.some(([option]) => !required.has(option)));
  tell();
}

export function setSecond(files, title) {
  second = files ? { files, title } : null;
  const total = second ? files.reduce((sum, [file]) => sum + file.size, 0) : 0;
  $("second-name").textContent = second ? `${title}, ${size(total)}` : "none chosen";
  $("second-drop").hidden = !second;
  tell();
}

// Fill the form from GET /v1/operations.
export function build(list) {
  operations = Object.fromEntries(list.map((item) => [item.name, item]));
  const names = [...ORDER.filter((name) => operations[name]), ...list.map((item) => item.name).filter((name) => !ORDER.includes(name))];
  $("operations").append(...names.map((name, index) => {
    const input = el("input", { type: "radio", name: "operation", value: name });
    input.checked = index === 0;
    input.addEventListener("change", show);
    return el("label", { class: "pill" }, input, el("span", {}, words(name).label));
  }));
  const preset = properties("compress").preset;
  $("presets").append(...(preset?.enum || []).map((name) => {
    const input = el("input", { type: "radio", name: "preset", value: name });
    input.checked = name === preset.default;
    const label = name[0].toUpperCase() + name.slice(1);
    return el("label", { class: "preset" }, input, el("span", { class: "mark", "aria-hidden": "true" }), el("strong", {}, label), el("span", { class: "hint" }, preset["x-meanings"]?.[name] || ""));
  }));
  $("setup").addEventListener("input", tell);
  $("second-drop").addEventListener("click", () => setSecond(null));
  $("setup").classList.remove("waiting");
  show();
}
