// What a finished job found or made: figures, plots and a table, in words of its own for each operation.

import { bytes, el, percent, size, table, updates } from "./plots.js";

function figure(label, value, unit = "") {
  return el("div", { class: "figure" }, el("dt", {}, label), el("dd", {}, value, " ", el("small", {}, unit)));
}

// The errors in total, as shares of one optimizer step, beside the largest that were asked for.
const STEP_ERRORS = [
  ["step error, update", "u_rms", "u_rms"], ["step error, momenta", "momentum_step_error", "u_rms"],
  ["step error, weights", "weight_step_error", "weight_step_error"],
];
const errors = (report) => STEP_ERRORS
  .filter(([, name]) => Number.isFinite(report.total?.[name]))
  .map(([label, name, bound]) => {
    const asked = report.asked?.[bound], unit = asked ? `of a step, asked ${percent(asked)}` : "of a step";
    return figure(label, percent(report.total[name]), report.total[name] ? unit : "");
  });

// What wrote the original, where its files tell.
const framework = (report) => (report.source?.framework ? [figure("written by", "", report.source.framework)] : []);

const FIGURES = {
  compress: (job, report) => [
    figure("smaller by", `${(job.bytes_in / job.bytes_out).toFixed(2)}\u00d7`),
    figure("size now", size(job.bytes_out), `from ${size(job.bytes_in)}`),
    ...(report.bytes_per_param ? [figure("per parameter", report.bytes_per_param.toFixed(2), "bytes")] : []),
    ...errors(report),
    ...framework(report),
  ],
  restore: (job) => [figure("restored", size(job.bytes_out), job.files[0]?.name || "")],
  convert: (job) => [figure("converted", size(job.bytes_out), `from ${size(job.bytes_in)}`)],
  verify: (job, report) => [
    figure("intact", size(report.bytes ?? job.bytes_in), "checked"), ...(report.total ? errors(report) : promises(report)),
  ],
  diff: (job, report) => [
    ...(report.identical !== undefined ? [figure("the two are", report.identical ? "identical" : "different")] : []),
    ...errors(report),
  ],
  analyze: (job, report) => [
    ...(report.saved !== undefined ? [figure("could be shared", percent(report.saved), "of second moments")] : []),
    ...(report.tensors?.length ? [figure("measured", String(report.tensors.length), "tensors")] : []),
  ],
};

// The errors that were asked for when the file was made; nothing where it does not say.
const promises = (report) => [["updates off by", "u_rms"], ["weights off by", "weight_step_error"]]
  .filter(([, name]) => report.asked?.[name])
  .map(([label, name]) => figure(label, percent(report.asked[name]), "of a step at most"));

const contents = (job, report) => [
  ...(report.tensors ? [figure("tensors", String(report.tensors.length))] : []),
  ...(report.num_params ? [figure("parameters", report.num_params.toLocaleString())] : []),
  ...promises(report),
  ...framework(report),
];

export function outcome(job, report, root) {
  const whole = ["compress", "inspect", "verify"].includes(job.operation); // the report is of the file that was stored
  const stored = whole && report.tensors?.length && report.tensors[0].bytes_before !== undefined;
  const plots = el("div", { class: "plots" }), open = root.querySelector("details.table")?.open;
  root.replaceChildren(el("dl", { class: "headline" }, ...(FIGURES[job.operation] || contents)(job, report)), plots);
  root.hidden = false;
  const width = Math.max(plots.clientWidth, 240);
  if (stored) plots.append(bytes(report, job, width));
  const moved = updates(report, width);
  if (moved) plots.append(moved);
  if (stored) root.append(table(report, width));
  if (open && stored) root.querySelector("details.table").open = true; // drawn again at another width
  if (report.pickles?.length) root.append(imports(report.pickles));
  if (report.notes?.length) root.append(el("ul", { class: "notes" }, ...report.notes.slice(0, 50).map((note) => el("li", {}, note))));
  redrawWhenWider(job, report, root, width);
}

// What unpickling the files would run; the service itself never does.
function imports(pickles) {
  const some = (names) => names.slice(0, 5).join(", ") + (names.length > 5 ? ` and ${names.length - 5} more` : "");
  const lines = pickles.filter((found) => found.can_run_code.length || found.unread).map((found) =>
    found.can_run_code.length ? `unpickling ${found.file} would import what can run code: ${some(found.can_run_code)}`
      : `what unpickling ${found.file} would run cannot be told: ${found.unread}`);
  if (!lines.length) return el("p", { class: "imports" }, "Unpickling the original would import nothing that can run code.");
  const rest = lines.length > 20 ? [el("li", {}, `and ${lines.length - 20} more files`)] : [];
  return el("ul", { class: "imports risky" }, ...lines.slice(0, 20).map((line) => el("li", {}, line)), ...rest);
}

const watched = new WeakMap();

function redrawWhenWider(job, report, root, width) {
  watched.get(root)?.disconnect();
  const observer = new ResizeObserver(() => {
    const now = root.clientWidth;
    if (now && Math.abs(now - width) > 8) { observer.disconnect(); outcome(job, report, root); }
  });
  observer.observe(root);
  watched.set(root, observer);
}
