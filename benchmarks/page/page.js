"use strict";
// Tables sort by the column whose heading is pressed: first press ascending for text, descending for numbers. Missing values stay last.
function valueOf(row, column, kind) {
  const text = row.cells[column].dataset.sort;
  if (text === "") return null;
  return kind === "number" ? Number(text) : text;
}

function sortTable(table, column, descending) {
  const head = table.tHead.rows[0].cells[column];
  const kind = head.dataset.kind;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  rows.sort((first, second) => {
    const a = valueOf(first, column, kind), b = valueOf(second, column, kind);
    if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
    const order = kind === "number" ? a - b : a.localeCompare(b);
    return descending ? -order : order;
  });
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sortTable(table, column, now === null ? head.dataset.kind === "number" : now === "ascending");
    });
  });
}

for (const form of document.querySelectorAll("form.filters")) {
  const table = document.getElementById(form.dataset.for);
  const choices = Array.from(form.querySelectorAll("select"));
  const apply = () => {
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = choices.some((choice) => choice.value !== "" && row.dataset[choice.dataset.filter] !== choice.value);
      if (!row.hidden) shown += 1;
    }
    form.querySelector("output").textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", apply);
  apply();
}
document.documentElement.dataset.ready = "true";
