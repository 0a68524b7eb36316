// Makes the columns of a table sortable: each header marked data-sort gets a button. The page is
// complete without this.
"use strict";

function cellValue(row, column, asText) {
  let place = 0;
  for (const cell of row.cells) {
    if (place <= column && column < place + cell.colSpan) {
      if (cell.colSpan > 1) return null;
      const text = cell.textContent.trim();
      if (asText) return text;
      const number = Number(cell.dataset.value ?? text);
      return Number.isNaN(number) ? null : number;
    }
    place += cell.colSpan;
  }
  return null;
}

function sortBy(table, header, asText) {
  const was = header.getAttribute("aria-sort");
  const ascending = was ? was === "descending" : asText;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [cellValue(row, header.cellIndex, asText), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = asText ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
    return ascending ? order : -order;
  });
  body.append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, header, header.dataset.sort === "text"));
    header.append(button);
  }
}
