// Elements. What comes from the gateway becomes text or attributes here, never HTML.

/** An element with properties (`on…` are listeners, `class`, `data-…`, `aria-…`) and children. */
export function h(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function s(tag, props = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Change text only where it differs: a screen reader and a selection are left in peace. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Options of a `<select>`; what was chosen stays chosen while it is there. */
export function setOptions(select, values, fallback) {
  const same = select.options.length === values.length && values.every((v, i) => select.options[i].value === v);
  if (same) return;
  const chosen = select.value;
  select.replaceChildren(...values.map((value) => h("option", { value }, value)));
  select.value = values.includes(chosen) ? chosen : fallback ?? values[0] ?? "";
}

let counted = 0;

/** An id that nothing else on the page has. */
export function freshId() {
  return `e${++counted}`;
}

/**
 * A table whose rows are kept by key and changed in place.
 *
 * Columns: `title`, `number` (to be set to the right) or `long` (sentences), and either `text(row)` or `show(cell, row)`. The first
 * column names the row. On a narrow screen rows become blocks, so the roles are said outright.
 */
export class Table {
  constructor(caption, columns, { empty = "Nothing here.", className = "" } = {}) {
    this.columns = columns;
    this.rows = new Map();
    this.body = h("tbody", { role: "rowgroup" });
    this.heads = h("tr", { role: "row" });
    this.caption = h("caption", { class: "hidden" }, caption);
    this.table = h("table", { role: "table", class: className },
      this.caption, h("thead", { role: "rowgroup" }, this.heads), this.body);
    this.empty = h("p", { class: "empty", hidden: true }, empty);
    this.element = h("div", { class: "table" }, this.table, this.empty);
    this.showHeads();
  }

  showHeads() {
    this.heads.replaceChildren(...this.columns.map((column) =>
      h("th", { scope: "col", role: "columnheader", class: column.number ? "number" : undefined }, column.title)));
  }

  /** Other columns: all rows are made anew. */
  setColumns(columns) {
    this.columns = columns;
    this.rows.clear();
    this.body.replaceChildren();
    this.showHeads();
  }

  update(rows) {
    const kept = new Set();
    let place = this.body.firstElementChild;
    for (const { key, ...row } of rows) {
      let line = this.rows.get(key);
      if (!line) {
        const cells = this.columns.map((column, number) => number === 0
          ? h("th", { scope: "row", role: "rowheader" })
          : h("td", { role: "cell", "data-label": column.title, class: column.number ? "number" : column.long ? "text" : undefined }));
        line = { element: h("tr", { role: "row" }, cells), cells };
        this.rows.set(key, line);
      }
      if (line.element !== place) this.body.insertBefore(line.element, place);
      else place = place.nextElementSibling;
      this.columns.forEach((column, number) => {
        if (column.show) column.show(line.cells[number], row);
        else setText(line.cells[number], column.text(row));
      });
      kept.add(key);
    }
    for (const [key, line] of this.rows) {
      if (kept.has(key)) continue;
      line.element.remove();
      this.rows.delete(key);
    }
    this.empty.hidden = rows.length > 0;
    this.table.hidden = rows.length === 0;
  }
}
