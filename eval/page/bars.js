"use strict";
// Where the time went: one stacked bar a setting.

const PARTS = [
  { key: "dense", name: "Attention, dense calls", colour: "var(--part-dense)" },
  { key: "sparse", name: "Attention, sparse calls", colour: "var(--part-sparse)" },
  { key: "rest", name: "Rest of the transformer", colour: "var(--part-rest)" },
  { key: "vae", name: "VAE decoder", colour: "var(--part-vae)" },
  { key: "other", name: "Text encoder, scheduler, the rest", colour: "var(--part-other)" },
];

function timeSection() {
  if (!CELLS.some((cell) => cell.seconds)) return null;
  const bars = el("div", { class: "bars" });
  const draw = () => {
    const rows = grouped(finished(filtered({ keepReferences: true })));
    const longest = Math.max(...rows.map((row) => row.total), 1e-9);
    bars.replaceChildren(...rows.map((row) => bar(row, longest)));
  };
  onChange((keys) => keys.some((key) => !["sort", "metric", "time", "each"].includes(key)) && draw());
  draw();
  const legend = el(
    "ul",
    { class: "legend" },
    PARTS.map((part) => el("li", {}, el("i", { class: "swatch", style: { background: part.colour } }), part.name)),
  );
  const lead =
    "Seconds of one run, on a GPU after an untimed warm-up; planning (clustering, profiling, permuting) counts as attention.";
  return section(
    "time",
    "Where the time went",
    DATA.kind === "sweep" ? `${lead} Means over prompts and seeds.` : lead,
    legend,
    bars,
  );
}

function grouped(cells) {
  const rows = new Map();
  for (const cell of cells.filter((item) => item.seconds)) {
    if (!rows.has(cell.label)) rows.set(cell.label, []);
    rows.get(cell.label).push(cell);
  }
  return [...rows.values()].map((members) => {
    const parts = Object.fromEntries(
      PARTS.map(({ key }) => [key, mean(members.map((cell) => partsOf(cell)[key])) || 0]),
    );
    return {
      cell: members[0],
      count: members.length,
      parts,
      total: mean(members.map((cell) => cell.seconds.end_to_end)),
      chosen: members.some((cell) => cell.id === state.selected),
    };
  });
}

function partsOf({ attention, seconds: time }) {
  const { dense, sparse } = attention || { dense: time.attention, sparse: 0 };
  return {
    dense,
    sparse,
    rest: Math.max(0, time.transformer - dense - sparse),
    vae: time.vae,
    other: Math.max(0, time.end_to_end - time.transformer - time.vae),
  };
}

function bar({ cell, count, parts, total, chosen }, longest) {
  const rows = PARTS.filter(({ key }) => parts[key] > 0).map(({ key, name }) => [
    name,
    `${seconds(parts[key])}, ${((100 * parts[key]) / total).toFixed(0)} %`,
  ]);
  const pieces = PARTS.filter(({ key }) => parts[key] > 0).map(({ key, colour }) =>
    el("i", { "data-part": key, style: { width: `${(100 * parts[key]) / longest}%`, background: colour } }),
  );
  const title = count > 1 ? `${cell.label}, mean of ${count} cells` : cell.label;
  const [first, second] = labelLines(cell.label);
  const stack = el(
    "div",
    {
      class: "stack",
      tabindex: 0,
      role: "img",
      "aria-label": `${title}: ${rows.map((row) => row.join(" ")).join("; ")}`,
      onpointermove: (event) => showTip(title, rows, event.clientX, event.clientY),
      onpointerleave: hideTip,
      onblur: hideTip,
      onfocus: (event) => {
        const place = event.currentTarget.getBoundingClientRect();
        showTip(title, rows, place.left, place.bottom);
      },
    },
    pieces,
  );
  return el(
    "div",
    { class: `bar${chosen ? " selected" : ""}` },
    el("span", { class: "bar-name", title: cell.label }, first, second && el("small", {}, second)),
    stack,
    el("span", { class: "bar-total" }, seconds(total)),
  );
}
