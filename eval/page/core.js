"use strict";
// Data, elements, numbers, and the one state that every part of the page reads.

const DATA = JSON.parse(document.getElementById("data").textContent);
const CELLS = DATA.cells;
const BY_ID = new Map(CELLS.map((cell) => [cell.id, cell]));

// `up`: larger is better. Every plot draws "better" upwards.
const METRICS = {
  psnr: { name: "PSNR", unit: "dB", digits: 2, up: true },
  ssim: { name: "SSIM", unit: "", digits: 4, up: true },
  lpips: { name: "LPIPS", unit: "", digits: 4, up: false },
  temporal_psnr: { name: "Temporal PSNR", short: "Temporal", unit: "dB", digits: 2, up: true },
  vmaf: { name: "VMAF", unit: "", digits: 2, up: true },
};
const TIMES = { attention: "Attention", transformer: "Transformer", end_to_end: "End to end" };
const BUDGETS = ["density", "top_p", "budget", "topk", "cdf"]; // how much is computed: what varies along a line of the plots

const state = {
  group: null,
  metric: "psnr",
  time: "attention",
  each: false, // what the plots show
  query: "",
  method: "",
  prompt: "",
  seed: "", // the filter
  sort: { key: null, down: false },
  selected: null, // id of a cell
};
const listeners = [];

function onChange(listener) {
  listeners.push(listener);
}

function update(changes) {
  Object.assign(state, changes);
  for (const listener of listeners) listener(Object.keys(changes));
}

// ---- elements: texts go in as text nodes only, so no prompt can become markup

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function section(id, title, lead, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  return el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    heading,
    lead && el("p", { class: "lead" }, lead),
    children,
  );
}

function selectBox(label, options, value, onchange) {
  const choices = options.map(([key, text]) => el("option", { value: key, selected: key === value }, text));
  const box = el("select", { onchange: () => onchange(box.value) }, choices);
  return el("label", { class: "field" }, el("span", {}, label), box);
}

// A row of radio buttons that looks like one control; arrow keys come with the element.
function choice(name, label, options, value, onchange) {
  const buttons = options.map(([key, text]) => {
    const input = el("input", {
      type: "radio",
      name,
      value: key,
      checked: key === value,
      onchange: () => onchange(key),
    });
    return el("label", {}, input, el("span", {}, text));
  });
  return el("fieldset", { class: "choice" }, el("legend", {}, label), el("div", {}, buttons));
}

function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "copy" }, label);
  button.addEventListener("click", async (event) => {
    event.stopPropagation();
    const done = await copy(text());
    button.textContent = done ? "Copied" : "Not allowed: select it";
    setTimeout(() => (button.textContent = label), 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyThroughSelection(text); // browsers that keep the clipboard from pages on disk
  }
}

function copyThroughSelection(text) {
  const area = el("textarea", { class: "offscreen" });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

// ---- numbers

function value(number) {
  return number === "inf" ? Infinity : number === "-inf" ? -Infinity : number;
}

function format(number, digits) {
  const plain = value(number);
  if (plain === null || plain === undefined) return "–";
  if (!Number.isFinite(plain)) return plain > 0 ? "∞" : "-∞";
  return plain.toFixed(digits);
}

// How much faster than dense, or slower.
function fasterText(factor) {
  return factor >= 1 ? `${factor.toFixed(2)}x faster` : `${(1 / factor).toFixed(2)}x slower`;
}

function seconds(number) {
  const plain = value(number);
  if (plain === null || plain === undefined) return "–";
  return `${plain.toFixed(plain >= 100 ? 1 : plain >= 1 ? 2 : 3)} s`;
}

function metricText(metric, number) {
  const { digits, unit } = METRICS[metric];
  return `${format(number, digits)}${unit && ` ${unit}`}`;
}

// Mean over the numbers that are finite, as a report's mean PSNR leaves identical frames out; all infinite: infinite.
function mean(numbers) {
  const known = numbers.map(value).filter((number) => number !== null && number !== undefined);
  const finite = known.filter(Number.isFinite);
  if (finite.length) return finite.reduce((sum, number) => sum + number, 0) / finite.length;
  return known.length ? known[0] : null;
}

// ---- cells

function speedup(cell, time) {
  const reference = BY_ID.get(cell.reference);
  if (!reference?.seconds?.[time] || !cell.seconds?.[time]) return null;
  return value(reference.seconds[time]) / value(cell.seconds[time]);
}

function finished(cells) {
  return cells.filter((cell) => cell.status === "finished");
}

function inGroup() {
  return CELLS.filter((cell) => cell.group === state.group);
}

// The cells that the filter leaves. Dense and control stay in the plots: they are the scale of everything else.
function filtered({ keepReferences }) {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  return inGroup().filter((cell) => {
    const text = `${cell.label} ${cell.prompt} ${cell.status} seed ${cell.seed}`.toLowerCase();
    const same =
      (!state.prompt || cell.prompt === state.prompt) && (state.seed === "" || String(cell.seed) === state.seed);
    if (keepReferences && cell.role !== "accelerated") return same;
    const kind = cell.role === "accelerated" ? cell.method : cell.role;
    return same && (!state.method || kind === state.method) && words.every((word) => text.includes(word));
  });
}

function describe(cell) {
  const several = (key) => new Set(CELLS.map((item) => item[key])).size > 1;
  const parts = [cell.label];
  if (several("prompt")) parts.push(`“${shorten(cell.prompt, 48)}”`);
  if (several("seed")) parts.push(`seed ${cell.seed}`);
  return parts.join(", ");
}

function shorten(text, length) {
  return text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text;
}

// ---- the tip: what the pointer or the focus is on

const TIP = document.getElementById("tip");

function showTip(title, rows, x, y) {
  TIP.replaceChildren(
    el("strong", {}, title),
    el(
      "dl",
      {},
      rows.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]),
    ),
  );
  TIP.hidden = false;
  const box = TIP.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
  TIP.style.left = `${Math.max(6, Math.min(left, innerWidth - box.width - 6))}px`;
  TIP.style.top = `${Math.max(6, Math.min(y + 14, innerHeight - box.height - 6))}px`;
}

function hideTip() {
  TIP.hidden = true;
}

document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
document.addEventListener("scroll", hideTip, { passive: true });
