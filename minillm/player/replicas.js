// The lanes of a server with several replicas: one lane for each engine. The engine of the pressed lane is drawn by
// the player below. A server with one engine has no lanes: its records name no replica.

import { Run, plural } from "./replay.js";
import { brush, fill, frame, hatch, make, write } from "./trace-player.js";

const MOST_STEPS = 5000; // kept of each replica
const MOST_MISSING = 3; // lanes of replicas that do not run any more
const DRAW_MS = 250; // between two drawings
const [TALL, CELL] = [32, 16]; // px: height of a strip, side of a cell at most
const ORDER = { numeric: true }; // of names: 10 after 9

const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);

class Lane {
  run = new Run({ live: true, most: MOST_STEPS });
  missing = ""; // why nothing comes from it
  #prompts = 0; // prompt tokens of the requests that it admitted
  #hits = 0; // those of them that its cache had
  #met = new WeakSet(); // requests that have been counted

  constructor(name, onclick) {
    this.name = name;
    const part = (kind, title) => {
      const value = make("b"), strip = make(kind === "queue" || kind === "hits" ? "i" : "canvas", { class: "strip" });
      this[kind] = { value, strip };
      return make("span", { class: kind }, make("span", {}, `${title} `, value), strip);
    };
    this.state = make("span", { class: "state" });
    this.button = make("button", { type: "button", class: "replica", "aria-pressed": "false", onclick },
      make("span", { class: "who" }, make("b", { title: name }, name), this.state), part("places", "Places"),
      part("queue", "Queue"), part("blocks", "Blocks"), part("hits", "Prefix hits"));
    this.element = make("li", {}, this.button);
  }

  // A record of its feed; `player` is the big view if it shows this replica.
  add(record, player) {
    if (record.gone) this.missing = "gone";
    if (record.format) {
      this.run = new Run({ live: true, most: MOST_STEPS });
      [this.missing, this.#prompts, this.#hits] = ["", 0, 0];
      player?.load(this.run);
    }
    (player ?? this.run).add(record);
    if (record.step) this.#countHits(record.step);
  }

  // As the server's metrics do: when a request takes part first, what is before its first token was in the cache.
  #countHits({ scheduled }) {
    const { byId, header, steps } = this.run, cut = steps.length === 1 && header.dropped_steps > 0;
    for (const request of scheduled.map((part) => byId.get(part.request_id))) {
      if (!request || this.#met.has(request)) continue;
      this.#met.add(request);
      if (cut) continue; // it may have begun before the first step that is known
      this.#prompts += request.numPrompt;
      this.#hits += Math.min(request.parts[0].start, request.numPrompt);
    }
  }

  // What the last step left: requests in the batch, waiting ones, blocks, and the share of prompt tokens found cached.
  get counts() {
    const { run } = this, { max_num_seqs: limit, num_blocks: size } = run.config;
    const running = [...run.seats.keys()].filter((id) => run.byId.get(id)?.finished === Infinity).length;
    const use = run.view(run.steps.length)?.use ?? { used: 0, cached: 0, null: 1 };
    return { running, places: limit ?? run.places(run.steps.length), waiting: run.open - running, used: use.used,
      cached: use.cached, blocks: Math.max(0, (size ?? run.pool?.numBlocks ?? 0) - use.null),
      hits: this.#prompts ? this.#hits / this.#prompts : null };
  }

  draw(pressed) {
    const { counts, missing, button } = this;
    const doing = this.run.config.paused ? "paused" : counts.running ? "running" : "idle";
    const held = `${counts.used.toLocaleString("en")} of ${counts.blocks.toLocaleString("en")}`;
    const shown = { places: `${counts.running} of ${counts.places}`, queue: counts.waiting.toLocaleString("en"),
      blocks: `${held} used, ${counts.cached.toLocaleString("en")} cached`, hits: percent(counts.hits) };
    for (const [kind, text] of Object.entries(shown)) this[kind].value.textContent = text;
    this.state.textContent = missing || doing;
    button.classList.toggle("missing", Boolean(missing));
    button.setAttribute("aria-pressed", String(pressed));
    const hits = counts.hits === null ? "no prompt yet" : `${percent(counts.hits)} prefix hits`;
    const said = [`${counts.running} of ${plural(counts.places, "place")} work`, `queue ${counts.waiting}`,
      `${held} blocks used`, hits];
    button.setAttribute("aria-label", `${this.name}: ${missing ? `${missing}, last state: ` : ""}${said.join(", ")}`);
    this.queue.strip.style.setProperty("--share", Math.min(1, counts.waiting / counts.places));
    this.hits.strip.style.setProperty("--share", counts.hits ?? 0);
    const style = getComputedStyle(button);
    const names = ["line", "soft", "blank"];
    const colors = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
    this.#drawPlaces(counts.places, colors);
    this.#drawBlocks(counts.blocks, colors);
  }

  // The requests in the batch, each at its place; a hatched one has ended, and its static batch goes on.
  #drawPlaces(count, { line, soft, blank }) {
    const { seats, byId } = this.run, here = new Map([...seats].map(([id, place]) => [place, byId.get(id)]));
    cells(this.places.strip, count, (pen, place, x, y, size) => {
      const request = here.get(place), side = size - (size > 5 ? 2 : 1), ended = request?.finished !== Infinity;
      fill(pen, request && !ended ? request.color : blank, x, y, side, side);
      if (request && ended) hatch(pen, x, y, side, side, soft, 4);
      if (size > 5) frame(pen, request ? soft : line, x, y, side, side, 0.7);
      if (request && !ended && side >= 12) write(pen, request.letter, x + side / 2, y + side / 2, "#000000", 11);
    });
  }

  // The pool in the order of its numbers: full cells are in tables, low ones are cached, empty ones free.
  #drawBlocks(count, { line, soft, blank }) {
    const view = this.run.view(this.run.steps.length), owners = view?.owners(), first = view?.numNull ?? 1;
    cells(this.blocks.strip, count, (pen, cell, x, y, size, each) => {
      const from = first + cell * each, to = Math.min(from + each, first + count), side = size - (size > 5 ? 2 : 1);
      let owner = null, cached = false;
      for (let block = from; block < to && !owner; block++) {
        owner = owners?.get(block)?.[0];
        cached ||= Boolean(view?.now.cached.has(block));
      }
      fill(pen, blank, x, y, side, side);
      if (owner) fill(pen, this.run.byId.get(owner.id)?.color ?? soft, x, y, side, side);
      else if (cached) fill(pen, soft, x, y + side / 2, side, side / 2);
      if (size > 5) frame(pen, owner ? soft : line, x, y, side, side, 0.7);
    });
  }
}

// Draw `count` things into a strip, in cells as large as fit; `paint` gets the pen, the number of the cell, its x, y
// and size in px, and for how many things it stands.
function cells(canvas, count, paint) {
  const width = canvas.clientWidth, fits = (size) => Math.floor(width / size) * Math.floor(TALL / size);
  let size = CELL;
  while (size > 3 && fits(size) < count) size -= 1;
  const each = Math.max(1, Math.ceil(count / fits(size))), columns = Math.max(1, Math.floor(width / size));
  const number = Math.ceil(count / each), pen = brush(canvas, width, Math.ceil(number / columns) * size + 1);
  for (let cell = 0; cell < number; cell++) {
    paint(pen, cell, (cell % columns) * size + 0.5, Math.floor(cell / columns) * size + 0.5, size, each);
  }
}

export class Replicas {
  #lanes = new Map(); // name -> its lane, in the order of the names
  #shown = null; // the lane in the big view
  #timer = 0;

  // `section` holds a list and a status; `onshow` gets the name and the run of a replica that is chosen.
  constructor(section, player, onshow) {
    Object.assign(this, { section, player, onshow });
    this.list = section.querySelector("ul");
    this.status = section.querySelector("[role=status]");
    new ResizeObserver(() => this.redraw()).observe(section);
    document.addEventListener("themechange", () => this.redraw());
  }

  // A record that names its replica; returns whether that is the one in the big view.
  add(record) {
    const { replica: name } = record, isNew = !this.#lanes.has(name);
    if (isNew) {
      const lane = new Lane(name, () => this.show(lane));
      this.#lanes = new Map([...this.#lanes, [name, lane]].sort(([one], [two]) => one.localeCompare(two, "en", ORDER)));
      this.list.insertBefore(lane.element, this.list.children[[...this.#lanes.keys()].indexOf(name)] ?? null);
      this.section.hidden = false;
    }
    const lane = this.#lanes.get(name), before = lane.missing;
    if (!this.#shown) this.show(lane);
    lane.add(record, lane === this.#shown ? this.player : null);
    if (isNew || lane.missing !== before) this.#count();
    this.redraw();
    return lane === this.#shown;
  }

  // The feed has ended; those that still run come again with a header.
  disconnected() {
    for (const lane of this.#lanes.values()) lane.missing ||= "not connected";
    if (this.#lanes.size) this.#count();
    this.redraw();
  }

  show(lane) {
    if (lane === this.#shown) return;
    this.#shown = lane;
    this.player.load(lane.run);
    this.onshow(lane.name, lane.run);
    this.redraw();
  }

  #count() {
    const missing = [...this.#lanes.values()].filter((lane) => lane.missing);
    for (const lane of missing.filter((each) => each !== this.#shown).slice(0, -MOST_MISSING)) {
      lane.element.remove();
      this.#lanes.delete(lane.name);
    }
    const running = this.#lanes.size - missing.length, names = missing.map(({ name, missing: why }) => `${name} ${why}`);
    this.status.textContent = `${plural(running, "replica")} running${names.length ? `; ${names.join(", ")}` : ""}.`;
  }

  redraw() {
    this.#timer ||= setTimeout(() => requestAnimationFrame(() => {
      this.#timer = 0;
      for (const lane of this.#lanes.values()) lane.draw(lane === this.#shown);
    }), DRAW_MS);
  }
}
