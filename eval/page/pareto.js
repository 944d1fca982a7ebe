"use strict";
// Quality against time and against density: one mark a setting, dense and control as the scale.

const PLOT = { height: 350, left: 58, right: 14, top: 46, bottom: 46, rail: 24 };

function paretoSection() {
  const known = Object.keys(METRICS).filter((key) =>
    CELLS.some((cell) => cell.quality[key] !== null && cell.role === "accelerated"),
  );
  if (!known.length) return null;
  if (!known.includes(state.metric)) state.metric = known[0];
  const several = new Set(CELLS.map((cell) => `${cell.prompt} ${cell.seed}`)).size > 1;
  const controls = el(
    "div",
    { class: "controls" },
    choice(
      "metric",
      "Quality",
      known.map((key) => [key, METRICS[key].short || METRICS[key].name]),
      state.metric,
      (metric) => update({ metric }),
    ),
    choice("time", "Time", Object.entries(TIMES), state.time, (time) => update({ time })),
    several &&
      choice(
        "each",
        "Marks",
        [
          ["mean", "Mean"],
          ["each", "Every cell"],
        ],
        "mean",
        (key) => update({ each: key === "each" }),
      ),
  );
  const plots = el("div", { class: "plots" });
  const legend = el("ul", { class: "legend" });
  const warning = el("p", { class: "warning", role: "status" });
  const draw = () => {
    const held = document.activeElement?.closest?.("#pareto .point");
    const place =
      held && `[data-axis="${held.closest("figure").dataset.axis}"] [data-label="${CSS.escape(held.dataset.label)}"]`;
    const width = plots.clientWidth || 900;
    const each = width >= 760 ? (width - 28) / 2 : width;
    plots.replaceChildren(plot("time", each), plot("density", each));
    legend.replaceChildren(...legendItems());
    warning.textContent = isUneven()
      ? "The means are over different prompts and seeds, because some cells are missing: compare them with care, or show every cell."
      : "";
    if (place) plots.querySelector(place)?.focus(); // drawing anew took it away
  };
  onChange((keys) => keys[0] !== "sort" && draw());
  new ResizeObserver(draw).observe(plots);
  return section(
    "pareto",
    "Quality against cost",
    "Up and to the left is better. Distances are to dense attention from the same prompt and seed; anything inside the control band is as close as dense is to itself on another backend.",
    controls,
    plots,
    legend,
    warning,
  );
}

// Marks of the cells in sight: means over prompts and seeds, or every cell.
function marks() {
  const cells = finished(filtered({ keepReferences: true }));
  if (state.each) return cells.map((cell) => ({ cells: [cell], cell }));
  const byLabel = new Map();
  for (const cell of cells) {
    if (!byLabel.has(cell.label)) byLabel.set(cell.label, []);
    byLabel.get(cell.label).push(cell);
  }
  return [...byLabel.values()].map((members) => ({ cells: members, cell: members[0] }));
}

// Whether means in sight are over different videos: a hard prompt in one of them alone looks like a bad method.
function isUneven() {
  const sparse = marks().filter((mark) => mark.cell.role === "accelerated");
  return (
    !state.each &&
    new Set(
      sparse.map((mark) =>
        mark.cells
          .map((cell) => `${cell.seed} ${cell.prompt}`)
          .sort()
          .join("\n"),
      ),
    ).size > 1
  );
}

function numbersOf(mark, axis) {
  const x =
    axis === "time"
      ? mean(mark.cells.map((cell) => cell.seconds?.[state.time]))
      : mean(mark.cells.map((cell) => cell.density?.all_calls));
  return { ...mark, x, y: mean(mark.cells.map((cell) => cell.quality[state.metric])) };
}

function plot(axis, width) {
  const all = marks()
    .map((mark) => numbersOf(mark, axis))
    .filter((mark) => mark.x !== null);
  const sparse = all.filter((mark) => mark.cell.role === "accelerated" && mark.y !== null);
  const xs = axis === "time" ? [0, Math.max(...all.map((mark) => mark.x), 1e-9) * 1.08] : [0, 1.04];
  const spans = { psnr: 2, ssim: 0.02, lpips: 0.02, temporal_psnr: 2, vmaf: 5 };
  const finite = sparse.map((mark) => mark.y).filter(Number.isFinite);
  const ends = around(finite.length ? finite : [0, 1], spans[state.metric]);
  const controls = all.filter((mark) => mark.cell.role === "control");
  const bounds = limit(ends, controls);
  const rails = [
    ["dense", "= dense"],
    ...(controls.some((mark) => !isOnScale(mark.y, bounds)) ? [["control", "control"]] : []),
  ];
  const top = PLOT.top + PLOT.rail * (rails.length - 1);
  const box = { left: PLOT.left, right: width - PLOT.right, top, bottom: PLOT.height - PLOT.bottom };
  const { up } = METRICS[state.metric];
  const mapX = scale(xs, [box.left, box.right]);
  const mapY = scale(bounds, up ? [box.bottom, box.top] : [box.top, box.bottom]);
  const name = METRICS[state.metric].name;
  const label =
    axis === "time" ? `${TIMES[state.time]}, seconds` : "Density, computed share of the attention map, all calls";
  const shortLabel = axis === "time" ? label : width < 420 ? "Density, all calls" : label;
  const title = `${name} against ${axis === "time" ? TIMES[state.time].toLowerCase() + " time" : "density"}`;
  const drawing = svg(
    "svg",
    {
      class: "plot",
      width,
      height: PLOT.height,
      viewBox: `0 0 ${width} ${PLOT.height}`,
      role: "group",
      "aria-label": `${title}; arrow keys go from mark to mark`,
    },
    svg(
      "text",
      { class: "title", x: 0, y: 14 },
      `${name}${METRICS[state.metric].unit && `, ${METRICS[state.metric].unit}`}${up ? "" : " (axis reversed: less is better)"}`,
    ),
    rails.map(([, text], index) => rail(text, railY(index), box)),
    band(all, bounds, mapX, mapY, box),
    axisX(
      mapX,
      ticks(...xs, width < 420 ? 4 : 6).filter(([number]) => number <= (axis === "density" ? 1 : Infinity)),
      { ...box, label: shortLabel },
    ),
    axisY(
      mapY,
      ticks(...bounds, 5).filter(([number]) => mapY(number) > top + 4 && mapY(number) < box.bottom - 4), // labels are there
      box,
    ),
    frontLine(sparse, mapX, mapY),
    lines(sparse, mapX, mapY),
    points(all, bounds, mapX, mapY),
  );
  return el("figure", { "data-axis": axis }, el("figcaption", { class: "offscreen" }, title), drawing);
}

// The control joins the axis if it is near; else it stands on the rail with its number.
function limit([low, high], controls) {
  const room = (high - low) * 0.9;
  for (const { y } of controls) {
    if (y !== null && Number.isFinite(y) && y > low - room && y < high + room) {
      low = Math.min(low, y - (high - low) * 0.06);
      high = Math.max(high, y + (high - low) * 0.06);
    }
  }
  if (state.metric === "ssim") high = Math.min(high, 1);
  return state.metric === "lpips" ? [Math.max(0, low), high] : [low, high];
}

function isOnScale(number, [low, high]) {
  return Number.isFinite(number) && number >= low && number <= high;
}

// Strips above the axis for what lies beyond it: identical to dense, and a control that is far away.
function rail(text, y, { left, right }) {
  return svg(
    "g",
    { "aria-hidden": "true" },
    svg("rect", { class: "rail", x: left, y: y - 10, width: right - left, height: 20, rx: 4 }),
    svg("text", { class: "rail-text", x: left - 8, y: y + 4, "text-anchor": "end" }, text),
  );
}

function railY(index) {
  return 34 + PLOT.rail * index;
}

function band(all, bounds, mapX, mapY, { left, right, top, bottom }) {
  const { up } = METRICS[state.metric];
  const controls = all.filter((mark) => mark.cell.role === "control" && isOnScale(mark.y, bounds));
  if (!controls.length) return null;
  const levels = controls.map((mark) => mark.y);
  const onTheRight = mean(controls.map((mark) => mapX(mark.x))) < (left + right) / 2; // away from the control's own marks
  const label = onTheRight ? { x: right - 6, "text-anchor": "end" } : { x: left + 6 };
  const y = mapY(up ? Math.min(...levels) : Math.max(...levels));
  return svg(
    "g",
    { class: "control-band", "aria-hidden": "true" },
    svg("rect", { x: left, y: top, width: right - left, height: Math.max(0, y - top) }),
    svg("line", { x1: left, x2: right, y1: y, y2: y }),
    svg("text", { ...label, y: Math.min(y + 14, bottom - 4) }, "control: noise floor"),
  );
}

// What no other mark beats on both axes.
function frontLine(sparse, mapX, mapY) {
  const { up } = METRICS[state.metric];
  const finite = sparse
    .filter((mark) => Number.isFinite(mark.y))
    .sort((a, b) => a.x - b.x || (up ? b.y - a.y : a.y - b.y));
  const front = [];
  for (const mark of finite) {
    const best = front.at(-1);
    if (!best || (up ? mark.y > best.y : mark.y < best.y)) front.push(mark);
  }
  if (front.length < 2) return null;
  const path = front
    .map((mark, index) => (index ? `H${mapX(mark.x)}V${mapY(mark.y)}` : `M${mapX(mark.x)} ${mapY(mark.y)}`))
    .join("");
  return svg("path", { class: "front", d: path, "aria-hidden": "true" });
}

function lines(sparse, mapX, mapY) {
  if (state.each) return null;
  const families = [...new Set(sparse.map((mark) => familyOf(mark.cell)))];
  return families.map((family) => {
    const own = sparse.filter((mark) => familyOf(mark.cell) === family && Number.isFinite(mark.y));
    own.sort((a, b) => budgetOf(a) - budgetOf(b));
    const path = own.map((mark, index) => `${index ? "L" : "M"}${mapX(mark.x)} ${mapY(mark.y)}`).join("");
    return (
      own.length > 1 && svg("path", { class: "series", d: path, style: { stroke: colourOf(own[0].cell) }, "aria-hidden": "true" })
    );
  });
}

// A line goes from budget to budget, also where time does not follow it.
function budgetOf(mark) {
  return mean(mark.cells.map((cell) => cell.density?.all_calls));
}

function points(all, bounds, mapX, mapY) {
  const ordered = all.filter((mark) => mark.y !== null || mark.cell.role === "dense").sort((a, b) => a.x - b.x);
  const group = svg("g", { class: "points" });
  const nodes = ordered.map((mark) => point(mark, bounds, mapX, mapY));
  group.append(...nodes);
  (nodes.find((node) => node.classList.contains("selected")) || nodes[0])?.setAttribute("tabindex", "0");
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const index = nodes.indexOf(document.activeElement);
    if (!step || index < 0) return;
    event.preventDefault();
    const next = nodes[Math.max(0, Math.min(nodes.length - 1, index + step))];
    nodes[index].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
  return group;
}

function point(mark, bounds, mapX, mapY) {
  const { cell } = mark;
  const kind = kindOf(cell);
  const onScale = isOnScale(mark.y, bounds);
  const x = mapX(mark.x);
  const y = onScale ? mapY(mark.y) : railY(kind === "control" ? 1 : 0);
  const chosen = mark.cells.some((member) => member.id === state.selected);
  const select = () => update({ selected: (mark.cells.find((member) => member.video) || cell).id });
  const rows = tipRows(mark);
  const node = svg(
    "g",
    {
      class: `point ${kind}${chosen ? " selected" : ""}`,
      tabindex: -1,
      role: "button",
      "data-label": cell.label,
      "data-id": cell.id,
      "aria-pressed": String(chosen),
      "aria-label": `${markName(mark)}: ${rows.map((row) => row.join(" ")).join(", ")}`,
      onclick: select,
      onkeydown: (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), select()),
      onpointerenter: (event) => showTip(markName(mark), rows, event.clientX, event.clientY),
      onpointerleave: hideTip,
      onblur: hideTip,
      onfocus: (event) => {
        const place = event.currentTarget.getBoundingClientRect();
        showTip(markName(mark), rows, place.right, place.bottom);
      },
    },
    chosen && svg("circle", { class: "halo", cx: x, cy: y, r: 12 }),
    svg("circle", { class: "target", cx: x, cy: y, r: innerWidth > 720 ? 13 : 22 }),
    marker(lookOf(cell), x, y, state.each ? 4.5 : 6, { stroke: "var(--paper)", strokeWidth: 1.4 }),
    !onScale &&
      kind === "control" &&
      valueBeside(x, y, mark.y, mapX),
  );
  return node;
}

// A number beside its mark, on the side where there is room for it.
function valueBeside(x, y, number, mapX) {
  const left = x - mapX(0) > 80;
  const place = { class: "rail-text", x: left ? x - 12 : x + 12, y: y + 4, "text-anchor": left ? "end" : "start" };
  return svg("text", place, metricText(state.metric, number));
}

function markName(mark) {
  return mark.cells.length > 1 ? `${mark.cell.label}, mean of ${mark.cells.length} cells` : describe(mark.cell);
}

function tipRows(mark) {
  const of = (get) => mean(mark.cells.map(get));
  const quality = Object.keys(METRICS)
    .map((key) => [key, of((cell) => cell.quality[key])])
    .filter(([, number]) => number !== null)
    .map(([key, number]) => [METRICS[key].name, metricText(key, number)]);
  const faster = of((cell) => speedup(cell, state.time));
  return [
    ...quality,
    [
      "Density",
      `${format(
        of((cell) => cell.density?.all_calls),
        3,
      )} all calls${
        mark.cell.role === "accelerated"
          ? `, ${format(
              of((cell) => cell.density?.sparse_calls),
              3,
            )} sparse`
          : ""
      }`,
    ],
    [
      TIMES[state.time],
      `${seconds(of((cell) => cell.seconds?.[state.time]))}${faster ? ` (${fasterText(faster)})` : ""}`,
    ],
  ];
}

function legendItems() {
  const families = new Map(finished(inGroup()).map((cell) => [familyOf(cell), cell]));
  const text = { dense: "dense, the reference", control: "control: dense on another backend" };
  const items = [...families].map(([family, cell]) =>
    legendItem(18, marker(lookOf(cell), 9, 8, 5), text[family] || family),
  );
  const sparse = marks().filter((mark) => mark.cell.role === "accelerated").length;
  if (sparse > 1) items.push(legendItem(22, svg("path", { class: "front", d: "M1 12H11V4H21" }), "best trade-offs"));
  return items;
}
