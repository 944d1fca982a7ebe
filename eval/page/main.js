"use strict";
// The order of the page: what was run, the selected cell's numbers, then every view of it.

function header() {
  const groups = [...new Set(CELLS.map((cell) => cell.group))];
  const devices = [...new Set(CELLS.map((cell) => cell.device).filter(Boolean))];
  const facts = [
    devices.join("; "),
    ...["svg-video", "torch"].filter((name) => DATA.versions[name]).map((name) => `${name} ${DATA.versions[name]}`),
  ];
  const notes = DATA.notes.map((note) => el("li", {}, note));
  const group =
    groups.length > 1
      ? selectBox(
          "Model and size",
          groups.map((name) => [name, name]),
          state.group,
          (name) => update({ group: name, selected: firstChoice(name) }),
        )
      : groups.length > 0 && el("span", {}, groups[0]);
  return [
    el(
      "p",
      { class: "kicker" },
      DATA.tune ? "svg tune" : { sweep: "svg sweep", run: "svg generate", recorded: "svg sweep --recorded" }[DATA.kind],
      DATA.state === "running" && el("b", {}, " · still running"),
    ),
    el("h1", {}, DATA.title),
    el(
      "div",
      { class: "facts" },
      group,
      facts.filter(Boolean).map((fact) => el("span", {}, fact)),
    ),
    notes.length > 0 && el("ul", { class: "notes" }, notes),
  ];
}

function firstChoice(group) {
  const cells = CELLS.filter((cell) => cell.group === group);
  const [first] = cells;
  const sparse = finished(cells).filter(
    (cell) => cell.role === "accelerated" && cell.prompt === first.prompt && cell.seed === first.seed,
  );
  const best = [...sparse].sort((a, b) => (value(b.quality.psnr) ?? -1) - (value(a.quality.psnr) ?? -1))[0];
  return (best || finished(cells)[0] || cells[0])?.id ?? null;
}

function selectedSection() {
  const body = el("div", { class: "selected-body", "aria-live": "polite" });
  const draw = () => body.replaceChildren(...selectedBody(BY_ID.get(state.selected)));
  onChange((keys) => (keys.includes("selected") || keys.includes("time")) && draw());
  draw();
  return section("selected", DATA.kind === "sweep" ? "Selected cell" : "In numbers", null, body);
}

function selectedBody(cell) {
  if (!cell) return [el("p", { class: "empty" }, "No cell yet.")];
  const name = el(
    "p",
    { class: "selected-name" },
    el("b", {}, cell.label),
    DATA.kind === "sweep" && ` · ${cell.prompt} · seed ${cell.seed}`,
  );
  const command = commandBlock(cell);
  if (cell.status !== "finished")
    return [name, el("p", { class: "problem" }, cell.error || "This cell has not been run yet."), command];
  const control = BY_ID.get(cell.control);
  const floor = (key) =>
    control?.quality[key] !== undefined &&
    control.quality[key] !== null &&
    `control ${format(control.quality[key], METRICS[key].digits)}`;
  const tiles = Object.keys(METRICS)
    .filter((key) => cell.quality[key] !== null)
    .map((key) =>
      tile(
        `${METRICS[key].name}${key === "lpips" ? ` (${cell.lpips_net})` : ""}`,
        metricText(key, cell.quality[key]),
        floor(key),
      ),
    );
  const computed =
    cell.density &&
    tile(
      "Density, all calls",
      format(cell.density.all_calls, 3),
      cell.density.sparse_calls !== null && `sparse calls ${format(cell.density.sparse_calls, 3)}`,
    );
  const times = Object.entries(TIMES).map(([key, text]) => {
    const faster = speedup(cell, key);
    return tile(text, seconds(cell.seconds?.[key]), faster && fasterText(faster));
  });
  return [name, el("dl", { class: "tiles" }, tiles, computed, times), command];
}

function tile(name, text, under) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, text), under && el("dd", { class: "under" }, under));
}

function commandBlock(cell) {
  return el(
    "div",
    { class: "command" },
    el("span", {}, "Run it again"),
    el("code", { tabindex: 0 }, cell.command),
    copyButton(() => cell.command),
  );
}

function footer() {
  const list = Object.entries(DATA.versions)
    .filter(([, version]) => version)
    .map(([name, version]) => `${name} ${version}`)
    .join(" · ");
  return section(
    "reading",
    "Reading the numbers",
    null,
    el(
      "dl",
      { class: "words" },
      [
        ...measuredWords(),
        [
          "PSNR, SSIM, LPIPS",
          "distance of a cell's raw frames from those of dense attention with the same prompt and seed: not how good a video is, only how far it is from another one.",
        ],
        ["Temporal PSNR", "PSNR of the frame-to-frame changes: flicker that each single frame hides."],
        [
          "Control",
          "dense attention once more on another backend. Rounding alone moves a video that far, so a difference above the control says nothing.",
        ],
        [
          "Density",
          "computed share of the attention map, weighted by tokens; over all calls it includes the dense warm-up, which is what time follows.",
        ],
        ["∞", "identical to dense, pixel by pixel. A mean leaves identical frames and cells out."],
      ].map(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]),
    ),
    DATA.command &&
      DATA.kind !== "run" &&
      el(
        "div",
        { class: "command" },
        el("span", {}, DATA.tune ? "The whole tuning" : "The whole sweep"),
        el("code", { tabindex: 0 }, DATA.command),
        copyButton(() => DATA.command),
      ),
    el("p", { class: "versions" }, list),
  );
}

state.group = CELLS[0]?.group ?? null;
state.selected = firstChoice(state.group);
document.getElementById("head").append(...fill(el("div"), {}, header()).childNodes);
const ORDER = {
  sweep: [tuneSection, paretoSection, tableSection, selectedSection, playerSection, insideSection, timeSection],
  run: [selectedSection, playerSection, paretoSection, insideSection, timeSection, tableSection],
  recorded: [],
};
const SECTIONS = [...ORDER[DATA.kind], recordedSection, recordedMaps, footer];
document.getElementById("main").append(...SECTIONS.map((make) => make()).filter(Boolean));
