// Figures as inline SVG, each with a title, a description and a table beside it for those who do not see it.

const SVG = "http://www.w3.org/2000/svg";
const ROLES = [
  ["weight", "weights"], ["exp_avg", "first moment"], ["exp_avg_sq", "second moment"], ["momentum", "momentum"], ["other", "everything else"],
];

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  while (value >= 999.5 && units.length > 1) { value /= 1000; units.shift(); }
  return `${units[0] === "B" ? Math.round(value) : value.toPrecision(3)} ${units[0]}`;
}

// A share as the command line writes it: three figures, without zeros at the end.
export const percent = (value) => (value === 0 ? "exact" : `${Number((100 * value).toPrecision(3))} %`);

export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function figure(title, description, width, height, ...shapes) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${description}` }, svg("title", {}, title), ...shapes);
}

const role = (tensor) => (tensor.role === "max_exp_avg_sq" ? "exp_avg_sq" : ROLES.some(([id]) => id === tensor.role) ? tensor.role : "other");

// A name that fits: its beginning and its end say most.
const middle = (text, letters) => {
  if (text.length <= letters) return text;
  const end = Math.ceil((letters - 1) * 0.6);
  return `${text.slice(0, letters - 1 - end)}\u2026${text.slice(-end)}`;
};

// Two bars to one scale: the checkpoint by role, before and after. They add up to the files themselves.
export function bytes(report, job, width) {
  const sums = Object.fromEntries(ROLES.map(([id]) => [id, { before: 0, after: 0 }]));
  for (const tensor of report.tensors) {
    sums[role(tensor)].before += tensor.bytes_before;
    sums[role(tensor)].after += tensor.bytes_after;
  }
  const whole = { before: report.source?.bytes ?? job.bytes_in, after: job.operation === "compress" ? job.bytes_out : report.bytes };
  for (const side of ["before", "after"]) {
    const held = ROLES.reduce((sum, [id]) => sum + sums[id][side], 0);
    sums.other[side] += Math.max((whole[side] || held) - held, 0); // headers, and what is no tensor
  }
  const used = ROLES.filter(([id]) => sums[id].before + sums[id].after > 0);
  const total = Math.max(...["before", "after"].map((side) => used.reduce((sum, [id]) => sum + sums[id][side], 0)), 1);
  const left = 52, scale = (width - left - 70) / total, shapes = [];
  ["before", "after"].forEach((side, line) => {
    let x = left;
    const y = line * 44;
    shapes.push(svg("text", { x: 0, y: y + 21, class: "ink" }, side));
    for (const [id, label] of used) {
      const long = sums[id][side] * scale;
      if (long < 0.3) continue;
      const bar = svg("rect", { x, y, width: Math.max(long - 1.5, 0.5), height: 32, rx: Math.min(3, long / 3), class: `fill-${id}` });
      bar.append(svg("title", {}, `${label}: ${size(sums[id][side])}`));
      shapes.push(bar);
      x += long;
    }
    const sum = used.reduce((all, [id]) => all + sums[id][side], 0);
    shapes.push(svg("text", { x: x + 8, y: y + 21, class: "ink" }, size(sum)));
  });
  const said = used.map(([id, label]) => `${label} from ${size(sums[id].before)} to ${size(sums[id].after)}`).join(", ");
  const legend = el("ul", { class: "legend" }, ...used.map(([id, label]) =>
    el("li", {}, el("i", { class: `fill-${id}` }), `${label} ${size(sums[id].before)} \u2192 ${size(sums[id].after)}`)));
  return plot("Where the bytes went", "Stored bytes by what they hold.", figure("Where the bytes went", said, width, 80, ...shapes), legend);
}

// One dot per parameter: how far the optimizer's next step moved, on a logarithmic axis. A narrow drawing has the names
// above the lines, so that they keep their ends.
export function updates(report, width) {
  const all = (report.updates || []).filter((item) => Number.isFinite(item.u_rms));
  if (!all.length) return null;
  const shown = [...all].sort((a, b) => b.u_rms - a.u_rms || b.numel - a.numel).slice(0, 14);
  const narrow = width < 520, left = narrow ? 6 : Math.min(width / 3, 260), right = 62, low = -5, high = 0;
  const letters = Math.floor((narrow ? width - 8 : left) / 7) - 1, line = narrow ? 38 : 22;
  const place = (value) => left + ((Math.min(Math.max(Math.log10(value), low), high) - low) / (high - low)) * (width - left - right);
  const bottom = shown.length * line + 4, shapes = [];
  for (let power = low; power <= high; power += 1) {
    const x = place(10 ** power);
    if (!narrow) shapes.push(svg("line", { x1: x, x2: x, y1: 0, y2: bottom, class: "axis" }));
    const label = { x, y: bottom + 16, "text-anchor": narrow && power === low ? "start" : "middle" };
    if (!narrow || power % 2) shapes.push(svg("text", label, `${10 ** (power + 2)} %`));
  }
  shown.forEach((item, index) => {
    const y = index * line + (narrow ? 28 : 14), name = item.param || "?";
    const spot = narrow ? { x: 0, y: y - 12 } : { x: left - 12, y: y + 4, "text-anchor": "end" };
    shapes.push(svg("text", { ...spot, class: "ink" }, middle(name, letters)));
    const exact = item.u_rms <= 10 ** low, x = exact ? left : place(item.u_rms);
    if (!exact) shapes.push(svg("line", { x1: left, x2: x, y1: y, y2: y, stroke: "var(--accent)", "stroke-width": 2.5, opacity: 0.45 }));
    const dot = svg("circle", { cx: x, cy: y, r: 5.5, fill: exact ? "var(--good)" : "var(--accent)" });
    dot.append(svg("title", {}, `${name}: ${percent(item.u_rms)}, cosine ${item.cosine.toFixed(6)}`));
    shapes.push(dot, svg("text", { x: x + 11, y: y + 4 }, percent(item.u_rms)));
  });
  const worst = shown[0];
  const more = all.length > shown.length ? ` The ${shown.length} largest of ${all.length}.` : "";
  const about = `Largest: ${worst.param} with ${percent(worst.u_rms)}.${more}`;
  return plot("What it did to the update direction",
    `Step error of the update, per parameter: how far the optimizer's next step is off.${more}`,
    figure("What it did to the update direction", about, width, bottom + 22, ...shapes));
}

function plot(title, hint, picture, ...rest) {
  return el("div", { class: "plot" }, el("h4", {}, title), el("p", { class: "hint" }, hint), picture, ...rest);
}

// Everything the figures show, and more, as a table; what people look for stands before what may be scrolled to.
export function table(report, width) {
  const letters = width < 480 ? 16 : 44;
  const head = ["tensor", "step error", "before", "after", "relative error", "role", "codec"];
  const numeric = (index) => (index > 0 && index < 5 ? { class: "n" } : {});
  const share = (value) => (value === undefined ? "" : percent(Number(value)));
  const rows = report.tensors.slice(0, 2000).map((tensor) => el("tr", {}, ...[
    tensor.name, share(tensor.error?.step_error), size(tensor.bytes_before), size(tensor.bytes_after),
    share(tensor.error?.relative_rms), tensor.role, tensor.codec,
  ].map((text, index) => el("td", { ...numeric(index), ...(index ? {} : { title: text }) }, index ? text : middle(text, letters)))));
  const caption = `${report.tensors.length} stored tensors${report.tensors.length > rows.length ? `, the first ${rows.length}` : ""}`;
  return el("details", { class: "table" }, el("summary", {}, caption),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((text, index) => el("th", { scope: "col", ...numeric(index) }, text)))),
      el("tbody", {}, ...rows))));
}
