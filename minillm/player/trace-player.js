// <trace-player>: a run of the engine, played step by step. Everything drawn comes from its trace.
//
//   <trace-player src="run.jsonl">                   a recorded run
//   with a script of type application/jsonl inside   the same, from the page
//   <trace-player live>, and add(record)             a live run: add every record of a feed
//
// Attributes: `compact` (sentence, places, and low rows in seconds), `unattended` (no controls: the page has them).
// Properties: run, position (0 .. number of steps), time (seconds), playing, span (seconds of a compact row).
// Keys: space plays, left and right step (with Shift ten), Home and End jump, up and down go from request to request.

import { PALETTE } from "./palette.js";
import { Run, countUpTo, plural, tokensOf } from "./replay.js";

const SPEEDS = [1, 2, 5, 10, 20, 50, 100, 200]; // steps per second
const ROW = 26; // px from one request to the next; in a narrow player each has two lines
const LOW = 13; // px: the same in a compact player
const NARROW = 640; // px
const MOST_CHIPS = 16; // requests named in the queue
const MOST_PLACES = 128; // places drawn as squares
const MOST_LINES = 40; // requests in the text form
const FOLLOW_MS = 250; // between two drawings of a live run, whose engine needs the processor
const SAY_EVERY = 3000; // ms between two announcements while it plays
const STATES = PALETTE.states;
const SAYS = {
  waiting: "has no place yet", preempted: "preempted: its blocks were freed and will be recomputed",
  swapped: "its blocks were copied out of the pool and will be copied back", prefill: "reads the prompt",
  decode: "makes one token", recompute: "computes again what preemption freed",
  padding: "has finished, but holds its place in a static batch", finished: "has ended and holds nothing",
};
const POOL_SAYS = "Used: in the table of a request, with its letter; its pale part is still empty, and this step "
  + "writes into a thick frame. Cached (*): in no table, but kept for a prompt with the same beginning. "
  + "Free: holds nothing. Null (0): fills gaps in tables, and belongs to no request.";

// An element with attributes, listeners (on...) and children; a text child is text, never HTML.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Black or white, whichever is more readable on a colour.
function inkOn(color) {
  const linear = [1, 3, 5].map((at) => (parseInt(color.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000000" : "#FFFFFF";
}

async function fetched(url) {
  const response = await fetch(url);
  if (response.ok) return response.text();
  throw new Error(`${url}: ${response.status} ${response.statusText}`);
}

// A canvas drawn in CSS pixels.
export function brush(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

// Diagonal lines over a box, so that no state is shown only by colour.
export function hatch(pen, x, y, width, height, color, apart = 5) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  pen.beginPath();
  for (let at = x - height; at < x + width; at += apart) {
    pen.moveTo(at, y + height);
    pen.lineTo(at + height, y);
  }
  pen.strokeStyle = color;
  pen.lineWidth = 1;
  pen.stroke();
  pen.restore();
}

export function fill(pen, color, x, y, width, height) {
  pen.fillStyle = color;
  pen.fillRect(x, y, width, height);
}

export function frame(pen, color, x, y, width, height, thick = 1) {
  pen.strokeStyle = color;
  pen.lineWidth = thick;
  pen.strokeRect(x, y, width, height);
}

export function write(pen, text, x, y, color, size = 10, align = "center") {
  pen.fillStyle = color;
  pen.font = `600 ${size}px ui-monospace, monospace`;
  pen.textAlign = align;
  pen.textBaseline = "middle";
  pen.fillText(text, x, y + 0.5);
}

export class TracePlayer extends HTMLElement {
  #position = 0;
  #following = false; // the end of a live run
  #clock = Infinity; // the time up to which compact rows are drawn as past
  #pinned = null; // id of the request whose blocks are shown
  #hovered = null;
  #block = null; // the block whose requests are shown
  #rows = new Map(); // id -> the elements of a row that is in view
  #said = 0;
  #drawing = false; // whether a drawing is scheduled
  #drawn = 0; // ms, the last drawing
  #ticking = 0;
  #scrolledFor = -1; // the position whose requests were scrolled into view
  #window = { from: 0, count: 1, wide: 8, x: () => 0 }; // see #stepsInView
  #longest = 1; // most tokens of a row in view
  #grid = { columns: 1, size: 1, each: 1, count: 0 }; // of the pool: cells, px, blocks per cell

  run = new Run();
  speed = 5;
  span = 0;

  connectedCallback() {
    if (!this.parts) this.#build();
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this);
    this.gone = new AbortController();
    const { signal } = this.gone;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.redraw, { signal });
    document.addEventListener("themechange", this.redraw, { signal });
    const inline = this.querySelector('script[type="application/jsonl"]');
    if (this.hasAttribute("live")) this.load(new Run({ live: true }));
    else if (inline) this.#read(async () => inline.textContent);
    else if (this.getAttribute("src")) this.#read(() => fetched(this.getAttribute("src")));
  }

  disconnectedCallback() {
    this.pause();
    this.observer.disconnect();
    this.gone.abort();
  }

  async #read(find) {
    try {
      this.load(Run.read(await find()));
    } catch (error) {
      this.parts.sentence.textContent = `This trace cannot be played: ${error.message}`;
      this.parts.sentence.setAttribute("role", "alert");
    }
  }

  // Play this run, from its beginning; a live run from its end.
  load(run) {
    this.pause();
    this.run = run;
    this.position = run.live ? this.#end : 0;
    this.#following = run.live;
    this.#pinned = this.#hovered = this.#block = null;
    this.parts.spacer.replaceChildren();
    this.#rows.clear();
    this.parts.rows.scrollTop = 0;
    const wanted = run.live ? 20 : run.steps.length / 20; // a recorded run takes about 20 seconds
    this.speed = SPEEDS.find((speed) => speed >= wanted) ?? SPEEDS.at(-1);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.speed = Math.min(this.speed, 2);
    this.parts.speed.value = this.speed;
    this.redraw();
  }

  // Add a record of a live feed; a header begins a new run.
  add(record) {
    if (record.format && this.run.steps.length) this.load(new Run({ live: true }));
    const before = this.run.steps.length;
    this.run.add(record);
    if (this.run.steps.length < before) { // the older half of a long run was dropped
      this.#position = Math.max(0, this.#position - (before + 1 - this.run.steps.length));
    }
    if (this.#following) this.#position = this.#end;
    this.redraw();
  }

  // --- position ---

  get #end() { return Math.max(0, this.run.steps.length - (this.run.open ? 1 : 0)); } // of a live run: the present
  get position() { return this.#position; }
  set position(value) {
    this.#position = Math.max(0, Math.min(this.run.steps.length, Math.round(value)));
    this.#following = this.run.live && this.#position >= this.run.steps.length - 1;
    this.#clock = Infinity;
    this.redraw();
  }

  // Seconds since the first arrival, on the run's clock.
  get time() { return this.run.elapsed(this.#position); }
  set time(seconds) {
    this.position = countUpTo(this.run.steps, this.run.origin + seconds, (step) => step.end_time);
    this.#clock = seconds;
  }

  get playing() { return this.#ticking !== 0; }
  play() {
    if (this.playing || !this.run.steps.length) return;
    if (this.#position >= this.run.steps.length) this.position = 0;
    this.#following = false;
    let before = performance.now(), owed = 0;
    const tick = (now) => {
      owed += ((now - before) / 1000) * this.speed;
      before = now;
      const whole = Math.floor(owed);
      owed -= whole;
      if (whole) this.position = this.#position + whole;
      const over = this.#position >= this.run.steps.length - (this.run.live ? 1 : 0);
      this.#ticking = over ? 0 : requestAnimationFrame(tick);
      if (over) this.redraw();
    };
    this.#ticking = requestAnimationFrame(tick);
    this.redraw();
  }

  pause() {
    cancelAnimationFrame(this.#ticking);
    this.#ticking = 0;
    if (this.parts) this.redraw();
  }

  // --- elements ---

  #build() {
    const button = (name, sign, action) =>
      make("button", { type: "button", "aria-label": name, title: name, onclick: action }, sign);
    const parts = (this.parts = {
      play: button("Play", "▶", () => (this.playing ? this.pause() : this.play())),
      slider: make("input", { type: "range", min: 0, value: 0, "aria-label": "Step",
        oninput: () => this.#jump(Number(parts.slider.value)) }),
      overview: make("canvas", { class: "overview", "aria-hidden": "true" }),
      speed: make("select", { "aria-label": "Speed", onchange: () => (this.speed = Number(parts.speed.value)) }),
      where: make("span", { class: "where" }),
      now: button("Jump to now", "Jump to now", () => this.#jump(this.run.steps.length)),
      sentence: make("p", { class: "sentence" }),
      said: make("p", { class: "only-read", "aria-live": "polite", role: "status" }),
      figures: make("p", { class: "figures" }),
      places: make("canvas", { role: "img" }),
      placesHead: make("h3"),
      batch: make("canvas", { role: "img" }),
      batchHead: make("h3"),
      queueHead: make("h3"),
      queue: make("ul", { class: "chips" }),
      rows: make("div", { class: "rows", role: "group", "aria-label": "Requests", onscroll: () => this.redraw() }),
      spacer: make("div", { class: "spacer" }),
      rowsHead: make("h3"),
      pool: make("canvas", { tabindex: 0, role: "slider", "aria-label": "Block of the pool", "aria-valuemin": 0 }),
      poolHead: make("h3"),
      block: make("p", { class: "figures" }),
      text: make("pre", { tabindex: 0, "aria-label": "The run as text" }),
    });
    for (const speed of SPEEDS) parts.speed.append(make("option", { value: speed }, `${plural(speed, "step")}/s`));
    parts.rows.append(parts.spacer);
    const controls = make("div", { class: "controls", role: "toolbar", "aria-label": "Playback" },
      button("First step", "|◂", () => this.#jump(0)),
      button("Step back", "◂", () => this.#jump(this.#position - 1)), parts.play,
      button("Step forward", "▸", () => this.#jump(this.#position + 1)),
      button("Last step", "▸|", () => this.#jump(this.run.steps.length)), parts.speed, parts.where, parts.now);
    parts.more = make("details", { class: "as-text", ontoggle: () => this.redraw() },
      make("summary", {}, "The same as text"), parts.text);
    const panel = (name, ...children) => make("section", { class: name }, ...children);
    this.append(
      parts.sentence, parts.said,
      panel("steering", controls, make("div", { class: "scrub" }, parts.overview, parts.slider)),
      make("div", { class: "columns" },
        make("div", { class: "column" }, panel("requests", parts.rowsHead, parts.rows, this.#legend())),
        make("div", { class: "column" },
          panel("places", parts.placesHead, parts.places), panel("batch", parts.batchHead, parts.batch),
          panel("queue", parts.queueHead, parts.queue), panel("pool", parts.poolHead, parts.pool, parts.block,
            make("details", {}, make("summary", {}, "What used, cached, free and null mean"), POOL_SAYS)))),
      parts.figures, parts.more);
    this.addEventListener("keydown", (event) => this.#key(event));
    parts.pool.addEventListener("pointermove", (event) => this.#point(this.#blockAt(event)));
    parts.pool.addEventListener("pointerleave", () => this.#point(null));
    parts.pool.addEventListener("focus", () => this.#point(this.#block ?? 0));
    parts.pool.addEventListener("blur", () => this.#point(null));
  }

  #legend() {
    const list = make("ul", { class: "legend", "aria-label": "Letters and colours" });
    for (const [key, state] of Object.entries(STATES)) {
      const sign = make("span", { class: `key ${key}`, "aria-hidden": "true" }, state.letter);
      if (state.color !== "#FFFFFF" && key !== "waiting") {
        Object.assign(sign.style, { background: state.color, color: inkOn(state.color) });
      }
      const says = make("span", { class: "only-read" }, `: ${SAYS[key]}`);
      list.append(make("li", { title: SAYS[key] }, sign, ` ${state.name}`, says));
    }
    return list;
  }

  #jump(position) {
    this.pause();
    this.position = position;
  }

  #key(event) {
    const { target, key } = event;
    if (event.ctrlKey || event.altKey || event.metaKey || target.matches("input, select, textarea, summary")) return;
    const far = event.shiftKey ? 10 : 1;
    const onPool = target === this.parts.pool, onRow = target.closest(".row");
    const at = this.#position;
    const to = { ArrowLeft: at - far, ArrowRight: at + far, Home: 0, End: this.run.steps.length };
    if (key === " " && target.tagName !== "BUTTON") this.parts.play.click();
    else if (onPool && key.startsWith("Arrow")) this.#moveInPool(key);
    else if (onRow && (key === "ArrowUp" || key === "ArrowDown")) this.#moveInRows(onRow, key === "ArrowUp" ? -1 : 1);
    else if (onRow && key === "Enter") this.#pin(onRow.dataset.id);
    else if (key === "Escape") this.#pin(null);
    else if (key in to && target !== this.parts.text) this.#jump(to[key]);
    else return;
    event.preventDefault();
  }

  #pin(id) {
    this.#pinned = this.#pinned === id ? null : id;
    this.redraw();
  }

  #point(block) {
    if (block === this.#block) return;
    this.#block = block;
    this.redraw();
  }

  #moveInRows(row, way) {
    const at = this.run.requests.findIndex((request) => request.id === row.dataset.id);
    const next = this.run.requests[at + way];
    if (!next) return;
    const { rows } = this.parts, height = this.#rowHeight, top = (at + way) * height;
    rows.scrollTop = Math.max(top + height - rows.clientHeight, Math.min(top, rows.scrollTop));
    this.#draw();
    this.#rows.get(next.id)?.element.focus();
  }

  #moveInPool(key) {
    const { columns, count } = this.#grid;
    const way = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    const cell = Math.floor((this.#block ?? 0) / this.#grid.each) + way;
    if (cell >= 0 && cell < count) this.#point(cell * this.#grid.each);
  }

  get #rowHeight() { return this.hasAttribute("compact") ? LOW : this.clientWidth < NARROW ? 2 * ROW - 6 : ROW; }
  #faded(id) { return this.#marked && this.#marked !== id ? 0.3 : 1; }
  get #marked() { return this.#hovered ?? this.#pinned; }

  // --- drawing, at most once per frame ---

  redraw = () => {
    if (this.#drawing) return;
    this.#drawing = true;
    const soon = () => requestAnimationFrame(() => this.#draw());
    if (this.#following) setTimeout(soon, this.#drawn + FOLLOW_MS - performance.now());
    else soon();
  };

  #draw() {
    this.#drawing = false;
    this.#drawn = performance.now();
    if (!this.isConnected || !this.clientWidth) return;
    const style = getComputedStyle(this);
    const names = ["ink", "soft", "line", "blank", "dim", "accent"];
    this.colors = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
    this.view = this.run.view(this.#position);
    this.owners = this.view?.owners();
    this.#drawControls();
    this.#drawWords();
    this.#drawPlaces();
    this.#drawBatch();
    this.#drawQueue();
    this.#drawRows();
    this.#drawPool();
    if (this.parts.more.open) this.parts.text.textContent = this.#text();
  }

  #drawControls() {
    const { parts } = this, { play, slider, where, overview } = parts, { steps } = this.run, at = this.#position;
    play.textContent = this.playing ? "❚❚" : "▶";
    play.setAttribute("aria-label", this.playing ? "Pause" : "Play");
    play.title = this.playing ? "Pause (space)" : "Play (space)";
    slider.max = steps.length;
    slider.value = at;
    const place = at < steps.length ? `step ${at + 1} of ${steps.length}` : `after step ${steps.length}`;
    slider.setAttribute("aria-valuetext", place);
    const past = this.run.live && !this.#following && steps.length > 0;
    where.textContent = `${place}, ${past ? "in the past" : `${this.time.toFixed(this.time < 10 ? 2 : 1)} s`}`;
    parts.now.hidden = !past;
    const width = overview.clientWidth, height = 34;
    const pen = brush(overview, width, height), most = Math.max(1, this.run.budget(at));
    const columns = Math.max(1, Math.min(steps.length, Math.floor(width)));
    for (let column = 0; column < columns; column++) {
      const [from, to] = [column, column + 1].map((edge) => Math.floor((edge * steps.length) / columns));
      this.#drawShare(pen, (column * width) / columns, width / columns, height, steps.slice(from, to), most, from > at);
    }
  }

  // The tokens of some steps, stacked by reason, as a bar of the overview.
  #drawShare(pen, x, width, height, steps, most, faded) {
    const sums = { decode: 0, prefill: 0, recompute: 0, padding: 0 };
    for (const step of steps) for (const part of step.scheduled) sums[part.why] += part.num_tokens / steps.length;
    let y = height;
    pen.globalAlpha = faded ? 0.3 : 1;
    for (const [why, tokens] of Object.entries(sums)) {
      const tall = (Math.min(tokens, most) / most) * height;
      y -= tall;
      const color = why === "padding" ? this.colors.dim : STATES[why].color;
      fill(pen, color, x, y, Math.max(0.5, width - (width > 4 ? 1 : 0)), tall);
    }
    pen.globalAlpha = 1;
  }

  #drawWords() {
    const { sentence, said, figures } = this.parts, { run } = this, at = this.#position;
    if (sentence.hasAttribute("role") && !run.steps.length) return; // it shows an error
    const words = run.sentence(at);
    sentence.textContent = words;
    const totals = run.totals[Math.min(at, run.totals.length - 1)];
    if (!totals) return;
    const now = performance.now();
    if ((!this.playing && !this.#following) || now - this.#said > SAY_EVERY) {
      const spoken = `${run.caption(at)}. ${words}`;
      if (said.textContent !== spoken) said.textContent = spoken;
      this.#said = now;
    }
    const useful = totals.tokens ? `, ${((100 * totals.useful) / totals.tokens).toFixed(0)} % of them useful` : "";
    const missing = run.header.dropped_steps ?? 0, { length } = run.requests;
    figures.textContent = `So far: ${totals.finished.toLocaleString("en")} of ${plural(length, "request")} finished, `
      + `${plural(totals.outputs, "token")} sampled, ${plural(totals.tokens, "token")} computed${useful}, `
      + `${plural(totals.preempted, "preemption")}${missing ? `; ${plural(missing, "step")} before not kept` : ""}.`;
  }

  // --- places and batch ---

  #drawPlaces() {
    const { places, placesHead } = this.parts, { run } = this, at = this.#position;
    const count = run.places(at), totals = run.totals[at];
    placesHead.textContent = `Places: ${totals?.working ?? 0} of ${count} work`;
    const shown = Math.min(count, MOST_PLACES), width = places.clientWidth;
    const columns = Math.min(shown, Math.max(4, shown <= 8 ? 8 : Math.min(16, Math.floor(width / 26))));
    const size = Math.min(44, width / columns), lines = Math.ceil(shown / columns);
    const pen = brush(places, width, lines * size);
    const here = run.occupants(at);
    for (let place = 0; place < shown; place++) {
      const x = (place % columns) * size + 1.5, y = Math.floor(place / columns) * size + 1.5;
      this.#drawPlace(pen, x, y, size - 3, here.get(place));
    }
    places.setAttribute("aria-label", run.sentence(at));
  }

  #drawPlace(pen, x, y, size, inside) {
    const { line, blank, soft, ink } = this.colors;
    if (!inside) {
      pen.setLineDash([3, 3]);
      frame(pen, line, x, y, size, size);
      pen.setLineDash([]);
      return;
    }
    const [request, state] = inside, held = state === "padding";
    pen.globalAlpha = this.#faded(request.id);
    fill(pen, held ? blank : request.color, x, y, size, size);
    if (held) hatch(pen, x, y, size, size, soft, 6);
    frame(pen, held ? soft : ink, x, y, size, size);
    if (size >= 14) {
      if (held) fill(pen, blank, x + size / 2 - 8, y + size / 2 - 9, 16, 18);
      write(pen, request.letter, x + size / 2, y + size / 2 - (held || size < 24 ? 0 : 4), held ? soft : "#000000",
        Math.min(16, size * 0.5));
    }
    if (!held) {
      fill(pen, STATES[state].color, x, y + size * 0.76, size, size * 0.24);
      frame(pen, ink, x, y + size * 0.76, size, size * 0.24);
    }
    pen.globalAlpha = 1;
  }

  #drawBatch() {
    const { batch, batchHead } = this.parts, { run } = this, step = run.steps[this.#position];
    const budget = run.budget(this.#position), used = step ? tokensOf(step) : 0;
    const most = run.totals.at(-1)?.budget ? "a budget of" : "at most";
    batchHead.textContent = `This step: ${used.toLocaleString("en")} of ${most} ${plural(budget, "token")}`;
    const { ink, blank, soft, line } = this.colors;
    const width = batch.clientWidth, height = 26, pen = brush(batch, width, height);
    let x = 0;
    const said = [];
    for (const part of step?.scheduled ?? []) {
      const wide = (part.num_tokens / budget) * width, state = STATES[part.why], padding = part.why === "padding";
      const request = run.byId.get(part.request_id);
      pen.globalAlpha = this.#faded(part.request_id);
      fill(pen, padding ? blank : state.color, x, 0, wide, height);
      if (padding) hatch(pen, x, 0, wide, height, soft);
      if (part.why === "recompute") hatch(pen, x, 0, wide, height, ink);
      if (wide > 3) frame(pen, padding ? soft : ink, x + 0.25, 0.25, wide - 0.5, height - 0.5, 0.5);
      if (wide > 11 && request) {
        const text = wide > 60 ? `${request.letter} ${part.num_tokens}` : request.letter;
        if (part.why === "recompute" || padding) {
          const free = padding ? blank : state.color;
          fill(pen, free, x + wide / 2 - 3.5 * text.length, 5, 7 * text.length, height - 10);
        }
        write(pen, text, x + wide / 2, height / 2, padding ? ink : inkOn(state.color), 11);
      }
      x += wide;
      if (said.length < 12) said.push(`${request?.label ?? part.request_id} ${part.why} ${part.num_tokens}`);
    }
    pen.globalAlpha = 1;
    frame(pen, line, 0.5, 0.5, width - 1, height - 1);
    batch.setAttribute("aria-label", `${batchHead.textContent}: ${said.join(", ") || "nothing"}`);
  }

  #drawQueue() {
    const { queue, queueHead } = this.parts, waiting = this.run.waiting(this.#position);
    queueHead.textContent = waiting.length ? `Queue: ${plural(waiting.length, "request")}` : "Queue: no request waits";
    const chips = waiting.slice(0, MOST_CHIPS).map((request) => {
      const state = this.run.state(request, this.#position), words = SAYS[state];
      const chip = make("li", { title: `${request.label} ${words}`, class: state }, request.letter);
      chip.append(make("span", { class: "only-read" }, ` ${request.label} ${words}`));
      if (state !== "waiting") chip.append(STATES[state].letter);
      chip.style.setProperty("--of", request.color);
      return chip;
    });
    const more = waiting.length - chips.length;
    if (more) chips.push(make("li", { class: "more" }, `and ${more} more`));
    queue.replaceChildren(...chips);
  }

  // --- requests: only the rows in view exist ---

  #drawRows() {
    const { rows, spacer, rowsHead } = this.parts, { requests } = this.run, height = this.#rowHeight;
    const ended = requests.filter((request) => request.finished < this.#position).length;
    rowsHead.textContent = `${plural(requests.length, "request")}, ${ended} finished`;
    spacer.style.height = `${requests.length * height}px`;
    if (this.#scrolledFor !== this.#position && !rows.matches(":focus-within")) this.#scrollToWork(rows, height);
    this.#scrolledFor = this.#position;
    const first = Math.max(0, Math.floor(rows.scrollTop / height) - 3);
    const last = Math.min(requests.length, Math.ceil((rows.scrollTop + rows.clientHeight) / height) + 3);
    const shown = new Set(requests.slice(first, last).map((request) => request.id));
    for (const [id, row] of this.#rows) {
      if (shown.has(id) || row.element.contains(document.activeElement)) continue;
      row.element.remove();
      this.#rows.delete(id);
    }
    rows.classList.toggle("stories", requests.some((request) => request.texts.length));
    if (!this.#rows.size && first < last) spacer.append(this.#rowOf(requests[first]).element); // to measure it
    this.#window = this.#stepsInView();
    this.#longest = Math.max(1, ...requests.slice(first, last).map((each) => each.numPrompt + each.outputs(Infinity)));
    const owners = new Set((this.owners?.get(this.#block) ?? []).map((each) => each.id));
    let before = null;
    for (let index = first; index < last; index++) {
      const row = this.#rowOf(requests[index]);
      const next = before ? before.nextSibling : spacer.firstChild;
      if (row.element !== next && !row.element.contains(document.activeElement)) spacer.insertBefore(row.element, next);
      row.element.style.top = `${index * height}px`;
      this.#drawRow(row, requests[index], owners);
      before = row.element;
    }
  }

  // Scroll to the first request that has not ended.
  #scrollToWork(rows, height) {
    const at = this.#position, { requests } = this.run;
    const first = requests.findIndex((request) => request.finished >= at - 3);
    const top = Math.max(0, (first < 0 ? requests.length : first) * height - height);
    if (top < rows.scrollTop || top > rows.scrollTop + rows.clientHeight * 0.3) rows.scrollTop = top;
  }

  // The steps that rows show, each `wide` px: all of a short run, else those around the position; and the x where each
  // begins. Compact rows are in seconds: a second is equally long in all of them, steps are not.
  #stepsInView() {
    const width = [...this.#rows.values()][0]?.line.clientWidth || 300, { run } = this;
    const total = Math.max(1, run.steps.length);
    const second = width / (Math.max(this.span, run.elapsed(total)) || 1);
    if (this.hasAttribute("compact")) {
      return { from: 0, count: total, wide: 0, x: (at) => run.elapsed(at) * second, now: this.#clock * second };
    }
    const all = total * 6 <= width, wide = all ? Math.min(16, width / total) : 8;
    const count = all ? total : Math.floor(width / 8);
    const from = Math.max(0, Math.min(total - count, this.#position - Math.floor(0.75 * count)));
    return { from, count, wide, x: (at) => (at - from) * wide };
  }

  #rowOf(request) {
    if (this.#rows.has(request.id)) return this.#rows.get(request.id);
    const row = {
      key: make("span", { class: "key", "aria-hidden": "true" }, request.letter),
      line: make("canvas", { class: "line", "aria-hidden": "true" }),
      cells: make("canvas", { class: "cells", "aria-hidden": "true" }),
      words: make("bdi", { dir: "ltr" }),
    };
    Object.assign(row.key.style, { background: request.color, color: "#000000" });
    const { label } = request, short = label.length > 8 ? `…${label.slice(-7)}` : label;
    row.name = make("span", { class: "name", title: request.id }, short);
    row.element = make("div", { class: "row", role: "button", tabindex: 0, "data-id": request.id }, row.key, row.name,
      row.line, row.cells, make("span", { class: "words" }, row.words));
    const on = { pointerenter: request.id, focus: request.id, pointerleave: null, blur: null };
    for (const [name, id] of Object.entries(on)) {
      row.element.addEventListener(name, () => {
        this.#hovered = id;
        this.redraw();
      });
    }
    row.element.addEventListener("click", () => this.#pin(request.id));
    this.#rows.set(request.id, row);
    return row;
  }

  #drawRow(row, request, owners) {
    const { run } = this, at = this.#position, state = run.state(request, at);
    const step = run.steps[Math.min(at, run.steps.length - 1)];
    const outputs = request.outputs(at), held = request.held(at);
    row.element.classList.toggle("marked", owners.has(request.id) || this.#marked === request.id);
    row.element.classList.toggle("absent", !state);
    row.element.setAttribute("aria-pressed", String(this.#pinned === request.id));
    const status = state ? STATES[state].name : "not arrived yet";
    const { from, count } = this.#window, letters = run.letters(request, Math.max(0, at - 39), at + 1);
    row.element.setAttribute("aria-label", `${request.label} |${letters}|: ${status}, `
      + `${plural(request.numPrompt, "prompt token")}, ${plural(outputs, "output token")}, ${held} held in the cache`);
    const text = step ? request.text(step.step) : "";
    row.words.textContent = text ? text.slice(-160) : `${request.numPrompt} prompt + ${outputs} output tokens`;
    row.words.parentElement.dir = text ? "rtl" : "ltr"; // shows the end of a story
    row.words.parentElement.title = `${request.numPrompt} prompt + ${outputs} output tokens`;
    this.#drawLine(row.line, request, from, from + count);
    this.#drawCells(row.cells, request, state, outputs, held);
  }

  // What the request does in each step: the row of a timeline, with the letters of its text picture.
  #drawLine(canvas, request, from, to) {
    const { wide, x, now = Infinity } = this.#window, { run } = this, at = this.#position, { accent } = this.colors;
    const height = this.#rowHeight < ROW ? LOW - 3 : 18, pen = brush(canvas, canvas.clientWidth, height);
    to = Math.min(to, run.steps.length);
    for (let index = from, begin = from; index < to; index++) {
      const what = [index, index + 1].map((each) => (each < to ? this.#doing(request, each) : null));
      if (wide < 7 && what[0] === what[1] && index !== at) continue; // narrow steps are drawn as one box
      const [left, right] = [x(begin), x(index + 1)], past = index > at ? left : Math.max(left, Math.min(now, right));
      this.#drawDoing(pen, what[0], left, past - left, height, false);
      this.#drawDoing(pen, what[0], past, right - past, height, true);
      if (wide >= 7 && !["waiting", "finished", "held", null].includes(what[0])) {
        const color = STATES[what[0]].color === "#FFFFFF" ? this.colors.ink : inkOn(STATES[what[0]].color);
        write(pen, run.letter(request, index), x(index + 0.5) - 0.5, height / 2, color, wide >= 12 ? 10 : 8);
      }
      pen.globalAlpha = 1;
      begin = index + 1;
    }
    if (wide && at >= from && at < to) frame(pen, accent, x(at) - 0.5, 0.5, wide, height - 1, 2);
  }

  // A key of STATES, or "held": it has ended, but keeps its place in a static batch.
  #doing(request, index) {
    const state = this.run.state(request, index);
    return state === "finished" && this.run.holdsPlace(request, index) ? "held" : state;
  }

  #drawDoing(pen, state, x, width, height, faded) {
    const { soft, blank, dim } = this.colors;
    if (!state || width <= 0) return;
    pen.globalAlpha = faded ? 0.16 : 1;
    if (state === "finished") fill(pen, soft, x, height / 2, width, 1);
    if (state === "waiting") fill(pen, dim, x, height / 3, width - (width > 5 && width < 17 ? 1 : 0), height / 3);
    if (state === "finished" || state === "waiting") return;
    const hollow = state === "held" || state === "padding";
    fill(pen, hollow ? blank : STATES[state].color, x, 1, width - (width > 5 && width < 17 ? 1 : 0), height - 2);
    if (hollow) hatch(pen, x, 1, width, height - 2, soft, 4);
  }

  // Its tokens: in the cache (prompt, output, recomputed) or not computed yet; tokens written in this step are framed.
  #drawCells(canvas, request, state, outputs, held) {
    const { ink, soft, line, blank } = this.colors;
    const width = canvas.clientWidth, height = 18, pen = brush(canvas, width, height);
    const size = Math.min(8, width / this.#longest), gap = size >= 4 ? 1 : 0, at = this.#position;
    const known = state ? request.numPrompt + outputs : 0, part = request.lastPart(at), now = part?.index === at;
    const box = (from, to, color, filled) => {
      if (to <= from) return;
      if (!gap) {
        const [y, tall] = filled ? [3, height - 6] : [height / 2 - 1, 2];
        fill(pen, filled ? color : line, from * size, y, (to - from) * size, tall);
        return;
      }
      for (let token = from; token < to; token++) {
        fill(pen, filled ? color : blank, token * size + 0.5, 4, size - gap, height - 8);
        if (!filled) frame(pen, soft, token * size + 0.5, 4, size - gap, height - 8, 0.7);
      }
    };
    box(0, Math.min(held, request.numPrompt), STATES.prefill.color, true);
    box(request.numPrompt, held, STATES.decode.color, true);
    box(held, known, soft, false);
    if (!now || part.state === "padding") return;
    box(part.start, part.start + part.again, STATES.recompute.color, true);
    frame(pen, ink, part.start * size, 2, Math.max(2, (part.end - part.start) * size), height - 4, 1.5);
  }

  // --- the pool ---

  #blockAt(event) {
    const { columns, size, each, count } = this.#grid;
    const cell = Math.floor(event.offsetY / size) * columns + Math.min(columns - 1, Math.floor(event.offsetX / size));
    return cell < count ? cell * each : null;
  }

  #drawPool() {
    const { pool, poolHead, block } = this.parts, { view } = this;
    pool.parentElement.hidden = !view;
    if (!view) return;
    const { use } = view, width = pool.clientWidth, most = 300; // px in height
    const each = Math.max(1, Math.ceil(view.numBlocks / (Math.floor(width / 4) * Math.floor(most / 4))));
    const count = Math.ceil(view.numBlocks / each);
    const size = Math.max(4, Math.min(30, Math.floor(Math.sqrt((width * most) / count))));
    const columns = Math.max(1, Math.floor(width / size));
    this.#grid = { columns, size, each, count };
    poolHead.textContent = `Block pool: ${use.used} used, ${use.cached} cached, ${use.free} free, ${use.null} null`;
    const pen = brush(pool, width, Math.ceil(count / columns) * size + 1);
    for (let cell = 0; cell < count; cell++) {
      const x = (cell % columns) * size + 0.5, y = Math.floor(cell / columns) * size + 0.5;
      this.#drawBlock(pen, cell * each, x, y, size - (size > 6 ? 2 : 1));
    }
    const words = this.#block === null ? this.#poolWords() : this.#blockWords(this.#block);
    block.textContent = each > 1 ? `${words} A cell stands for ${each} blocks.` : words;
    pool.setAttribute("aria-valuemax", view.numBlocks - 1);
    pool.setAttribute("aria-valuenow", this.#block ?? 0);
    pool.setAttribute("aria-valuetext", this.#blockWords(this.#block ?? 0));
  }

  #drawBlock(pen, block, x, y, size) {
    const { view, colors } = this, { each } = this.#grid;
    let owners = this.owners.get(block) ?? [];
    for (let other = block + 1; !owners.length && other < block + each; other++) owners = this.owners.get(other) ?? [];
    const { ink, soft, line, blank, dim, accent } = colors;
    const cached = view.now.cached.has(block), empty = block < view.numNull;
    const mine = owners.some((owner) => owner.id === this.#marked);
    pen.globalAlpha = this.#marked && !mine ? 0.25 : 1;
    fill(pen, cached ? dim : blank, x, y, size, size);
    const shown = owners.slice(0, 4), filled = Math.max(0, ...owners.map((owner) => owner.filled)) / view.blockSize;
    shown.forEach((owner, stripe) => {
      const color = this.run.byId.get(owner.id)?.color ?? dim;
      fill(pen, color, x, y + (stripe * size) / shown.length, size, size / shown.length);
    });
    if (owners.length && filled < 1 && size >= 8) { // empty slots at the right
      pen.globalAlpha *= 0.75;
      fill(pen, blank, x + filled * size, y, size * (1 - filled), size);
      pen.globalAlpha = this.#marked && !mine ? 0.25 : 1;
    }
    const written = owners.some((owner) => {
      const [from, to] = view.now.written.get(owner.id) ?? [0, 0];
      return to > owner.logical * view.blockSize && from < (owner.logical + 1) * view.blockSize;
    });
    if (size > 5) frame(pen, owners.length ? ink : line, x, y, size, size, written && size > 6 ? 2 : 0.7);
    if (mine || block === this.#block) frame(pen, accent, x, y, size, size, size > 8 ? 3 : 1.5);
    if (size >= 13) {
      const letters = owners.map(({ id }) => this.run.byId.get(id)?.letter).join("");
      const nobody = empty ? "0" : cached ? PALETTE.cached.letter : "";
      const sign = (owners.length > 2 ? String(owners.length) : letters) || nobody;
      write(pen, sign, x + size / 2, y + size / 2, !owners.length ? soft : filled < 0.5 ? ink : "#000000",
        Math.min(12, size * 0.5));
    }
    pen.globalAlpha = 1;
  }

  #poolWords() {
    const { view } = this, sizes = [...view.now.tables.values()].map((table) => table.length);
    const saved = sizes.reduce((sum, size) => sum + size, 0) - view.use.used;
    return `${plural(view.numBlocks, "block")} of ${plural(view.blockSize, "token")}`
      + `${saved > 0 ? `; sharing saves ${plural(saved, "block")}` : ""}.`;
  }

  #blockWords(block) {
    const { view } = this, owners = this.owners?.get(block) ?? [];
    if (!view) return "";
    if (!owners.length) {
      const kept = view.now.cached.has(block) ? "cached, in no table" : "free";
      const what = block < view.numNull ? "null, stands for padding" : kept;
      return `Block ${block}: ${what}.`;
    }
    const names = owners.slice(0, 6).map(({ id }) => this.run.byId.get(id)?.label ?? id);
    const [{ logical }] = owners, filled = Math.max(...owners.map((owner) => owner.filled));
    const first = logical * view.blockSize;
    return `Block ${block}: ${names.join(" and ")}${owners.length > 6 ? ` and ${owners.length - 6} more` : ""}, `
      + `tokens ${first} to ${first + Math.max(1, filled) - 1}, ${filled} of ${view.blockSize} slots full`
      + `${owners.length > 1 ? `, shared by ${owners.length}` : ""}.`;
  }

  // --- text ---

  #text() {
    const { run } = this, at = this.#position;
    const to = Math.min(at + 1, run.steps.length), from = Math.max(0, to - 100);
    const active = run.requests.filter((request) => request.finished >= from && run.state(request, at));
    const shown = active.slice(0, MOST_LINES), width = Math.max(0, ...shown.map((request) => request.label.length));
    const lines = shown.map((request) => `${request.label.padEnd(width)} |${run.letters(request, from, to)}`);
    if (active.length > shown.length) lines.push(`and ${active.length - shown.length} more`);
    if (this.view) lines.push("", this.parts.poolHead.textContent);
    return [`steps ${from + 1} to ${to}`, ...lines, "", run.caption(at), run.sentence(at)].join("\n");
  }
}

if (!customElements.get("trace-player")) customElements.define("trace-player", TracePlayer);
