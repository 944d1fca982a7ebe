"use strict";
// Methods measured on recorded q, k, v: what they keep and lose against density, in the mean and head by head.

const MEASURES = {
  error: { name: "Output error", low: "0: exact", up: false },
  recall: { name: "Recall", low: "0: nothing", up: true },
  density: { name: "Density", low: "0: nothing", up: false },
};
const recordedState = { label: null, measure: "error" };

function recordedSection() {
  const methods = DATA.recorded?.methods;
  if (!methods) return null;
  const plots = el("div", { class: "plots" });
  const draw = () => {
    const width = plots.clientWidth || 900;
    const each = width >= 760 ? (width - 28) / 2 : width;
    plots.replaceChildren(measurePlot(methods, "recall", each), measurePlot(methods, "error", each));
  };
  new ResizeObserver(draw).observe(plots);
  draw();
  return section(
    "recorded",
    "On recorded inputs",
    "Every method on the same queries, keys and values of a dense run: means over steps, layers, branches and heads. What a head's error does to a video, these numbers do not say.",
    plots,
    recordedLegend(methods),
    measureTable(methods),
  );
}

function measurePlot(methods, measure, width) {
  const known = methods.filter((method) => method[measure] !== null);
  const box = { left: 58, right: width - 14, top: 34, bottom: 270 };
  const most = Math.max(...known.map((method) => method[measure]), 1e-6);
  const bounds = measure === "recall" ? [Math.min(...known.map((method) => method.recall), 0.9) - 0.04, 1] : [0, most * 1.12];
  const mapX = scale([0, 1.04], [box.left, box.right]);
  const mapY = scale(bounds, [box.bottom, box.top]);
  const names = [...new Set(known.map((method) => method.method))];
  const lines = names.map((name) => {
    const own = known.filter((method) => method.method === name).sort((a, b) => a.density - b.density);
    const path = own.map((method, index) => `${index ? "L" : "M"}${mapX(method.density)} ${mapY(method[measure])}`).join("");
    return own.length > 1 && svg("path", { class: "series", d: path, stroke: recordedLook(name).colour, "aria-hidden": "true" });
  });
  const dots = known.map((method) => {
    const rows = Object.entries(MEASURES).map(([key, { name }]) => [name, format(method[key], 4)]);
    const x = mapX(method.density);
    const y = mapY(method[measure]);
    return svg(
      "g",
      {
        class: "point",
        tabindex: 0,
        role: "img",
        "data-label": method.label,
        "aria-label": `${method.label}: ${rows.map((row) => row.join(" ")).join(", ")}`,
        onpointermove: (event) => showTip(method.label, rows, event.clientX, event.clientY),
        onpointerleave: hideTip,
        onblur: hideTip,
        onfocus: (event) => {
          const place = event.currentTarget.getBoundingClientRect();
          showTip(method.label, rows, place.right, place.bottom);
        },
      },
      svg("circle", { class: "target", cx: x, cy: y, r: 13 }),
      marker(recordedLook(method.method), x, y, 6),
    );
  });
  const title = `${MEASURES[measure].name} against density`;
  const drawing = svg(
    "svg",
    { class: "plot", width, height: 320, viewBox: `0 0 ${width} 320`, role: "group", "aria-label": title },
    svg("text", { class: "title", x: 0, y: 14 }, MEASURES[measure].name),
    axisX(mapX, ticks(0, 1, width < 420 ? 4 : 6), { ...box, label: "Density" }),
    axisY(mapY, ticks(...bounds, 5), box),
    lines,
    dots,
  );
  return el("figure", { "data-measure": measure }, el("figcaption", { class: "offscreen" }, title), drawing);
}

function recordedLegend(methods) {
  const items = [...new Set(methods.map(({ method }) => method))].map((name) =>
    legendItem(18, marker(recordedLook(name), 9, 8, 5), name),
  );
  return el("ul", { class: "legend" }, items);
}

function recordedLook(name) {
  const others = [...new Set(DATA.recorded.methods.map((method) => method.method))].filter((method) => !METHODS[method]);
  return METHODS[name] || MORE[others.indexOf(name) % MORE.length];
}

function measureTable(methods) {
  const heads = ["Method", "Density", "Recall", "Output error", "Worst head"];
  const rows = methods.map((method) => {
    const { worst } = method;
    return el(
      "tr",
      {},
      el("th", { scope: "row", class: "text" }, method.label),
      ...["density", "recall", "error"].map((key) => el("td", {}, format(method[key], 4))),
      el("td", {}, `${format(worst.error, 3)} (step ${worst.step + 1}, layer ${worst.layer}, head ${worst.head})`),
    );
  });
  const columns = heads.map((name, index) => el("th", { scope: "col", class: index ? "head" : "head text" }, name));
  const table = el("table", { class: "plain" }, el("thead", {}, el("tr", {}, columns)), el("tbody", {}, rows));
  return el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Methods on recorded inputs" }, table);
}

function recordedMaps() {
  const methods = DATA.recorded?.methods;
  if (!methods) return null;
  recordedState.label = methods[0].label;
  const body = el("div");
  const draw = () => body.replaceChildren(...methodMaps(methods.find((method) => method.label === recordedState.label)));
  const change = (changes) => {
    Object.assign(recordedState, changes);
    draw();
  };
  draw();
  const controls = el(
    "div",
    { class: "controls" },
    selectBox("Method", methods.map(({ label }) => [label, label]), recordedState.label, (label) => change({ label })),
    choice("measure", "Measure", Object.entries(MEASURES).map(([key, { name }]) => [key, name]), "error", (measure) =>
      change({ measure }),
    ),
  );
  return section("recorded-heads", "Head by head", "Means over the guidance branches.", controls, body);
}

function methodMaps(method) {
  const { measure } = recordedState;
  return method.maps.map((map) => {
    const numbers = map.values[measure].flat(2);
    const known = numbers.filter((number) => number !== null);
    if (!known.length) return el("p", { class: "empty" }, `${method.label} has no ${measure}: its map is not in blocks.`);
    const most = measure === "error" ? Math.max(...known, 1e-9) : 1;
    const bytes = numbers.map((number) => (number === null ? MISSING : Math.round((number / most) * 254)));
    const name = method.maps.length > 1 ? ` (${map.transformer})` : "";
    return heatmap(map, bytes, {
      id: "recorded",
      title: `${MEASURES[measure].name} of ${method.label}${name}`,
      stops: DENSITY_STOPS,
      low: MEASURES[measure].low,
      high: format(most, 2),
      empty: "not recorded",
      word: (share) => `${MEASURES[measure].name.toLowerCase()} ${(share * most).toFixed(3)}`,
    });
  });
}

function measuredWords() {
  const words = [];
  if (DATA.tune)
    words.push(
      ["Tuned", "each head, or each layer, has a budget of its own; the prompts of this page were not used to find them."],
      ["Uniform", "one budget for all heads, searched in the same way on the same videos."],
    );
  if (DATA.recorded)
    words.push(
      ["Recall", "share of dense attention's mass that a method computes, mean over the query rows."],
      ["Output error", "distance of a head's output from that of dense attention, as a share of it."],
    );
  return words;
}
