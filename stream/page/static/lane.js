// One lane: the curve of a query on a stream, its moments, a cursor in time, and a threshold that can be dragged.

import { PAD, drawLane, indexAt, scoreAt, scoreNear, yOf } from "./curve.js";
import { clock } from "./moments.js";
import { element } from "./queries.js";

/** How much of the past a lane shows. */
export const WINDOW_MS = 600_000;
const STEP = 0.01, PAGE = 0.1;
const SETTLE_MS = 700; // after the last key, before another threshold is asked for
const SPARE = 256; // scores beyond the window are dropped in one go

export class Lane {
  /** group: the stream's part of the page. */
  constructor(group, { query_id, query, threshold, hop_s }) {
    Object.assign(this, { group, id: query_id, text: query, hop: 1000 * hop_s, times: [], scores: [], missed: 0 });
    const node = (this.node = element("article", "lane"));
    node.dataset.queryId = query_id;
    const title = element("h3", "", query);
    title.title = query;
    this.tag = element("span", "tag");
    this.now = element("span", "now");
    this.close = element("button", "close", "×");
    this.close.type = "button";
    this.close.ariaLabel = `Stop watching for ${query}`;
    this.close.onclick = () => group.page.remove(query_id);
    const head = element("div", "head");
    head.append(element("span", "swatch"), title, this.tag, this.close, this.now);
    const plot = element("div", "plot");
    this.canvas = element("canvas");
    this.canvas.role = "img";
    this.scrub = slider("scrub", `Time of ${query} on ${group.name}`, -WINDOW_MS / 1000, 0);
    this.level = slider("level", `Threshold of ${query} on ${group.name}`, STEP, 1);
    this.level.ariaOrientation = "vertical";
    this.level.append((this.grip = element("span", "grip")));
    plot.append(this.canvas, this.scrub, this.level);
    node.append(head, plot);
    this.hold(threshold);
    this.listen();
  }

  /** The threshold that it is held against. */
  hold(threshold) {
    this.threshold = threshold;
    if (this.preview === undefined) this.showLevel(threshold, "");
  }

  /** own: the query is one's own; variant: another threshold is on its way. */
  mark(own) {
    this.own = own;
    this.tag.textContent = own ? "yours" : "";
    this.close.hidden = !own;
  }

  take({ times, scores, anew, hop_s }) {
    if (anew) [this.times, this.scores] = [[], []];
    this.hop = 1000 * hop_s;
    for (let i = 0; i < times.length; i++) {
      if (this.times.length && times[i] <= this.times.at(-1)) continue;
      this.times.push(times[i]);
      this.scores.push(scores[i]);
    }
    const old = indexAt(this.times, (this.times.at(-1) ?? 0) - WINDOW_MS - this.hop);
    if (old > SPARE) {
      this.times.splice(0, old);
      this.scores.splice(0, old);
    }
  }

  draw(from, to, theme) {
    const { cursor } = this.group;
    const moments = this.group.momentsOf(this.id);
    const lane = { times: this.times, scores: this.scores, moments, threshold: this.threshold, preview: this.preview };
    const { bands, stretches } = drawLane(this.canvas, { ...lane, hop: this.hop, from, to, cursor, theme });
    // What was drawn, for who cannot look at it, and for tests.
    this.canvas.dataset.bands = JSON.stringify(bands);
    this.canvas.dataset.from = from;
    this.canvas.dataset.to = to;
    this.node.classList.toggle("open", bands.some((band) => band.open));
    const score = cursor === undefined ? this.scores.at(-1) : scoreNear(this.times, this.scores, cursor, this.hop);
    this.now.textContent = score === undefined ? "–" : score.toFixed(2);
    this.now.classList.toggle("over", score >= this.threshold);
    if (this.preview !== undefined) this.showLevel(this.preview, `, ${sumUp(stretches)} in 10 minutes lie above`);
  }

  /** Once a second: the same in words. */
  describe() {
    const best = this.scores.reduce((top, score, i) => (score > this.scores[top] ? i : top), 0);
    const moments = this.group.momentsOf(this.id), open = moments.some((moment) => moment.end === null);
    this.canvas.ariaLabel =
      `Score of ${this.text} on ${this.group.name} over the last 10 minutes: ` +
      (this.times.length
        ? `now ${this.scores.at(-1).toFixed(2)}, highest ${this.scores[best].toFixed(2)} at ${clock(this.times[best])}; ` +
          `${moments.length} moment${moments.length === 1 ? "" : "s"}${open ? ", one is open" : ""}.`
        : "none yet.");
    // Who listens at it hears what they ask for, not every second.
    if (document.activeElement !== this.scrub) this.showTime();
  }

  // -- time

  listen() {
    const { scrub, level, group } = this;
    scrub.onpointermove = (event) => this.pointAt(group.from + (event.offsetX / scrub.clientWidth) * (group.to - group.from));
    scrub.onpointerleave = scrub.onpointercancel = scrub.onblur = () => this.pointAt(undefined);
    scrub.onkeydown = (event) => {
      const at = group.cursor ?? this.times.at(-1) ?? group.to;
      const to = {
        ArrowLeft: at - this.hop, ArrowDown: at - this.hop, ArrowRight: at + this.hop, ArrowUp: at + this.hop,
        PageDown: at - 10 * this.hop, PageUp: at + 10 * this.hop,
        Home: Math.max(group.from, this.times[0] ?? group.from), End: this.times.at(-1) ?? group.to, Escape: undefined,
      };
      if (!(event.key in to)) return;
      event.preventDefault();
      this.pointAt(to[event.key]);
    };
    level.onpointerdown = (event) => {
      if (event.button) return;
      event.preventDefault();
      level.setPointerCapture(event.pointerId);
      level.focus({ preventScroll: true });
      const top = this.canvas.getBoundingClientRect().top;
      // What was taken hold of stays under the pointer.
      const off = event.clientY - top - yOf(this.threshold, this.canvas.clientHeight);
      this.dragged = (y) => this.try(scoreAt(y - top - off, this.canvas.clientHeight));
    };
    level.onpointermove = (event) => this.dragged?.(event.clientY);
    level.onpointerup = () => this.dragged && this.settle();
    level.onpointercancel = () => this.forget();
    level.onblur = () => this.settle();
    level.onkeydown = (event) => {
      const at = this.preview ?? this.threshold;
      const to = {
        ArrowUp: at + STEP, ArrowRight: at + STEP, ArrowDown: at - STEP, ArrowLeft: at - STEP,
        PageUp: at + PAGE, PageDown: at - PAGE, Home: STEP, End: 1,
      };
      if (event.key === "Escape") this.forget();
      else if (event.key === "Enter") this.settle();
      else if (event.key in to) {
        this.try(to[event.key]);
        this.timer = setTimeout(() => this.settle(), SETTLE_MS);
      } else return;
      event.preventDefault();
    };
  }

  /** Shows a time in all lanes of the stream, and its picture; undefined: no more. */
  pointAt(time) {
    const { group } = this;
    if (time !== undefined) {
      time = Math.min(group.to, Math.max(group.from, time));
      const after = indexAt(this.times, time - this.hop / 2);
      if (Math.abs(this.times[after] - time) <= this.hop) time = this.times[after]; // the hop that it lies in
    }
    group.cursor = time;
    group.changed();
    this.showTime();
    group.page.peek(this, time);
  }

  showTime() {
    const { group, scrub } = this, time = group.cursor ?? this.times.at(-1) ?? group.to;
    const score = scoreNear(this.times, this.scores, time, this.hop);
    scrub.ariaValueNow = String(Math.min(0, Math.round((time - group.to) / 1000)));
    scrub.ariaValueText = `${clock(time)}, ${score === undefined ? "no score" : `score ${score.toFixed(2)}`}`;
  }

  // -- threshold

  try(threshold) {
    clearTimeout(this.timer);
    this.preview = Math.min(1, Math.max(STEP, Math.round(threshold / STEP) * STEP));
    this.group.changed();
  }

  settle() {
    const wanted = this.preview, before = this.threshold;
    this.forget();
    if (wanted !== undefined && Math.abs(wanted - before) > STEP / 2) {
      this.group.page.threshold(this, Math.round(wanted * 100) / 100);
    }
  }

  forget() {
    clearTimeout(this.timer);
    this.preview = this.dragged = undefined;
    this.showLevel(this.threshold, "");
    this.group.changed();
  }

  showLevel(threshold, more) {
    this.level.style.top = `calc(${PAD}px + ${1 - threshold} * (100% - ${2 * PAD}px))`;
    this.level.ariaValueNow = threshold.toFixed(2);
    this.level.ariaValueText = `${threshold.toFixed(2)}${more}`;
    this.grip.textContent = threshold.toFixed(2);
  }
}

function sumUp(stretches) {
  const seconds = stretches.reduce((sum, [start, end]) => sum + end - start, 0) / 1000;
  return `${stretches.length} stretch${stretches.length === 1 ? "" : "es"} of ${seconds.toFixed(0)} seconds`;
}

function slider(kind, label, least, most) {
  const made = element("div", kind);
  Object.assign(made, { role: "slider", tabIndex: 0, ariaLabel: label });
  Object.assign(made, { ariaValueMin: String(least), ariaValueMax: String(most), ariaValueNow: String(most) });
  return made;
}
