"use strict";
// What `svg tune` found: the result beside one budget for all heads, every head's or layer's budget, and its curve.

const TARGETS = {
  min_psnr: (value) => `PSNR of at least ${value} dB`,
  max_lpips: (value) => `LPIPS of at most ${value}`,
  target_speedup: (value) => `attention ${value} times as fast`,
};

function tuneSection() {
  const { tune } = DATA;
  if (!tune) return null;
  const over = tune.target.worst ? "every video" : "the mean";
  const videos = tune.prompts["held-out"];
  const prompts = `${videos} ${videos === 1 ? "prompt" : "prompts"} that ${videos === 1 ? "was" : "were"} not used to find budgets`;
  const lead = `Target: ${TARGETS[tune.target.kind](tune.target.value)} in ${over} over ${prompts}.`;
  return section("tune", `Budgets for every ${tune.unit_of_budgets}`, lead, verdict(tune), trialTable(tune), headBudgets(tune), headCurves(tune));
}

function verdict(tune) {
  const unit = tune.unit === "seconds" ? "attention time" : "density";
  const text = (share) => `${Math.abs(100 * share).toFixed(1)} % ${share >= 0 ? "less" : "more"} ${unit}`;
  const exact = tune.saved_at_equal_quality;
  if (exact !== null) {
    const tried = tune.saved === null ? "" : ` The settings of the table, which both reach it: ${text(tune.saved)}.`;
    const between = " than one budget for all heads exactly at the target, between videos on either side of it.";
    return el("p", { class: "verdict" }, el("b", {}, text(exact)), `${between}${tried}`);
  }
  if (tune.saved === null)
    return el("p", { class: "verdict" }, "Not both kinds of budgets reached the target, so there is no saving to name.");
  return el("p", { class: "verdict" }, el("b", {}, text(tune.saved)), " than one budget for all heads, both at the target.");
}

function trialTable({ rows, steps }) {
  const lpips = rows.some((row) => row.lpips !== null) ? ["LPIPS"] : [];
  const dense = rows.some((row) => row.dense_steps !== null) ? ["Dense steps"] : [];
  const columns = ["Budgets", "Setting", "Target", ...dense, "Density", "Attention", "PSNR", ...lpips];
  const body = rows.map((row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", class: "text" }, row.name),
      el("td", { class: "text" }, row.label),
      el("td", {}, row.met === null ? "" : row.met ? "reached" : "missed"),
      dense.map(() => el("td", {}, row.dense_steps === null ? "" : `${row.dense_steps} of ${steps}`)),
      el("td", {}, format(row.density, 3)),
      el("td", {}, seconds(row.attention_seconds)),
      el("td", {}, metricText("psnr", row.psnr)),
      lpips.map(() => el("td", {}, format(row.lpips, 4))),
    ),
  );
  const heads = columns.map((name, index) => el("th", { scope: "col", class: index < 2 ? "head text" : "head" }, name));
  const table = el("table", { class: "plain" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, body));
  return el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Tuned and uniform budgets" }, table);
}

// One picture: layers to the right, heads downwards, or a row of layers whose heads share a budget.
function headBudgets({ budgets, budget, levels, density, loss, unit_of_budgets: unit }) {
  if (!budgets) return null;
  const layers = budgets.map((_, layer) => layer);
  const map = { steps: layers, layers: [0], heads: budgets[0].length };
  const bytes = budgets.flat().map((value) => Math.round(value * 254));
  return heatmap(map, bytes, {
    id: "budgets",
    title: `${budget} of every ${unit}: layers to the right${unit === "head" ? ", heads downwards" : ""}`,
    stops: DENSITY_STOPS,
    low: "little",
    high: "1: dense",
    hint: "Point at a square, or focus the picture and use the arrow keys.",
    panelName: () => "",
    place: ({ step, head }) => `Layer ${step}${unit === "head" ? `, head ${head}` : ""}`,
    word: (_, { step, head }) => {
      const level = levels.indexOf(budgets[step][head]);
      const computed = level < 0 ? "" : `, density ${format(density[step][head][level], 3)}`;
      const lost = level < 0 ? "" : `, weighted error ${loss[step][head][level].toExponential(1)}`;
      return `${budget} ${budgets[step][head]}${computed}${lost}`;
    },
  });
}

// Weighted error against density, a line a head or layer, on a logarithmic scale; a dot where it was put.
function headCurves(tune) {
  const figure = el("figure", { id: "curves" });
  const draw = () => {
    const width = Math.min(figure.clientWidth || 900, 900);
    figure.replaceChildren(curvePlot(tune, width));
  };
  new ResizeObserver(draw).observe(figure);
  draw();
  return figure;
}

function curvePlot({ loss, density, budgets, levels, unit_of_budgets: unit }, width) {
  const box = { left: 58, right: width - 14, top: 34, bottom: 290 };
  const known = loss.flat(2).filter((number) => number > 0);
  if (!known.length) return el("p", { class: "empty" }, `No ${unit} loses anything at any level.`);
  const top = Math.max(...known);
  const floor = Math.max(Math.min(...known), top * 1e-6);
  const bounds = [Math.floor(Math.log10(floor)), Math.ceil(Math.log10(top))];
  const mapX = scale([0, 1.04], [box.left, box.right]);
  const mapY = scale(bounds, [box.bottom, box.top]);
  const place = (layer, head, level) => [
    mapX(density[layer][head][level]),
    mapY(Math.log10(Math.max(loss[layer][head][level], 10 ** bounds[0]))),
  ];
  const lines = loss.flatMap((heads, layer) =>
    heads.map((errors, head) => {
      const points = errors.map((_, level) => place(layer, head, level)).slice(0, -1);
      const title = svg("title", {}, `layer ${layer}${unit === "head" ? `, head ${head}` : ""}`);
      return svg("path", { class: "head-curve", d: `M${points.map((point) => point.join(" ")).join("L")}` }, title);
    }),
  );
  const dots = loss.flatMap((heads, layer) =>
    heads.map((_, head) => {
      const level = budgets ? levels.indexOf(budgets[layer][head]) : -1;
      if (level < 0) return null;
      const [x, y] = place(layer, head, level);
      return svg("circle", { class: "head-dot", cx: x, cy: y, r: 3.2 });
    }),
  );
  const exponents = Array.from({ length: bounds[1] - bounds[0] + 1 }, (_, index) => bounds[0] + index);
  return svg(
    "svg",
    {
      class: "plot",
      width,
      height: 340,
      viewBox: `0 0 ${width} 340`,
      role: "img",
      "aria-label": `Weighted error against density of ${lines.length} ${unit}s; a dot is where a ${unit} was put`,
    },
    svg("text", { class: "title", x: 0, y: 14 }, `Weighted error; a dot is a ${unit}'s budget`),
    axisX(mapX, ticks(0, 1, width < 420 ? 4 : 6), { ...box, label: "Density" }),
    axisY(
      mapY,
      exponents.map((exponent) => [exponent, `1e${exponent}`]),
      box,
    ),
    lines,
    dots.filter(Boolean),
  );
}
