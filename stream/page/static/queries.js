// One's own queries: kept by the browser, asked for on each connection, with what became of them.

import { Lost } from "./link.js";

const KEY = "livemoments.queries";

export class Queries {
  /** problem: called with what the service says is wrong. gone: with the query_id of one that nobody here wants now. */
  constructor(link, list, { colourOf, problem, gone }) {
    Object.assign(this, { link, list, colourOf, problem, gone });
    this.own = load(); // [{text, stream, threshold?}], and while connected: query_id, waits
  }

  /** Asks for all of them, on a new connection. */
  askAll() {
    for (const query of this.own) this.subscribe(query);
    this.show();
  }

  /** Of the query that runs under an id, if it is one's own. */
  find(query_id) {
    return this.own.find((query) => query.query_id === query_id);
  }

  /** Watch for something; in the place of what was asked for with the same text on the same stream. */
  async add(text, stream, threshold) {
    const same = (query) => query.text.toLowerCase() === text.toLowerCase() && query.stream === stream;
    const before = this.own.find(same);
    if (before && before.threshold === threshold) return;
    const query = { text, stream, ...(threshold === undefined ? {} : { threshold }) };
    this.own = [...this.own.filter((each) => each !== before), query];
    this.changed();
    if (await this.subscribe(query)) {
      if (before) await this.unsubscribe(before);
    } else if (before) {
      this.own = [...this.own, before];
      this.changed();
    }
  }

  async remove(query) {
    this.own = this.own.filter((each) => each !== query);
    this.changed();
    await this.unsubscribe(query);
  }

  /** The past of a query has been told on a stream. */
  caughtUp(query_id) {
    for (const query of this.own) if (query.query_id === query_id) query.waits = false;
    this.show();
  }

  /** Whether it worked out. */
  async subscribe(query) {
    delete query.query_id;
    query.waits = true;
    try {
      const answer = await this.link.ask({ op: "subscribe", ...asked(query) });
      query.query_id = answer.query_id;
      if (!this.own.includes(query)) await this.unsubscribe(query); // removed meanwhile
    } catch (error) {
      if (error instanceof Lost) return true; // it is asked for again on the next connection
      this.problem(`“${query.text}”: ${error.message}`);
      this.own = this.own.filter((each) => each !== query);
      this.changed();
      return false;
    }
    this.show();
    return true;
  }

  async unsubscribe(query) {
    if (query.query_id === undefined) return;
    const { query_id } = query;
    delete query.query_id;
    await this.link.ask({ op: "unsubscribe", ...asked(query) }).catch(() => {});
    if (!this.find(query_id)) this.gone(query_id);
  }

  changed() {
    localStorage.setItem(KEY, JSON.stringify(this.own.map(asked).map(({ query, ...rest }) => ({ text: query, ...rest }))));
    this.show();
  }

  show() {
    const chips = this.list.children, at = [...chips].findIndex((chip) => chip.contains(document.activeElement));
    this.list.replaceChildren(...this.own.map((query) => this.chip(query)));
    if (at < 0) return;
    // Who works by keys goes on at the next one.
    (chips[Math.min(at, chips.length - 1)]?.lastElementChild ?? document.getElementById("text")).focus();
  }

  chip(query) {
    const chip = document.createElement("li"), close = document.createElement("button");
    chip.style.setProperty("--line", this.colourOf(query.text));
    const where = query.stream === "*" ? "all streams" : query.stream;
    const at = query.threshold === undefined ? "" : `, from ${query.threshold.toFixed(2)}`;
    chip.append(element("span", "swatch"), element("b", "", query.text), element("span", "dim", `${where}${at}`));
    if (query.waits) chip.append(element("span", "dim", "looking back …"));
    close.type = "button";
    close.textContent = "×";
    close.ariaLabel = `Stop watching for ${query.text} on ${where}`;
    close.onclick = () => this.remove(query);
    chip.append(close);
    return chip;
  }
}

/** An element with a class and a text, which is never read as HTML. */
export function element(name, kind = "", text = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

function asked({ text, stream, threshold }) {
  return { query: text, stream, ...(threshold === undefined ? {} : { threshold }) };
}

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return found.filter((each) => typeof each?.text === "string" && typeof each.stream === "string");
  } catch {
    return []; // whoever wrote it was not this page
  }
}
