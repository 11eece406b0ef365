// Draws the scores of one query over time, with its moments. Pure: what is given decides what is drawn, nothing is kept.
//
// Times are in ms (UTC on the page, any other beginning elsewhere), scores lie between 0 and 1.

/** Height in CSS pixels that is left free above a score of 1 and below one of 0. */
export const PAD = 7;
const GAP_HOPS = 2.5; // what is further apart than this is not joined by a line
const HATCH = 6;

/** Colours of a canvas; `line` is that of the query, see `colour`. */
export const THEMES = {
  dark: {
    paper: "#12161c", ink: "#e6eaf0", dim: "#9aa5b4", grid: "#262d37",
    lines: ["#5fb0ff", "#ffab4a", "#4fd6a8", "#e394ff", "#f2d648", "#ff8c96", "#74dcf0", "#b6d867"],
  },
  light: {
    paper: "#ffffff", ink: "#1b222c", dim: "#566170", grid: "#e3e7ec",
    lines: ["#1565c0", "#a34d00", "#0a7350", "#8630ac", "#756000", "#bb2340", "#086a80", "#4a6c12"],
  },
};

/** A theme for `drawLane`: the colours of the nth query. */
export function colour(dark, n) {
  const theme = dark ? THEMES.dark : THEMES.light;
  return { ...theme, line: theme.lines[n % theme.lines.length] };
}

/** Where a score lies in a lane of a height, in CSS pixels from its top. */
export function yOf(score, height) {
  return PAD + (1 - score) * (height - 2 * PAD);
}

/** The score at a place in a lane: what `yOf` undoes, kept between 0 and 1. */
export function scoreAt(y, height) {
  return Math.min(1, Math.max(0, 1 - (y - PAD) / (height - 2 * PAD)));
}

/** Index of the first of ascending `times` that is not before `time`. */
export function indexAt(times, time) {
  let low = 0, high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] < time) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The hop of a curve: the smallest step between its newest times, in ms. */
export function hopOf(times) {
  let hop = Infinity;
  for (let i = Math.max(1, times.length - 64); i < times.length; i++) hop = Math.min(hop, times[i] - times[i - 1]);
  return Number.isFinite(hop) ? hop : 1000;
}

/** The stretches in which scores reach a threshold: [[start, end], ...] in ms, each hop counted as a whole. */
export function above(times, scores, threshold, hop = hopOf(times)) {
  const found = [];
  for (let i = 0; i < times.length; i++) {
    if (!(scores[i] >= threshold)) continue;
    const last = found.at(-1);
    if (last && times[i] - hop / 2 - last[1] <= hop / 4) last[1] = times[i] + hop / 2;
    else found.push([times[i] - hop / 2, times[i] + hop / 2]);
  }
  return found;
}

/**
 * Draws one lane into a canvas, at the size that CSS gives it and the resolution of the screen.
 *
 * times, scores: the curve, times ascending (middle of each hop).
 * moments: [{start, end, peak?, score?, highlights?: [{time, score}]}], end null while open: it reaches the newest score.
 * truth: [[start, end], ...], drawn as a bar at the bottom.
 * threshold: 0..1; preview: another that is being tried.
 * from, to: what the width stands for. cursor: a time to be marked.
 * theme: see `colour`. hop: in ms, where it is known.
 * Returns {bands: [{start, end, open, left, right}], stretches}: what was drawn of the moments, in ms and CSS pixels,
 * and the stretches above `preview`.
 */
export function drawLane(canvas, lane) {
  const { times, scores, moments = [], truth = [], threshold, preview, from, to, cursor, theme } = lane;
  const hop = lane.hop ?? hopOf(times);
  const { context, width, height } = fit(canvas);
  const x = (time) => ((time - from) / (to - from)) * width;
  context.fillStyle = theme.paper;
  context.fillRect(0, 0, width, height);
  context.lineJoin = "round";
  grid(context, width, height, from, to, theme);
  const newest = times.length ? times.at(-1) + hop / 2 : from;
  const bands = [];
  for (const moment of moments) {
    const open = moment.end === null || moment.end === undefined;
    const end = open ? Math.max(newest, moment.start) : moment.end;
    if (end < from || moment.start > to) continue;
    const band = { start: moment.start, end, open, left: Math.max(0, x(moment.start)), right: Math.min(width, x(end)) };
    drawBand(context, band, height, theme);
    bands.push(band);
  }
  for (const [start, end] of truth) drawTruth(context, x(start), x(end), height, theme);
  const pieces = trace(times, scores, { from, to, hop, x, height, ratio: canvas.width / Math.max(1, width) });
  const stretches = preview === undefined ? [] : above(times, scores, preview, hop);
  if (preview !== undefined) drawPreview(context, pieces, stretches, preview, { x, width, height, theme });
  drawCurve(context, pieces, height, theme);
  if (threshold !== undefined) {
    level(context, width, yOf(threshold, height), theme.dim, [4, 3]);
  }
  for (const moment of moments) {
    for (const mark of moment.highlights ?? []) {
      if (mark.time >= from && mark.time <= to) drawMark(context, x(mark.time), yOf(mark.score, height), theme);
    }
  }
  if (cursor !== undefined) drawCursor(context, x(cursor), scoreNear(times, scores, cursor, hop), height, theme);
  return { bands, stretches };
}

/** The score of the hop that a time lies in; undefined where there is none. */
export function scoreNear(times, scores, time, hop = hopOf(times)) {
  const after = indexAt(times, time);
  const at = after > 0 && (after === times.length || time - times[after - 1] < times[after] - time) ? after - 1 : after;
  return at < times.length && Math.abs(times[at] - time) <= hop ? scores[at] : undefined;
}

/** Times under the lanes. label: what is written at a time; local time of day unless given. */
export function drawAxis(canvas, { from, to, theme, label = clock }) {
  const { context, width, height } = fit(canvas);
  context.clearRect(0, 0, width, height);
  context.fillStyle = theme.dim;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "center";
  const { step, first } = ticks(from, to, width);
  for (let time = first; time <= to; time += step) {
    const text = label(time, step), half = context.measureText(text).width / 2;
    const at = ((time - from) / (to - from)) * width;
    if (at >= half && at <= width - half) context.fillText(text, at, height / 2);
  }
}

function clock(time, step) {
  const parts = { hour: "2-digit", minute: "2-digit", ...(step < 60000 ? { second: "2-digit" } : {}), hour12: false };
  return new Date(time).toLocaleTimeString([], parts);
}

const STEPS_S = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];

function ticks(from, to, width) {
  const least = ((to - from) / Math.max(1, width)) * 64;
  const step = 1000 * (STEPS_S.find((seconds) => seconds * 1000 >= least) ?? STEPS_S.at(-1));
  return { step, first: Math.ceil(from / step) * step };
}

function fit(canvas) {
  const ratio = globalThis.devicePixelRatio || 1;
  const width = canvas.clientWidth || canvas.width, height = canvas.clientHeight || canvas.height;
  const wide = Math.round(width * ratio), high = Math.round(height * ratio);
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.globalAlpha = 1;
  return { context, width, height };
}

function grid(context, width, height, from, to, theme) {
  context.strokeStyle = theme.grid;
  context.lineWidth = 1;
  context.beginPath();
  const { step, first } = ticks(from, to, width);
  for (let time = first; time <= to; time += step) {
    const at = Math.round(((time - from) / (to - from)) * width) + 0.5;
    context.moveTo(at, 0);
    context.lineTo(at, height);
  }
  for (const score of [0, 1]) {
    context.moveTo(0, Math.round(yOf(score, height)) + 0.5);
    context.lineTo(width, Math.round(yOf(score, height)) + 0.5);
  }
  context.stroke();
}

/** A moment: tinted and outlined, so that it shows without colour; hatched while it is open. */
function drawBand(context, { left, right, open }, height, theme) {
  const wide = Math.max(2, right - left);
  context.save();
  context.beginPath();
  context.rect(left, 0, wide, height);
  context.clip();
  context.fillStyle = context.strokeStyle = theme.line;
  context.globalAlpha = 0.2;
  context.fillRect(left, 0, wide, height);
  if (open) {
    context.globalAlpha = 0.4;
    context.lineWidth = 1;
    context.beginPath();
    for (let at = left - height; at < left + wide; at += HATCH) {
      context.moveTo(at, height);
      context.lineTo(at + height, 0);
    }
    context.stroke();
  }
  context.globalAlpha = 1;
  context.lineWidth = 3; // half of it is clipped away
  context.beginPath();
  context.moveTo(left, height);
  context.lineTo(left, 0);
  if (open) context.lineTo(left + wide, 0);
  else {
    context.lineTo(left + wide, 0);
    context.lineTo(left + wide, height);
  }
  context.stroke();
  context.restore();
}

function drawTruth(context, left, right, height, theme) {
  context.fillStyle = theme.ink;
  context.globalAlpha = 0.75;
  context.fillRect(left, height - 4, Math.max(2, right - left), 4);
  context.globalAlpha = 1;
}

/** The curve in pieces without gaps: [[x, y], ...]; of points in one column of pixels the extremes are enough. */
function trace(times, scores, { from, to, hop, x, height, ratio }) {
  const pieces = [];
  let piece = null, column = NaN, low = 0, high = 0, last = 0, before = -Infinity;
  const flush = () => {
    if (!piece || Number.isNaN(column)) return;
    const at = column / ratio;
    if (low !== high) piece.push([at, yOf(low, height)], [at, yOf(high, height)]);
    piece.push([at, yOf(last, height)]);
    column = NaN;
  };
  const begin = Math.max(0, indexAt(times, from) - 1), stop = Math.min(times.length, indexAt(times, to) + 1);
  for (let i = begin; i < stop; i++) {
    if (times[i] - before > GAP_HOPS * hop) {
      flush();
      pieces.push((piece = []));
    }
    const here = Math.round(x(times[i]) * ratio);
    if (here !== column) {
      flush();
      [column, low, high] = [here, scores[i], scores[i]];
    }
    low = Math.min(low, scores[i]);
    high = Math.max(high, scores[i]);
    last = scores[i];
    before = times[i];
  }
  flush();
  return pieces;
}

function drawCurve(context, pieces, height, theme) {
  context.strokeStyle = context.fillStyle = theme.line;
  context.lineWidth = 1.5;
  for (const piece of pieces) {
    outline(context, piece);
    if (piece.length === 1) context.lineTo(piece[0][0] + 1.5, piece[0][1]);
    context.stroke();
    context.lineTo(piece.at(-1)[0], yOf(0, height));
    context.lineTo(piece[0][0], yOf(0, height));
    context.globalAlpha = 0.1;
    context.fill();
    context.globalAlpha = 1;
  }
}

function outline(context, piece) {
  context.beginPath();
  context.moveTo(...piece[0]);
  for (let i = 1; i < piece.length; i++) context.lineTo(...piece[i]);
}

/** What would be above another threshold: filled down to it, and marked along the bottom. */
function drawPreview(context, pieces, stretches, preview, { x, width, height, theme }) {
  const y = yOf(preview, height);
  context.save();
  context.beginPath();
  context.rect(0, 0, width, y);
  context.clip();
  context.fillStyle = theme.line;
  context.globalAlpha = 0.55;
  for (const piece of pieces) {
    outline(context, piece);
    context.lineTo(piece.at(-1)[0], height);
    context.lineTo(piece[0][0], height);
    context.fill();
  }
  context.restore();
  context.fillStyle = theme.line;
  for (const [start, end] of stretches) context.fillRect(x(start), height - 3, Math.max(2, x(end) - x(start)), 3);
  level(context, width, y, theme.ink, []);
}

function level(context, width, y, style, dash) {
  context.strokeStyle = style;
  context.lineWidth = 1;
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(0, Math.round(y) + 0.5);
  context.lineTo(width, Math.round(y) + 0.5);
  context.stroke();
  context.setLineDash([]);
}

/** A highlight: a diamond on the curve. */
function drawMark(context, x, y, theme) {
  context.beginPath();
  for (const [dx, dy] of [[0, -5], [5, 0], [0, 5], [-5, 0]]) context.lineTo(x + dx, Math.max(5.5, y) + dy);
  context.closePath();
  context.fillStyle = theme.line;
  context.fill();
  context.strokeStyle = theme.paper;
  context.lineWidth = 1.5;
  context.stroke();
}

function drawCursor(context, x, score, height, theme) {
  context.fillStyle = theme.ink;
  context.globalAlpha = 0.7;
  context.fillRect(Math.round(x), 0, 1, height);
  context.globalAlpha = 1;
  if (score === undefined) return;
  context.beginPath();
  context.arc(x, yOf(score, height), 3.5, 0, 2 * Math.PI);
  context.fill();
}
