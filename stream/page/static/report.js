
// -- the report: draws the lanes of its streams out of #data. Stands behind curve.js, in one script.
{
  const STRIP = 80, SPARE = 4; // CSS pixels: a picture below a lane, and between two of them
  const LEAST_S = 4; // that can be looked at closer
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const peek = document.getElementById("peek");
  const streams = JSON.parse(document.getElementById("data").textContent).streams.map(prepare);
  let isPrinted = false, isAsked = false;

  /** What a stream draws: times become ms, UTC where it was live. */
  function prepare(stream, number) {
    const node = document.querySelector(`[data-stream="${number}"]`);
    const origin = stream.origin_ms ?? 0, ms = (seconds) => origin + 1000 * seconds;
    const lanes = stream.queries.map((query, at) => {
      const kept = [...query.scores.keys()].filter((i) => query.scores[i] !== null);
      const pictures = new Map();
      for (const row of node.querySelectorAll(`tr[data-lane="${at}"]`)) {
        pictures.set(row.dataset.moment, row.querySelector("img")?.src);
      }
      const lane = {
        node: node.querySelector(`article[data-lane="${at}"]`),
        text: query.query,
        number: at,
        threshold: query.threshold,
        times: kept.map((i) => ms(stream.times[i])),
        scores: kept.map((i) => query.scores[i]),
        truth: (query.truth ?? []).map(([start, end]) => [ms(start), ms(end)]),
        moments: query.moments.map((moment) => ({
          ...moment, start: ms(moment.start), end: ms(moment.end), peak: ms(moment.peak), picture: pictures.get(moment.id),
          highlights: moment.highlights.map(({ time, score }) => ({ time: ms(time), score })),
        })),
      };
      lane.canvas = lane.node.querySelector("canvas");
      lane.scrub = lane.node.querySelector(".scrub");
      lane.at = lane.node.querySelector(".at");
      lane.strip = lane.node.querySelector(".strip");
      return lane;
    });
    // What was dropped of a long run is not shown empty.
    const first = Math.min(ms(stream.times[0] ?? 0), ...lanes.flatMap((lane) => lane.moments.map((each) => each.start)));
    const begin = stream.times[0] > 60 ? first : origin, end = Math.max(ms(stream.length_s), begin + 1000);
    const made = { node, lanes, begin, end, from: begin, to: end, hop: 1000 * stream.hop_s, live: stream.origin_ms !== null };
    for (const lane of lanes) listen(made, lane);
    made.whole = node.querySelector(".whole");
    made.whole.onclick = () => look(made, begin, end);
    return made;
  }

  /** A time in words: m:ss of a recording, the time of day in UTC of a live stream. */
  function words(stream, time, digits = 1) {
    if (stream.live) return new Date(time).toISOString().slice(11, digits ? 21 : 19);
    const seconds = time / 1000, hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
    const rest = (seconds % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
    return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
  }

  /** Draws again what has changed, once a picture of the screen; no stream: all. */
  function change(stream) {
    for (const each of stream ? [stream] : streams) each.isStale = true;
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(drawAll);
  }

  function drawAll() {
    isAsked = false;
    for (const stream of streams.filter((each) => each.isStale)) {
      stream.isStale = false;
      for (const lane of stream.lanes) drawOne(stream, lane);
      const label = (time) => words(stream, time, 0) + (stream.live ? "Z" : "");
      drawAxis(stream.node.querySelector(".axis"), { from: stream.from, to: stream.to, theme: colour(isDark(), 0), label });
      stream.whole.hidden = stream.from === stream.begin && stream.to === stream.end;
    }
    document.documentElement.dataset.drawn = "yes"; // for tests
  }

  /** All of it in the colours of the screen, or of paper. */
  function paint() {
    for (const stream of streams) {
      for (const node of stream.node.querySelectorAll("[data-lane]")) {
        node.style.setProperty("--line", colour(isDark(), Number(node.dataset.lane)).line);
      }
    }
    change();
    drawAll();
  }

  function isDark() {
    return dark.matches && !isPrinted;
  }

  function drawOne(stream, lane) {
    const { times, scores, moments, truth, threshold } = lane, { from, to, hop } = stream;
    const theme = colour(isDark(), lane.number);
    drawLane(lane.canvas, { times, scores, moments, truth, threshold, from, to, hop, theme });
    const view = `${from} ${to} ${lane.strip.clientWidth}`;
    if (lane.view !== view) fill(stream, lane);
    lane.view = view;
  }

  /** The pictures below a lane, each at its peak: the strongest first, as many as there is room for. */
  function fill(stream, lane) {
    const width = lane.canvas.clientWidth, taken = [], found = [];
    const strongest = lane.moments.filter((each) => each.picture).sort((a, b) => b.score - a.score);
    for (const moment of strongest) {
      const at = ((moment.peak - stream.from) / (stream.to - stream.from)) * width;
      if (at < 0 || at > width) continue;
      const left = Math.min(Math.max(0, at - STRIP / 2), width - STRIP);
      if (taken.some((other) => Math.abs(other - left) < STRIP + SPARE)) continue;
      taken.push(left);
      const image = new Image(), tick = document.createElement("i");
      image.src = moment.picture;
      image.alt = "";
      image.style.left = `${left}px`;
      tick.style.left = `${at}px`;
      found.push(image, tick);
    }
    lane.strip.replaceChildren(...found);
  }

  // -- what a pointer or the keys ask for

  function look(stream, from, to) {
    Object.assign(stream, { from: Math.max(stream.begin, from), to: Math.min(stream.end, to) });
    for (const lane of stream.lanes) lane.at.hidden = true;
    change(stream);
  }

  function listen(stream, lane) {
    const { scrub } = lane;
    const best = lane.scores.reduce((top, score, i) => (score > lane.scores[top] ? i : top), 0);
    lane.canvas.role = "img";
    lane.canvas.ariaLabel = lane.scores.length
      ? `Score of ${lane.text}: highest ${lane.scores[best].toFixed(2)} at ${words(stream, lane.times[best])}, ` +
        `${lane.moments.length} moments, which the table lists.`
      : `No scores of ${lane.text}.`;
    Object.assign(scrub, { role: "slider", tabIndex: 0, ariaLabel: `Time of ${lane.text}` });
    Object.assign(scrub, { ariaValueMin: "0", ariaValueMax: String(Math.round((stream.end - stream.begin) / 1000)) });
    Object.assign(scrub, { ariaValueNow: "0", ariaValueText: words(stream, stream.begin) });
    const timeAt = (x) => stream.from + (Math.min(Math.max(x, 0), scrub.clientWidth) / scrub.clientWidth) * (stream.to - stream.from);
    let held, marked;
    scrub.onpointerdown = (event) => {
      if (event.button || event.pointerType === "touch") return;
      held = event.offsetX;
      scrub.setPointerCapture(event.pointerId);
    };
    scrub.onpointermove = (event) => {
      if (held !== undefined && (marked || Math.abs(event.offsetX - held) > 6)) {
        if (!marked) scrub.append((marked = document.createElement("i")));
        marked.style.left = `${Math.min(held, event.offsetX)}px`;
        marked.style.width = `${Math.abs(event.offsetX - held)}px`;
      }
      point(stream, lane, timeAt(event.offsetX));
    };
    const letGo = (event) => {
      if (marked && event.type === "pointerup") {
        const [a, b] = [timeAt(held), timeAt(event.offsetX)].sort((one, other) => one - other);
        if (b - a >= 1000 * LEAST_S) look(stream, a, b);
      }
      marked?.remove();
      held = marked = undefined;
    };
    scrub.onpointerup = scrub.onpointercancel = letGo;
    scrub.ondblclick = () => look(stream, stream.begin, stream.end);
    scrub.onpointerleave = scrub.onblur = () => point(stream, lane, undefined);
    scrub.onkeydown = (event) => {
      const at = stream.cursor ?? stream.from, half = (stream.to - stream.from) / 4;
      const to = {
        ArrowLeft: at - stream.hop, ArrowDown: at - stream.hop, ArrowRight: at + stream.hop, ArrowUp: at + stream.hop,
        PageDown: at - 10 * stream.hop, PageUp: at + 10 * stream.hop, Home: stream.from, End: stream.to,
      };
      if (event.key in to) point(stream, lane, Math.min(stream.to, Math.max(stream.from, to[event.key])));
      else if (event.key === "Escape") look(stream, stream.begin, stream.end);
      else if (event.key === "+" && half >= 500 * LEAST_S) look(stream, at - half, at + half);
      else if (event.key === "-") look(stream, at - 4 * half, at + 4 * half);
      else return;
      event.preventDefault();
    };
  }

  /** Marks a time in all lanes of a stream, and says beside one of them what is there; undefined: no more. */
  function point(stream, lane, time) {
    stream.cursor = time;
    const share = (time - stream.from) / (stream.to - stream.from), width = lane.scrub.clientWidth;
    // A line above each canvas: to draw the curves again would take too long.
    for (const each of stream.lanes) {
      each.at.hidden = time === undefined;
      each.at.style.transform = `translateX(${share * width}px)`;
    }
    peek.hidden = time === undefined;
    if (time === undefined) return;
    const score = scoreNear(lane.times, lane.scores, time, stream.hop);
    const moment = lane.moments.find((each) => each.start <= time && time <= each.end);
    const said = `${words(stream, time)}${stream.live ? " UTC" : ""}  ${score === undefined ? "no score" : score.toFixed(3)}`;
    const more = moment ? `\nmoment ${words(stream, moment.start)} to ${words(stream, moment.end)}, ${moment.score.toFixed(2)}` : "";
    lane.scrub.ariaValueNow = String(Math.round((time - stream.begin) / 1000));
    lane.scrub.ariaValueText = said + more;
    peek.querySelector("figcaption").textContent = said + more;
    const image = peek.querySelector("img");
    if (moment?.picture) image.src = moment.picture;
    else image.removeAttribute("src");
    const box = lane.scrub.getBoundingClientRect();
    const at = box.left + share * box.width;
    const left = at + 14 + peek.offsetWidth > innerWidth ? at - 14 - peek.offsetWidth : at + 14;
    const top = box.bottom + 6 + peek.offsetHeight > innerHeight ? box.top - 6 - peek.offsetHeight : box.bottom + 6;
    Object.assign(peek.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px` });
  }

  if (streams.some((stream) => stream.lanes.length)) document.getElementById("legend").hidden = false;
  const knows = streams.some((stream) => stream.lanes.some((lane) => lane.truth.length));
  document.querySelector("#legend .true").hidden = !knows;
  dark.onchange = paint;
  onresize = () => change();
  onbeforeprint = onafterprint = (event) => {
    isPrinted = event.type === "beforeprint";
    paint();
  };
  paint();
}
