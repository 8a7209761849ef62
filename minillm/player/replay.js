// A trace in the browser: its JSON lines, what every request does in every step, and which request holds which block.
//
// The format is that of minillm/trace/files.py; a live feed adds {"config": ...} and {"tokens": ...}. The letters are
// those of viz/activity.py, the block tables those of viz/block_replay.py: tests compare all three on real runs.
// Nothing here needs a page; node can also run it.

import { PALETTE } from "./palette.js";

const EVERY = 64; // steps from one snapshot of the pool to the next: the most that a jump replays
const MOST_STEPS = 20000; // of a live run; then the older half is dropped
const PRECEDENCE = ["recompute", "prefill", "decode", "padding"]; // of several in one step, the first shows
const WASTE = ["padding", "recompute"];

// "1 request", "2 requests"
export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// How many of the sorted `items` have key(item) <= limit.
export function countUpTo(items, limit, key = (item) => item) {
  let low = 0, high = items.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (key(items[middle]) <= limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

// One request of a run; `parts`: {index, start, end, state, mixed, outputs} of each step it took part in.
class TracedRequest {
  constructor(record, number) {
    this.id = record.request_id;
    const story = /^story-.*-(\d+)$/.exec(this.id); // from a burst of the page
    this.label = story ? `story ${story[1]}` : /^\d/.test(this.id) ? `req ${this.id}` : this.id;
    this.arrival = record.arrival_time;
    this.numPrompt = record.num_prompt_tokens;
    this.number = number;
    this.color = PALETTE.owners[number % PALETTE.owners.length];
    this.letter = PALETTE.letters[number % PALETTE.letters.length];
    this.parts = [];
    this.preempted = []; // {index, mode}
    this.finished = Infinity; // index of the step it ended with
    this.texts = []; // {step, text}: output from the live feed
    this.stints = []; // {index, place}: its place in the batch, from step `index` on
  }

  // The last part in steps up to `index`, or undefined.
  lastPart(index) { return this.parts[countUpTo(this.parts, index, (part) => part.index) - 1]; }
  lastPreemption(index) { return this.preempted[countUpTo(this.preempted, index, (each) => each.index) - 1]; }
  stint(index) { return this.stints[countUpTo(this.stints, index, (each) => each.index) - 1]; }
  // Output tokens sampled up to and including step `index`.
  outputs(index) { return this.lastPart(index)?.outputs ?? 0; }

  // Tokens whose keys and values are held during step `index`, including those that it writes.
  held(index) {
    const part = this.lastPart(index);
    if (!part || this.finished < index) return 0;
    return (this.lastPreemption(index)?.index ?? -1) > part.index ? 0 : part.end;
  }

  // The output text up to the step of this number, at most its last `most` pieces.
  text(step, most = 400) {
    const count = countUpTo(this.texts, step, (each) => each.step);
    return this.texts.slice(Math.max(0, count - most), count).map((each) => each.text).join("");
  }
}

export class Run {
  constructor({ live = false, most = MOST_STEPS } = {}) {
    Object.assign(this, { live, most });
    this.header = {};
    this.config = {};
    this.requests = [];
    this.byId = new Map();
    this.steps = [];
    this.totals = []; // after each step: {tokens, useful, outputs, finished, preempted, working, held}
    this.batch = new Set(); // static batching: the requests admitted together
    this.open = 0; // requests that have arrived and not ended
    this.seats = new Map(); // id -> its place in the batch
    this.pool = null;
  }

  // Every line of a file.
  static read(text) {
    const run = new Run();
    for (const [number, line] of text.split("\n").entries()) {
      if (!line.trim()) continue;
      let record;
      try {
        record = JSON.parse(line);
      } catch (error) {
        throw new Error(`line ${number + 1} of the trace is not JSON (${error.message})`);
      }
      run.add(record);
    }
    if (run.header.format !== "minillm trace") throw new Error("not a trace: its first line has no format");
    return run;
  }

  add(record) {
    if (record.format) {
      if (record.version !== 1) throw new Error(`the trace has version ${record.version}, this player reads 1`);
      this.header = record;
    } else if (record.config) {
      this.config = { ...this.config, ...record.config };
    } else if (record.request) this.addRequest(record.request);
    else if (record.step) this.addStep(record.step);
    else if (record.aborted) for (const id of record.aborted) this.end(id, this.steps.length - 1);
    else if (record.tokens) {
      const { request_id: id, step, texts } = record.tokens;
      this.byId.get(id)?.texts.push({ step, text: texts.join("") });
    }
  }

  addRequest(record) {
    if (this.byId.has(record.request_id)) return;
    const anew = this.live && !this.open; // a burst gets the same letters whenever the engine is idle
    const request = new TracedRequest(record, anew ? 0 : (this.requests.at(-1)?.number ?? -1) + 1);
    this.byId.set(request.id, request);
    this.requests.push(request);
    this.open += 1;
  }

  end(id, index) {
    const request = this.byId.get(id);
    if (request?.finished !== Infinity) return;
    request.finished = index;
    this.open -= 1; // none may be left
  }

  addStep(step) {
    if (this.live && this.steps.length >= this.most) this.forget(this.most / 2);
    const index = this.steps.length;
    const byRequest = new Map();
    for (const part of step.scheduled) {
      if (!byRequest.has(part.request_id)) byRequest.set(part.request_id, []);
      byRequest.get(part.request_id).push(part);
    }
    this.steps.push(step);
    for (const { request_id: id, mode } of step.preempted ?? []) this.byId.get(id)?.preempted.push({ index, mode });
    for (const [id, parts] of byRequest) this.takePart(index, this.byId.get(id), parts);
    for (const id of step.finished ?? []) this.end(id, index);
    this.totals.push(this.count(step, index, byRequest));
    this.seat(step, index, byRequest);
    if (this.live && step.blocks) this.pool ??= new Pool(this);
    if (this.live) this.pool?.go(index + 1);
  }

  takePart(index, request, parts) {
    if (!request) return;
    const real = parts.filter((part) => part.why !== "padding");
    const before = request.parts.at(-1);
    request.parts.push({
      index,
      start: real[0]?.start ?? before?.end ?? 0,
      end: real.at(-1) ? real.at(-1).start + real.at(-1).num_tokens : before?.end ?? 0,
      state: PRECEDENCE.find((why) => parts.some((part) => part.why === why)),
      mixed: real.length > 0 && real.length < parts.length,
      again: real.filter((part) => part.why === "recompute").reduce((sum, part) => sum + part.num_tokens, 0),
      outputs: (before?.outputs ?? 0) + parts.reduce((sum, part) => sum + (part.num_sampled ?? 0), 0),
    });
  }

  // Each request gets the lowest free place until it is preempted or ends; in a static batch until all have ended.
  seat(step, index, byRequest) {
    for (const each of step.preempted ?? []) this.seats.delete(each.request_id);
    const newcomers = [...byRequest.keys()].filter((id) => !this.seats.has(id));
    if (this.seats.size + newcomers.length > this.places(index)) {
      const aborted = [...this.seats.keys()].filter((id) => !byRequest.has(id) && !this.batch.has(id));
      for (const id of aborted) this.seats.delete(id);
    }
    const taken = new Set(this.seats.values());
    let place = 0;
    for (const id of newcomers) {
      while (taken.has(place)) place += 1;
      taken.add(place);
      this.seats.set(id, place);
      this.byId.get(id)?.stints.push({ index, place });
    }
    for (const id of this.seats.keys()) {
      if (!(this.byId.get(id)?.finished > index) && !this.batch.has(id)) this.seats.delete(id);
    }
  }

  count(step, index, byRequest) {
    const before = this.totals.at(-1) ?? { tokens: 0, useful: 0, outputs: 0, finished: 0, preempted: 0, worked: 0 };
    const sum = (parts, value) => parts.reduce((total, part) => total + value(part), 0);
    const working = [...byRequest.values()].filter((parts) => parts.some((part) => part.why !== "padding")).length;
    let held = byRequest.size - working; // rows of a padded rectangle that are only padding
    if (this.config.batching === "static") {
      if (!this.batch.size) this.batchFrom = index;
      for (const id of byRequest.keys()) this.batch.add(id);
      held = [...this.batch].filter((id) => this.byId.get(id)?.finished < index).length;
      if ([...this.batch].every((id) => this.byId.get(id)?.finished <= index)) this.batch.clear();
    } else {
      this.batch.clear();
      this.batchFrom = Infinity;
    }
    return {
      tokens: before.tokens + sum(step.scheduled, (part) => part.num_tokens),
      useful: before.useful + sum(step.scheduled, (part) => (WASTE.includes(part.why) ? 0 : part.num_tokens)),
      outputs: before.outputs + sum(step.scheduled, (part) => part.num_sampled ?? 0),
      finished: before.finished + (step.finished?.length ?? 0),
      preempted: before.preempted + (step.preempted?.length ?? 0),
      worked: before.worked + working, // places that worked, summed over the steps
      working,
      held,
      most: Math.max(before.most ?? 0, working + held),
      batchFrom: this.batchFrom, // the step with which a static batch began
      limit: this.config.max_num_seqs, // at that time: it can be changed in a live engine
      budget: this.config.max_num_batched_tokens,
    };
  }

  // Drop the first `count` steps and the requests that ended in them.
  forget(count) {
    this.pool?.forget(count);
    this.steps.splice(0, count);
    this.totals.splice(0, count);
    for (const each of [...this.totals, this]) each.batchFrom -= count;
    this.header.dropped_steps = (this.header.dropped_steps ?? 0) + count;
    for (const request of this.requests) {
      for (const each of [...request.parts, ...request.preempted, ...request.stints]) each.index -= count;
      request.parts = request.parts.filter((each) => each.index >= 0);
      request.preempted = request.preempted.filter((each) => each.index >= 0);
      request.finished -= count;
      if (request.finished < 0) this.byId.delete(request.id);
    }
    this.requests = this.requests.filter((request) => request.finished >= 0);
  }

  // --- views of a position: during step `index`; index = steps.length is the state after the last step ---

  // The time on the engine's clock at which the run begins: the first arrival.
  get origin() { return Math.min(this.requests[0]?.arrival ?? Infinity, this.steps[0]?.start_time ?? Infinity); }
  // Seconds from there to the start of step `index`, or to the end of the last one.
  elapsed(index) {
    if (!this.steps.length) return 0;
    return (this.steps[index]?.start_time ?? this.steps.at(-1).end_time) - this.origin;
  }

  // A key of PALETTE.states, or null before the request arrives.
  state(request, index) {
    const part = request.lastPart(index);
    if (part?.index === index) return part.state;
    if (index > request.finished) return "finished";
    const preemption = request.lastPreemption(index);
    if (preemption && preemption.index > (part?.index ?? -1)) {
      return preemption.mode === "swap" ? "swapped" : "preempted";
    }
    return request.arrival <= (this.steps[index]?.start_time ?? Infinity) ? "waiting" : null;
  }

  letter(request, index) {
    const state = this.state(request, index);
    if (!state) return " ";
    const { letter } = PALETTE.states[state];
    const part = request.lastPart(index);
    return part?.index === index && part.mixed ? letter.toLowerCase() : letter;
  }

  // The text picture of a row, a letter per step: steps `from` up to `to`, the last one excluded.
  letters(request, from = 0, to = this.steps.length) {
    let line = "";
    for (let index = from; index < to; index++) line += this.letter(request, index);
    return line.trimEnd();
  }

  waiting(index) {
    return this.requests.filter((request) => ["waiting", "preempted", "swapped"].includes(this.state(request, index)));
  }

  // The request at each place, and what it does: place -> [request, state]; "padding" holds it without computing.
  occupants(index) {
    const found = new Map();
    for (const request of this.totals[index] ? this.requests : []) {
      const part = request.lastPart(index), state = part?.index === index ? part.state : "padding";
      const there = part?.index === index || this.holdsPlace(request, index);
      if (there) found.set(request.stint(index)?.place, [request, state]);
    }
    return found;
  }

  // Whether the request has ended, but not its static batch.
  holdsPlace(request, index) {
    return request.finished < index && request.stint(index)?.index >= (this.totals[index]?.batchFrom ?? Infinity);
  }

  // Requests that can run at the same time: as configured at a position, or the most that did.
  places(index) {
    return this.totals[Math.min(index, this.totals.length - 1)]?.limit ?? Math.max(1, this.totals.at(-1)?.most ?? 1);
  }

  // Tokens that fit into a step: as configured, or the most of any step.
  budget(index) {
    const known = this.totals[Math.min(index, this.totals.length - 1)]?.budget;
    return known ?? (this.mostTokens ??= this.steps.reduce((most, step) => Math.max(most, tokensOf(step)), 1));
  }

  // A position in one sentence.
  sentence(index) {
    const step = this.steps[index], totals = this.totals[index];
    if (!step) {
      const last = this.totals.at(-1);
      if (!last) return "Nothing has run yet.";
      return `${plural(last.finished, "request")} finished${this.open > 0 ? `, ${this.open} did not` : ""}.`;
    }
    const waiting = this.waiting(index).length, places = this.places(index);
    const said = [`${totals.working} of ${plural(places, "place")} ${totals.working === 1 ? "works" : "work"}`];
    if (totals.held) said.push(`${plural(totals.held, "place")} ${are(totals.held)} held by finished requests`);
    const empty = places - totals.working - totals.held;
    if (waiting) said.push(`${plural(waiting, "request")} ${waiting === 1 ? "waits" : "wait"}`);
    else if (empty > 0) said.push(`${plural(empty, "place")} ${are(empty)} empty, and no request waits`);
    return `${said.join("; ")}.`;
  }

  // The same as viz.Timeline's caption: what each request computes.
  caption(index) {
    const step = this.steps[index];
    if (!step) return `after the last of ${plural(this.steps.length, "step")}`;
    const name = (id) => this.byId.get(id)?.label ?? id;
    const said = (part) => `${name(part.request_id)} ${part.why} ${plural(part.num_tokens, "token")}`;
    const parts = step.scheduled.map(said);
    const shown = parts.slice(0, 6).join(", ") + (parts.length > 6 ? ` and ${parts.length - 6} more` : "");
    const all = [`step ${index + 1} of ${this.steps.length}: ${shown || "nothing to do"}`];
    const gone = (step.preempted ?? []).map((each) => `${name(each.request_id)} (${each.mode})`).join(", ");
    if (gone) all.push(`preempted: ${gone}`);
    if (step.num_waiting) all.push(`${step.num_waiting} waiting`);
    if (step.finished?.length) all.push(`finished: ${step.finished.map(name).join(", ")}`);
    return all.join("; ");
  }

  // The pool at a position, or null if the run has none.
  view(index) {
    if (!this.pool && this.steps.some((step) => step.scheduled.some((part) => part.block_ids?.length))) {
      this.pool = new Pool(this);
    }
    return this.pool?.seek(index) ?? null;
  }
}

const are = (count) => (count === 1 ? "is" : "are");
export const tokensOf = (step) => step.scheduled.reduce((sum, part) => sum + part.num_tokens, 0);

// The block tables of a paged run. `seek` replays to any position from the snapshot before it.
export class Pool {
  constructor(run) {
    this.run = run;
    const use = run.steps.find((step) => step.blocks)?.blocks;
    this.numNull = use ? use.null ?? 1 : 1;
    const found = run.live ? {} : this.findSizes();
    const total = use ? use.used + use.cached + use.free + this.numNull : found.most + 1;
    this.numBlocks = run.config.num_blocks ?? total;
    this.blockSize = run.config.block_size ?? found.size;
    this.lost = new Map(); // index -> ids that lose their tables before that step: aborted, without a later step
    this.discarded = new Map(); // the same, at the end of that step
    if (!run.live) this.findLost();
    this.snapshots = new Map();
    this.index = 0; // the running step, or the next
    this.begun = false;
    this.now = {
      tables: new Map(), // id -> physical blocks
      numTokens: new Map(), // id -> tokens that its blocks hold
      written: new Map(), // id -> [first, end) positions that this step writes
      references: new Map(), // block -> number of tables with it
      cached: new Set(), // in no table, but kept; the next to evict first
      content: new Map(), // registered block -> [id, logical block]
      swappedIn: new Set(), // their blocks are not registered until another one is full
      fates: new Map(), // id -> "" with a table, "swap", "recompute", "finished", "aborted"
    };
  }

  // The number of slots per block, inferred from full tables; and the highest block number.
  findSizes() {
    let size = 1, most = 0;
    const lengths = new Map();
    for (const part of this.run.steps.flatMap((step) => step.scheduled)) {
      const { request_id: id, block_ids: blocks = [], first_block: first = 0 } = part;
      if (blocks.length) lengths.set(id, first + blocks.length);
      if (lengths.has(id)) size = Math.max(size, Math.ceil((part.start + part.num_tokens) / lengths.get(id)));
      most = Math.max(most, ...blocks);
    }
    return { size, most };
  }

  findLost() {
    const last = new Map(), steps = this.run.steps;
    steps.forEach((step, index) => {
      for (const each of step.preempted ?? []) last.set(each.request_id, [index, false]);
      for (const part of step.scheduled) last.set(part.request_id, [index, part.why === "padding"]);
    });
    for (const step of steps) for (const id of step.finished ?? []) last.delete(id);
    for (const [id, [index, discarded]] of last) {
      if (discarded) push(this.discarded, index, id);
      else if (index < steps.length - 1) push(this.lost, index + 1, id);
    }
  }

  // The pool during step `index`.
  seek(index) {
    index = Math.min(index, this.run.steps.length);
    if (index === this.index && this.begun) return this;
    this.go(index);
    if (this.index < this.run.steps.length) this.begin();
    return this;
  }

  // Go to the moment before step `index` begins.
  go(index) {
    if (index < this.index || (index === this.index && this.begun)) {
      this.index = Math.floor(index / EVERY) * EVERY;
      while (this.index > 0 && !this.snapshots.has(this.index)) this.index -= EVERY;
      this.now = copied(this.snapshots.get(this.index));
      this.begun = false;
    }
    while (this.index < index) {
      this.begin();
      this.end();
    }
  }

  begin() {
    if (this.begun) return;
    if (this.index % EVERY === 0 && !this.snapshots.has(this.index)) this.snapshots.set(this.index, copied(this.now));
    this.begun = true;
    const step = this.run.steps[this.index];
    this.lose(this.lost.get(this.index));
    for (const each of step.preempted ?? []) {
      this.release(each.request_id);
      this.now.fates.set(each.request_id, each.mode);
    }
    for (const part of step.scheduled) {
      if (part.why !== "padding" || this.now.fates.get(part.request_id) !== "finished") this.takePart(part);
    }
  }

  end() {
    const step = this.run.steps[this.index], now = this.now;
    this.lose(this.discarded.get(this.index));
    for (const [id, [start, end]] of now.written) {
      const first = Math.floor(start / this.blockSize), full = Math.floor(end / this.blockSize);
      if (full <= first) continue;
      const table = now.tables.get(id);
      for (let each = now.swappedIn.has(id) ? 0 : first; each < full; each++) {
        if (table[each] >= 0 && !now.content.has(table[each])) now.content.set(table[each], [id, each]);
      }
      now.swappedIn.delete(id);
    }
    now.written.clear();
    for (const id of step.finished ?? []) {
      this.release(id);
      now.fates.set(id, "finished");
    }
    if (this.run.live) this.loseUnseen(step);
    let surplus = now.cached.size - (step.blocks?.cached ?? 0);
    for (const block of now.cached) {
      if (surplus-- <= 0) break;
      now.cached.delete(block);
      now.content.delete(block);
    }
    this.index += 1;
    this.begun = false;
  }

  // A live feed does not say which request was aborted: if tables have too many blocks, drop idle requests first.
  loseUnseen(step) {
    const here = new Set(step.scheduled.filter((part) => part.why !== "padding").map((part) => part.request_id));
    const unseen = [...this.now.tables.keys()].filter((id) => !here.has(id));
    for (const id of unseen) {
      if (!step.blocks || this.now.references.size <= step.blocks.used) return;
      if (!this.discarded.get(this.index)?.includes(id)) push(this.discarded, this.index, id);
      this.lose([id]);
    }
  }

  lose(ids) {
    for (const id of ids ?? []) {
      this.release(id);
      this.now.fates.set(id, "aborted");
    }
  }

  takePart(part) {
    const now = this.now, id = part.request_id, size = this.blockSize;
    if (!now.tables.has(id)) now.tables.set(id, []);
    const table = now.tables.get(id);
    if (now.fates.get(id) === "swap") now.swappedIn.add(id);
    now.fates.set(id, "");
    if (part.block_ids?.length) {
      const first = part.first_block ?? 0;
      while (table.length < first) table.push(-1); // from before the first kept step: unknown
      const dropped = table.splice(first, table.length, ...part.block_ids);
      for (const block of part.block_ids) now.references.set(block, (now.references.get(block) ?? 0) + 1);
      this.letGo(dropped);
      const firstNew = now.swappedIn.has(id) ? 0 : Math.floor(part.start / size);
      part.block_ids.forEach((block, place) => {
        now.cached.delete(block);
        if (first + place >= firstNew) now.content.delete(block);
      });
    }
    const end = part.start + part.num_tokens;
    now.numTokens.set(id, end);
    now.written.set(id, [now.written.get(id)?.[0] ?? part.start, end]);
  }

  release(id) {
    const now = this.now, table = now.tables.get(id) ?? [];
    now.tables.delete(id);
    this.letGo(table.toReversed ? table.toReversed() : [...table].reverse());
    now.numTokens.delete(id);
    now.written.delete(id);
    now.swappedIn.delete(id);
  }

  letGo(blocks) {
    const now = this.now;
    for (const block of blocks) if (block >= 0) now.references.set(block, now.references.get(block) - 1);
    for (const block of blocks) {
      if (now.references.get(block) !== 0) continue;
      now.references.delete(block);
      if (now.content.has(block)) now.cached.add(block);
    }
  }

  forget(count) {
    this.go(count);
    this.snapshots.clear();
    const shifted = (from) => new Map([...from].filter(([at]) => at >= count).map(([at, ids]) => [at - count, ids]));
    [this.lost, this.discarded] = [shifted(this.lost), shifted(this.discarded)];
    this.index = 0;
    this.snapshots.set(0, copied(this.now));
  }

  // --- views ---

  // The owners of each block: block -> [{id, logical, filled}], in the order of the tables.
  owners() {
    const found = new Map();
    for (const [id, table] of this.now.tables) {
      const tokens = this.now.numTokens.get(id);
      table.forEach((block, logical) => {
        if (block < 0) return;
        const filled = Math.min(Math.max(tokens - logical * this.blockSize, 0), this.blockSize);
        push(found, block, { id, logical, filled });
      });
    }
    return found;
  }

  get use() {
    const used = this.now.references.size, cached = this.now.cached.size;
    return { used, cached, free: this.numBlocks - this.numNull - used - cached, null: this.numNull };
  }
}

function push(map, key, value) {
  if (!map.has(key)) map.set(key, []);
  map.get(key).push(value);
}

function copied(state) {
  const { tables, ...rest } = state;
  const copy = { tables: new Map([...tables].map(([id, table]) => [id, [...table]])) };
  for (const [name, value] of Object.entries(rest)) copy[name] = new value.constructor(value);
  return copy;
}
