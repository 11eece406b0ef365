// The list of moments: each one a row from when it opens, which closes and gets its clip; between them, briefly, the
// streams' news. And the clip itself.

import { element } from "./queries.js";

const MOST = 200; // rows
const FRESH_MS = 30000; // what is older than this when it comes is not read out

export class Moments {
  /** colourOf: a query's text. nowOf: a stream's name; its clock need not be ours. */
  constructor(colourOf, nowOf) {
    Object.assign(this, { colourOf, nowOf });
    this.list = document.getElementById("events");
    this.none = document.getElementById("none");
    this.said = document.getElementById("said");
    this.rows = new Map(); // oldest first is not promised: see `place`
    this.dialog = new ClipDialog();
  }

  /** Takes an event of the log; whichever way it comes, and however often, it is the same row. */
  take(event) {
    const { data, type } = event, kind = type.split(".").at(-2);
    if (type.includes("client.lost")) {
      return this.news(`lost ${event.id}`, Date.now(), `${data.lost} events had left the log before they could be sent`);
    }
    if (!("moment_id" in data)) {
      const reason = data.reason ? `: ${data.reason}` : "";
      return this.news(`${event.source} ${event.id}`, Date.parse(event.time), `${data.state}${reason}`, data.stream);
    }
    const key = `${data.stream} ${data.moment_id}`;
    let row = this.rows.get(key);
    if (!row) {
      row = new Row(key, data, this.colourOf(data.query), this.dialog);
      if (!this.place(row)) return;
      const late = Date.now() - Date.parse(event.time);
      if (kind === "opened" && Math.abs(late) < FRESH_MS) this.say(`${data.query}: began on ${data.stream}`);
    }
    row.take(kind, data, event.lognumber);
    row.lasting(this.nowOf);
  }

  /** Forgets the moments of a query. */
  forget(query_id) {
    for (const row of [...this.rows.values()]) if (row.data?.query_id === query_id) this.drop(row);
  }

  clear() {
    for (const row of [...this.rows.values()]) this.drop(row);
  }

  /** Once a second: what is open lasts longer. */
  tick() {
    for (const row of this.rows.values()) row.lasting?.(this.nowOf);
  }

  recolour() {
    for (const row of this.rows.values()) row.recolour?.(this.colourOf);
  }

  news(key, at, text, stream = "") {
    if (this.rows.has(key)) return;
    const node = element("li", "news");
    node.append(element("time", "", clock(at)), element("b", "", stream), element("span", "", text));
    this.place({ key, at, node });
  }

  /** Newest first; false if it is older than all that there is room for. */
  place(row) {
    let before = this.list.firstElementChild;
    while (before && Number(before.dataset.at) > row.at) before = before.nextElementSibling;
    if (!before && this.rows.size >= MOST) return false;
    row.node.dataset.at = row.at;
    row.node.dataset.key = row.key;
    this.list.insertBefore(row.node, before);
    this.rows.set(row.key, row);
    if (this.rows.size > MOST) this.drop(this.rows.get(this.list.lastElementChild.dataset.key));
    this.none.hidden = true;
    return true;
  }

  drop(row) {
    row.node.remove();
    this.rows.delete(row.key);
    this.none.hidden = this.rows.size > 0;
  }

  say(text) {
    this.said.textContent = text;
  }
}

class Row {
  constructor(key, data, colour, dialog) {
    Object.assign(this, { key, data, dialog, number: -1, at: Date.parse(data.start) });
    const node = (this.node = element("li", "moment"));
    node.style.setProperty("--line", colour);
    this.thumb = element("button", "thumb");
    this.thumb.type = "button";
    this.image = element("img");
    Object.assign(this.image, { alt: "", loading: "lazy", decoding: "async", width: 96, height: 54 });
    this.image.onload = () => this.image.classList.remove("absent");
    this.image.onerror = () => this.image.classList.add("absent");
    this.thumb.append(this.image);
    this.thumb.disabled = true;
    // For pointers: who hears the page, or uses keys, has the button beside it.
    Object.assign(this.thumb, { ariaHidden: "true", tabIndex: -1 });
    this.thumb.onclick = () => this.dialog.show(this.clip, this.title());
    const head = element("p", "what");
    head.append(element("span", "swatch"), element("b", "", data.query));
    if (/-at-[\d.]+$/.test(data.query_id)) head.append(element("span", "dim", `from ${data.threshold.toFixed(2)}`));
    this.facts = element("p", "facts");
    for (const name of ["where", "start", "lasts", "score", "late"]) this.facts.append((this[name] = element("span", name)));
    this.links = element("p", "links");
    const text = element("div");
    text.append(head, this.facts, this.links);
    node.append(this.thumb, text);
    this.where.textContent = data.stream;
    this.start.textContent = clock(this.at);
  }

  take(kind, data, number) {
    if (kind === "highlight") this.node.classList.add("highlight");
    if (number !== undefined && number <= this.number) return;
    this.number = number ?? this.number;
    // The first word says how late it came: those that follow are about what was known already.
    this.latency ??= data.backfill ? null : data.capture_to_publish_ms;
    if (this.data.end !== null && data.end === null) return; // what is over does not open again
    this.data = data;
    this.node.classList.toggle("open", data.end === null);
    this.node.dataset.state = data.end === null ? "open" : "closed";
    this.score.textContent = `score ${data.score.toFixed(2)}`;
    this.late.textContent = data.backfill ? "earlier" : this.latency == null ? "" : `latency ${this.latency.toFixed(0)} ms`;
    if (kind === "ready") this.takeClip(data.clip);
    if (!this.clip) this.picture(`/streams/${encodeURIComponent(data.stream)}/pictures/${peak(data)}.jpg`);
  }

  takeClip(clip) {
    this.clip = clip;
    this.picture(clip.thumbnail);
    this.thumb.disabled = false;
    this.node.classList.add("clipped");
    const play = element("button", "", "▶ Play"), save = element("a", "", "Download");
    play.type = "button";
    play.ariaLabel = `Play the clip of ${this.title()}`;
    play.onclick = this.thumb.onclick;
    save.href = clip.url;
    save.download = "";
    save.ariaLabel = `Download the clip of ${this.title()}`;
    this.links.replaceChildren(play, save, element("span", "dim", size(clip.bytes)));
    if (!clip.complete) this.links.append(element("span", "dim", clip.missing ?? "shorter than asked"));
  }

  picture(url) {
    if (this.url !== url) this.image.src = this.url = url;
  }

  title() {
    return `${this.data.query} on ${this.data.stream} at ${clock(this.at)}`;
  }

  lasting(nowOf) {
    const { end, end_s, start_s, stream } = this.data, open = end === null;
    const seconds = open ? (nowOf(stream) - this.at) / 1000 : end_s - start_s;
    this.lasts.textContent = `${open ? "● open, " : ""}${duration(Math.max(0, seconds))}`;
  }

  recolour(colourOf) {
    this.node.style.setProperty("--line", colourOf(this.data.query));
  }
}

class ClipDialog {
  constructor() {
    this.dialog = document.getElementById("clip");
    this.video = this.dialog.querySelector("video");
    document.getElementById("clip-close").onclick = () => this.dialog.close();
    this.dialog.onclose = () => {
      this.video.pause();
      this.video.removeAttribute("src");
      this.video.load(); // lets go of the connection
    };
  }

  show(clip, title) {
    document.getElementById("clip-title").textContent = title;
    document.getElementById("clip-note").textContent = clip.complete ? "" : (clip.missing ?? "");
    document.getElementById("clip-save").href = clip.url;
    this.video.poster = clip.thumbnail;
    this.video.src = clip.url;
    this.dialog.showModal();
    this.video.play().catch(() => {}); // the browser may want a click for that
  }
}

/** When a moment was strongest, in ms UTC. */
export function peak(data) {
  return Math.round(Date.parse(data.start) + 1000 * (data.peak_s - data.start_s));
}

/** A time of day. */
export function clock(ms) {
  return new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

/** Seconds in a few characters. */
export function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
