// The page: what comes over the connection goes to the streams, the lanes and the list of moments.

import { colour } from "./curve.js";
import { Link, Lost } from "./link.js";
import { Moments, clock } from "./moments.js";
import { Queries } from "./queries.js";
import { Stream } from "./streams.js";

const POLL_MS = 2000, READY_MS = 10000;
const SETTLED_MS = 400; // after which the service has let go of a query
const PAST = 1000; // events of the log that a new page asks for
const OVERLAP = 200; // asked for again after a gap: the past of a query runs ahead of the rest of the log

const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const streams = new Map(), colours = new Map(), gone = new Set(), dirty = new Set();
let reached = 0, lamp = "connecting", unready = [], peeked, drawing = false;

const page = {
  theme(text) {
    if (text === undefined) return colour(dark.matches, 0);
    const key = text.toLowerCase();
    if (!colours.has(key)) colours.set(key, colours.size);
    return colour(dark.matches, colours.get(key));
  },
  isOwn: (query_id) => queries.find(query_id) !== undefined,
  isGone: (query_id) => gone.has(query_id),
  remove(query_id) {
    const own = queries.find(query_id);
    if (own) queries.remove(own);
  },
  /** For one's own query in its place; for one of the config it begins one's own beside it. */
  threshold(lane, value) {
    const own = queries.find(lane.id);
    queries.add(lane.text, own ? own.stream : lane.group.name, value);
  },
  draw(stream) {
    dirty.add(stream);
    if (drawing || document.hidden) return;
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      for (const each of dirty) if (each.shown) each.draw();
      dirty.clear();
    });
  },
  peek,
};
const colourOf = (text) => page.theme(text).line;
const moments = new Moments(colourOf, (name) => streams.get(name)?.now() ?? Date.now());
const link = new Link({ opened, message, state });
const queries = new Queries(link, $("own"), {
  colourOf,
  problem: (text) => warn(text),
  gone: (query_id) => gone.add(query_id) && setTimeout(poll, SETTLED_MS),
});

// -- the connection

async function opened() {
  try {
    const answer = await link.ask({ op: "streams" });
    if (answer.lognumber < reached) {
      reached = 0; // another log
      moments.clear();
      for (const stream of streams.values()) stream.moments.clear();
    }
    for (const stream of streams.values()) stream.restart();
    const since = Math.max(0, reached ? reached - OVERLAP : answer.lognumber - PAST);
    report(answer.streams);
    queries.askAll();
    await Promise.all([link.ask({ op: "curves", on: true }), link.ask({ op: "subscribe", query: "*", since })]);
    ready();
  } catch (error) {
    if (!(error instanceof Lost)) warn(error.message);
  }
}

function message(told) {
  if (told.op === "curve") return streams.get(told.stream)?.curve(told);
  if (told.op === "caught_up") return queries.caughtUp(told.query_id);
  if (told.lognumber !== undefined) reached = Math.max(reached, told.lognumber);
  moments.take(told);
  const { data } = told;
  if (data.moment_id !== undefined) streams.get(data.stream)?.event(told.type.split(".").at(-2), data);
  else if (data.state !== undefined) poll();
}

function state(now, wait) {
  lamp = now;
  if (now === "token" && !$("login").open) $("login").showModal();
  say({ lost: `connection lost, next try in ${wait / 1000} s`, token: "a token is needed" }[now] ?? now);
  showHealth();
}

/** How the streams are. One question at a time. */
async function poll() {
  if (poll.asked) return;
  poll.asked = true;
  try {
    report((await link.ask({ op: "streams" })).streams);
  } catch (error) {
    if (!(error instanceof Lost)) warn(error.message);
  } finally {
    poll.asked = false;
  }
}

function report(all) {
  const names = new Set(all.map((each) => each.stream));
  for (const [name, stream] of streams) {
    if (names.has(name)) continue;
    stream.leave();
    streams.delete(name);
    $("where").querySelector(`option[value="${CSS.escape(name)}"]`)?.remove();
  }
  const running = new Set(all.flatMap((each) => each.watching.map(({ query_id }) => query_id)));
  for (const each of all) {
    if (!streams.has(each.stream)) {
      const stream = new Stream(page, each.stream);
      streams.set(each.stream, stream);
      $("streams").append(stream.node);
      $("where").append(new Option(each.stream, each.stream));
    }
    streams.get(each.stream).update(each);
  }
  $("streams").querySelector(":scope > .empty")?.remove();
  for (const query_id of gone) {
    if (running.has(query_id)) continue;
    gone.delete(query_id);
    if (!queries.find(query_id)) moments.forget(query_id);
  }
  showHealth();
}

// -- health

async function ready() {
  try {
    unready = (await (await fetch("/readyz")).json()).reasons;
  } catch {
    unready = []; // nobody answers: the lamp says so
  }
  showHealth();
}

function showHealth() {
  const all = [...streams.values()], well = all.filter((each) => each.node.dataset.state === "connected").length;
  if (lamp === "connected") {
    say([`connected, ${well} of ${all.length} stream${all.length === 1 ? "" : "s"}`, ...unready].join(" · "));
  }
  $("health").dataset.state = lamp !== "connected" ? "lost" : unready.length || well < all.length ? "part" : "well";
}

/** Only what is new is read out. */
function say(text) {
  if ($("link").textContent !== text) $("link").textContent = text;
}

function warn(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
  clearTimeout(warn.timer);
  warn.timer = setTimeout(() => ($("problem").hidden = true), 10000);
}

// -- what the pointer or the keys point at

function peek(lane, time) {
  const figure = $("peek"), image = figure.firstElementChild;
  clearTimeout(peek.timer);
  peeked = time === undefined ? undefined : { lane, time };
  figure.hidden = !peeked;
  if (!peeked) return;
  const box = lane.scrub.getBoundingClientRect(), { from, to } = lane.group;
  figure.lastElementChild.textContent = `${lane.scrub.ariaValueText} · ${lane.text}`;
  const left = box.left + ((time - from) / (to - from)) * box.width - figure.offsetWidth / 2;
  figure.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - figure.offsetWidth - 8))}px`;
  const below = box.bottom + 8 + figure.offsetHeight < innerHeight || box.top < figure.offsetHeight + 8;
  figure.style.top = `${below ? box.bottom + 8 : box.top - figure.offsetHeight - 8}px`;
  const url = `/streams/${encodeURIComponent(lane.group.name)}/pictures/${Math.round(time)}.jpg`;
  // Whoever sweeps over a lane does not want them all.
  peek.timer = setTimeout(() => (image.src = url), 60);
  image.onload = () => image.classList.remove("absent");
  image.onerror = () => image.classList.add("absent");
}

// -- begin

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  queries.add(text, $("where").value, undefined);
  $("text").value = "";
};

$("login").onsubmit = async (event) => {
  event.preventDefault();
  const field = $("token");
  $("login-problem").textContent = "";
  const right = await link.login(field.value).catch(() => false);
  field.value = "";
  if (right) $("login").close();
  else $("login-problem").textContent = "This is not the token.";
};
$("login").oncancel = (event) => event.preventDefault(); // without it there is nothing to see

dark.addEventListener("change", () => {
  for (const stream of streams.values()) stream.recolour();
  moments.recolour();
  queries.show();
});
document.addEventListener("visibilitychange", () => {
  for (const stream of streams.values()) stream.changed();
});
setInterval(() => {
  if (document.hidden) return;
  for (const stream of streams.values()) stream.tick();
  moments.tick();
}, 1000);
setInterval(() => lamp === "connected" && !document.hidden && poll(), POLL_MS);
setInterval(() => lamp === "connected" && !document.hidden && ready(), READY_MS);
link.connect();
queries.show();
