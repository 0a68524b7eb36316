// Makes tables sortable: each header of a column gets a button. The page is complete without this.
"use strict";

function sortBy(table, header) {
  const column = header.cellIndex;
  const was = header.getAttribute("aria-sort");
  const ascending = was ? was === "descending" : column === 0; // the first column holds names
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const keyed = [...table.tBodies[0].rows].map((row) => {
    const { dataset, textContent } = row.cells[column];
    return [column ? parseFloat(dataset.value ?? textContent) : textContent.trim(), row];
  });
  keyed.sort(([a], [b]) => {
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    const order = column ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table")) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, header));
    header.append(button);
  }
}
