"use strict";
// A family: cells of one method that differ in nothing but how much they compute. One line, colour and mark each.

const ROLES = {
  dense: { colour: "var(--ink)", shape: "diamond" },
  control: { colour: "var(--control)", shape: "cross" },
};
const METHODS = {
  near: { colour: "#00805f", shape: "triangle" },
  svg1: { colour: "#0072b2", shape: "square" },
  svg2: { colour: "#c2410c", shape: "circle" },
  sparge: { colour: "#7c3aed", shape: "down" },
};
const MORE = [
  { colour: "#a8327d", shape: "hexagon" },
  { colour: "#8a6d00", shape: "bow" },
  { colour: "#4a5bd0", shape: "right" },
  { colour: "#00838f", shape: "glass" },
  { colour: "#7a4b2a", shape: "left" },
  { colour: "#5a6b00", shape: "star" },
];
const FAMILY = new Map(); // id of a cell -> its family's name
const LOOKS = new Map(Object.entries(ROLES)); // family or role -> colour and shape

function kindOf(cell) {
  return cell.role === "accelerated" ? cell.method : cell.role;
}

function familyOf(cell) {
  return FAMILY.get(cell.id) ?? cell.role;
}

function lookOf(cell) {
  return LOOKS.get(familyOf(cell));
}

function colourOf(cell) {
  return lookOf(cell).colour;
}

// A label's first line says what and how much, its second line the rest.
function labelLines(label) {
  const [method, ...settings] = label.split(" ");
  const isBudget = (text) => !text.includes("=") || BUDGETS.includes(text.split("=")[0]);
  return [[method, ...settings.filter(isBudget)].join(" "), settings.filter((text) => !isBudget(text)).join(" ")];
}

function findFamilies() {
  const sparse = CELLS.filter((cell) => cell.role === "accelerated");
  for (const method of new Set(sparse.map((cell) => cell.method))) {
    const own = sparse.filter((cell) => cell.method === method);
    const names = [...new Set(own.flatMap((cell) => Object.keys(cell.settings)))].filter(isPartOfAFamily);
    const differing = names.filter((name) => new Set(own.map((cell) => spelt(cell.settings[name]))).size > 1);
    for (const cell of own)
      FAMILY.set(cell.id, [method, ...differing.map((name) => `${name}=${spelt(cell.settings[name])}`)].join(" "));
  }
  const seen = new Set();
  let next = 0;
  for (const cell of sparse) {
    if (LOOKS.has(familyOf(cell))) continue;
    const first = !seen.has(cell.method) && METHODS[cell.method];
    LOOKS.set(familyOf(cell), first || MORE[next++ % MORE.length]);
    seen.add(cell.method);
  }
}

function isPartOfAFamily(name) {
  return !BUDGETS.includes(name) && !/^head_|^tuned_for$|^thresholds$|^method$/.test(name);
}

function spelt(setting) {
  return JSON.stringify(setting ?? null).replaceAll('"', ""); // one that an earlier version didn't know is not set
}

findFamilies();
