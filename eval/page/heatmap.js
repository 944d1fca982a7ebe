"use strict";
// Step x layer x head: one small picture a layer, heads downwards, steps to the right.

const MISSING = 255;
const DENSITY_STOPS = [
  [247, 250, 252],
  [198, 219, 239],
  [107, 174, 214],
  [33, 113, 181],
  [8, 38, 84],
];
const KIND_STOPS = [
  [0, 114, 178],
  [252, 249, 240],
  [230, 126, 0],
];
const NO_VALUE = [193, 200, 209];

function colourAt(stops, share) {
  const place = share * (stops.length - 1);
  const index = Math.min(stops.length - 2, Math.floor(place));
  return stops[index].map((low, channel) => Math.round(low + (stops[index + 1][channel] - low) * (place - index)));
}

function unpack(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function insideSection() {
  if (!CELLS.some((cell) => cell.maps.length)) return null;
  const body = el("div");
  const draw = () => body.replaceChildren(...inside(BY_ID.get(state.selected)));
  onChange((keys) => (keys.includes("selected") || keys.includes("group")) && draw());
  draw();
  return section("inside", "What was computed", null, body);
}

function inside(cell) {
  if (!cell?.maps.length)
    return [
      el(
        "p",
        { class: "empty" },
        `${cell ? cell.label : "Nothing"} computes the whole attention map: select a sparse cell.`,
      ),
    ];
  return cell.maps.flatMap((map) => {
    const name = cell.maps.length > 1 ? ` (${map.transformer})` : "";
    const density = heatmap(map, unpack(map.density), {
      id: "density",
      title: `Density of ${describe(cell)}${name}`,
      stops: DENSITY_STOPS,
      low: "0: nothing",
      high: "1: dense",
      word: (share) => `density ${share.toFixed(2)}`,
    });
    const kinds =
      map.temporal &&
      heatmap(map, unpack(map.temporal), {
        id: "kinds",
        title: `Head kinds of ${describe(cell)}${name}`,
        stops: KIND_STOPS,
        low: "spatial",
        high: "temporal",
        missing: "grey: dense call",
        word: kindWord,
      });
    return [density, kinds].filter(Boolean);
  });
}

function kindWord(share) {
  if (share === 0) return "spatial";
  return share === 1 ? "temporal" : `temporal in ${(share * 100).toFixed(0)} % of the calls`;
}

// `place` says where a square is, `panelName` what a small picture is.
function heatmap(map, bytes, { id, title, stops, low, high, missing, word, place, panelName, empty, hint }) {
  const { steps, layers, heads } = map;
  const at = (step, layer, head) => bytes[(step * layers.length + layer) * heads + head];
  const readout = el(
    "output",
    { class: "readout", "aria-live": "polite" },
    hint || "Point at a square, or focus the maps and use the arrow keys; Page Up and Down change the layer.",
  );
  const panels = layers.map((layer, index) =>
    panel(panelName?.(layer) ?? `layer ${layer}`, steps, heads, (step, head) => at(step, index, head), stops),
  );
  const grid = el(
    "div",
    {
      class: "maps",
      tabindex: 0,
      role: "group",
      "aria-label": place ? title : `${title}: ${layers.length} layers, ${heads} heads, ${steps.length} steps`,
    },
    panels.map((item) => item.node),
  );
  grid.style.setProperty("--steps", steps.length);
  const here = { step: 0, layer: 0, head: 0 };
  const show = () => {
    const byte = at(here.step, here.layer, here.head);
    const text = byte === MISSING ? empty || "no sparse call" : word(byte / 254, here);
    const where = place?.(here) ?? `Step ${steps[here.step]}, layer ${layers[here.layer]}, head ${here.head}`;
    readout.textContent = `${where}: ${text}`;
    panels.forEach((item, index) => item.mark(index === here.layer ? here : null));
  };
  panels.forEach((item, layer) =>
    item.canvas.addEventListener("pointermove", (event) => {
      const box = item.canvas.getBoundingClientRect();
      const step = clamp(Math.floor(((event.clientX - box.left) / box.width) * steps.length), steps.length);
      const head = clamp(Math.floor(((event.clientY - box.top) / box.height) * heads), heads);
      Object.assign(here, { step, layer, head });
      show();
    }),
  );
  grid.addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: ["step", 1],
      ArrowLeft: ["step", -1],
      ArrowDown: ["head", 1],
      ArrowUp: ["head", -1],
      PageDown: ["layer", 1],
      PageUp: ["layer", -1],
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    const [axis, by] = moves[event.key];
    here[axis] = clamp(here[axis] + by, { step: steps.length, layer: layers.length, head: heads }[axis]);
    show();
  });
  return el(
    "div",
    { class: "heatmap", id: `heatmap-${id}`, "data-id": id },
    el("h3", {}, title),
    grid,
    el(
      "div",
      { class: "under" },
      el(
        "div",
        { class: "scale" },
        el("span", {}, low),
        ramp(stops),
        el("span", {}, high),
        missing && el("span", { class: "missing" }, missing),
      ),
      readout,
    ),
  );
}

function clamp(index, count) {
  return Math.max(0, Math.min(count - 1, index));
}

function panel(name, steps, heads, at, stops) {
  const canvas = el("canvas", { width: steps.length, height: heads, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const picture = context.createImageData(steps.length, heads);
  for (let head = 0; head < heads; head += 1) {
    for (let step = 0; step < steps.length; step += 1) {
      const byte = at(step, head);
      picture.data.set(
        [...(byte === MISSING ? NO_VALUE : colourAt(stops, byte / 254)), 255],
        4 * (head * steps.length + step),
      );
    }
  }
  context.putImageData(picture, 0, 0);
  const cursor = el("div", { class: "cursor", hidden: true });
  const size = Math.max(3, Math.min(22, Math.floor((innerWidth > 720 ? 148 : 106) / Math.max(steps.length, heads))));
  const screen = el(
    "div",
    { class: "map", style: { width: `${size * steps.length}px`, height: `${size * heads}px` } },
    canvas,
    cursor,
  );
  const mark = (here) => {
    cursor.hidden = !here;
    if (here)
      Object.assign(cursor.style, {
        left: `${size * here.step}px`,
        top: `${size * here.head}px`,
        width: `${size}px`,
        height: `${size}px`,
      });
  };
  return { node: el("div", { class: "panel" }, el("span", {}, name), screen), canvas, mark };
}

function ramp(stops) {
  const colours = stops.map((stop) => `rgb(${stop.join(",")})`).join(",");
  return el("i", { style: { background: `linear-gradient(to right, ${colours})` } });
}
