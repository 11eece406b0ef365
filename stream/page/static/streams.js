// A stream: its picture, how it is, and its lanes, one for each query that runs on it.

import { drawAxis } from "./curve.js";
import { Lane, WINDOW_MS } from "./lane.js";
import { peak } from "./moments.js";
import { element } from "./queries.js";

const SIGNS = { connected: "●", reconnecting: "▲", ended: "■" };
const LATENCIES = 500;
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) target.stream.visible(isIntersecting);
});

export class Stream {
  /** page: {theme(text), remove(query_id), threshold(lane, value), peek(lane, time), draw(stream),
   *  isOwn(query_id), isGone(query_id)} */
  constructor(page, name) {
    Object.assign(this, { page, name, lanes: new Map(), moments: new Map(), latencies: [], ahead: undefined, to: Date.now() });
    const node = (this.node = element("article", "stream"));
    node.stream = this;
    node.dataset.stream = name;
    node.ariaLabel = `Stream ${name}`;
    this.title = element("h2", "", name);
    this.state = element("p", "state");
    this.picture = new Picture(name);
    const facts = element("dl");
    for (const fact of ["fps", "latency / p95", "drops", "reconnects"]) {
      const pair = element("div");
      pair.append(element("dt", "", fact), (this[fact.split(" ")[0]] = element("dd", "", "–")));
      facts.append(pair);
    }
    const saves = element("p", "saves", "moments as ");
    for (const kind of ["vtt", "otio", "jsonl"]) {
      const link = element("a", "", kind);
      link.href = `/streams/${encodeURIComponent(name)}/moments.${kind}`;
      link.download = "";
      link.ariaLabel = `Download the moments of ${name} as ${kind}`;
      saves.append(link, " ");
    }
    const side = element("div", "side");
    side.append(this.title, this.state, this.picture.node, facts, saves);
    const lanes = element("div", "lanes");
    this.shelf = element("div", "shelf");
    this.axis = element("canvas", "axis");
    this.axis.ariaHidden = "true";
    this.empty = element("p", "empty", "No query runs here: type one above.");
    lanes.append(this.shelf, this.axis, this.empty);
    node.append(side, lanes);
    seen.observe(node);
    this.resized = new ResizeObserver(() => this.changed());
    this.resized.observe(this.shelf);
  }

  /** How the service says that it is. */
  update(report) {
    const { source, state, reason, decoded, looked_at, dropped, reconnects, watching, hop_s } = report;
    if (source !== this.source) this.restart(); // another of the same name, which may have another clock
    this.source = source;
    this.state.dataset.state = this.node.dataset.state = state;
    this.state.textContent = `${SIGNS[state] ?? "▲"} ${state}${reason ? `: ${reason}` : ""}`;
    const now = performance.now();
    if (this.before) {
      const fps = (1000 * (decoded - this.before.decoded)) / (now - this.before.now);
      if (now - this.before.now > 900) this.fps.textContent = Math.max(0, fps).toFixed(1);
    }
    if (!this.before || now - this.before.now > 900) this.before = { decoded, now };
    this.drops.textContent = String(dropped);
    this.reconnects.textContent = String(reconnects);
    if (looked_at > (this.looked ?? 0) && !this.lanes.size) this.picture.ask(); // with lanes, curves tell of windows
    this.looked = looked_at;
    this.ended = state === "ended";
    this.follow(watching, hop_s);
  }

  /** Its clock is found anew. */
  restart() {
    this.ahead = this.newest = undefined;
  }

  /** Lanes for what runs; one that is not there twice in a row has gone. */
  follow(watching, hop_s) {
    const running = new Set(watching.map((each) => each.query_id));
    for (const lane of [...this.lanes.values()]) {
      lane.missed = running.has(lane.id) ? 0 : lane.missed + 1;
      if (lane.missed > 1 || (lane.missed && this.page.isGone(lane.id))) this.drop(lane);
    }
    for (const each of watching) this.lane({ ...each, hop_s }).hold(each.threshold);
    // Thresholds of one text stay together.
    const first = new Map();
    for (const { text } of this.lanes.values()) first.set(text.toLowerCase(), first.get(text.toLowerCase()) ?? first.size);
    const order = [...this.lanes.values()].sort((a, b) => first.get(a.text.toLowerCase()) - first.get(b.text.toLowerCase()));
    order.forEach((lane, i) => {
      if (this.shelf.children[i] !== lane.node) this.shelf.insertBefore(lane.node, this.shelf.children[i] ?? null);
      lane.mark(this.page.isOwn(lane.id));
    });
    this.empty.hidden = this.lanes.size > 0;
    this.axis.hidden = !this.lanes.size;
  }

  lane(about) {
    let lane = this.lanes.get(about.query_id);
    if (!lane) {
      lane = new Lane(this, about);
      lane.node.style.setProperty("--line", this.page.theme(lane.text).line);
      lane.mark(this.page.isOwn(lane.id));
      this.lanes.set(lane.id, lane);
      this.shelf.append(lane.node);
      this.axis.hidden = false;
      this.empty.hidden = true;
      lane.describe();
    }
    return lane;
  }

  drop(lane) {
    const focused = lane.node.contains(document.activeElement) && document.activeElement.className;
    lane.node.remove();
    this.lanes.delete(lane.id);
    // Another threshold has taken its place: who works by keys goes on there.
    const next = focused && [...this.lanes.values()].find(({ text, own }) => own && text === lane.text);
    if (next) next.node.getElementsByClassName(focused)[0]?.focus({ preventScroll: true });
    this.moments.delete(lane.id);
  }

  /** New scores of a query. */
  curve(message) {
    const lane = this.lane(message);
    lane.missed = 0;
    lane.hold(message.threshold);
    lane.take(message);
    const newest = lane.times.at(-1);
    // The stream's clock need not be ours; what comes first of a window came with the least delay.
    if (newest !== undefined) {
      const ahead = newest + lane.hop / 2 - Date.now();
      this.ahead = Math.max(this.ahead ?? -Infinity, ahead);
      if (newest + lane.hop / 2 > (this.newest ?? 0)) {
        this.newest = newest + lane.hop / 2;
        if (!message.anew) this.picture.ask(); // once a window, however many queries there are
      }
    }
    if (message.anew) lane.describe();
    this.changed();
  }

  /** An event of a query; the same moment may come again. */
  event(kind, data) {
    const of = this.moments.get(data.query_id) ?? new Map();
    this.moments.set(data.query_id, of);
    const start = Date.parse(data.start), end = data.end === null ? null : Date.parse(data.end);
    const moment = of.get(data.moment_id) ?? { start, end: null, highlights: [] };
    of.set(data.moment_id, moment);
    moment.start = start;
    moment.end = end ?? moment.end;
    const marked = peak(data);
    if (kind === "highlight" && !moment.highlights.some(({ time }) => time === marked)) {
      moment.highlights.push({ time: marked, score: data.score });
    }
    if (kind === "opened" && !data.backfill && data.capture_to_publish_ms !== null) {
      this.latencies.push(data.capture_to_publish_ms);
      if (this.latencies.length > LATENCIES) this.latencies.shift();
      const sorted = [...this.latencies].sort((a, b) => a - b);
      const p95 = sorted[Math.ceil(0.95 * sorted.length) - 1];
      this.latency.textContent = pair(data.capture_to_publish_ms, p95);
    }
    for (const [id, { end }] of of) if (end !== null && end < this.now() - WINDOW_MS) of.delete(id);
    this.changed();
  }

  momentsOf(query_id) {
    return [...(this.moments.get(query_id)?.values() ?? [])];
  }

  /** Its present, ms UTC: that of its newest window goes on, until it ends. */
  now() {
    if (this.ended && this.newest) return this.newest;
    return Date.now() + (this.ahead ?? 0);
  }

  get from() {
    return this.to - WINDOW_MS;
  }

  changed() {
    this.page.draw(this);
  }

  draw() {
    this.to = this.now();
    for (const lane of this.lanes.values()) lane.draw(this.from, this.to, this.page.theme(lane.text));
    if (this.lanes.size) drawAxis(this.axis, { from: this.from, to: this.to, theme: this.page.theme() });
  }

  /** Once a second. */
  tick() {
    for (const lane of this.lanes.values()) lane.describe();
    this.changed();
  }

  recolour() {
    for (const lane of this.lanes.values()) lane.node.style.setProperty("--line", this.page.theme(lane.text).line);
    this.changed();
  }

  visible(is) {
    this.shown = is;
    this.picture.shown = is;
    if (is) {
      this.picture.ask();
      this.changed();
    }
  }

  leave() {
    seen.unobserve(this.node);
    this.resized.disconnect();
    this.picture.shown = false;
    this.node.remove();
  }
}

/** Two durations in ms in one unit, as short as they may be: the second is seldom the smaller one. */
function pair(one, other) {
  if (other < 1000) return `${one.toFixed(0)} / ${other.toFixed(0)} ms`;
  return `${(one / 1000).toFixed(1)} / ${(other / 1000).toFixed(1)} s`;
}

/** The newest picture: never more than one on its way, none while nobody looks. */
class Picture {
  constructor(name) {
    this.node = element("div", "picture");
    this.url = `/streams/${encodeURIComponent(name)}/picture.jpg`;
    this.image = element("img", "absent");
    Object.assign(this.image, { alt: `Picture of ${name}`, width: 640, height: 360, decoding: "async" });
    this.image.onload = () => this.done(true);
    this.image.onerror = () => this.done(false);
    this.node.append(this.image);
    document.addEventListener("visibilitychange", () => this.ask());
  }

  ask() {
    this.wanted = true;
    if (this.loading || document.hidden || !this.shown) return;
    this.wanted = false;
    this.loading = true;
    this.image.src = `${this.url}?at=${Date.now()}`;
  }

  done(came) {
    this.loading = false;
    this.image.classList.toggle("absent", !came);
    if (this.wanted && came) this.ask();
  }
}
