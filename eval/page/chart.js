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

// One shape a method, so that colour is never the only difference.
function marker(kind, x, y, size, attributes) {
  const shapes = {
    dense: `M0 ${-size * 1.3}L${size * 1.3} 0L0 ${size * 1.3}L${-size * 1.3} 0Z`,
    control: `M${-size} ${-size}L${size} ${size}M${-size} ${size}L${size} ${-size}`,
    svg1: `M${-size * 0.9} ${-size * 0.9}H${size * 0.9}V${size * 0.9}H${-size * 0.9}Z`,
    svg2: `M${-size} 0A${size} ${size} 0 1 1 ${size} 0A${size} ${size} 0 1 1 ${-size} 0Z`,
  };
  const triangle = `M0 ${-size * 1.2}L${size * 1.1} ${size * 0.8}H${-size * 1.1}Z`;
  return svg("path", { d: shapes[kind] || triangle, transform: `translate(${x} ${y})`, ...attributes });
}

function kindOf(cell) {
  return cell.role === "accelerated" ? cell.method : cell.role;
}
