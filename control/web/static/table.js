// A table that is drawn again and again: rows keep their elements, so that nothing blinks and a selection stays.
// Knows nothing of fleets (rows.js does) and writes text only, never markup.

import { printable } from "./rows.js";

export const make = (tag, style = "") => Object.assign(document.createElement(tag), { className: style });
export const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

export class Table {
  // `spec` is one of rows.js; `wanted` gives the words that rows must have, `open` is told of a row that was chosen.
  constructor(spec, wanted, open) {
    Object.assign(this, { spec, wanted, open });
    this.sort = spec.sort;
    this.turned = false;
    this.rows = [];
    this.lines = new Map();
    const section = document.getElementById(spec.id);
    this.note = section.querySelector("h2").appendChild(make("small"));
    this.empty = section.appendChild(make("p", "empty"));
    this.scroll = section.appendChild(make("div", "scroll"));
    const table = this.scroll.appendChild(make("table"));
    this.heads = this.head(table.createTHead().insertRow());
    this.body = table.createTBody();
  }

  head(line) {
    return this.spec.columns.map((column) => {
      const head = line.appendChild(make("th", column.style.replace(/\b(name|id|words)\b/, "")));
      head.scope = "col";
      head.title = column.hint;
      if (column.key === null) put(head, column.title);
      else {
        const button = head.appendChild(make("button"));
        button.type = "button";
        put(button, column.title);
        button.addEventListener("click", () => this.sortBy(column.title));
      }
      return head;
    });
  }

  sortBy(title) {
    this.turned = this.sort === title && !this.turned;
    this.sort = title;
    this.draw();
  }

  show(rows, now, note = "") {
    [this.rows, this.now, this.told] = [rows, now, note];
    this.draw();
  }

  draw() {
    const words = this.wanted();
    const kept = this.rows.filter((row) => words.every((word) => this.spec.words(row).toLowerCase().includes(word)));
    this.order(kept);
    put(this.note, this.told || (kept.length < this.rows.length ? `${kept.length} of ${this.rows.length}` : kept.length ? `${kept.length}` : ""));
    put(this.empty, this.rows.length ? "Nothing here has the words of the filter." : this.spec.empty);
    this.empty.hidden = kept.length > 0;
    this.scroll.hidden = kept.length === 0;
    const old = this.lines;
    this.lines = new Map();
    kept.forEach((row, place) => {
      const key = this.spec.key(row);
      const line = old.get(key) ?? this.line();
      old.delete(key);
      this.lines.set(key, line);
      this.fill(line, row);
      if (this.body.children[place] !== line.element) this.body.insertBefore(line.element, this.body.children[place] ?? null);
    });
    for (const line of old.values()) line.element.remove();
  }

  order(rows) {
    const column = this.spec.columns.find((each) => each.title === this.sort && each.key !== null);
    for (const [place, each] of this.spec.columns.entries()) this.heads[place].removeAttribute("aria-sort");
    if (!column) return;
    const text = rows.length > 0 && typeof column.key(rows[0]) === "string";
    const rising = text !== this.turned; // Names begin with the first, figures with the largest.
    rows.sort((one, other) => {
      const [a, b] = [column.key(one), column.key(other)];
      return (a < b ? -1 : a > b ? 1 : 0) * (rising ? 1 : -1);
    });
    this.heads[this.spec.columns.indexOf(column)].setAttribute("aria-sort", rising ? "ascending" : "descending");
  }

  line() {
    const element = make("tr", this.spec.opens ? "opens" : "");
    const line = { element, row: null, cells: this.spec.columns.map((column) => element.appendChild(make("td", column.style))) };
    if (this.spec.opens) {
      const button = line.cells[0].appendChild(make("button"));
      button.type = "button";
      button.setAttribute("aria-haspopup", "dialog");
      element.addEventListener("click", () => this.open(this.spec.opens, this.spec.key(line.row)));
    }
    return line;
  }

  fill(line, row) {
    line.row = row;
    const style = this.spec.rowStyle?.(row) ?? "";
    line.element.classList.toggle("silent", style === "silent");
    this.spec.columns.forEach((column, place) => fillCell(line.cells[place], column.cell(row, this.now)));
  }
}

function fillCell(cell, content) {
  const title = content.title ? printable(content.title) : "";
  if (cell.title !== title) cell.title = title;
  if ("part" in content) return fillBar(cell, content);
  const words = printable(content.text);
  let inner = cell.firstElementChild;
  if (inner === null) inner = cell.appendChild(make("bdi"));
  if (inner.tagName === "BDI" && inner.className !== content.style) inner.className = content.style;
  put(inner, words);
  if (cell.classList.contains("name") && !content.title && cell.title !== words) cell.title = words;
}

function fillBar(cell, { part, over = 0, due = null, style = "" }) {
  let bar = cell.firstElementChild;
  if (bar === null) {
    bar = cell.appendChild(make("span"));
    bar.append(make("i"), make("i", "over"), make("u"));
  }
  bar.className = `bar ${style}`;
  const [full, held, mark] = bar.children;
  full.style.setProperty("--part", Math.min(1, part));
  held.style.setProperty("--part", Math.min(1, over));
  mark.hidden = !due;
  mark.style.setProperty("--due-at", Math.min(1, due ?? 0));
}
