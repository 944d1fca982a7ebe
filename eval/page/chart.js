"use strict";
// Scales, ticks and axes for the small SVG charts.

function scale([from, to], [start, end]) {
  const span = to - from || 1;
  return (number) => start + ((number - from) / span) * (end - start);
}

// Round numbers that divide [from, to] into about `count` parts.
function ticks(from, to, count) {
  const rough = (to - from || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const list = [];
  for (let index = Math.ceil(from / step - 1e-9); index * step <= to + step * 1e-9; index += 1) list.push(index * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (String(step / power).startsWith("2.5") ? 1 : 0));
  return list.map((number) => [number, number.toFixed(Math.min(digits, 6))]);
}

// A domain around numbers with some air, at least `least` wide.
function around(numbers, least) {
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  const air = Math.max((high - low) * 0.14, least / 2 - (high - low) / 2, least * 0.05);
  return [low - air, high + air];
}

function axisX(map, list, { bottom, top, label, right, left }) {
  const marks = list.map(([number, text]) => [
    svg("line", { class: "grid", x1: map(number), x2: map(number), y1: top, y2: bottom }),
    svg("text", { class: "tick", x: map(number), y: bottom + 17, "text-anchor": "middle" }, text),
  ]);
  return svg(
    "g",
    { "aria-hidden": "true" },
    marks,
    svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    svg("text", { class: "label", x: right, y: bottom + 36, "text-anchor": "end" }, label),
  );
}

function axisY(map, list, { left, right }) {
  return svg(
    "g",
    { "aria-hidden": "true" },
    list.map(([number, text]) => [
      svg("line", { class: "grid", x1: left, x2: right, y1: map(number), y2: map(number) }),
      svg("text", { class: "tick", x: left - 8, y: map(number) + 4, "text-anchor": "end" }, text),
    ]),
  );
}

// Corners of each shape, for a size of 1; one shape a family, so that colour is never the only difference.
const SHAPES = {
  diamond: "0,-1.3 1.3,0 0,1.3 -1.3,0",
  square: "-.9,-.9 .9,-.9 .9,.9 -.9,.9",
  triangle: "0,-1.2 1.1,.8 -1.1,.8",
  down: "0,1.2 1.1,-.8 -1.1,-.8",
  right: "1.2,0 -.8,1.1 -.8,-1.1",
  left: "-1.2,0 .8,1.1 .8,-1.1",
  hexagon: "-1.1,0 -.55,-.95 .55,-.95 1.1,0 .55,.95 -.55,.95",
  bow: "-1.2,-.9 0,-.25 1.2,-.9 1.2,.9 0,.25 -1.2,.9",
  glass: "-.9,-1.2 .9,-1.2 .25,0 .9,1.2 -.9,1.2 -.25,0",
  star: "0,-1.3 .35,-.4 1.3,0 .35,.4 0,1.3 -.35,.4 -1.3,0 -.35,-.4",
};

// A family's mark.
function marker({ colour, shape }, x, y, size, outline = {}) {
  const corners = SHAPES[shape]?.split(" ").map((pair) => pair.split(",").map((number) => (size * number).toFixed(2)));
  const paths = {
    circle: `M${-size} 0A${size} ${size} 0 1 1 ${size} 0A${size} ${size} 0 1 1 ${-size} 0Z`,
    cross: `M${-size} ${-size}L${size} ${size}M${-size} ${size}L${size} ${-size}`,
  };
  const d = corners ? `M${corners.map((pair) => pair.join(" ")).join("L")}Z` : paths[shape];
  const style =
    shape === "cross" ? { fill: "none", stroke: colour, strokeWidth: 2.3 } : { fill: colour, ...outline };
  return svg("path", { d, transform: `translate(${x} ${y})`, style });
}

// A line of a legend: a mark and what it stands for.
function legendItem(width, mark, text) {
  return el("li", {}, svg("svg", { width, height: 16, "aria-hidden": "true" }, mark), text);
}
