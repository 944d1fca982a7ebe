"use strict";
// Every cell as a row: sorts, filters, selects, copies the command.

const COLUMNS = [
  { key: "label", name: "Cell", get: (cell) => cell.label, text: true },
  {
    key: "density",
    name: "Density",
    get: (cell) => cell.density?.all_calls,
    show: (number) => format(number, 3),
    hint: "over all calls",
  },
  ...Object.entries(METRICS).map(([key, { name, short, digits, unit }]) => ({
    key,
    name: short || name,
    get: (cell) => cell.quality[key],
    show: (number) => format(number, digits),
    hint: [name, unit].filter(Boolean).join(", "),
    metric: true,
  })),
  ...["attention", "end_to_end"].map((key) => ({
    key,
    name: TIMES[key],
    get: (cell) => cell.seconds?.[key],
    show: seconds,
    after: (cell) => speedup(cell, key),
    hint: "and how much faster or slower than dense",
  })),
  { key: "prompt", name: "Prompt", get: (cell) => cell.prompt, text: true, several: true },
  { key: "seed", name: "Seed", get: (cell) => cell.seed, several: true },
];

function tableSection() {
  const columns = COLUMNS.filter((column) => {
    if (column.several) return new Set(CELLS.map(column.get)).size > 1;
    return !column.metric || CELLS.some((cell) => cell.quality[column.key] !== null);
  });
  const buttons = columns.map((column) =>
    el(
      "button",
      { type: "button", onclick: () => sortBy(column) },
      column.name,
      el("span", { class: "arrow", "aria-hidden": "true" }),
    ),
  );
  const heads = columns.map((column, index) =>
    el("th", { scope: "col", class: column.text ? "text" : null, title: column.hint }, buttons[index]),
  );
  const body = el("tbody");
  const count = el("p", { class: "count", role: "status" });
  const table = el(
    "table",
    {},
    el("caption", { class: "offscreen" }, "All cells"),
    el("thead", {}, el("tr", {}, heads, el("th", { scope: "col" }, el("span", { class: "head" }, "Command")))),
    body,
  );
  const draw = () => {
    const cells = sorted(filtered({ keepReferences: false }), columns);
    const held = body.contains(document.activeElement) && document.activeElement.closest("tr").dataset.id;
    body.replaceChildren(...cells.map((cell) => row(cell, columns)));
    if (held) body.querySelector(`[data-id="${CSS.escape(held)}"] .pick`)?.focus();
    if (!cells.length)
      body.append(
        el(
          "tr",
          {},
          el(
            "td",
            { colspan: columns.length + 1, class: "empty" },
            "No cell matches. ",
            el("button", { type: "button", onclick: clearFilter }, "Clear the filter"),
          ),
        ),
      );
    count.textContent = `${cells.length} of ${inGroup().length} cells`;
    columns.forEach((column, index) => {
      const order = state.sort.key === column.key ? (state.sort.down ? "descending" : "ascending") : "none";
      heads[index].setAttribute("aria-sort", order);
    });
  };
  onChange((keys) => keys.some((key) => !["metric", "time", "each"].includes(key)) && draw());
  draw();
  const scroller = el(
    "div",
    { class: "scroller", tabindex: 0, role: "region", "aria-label": "Table of cells, scrolls sideways" },
    table,
  );
  return section(
    "cells",
    "Cells",
    DATA.kind === "sweep"
      ? "The filter applies to the plots too. A click on a row shows its video and its inside below."
      : null,
    filterBar(),
    count,
    scroller,
  );
}

function sortBy({ key }) {
  const { sort } = state;
  update({
    sort: sort.key !== key ? { key, down: false } : sort.down ? { key: null, down: false } : { key, down: true },
  });
}

// Numbers in order, infinity above all of them; cells without the number stay at the end either way.
function sorted(cells, columns) {
  const column = columns.find(({ key }) => key === state.sort.key);
  if (!column) return cells;
  const known = cells.filter((cell) => (column.get(cell) ?? null) !== null);
  const rest = cells.filter((cell) => (column.get(cell) ?? null) === null);
  const compare = column.text
    ? (a, b) => String(column.get(a)).localeCompare(String(column.get(b)), undefined, { numeric: true })
    : (a, b) => compareNumbers(value(column.get(a)), value(column.get(b)));
  known.sort((a, b) => (state.sort.down ? -1 : 1) * compare(a, b));
  return [...known, ...rest];
}

function compareNumbers(a, b) {
  return a === b ? 0 : a - b; // infinity minus infinity is not a number
}

function row(cell, columns) {
  const chosen = cell.id === state.selected;
  const cells = columns.map((column, index) => (index ? dataCell(cell, column) : nameCell(cell, chosen)));
  const copyCell = el(
    "td",
    { class: "action" },
    copyButton(() => cell.command),
  );
  const attributes = {
    "data-id": cell.id,
    class: `${chosen ? "selected " : ""}${cell.status}`,
    onclick: () => update({ selected: cell.id }),
  };
  return el("tr", attributes, cells, copyCell);
}

function nameCell(cell, chosen) {
  const dot = svg(
    "svg",
    { width: 14, height: 14, "aria-hidden": "true" },
    marker(lookOf(cell), 7, 7, 4.4),
  );
  const pick = el("button", { type: "button", class: "pick", "aria-pressed": String(chosen) }, cell.label);
  const status =
    cell.status !== "finished" && el("span", { class: `status ${cell.status}`, title: cell.error }, cell.status);
  return el("th", { scope: "row", class: "text" }, el("div", { class: "name" }, dot, pick, status));
}

function dataCell(cell, column) {
  const number = column.get(cell);
  if (column.text) return el("td", { class: "text prompt", title: number }, number);
  if (cell.status === "failed" && column.key === "density") return el("td", { title: cell.error }, "–");
  const faster = column.after?.(cell);
  return el(
    "td",
    {},
    column.show ? column.show(number) : String(number),
    faster && el("small", {}, ` ${fasterText(faster)}`),
  );
}

function filterBar() {
  const search = el("input", {
    type: "search",
    placeholder: "such as svg2 0.7",
    oninput: () => update({ query: search.value }),
  });
  const kinds = [...new Set(CELLS.map(kindOf))];
  const prompts = [...new Set(CELLS.map((cell) => cell.prompt))];
  const seeds = [...new Set(CELLS.map((cell) => String(cell.seed)))];
  const any = (list, short) => [["", "all"], ...list.map((item) => [item, short ? shorten(item, 40) : item])];
  const bar = el(
    "form",
    {
      class: "controls filter",
      role: "search",
      onsubmit: (event) => event.preventDefault(),
      onreset: () => update({ query: "", method: "", prompt: "", seed: "" }),
    },
    el("label", { class: "field grow" }, el("span", {}, "Filter"), search),
    selectBox("Method", any(kinds), "", (method) => update({ method })),
    prompts.length > 1 && selectBox("Prompt", any(prompts, true), "", (prompt) => update({ prompt })),
    seeds.length > 1 && selectBox("Seed", any(seeds), "", (seed) => update({ seed })),
    el("button", { type: "reset" }, "Clear"),
  );
  return DATA.kind === "sweep" ? bar : null;
}

function clearFilter() {
  document.querySelector("form.filter")?.reset();
}
