// The page of a live server: draws its engine with <trace-player>, sends requests, compares two batching policies.
//
// What is drawn and measured comes from GET /live/events; stories are sent through /v1/completions and
// /v1/chat/completions, like any client's. Text of the model or the user is always inserted as text, never as HTML.

import { events, records } from "./feed.js";
import { PALETTE } from "./palette.js";
import { Run, plural } from "./replay.js";
import { Replicas } from "./replicas.js";
import { make } from "./trace-player.js";

const BEGINNINGS = ["Once upon a time there was a little fox", "One day Tom found a red kite",
  "The owl looked at the moon", "Mia had a small boat", "In the forest lived a bear", "A cat sat in the snow",
  "There was a king who loved cake", "The little duck was sad because"];
const MIDDLES = ["", ".", " and", " who lived by the river"];
const MOST_TOKENS = 160; // of a story; most end earlier, at different lengths
const PLAYED_FOR = 16; // seconds that the replay of the slower of two runs takes
const WINDOW = 20; // seconds of the engine's clock in a sparkline
const RETRY_MS = [500, 1000, 2000, 5000];
const RED = matchMedia("(prefers-reduced-motion: reduce)");

const at = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
let config = {}; // the last one from the feed
const hearing = new Set(); // functions that get every record of the feed; with several replicas, of the shown one
const replicas = new Replicas(at("replicas"), at("live"), showReplica);

// --- talking to the server ---

async function send(path, body, { id, method = "POST" } = {}) {
  for (;;) {
    const headers = { ...authorization(), ...(id && { "X-Request-Id": id }) };
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
    if (response.status === 401) await askForKey();
    else if (response.ok) return response;
    else throw new Error(await reasonOf(response));
  }
}

async function reasonOf(response) {
  const answer = await response.json().catch(() => ({}));
  return answer.error?.message ?? answer.message ?? `${response.status} ${response.statusText}`;
}

function authorization() {
  const key = sessionStorage.getItem("minillm-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

let asking = null; // one dialog for all waiting calls

function askForKey() {
  asking ??= new Promise((done) => {
    const dialog = at("key"), tried = sessionStorage.getItem("minillm-key");
    if (tried) at("key-why").textContent = "The server refused that key. Its operator knows the right one.";
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("minillm-key", at("key-value").value.trim());
      at("key-value").value = "";
      asking = null;
      done();
    }, { once: true });
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.showModal();
  });
  return asking;
}

// Follow the feed for as long as the page is open.
async function follow() {
  for (let failures = 0; ; failures++) {
    try {
      for await (const record of records("live/events", { headers: authorization() })) {
        failures = 0;
        if (record.replica === undefined) at("live").add(record);
        else if (!replicas.add(record)) continue;
        if (record.config) take(record.config);
        for (const hear of hearing) hear(record);
      }
    } catch (error) {
      if (error.status === 401) {
        await askForKey();
        continue;
      }
    }
    replicas.disconnected();
    at("connection").textContent = "not connected; trying again …";
    await wait(RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
  }
}

// A replica has been chosen among several. The two policies are not compared: each burst goes to only one replica.
function showReplica(name, run) {
  at("compare").hidden = true;
  at("controls").querySelector("legend").textContent = "Settings of all replicas now";
  at("live-title").textContent = `The engine of ${name}`;
  if (run.config.model) take(run.config);
  measure({ format: true });
  for (const { id, arrival } of run.requests) measure({ request: { request_id: id, arrival_time: arrival } });
  for (const step of run.steps) measure({ step });
  drawSparks();
}

// The engine's settings have changed, here or elsewhere.
function take(change) {
  config = { ...config, ...change };
  at("model").textContent = config.model ?? "";
  at("connection").textContent = config.paused ? "paused" : "connected";
  at("pause").textContent = config.paused ? "Go on" : "Pause";
  at("pause").setAttribute("aria-pressed", String(Boolean(config.paused)));
  at("step").disabled = at("steps").disabled = !config.paused;
  for (const radio of document.getElementsByName("batching")) radio.checked = radio.value === config.batching;
  for (const slider of document.querySelectorAll("[data-control]")) {
    const name = slider.dataset.control;
    slider.max = config[name.replace("max_", "most_")] ?? config[name];
    if (document.activeElement !== slider) slider.value = config[name];
    at(`${slider.id}-value`).textContent = slider.value;
  }
}

async function control(changes) {
  try {
    take(await (await send("live/control", changes)).json());
  } catch (error) {
    at("reply").textContent = error.message;
  }
}

// --- stories ---

// `count` beginnings, all different.
function stories(count) {
  return Array.from({ length: count }, (_, index) => BEGINNINGS[index % 8] + MIDDLES[Math.floor(index / 8) % 4]);
}

// Send a burst in one request, and read it to its end.
async function burst(count, id) {
  const sampling = { max_tokens: MOST_TOKENS, temperature: 1, seed: 5, cache_salt: id }; // no prefix of another burst
  const body = { model: config.model, prompt: stories(count), stream: true, ...sampling };
  const response = await send("v1/completions", body, { id });
  for await (const data of events(response.body)) raise(data);
}

// An error in the middle of a stream.
function raise(data) {
  const answer = data === "[DONE]" ? {} : JSON.parse(data);
  if (answer.error) throw new Error(answer.error.message);
  return answer;
}

async function ask(event) {
  event.preventDefault();
  const prompt = at("prompt").value, chat = document.querySelector("[name=kind]:checked").value === "chat";
  const body = { model: config.model, max_tokens: Number(at("most").value), temperature: 0.7, stream: true };
  const reply = at("reply");
  reply.textContent = chat ? "" : prompt;
  try {
    const given = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    const response = await send(chat ? "v1/chat/completions" : "v1/completions", { ...body, ...given });
    for await (const data of events(response.body)) {
      const choice = raise(data).choices?.[0];
      reply.textContent += (chat ? choice?.delta?.content : choice?.text) ?? "";
      reply.scrollTop = reply.scrollHeight;
    }
  } catch (error) {
    reply.textContent = error.message;
  }
}

const fresh = (name) => `${name}-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;

// --- static against continuous ---

// Run one burst under one batching policy and draw it in its lane meanwhile; returns the run, cut out of the feed.
async function measured(batching, count, places) {
  const id = fresh(`story-${batching}`), mine = (other) => other.startsWith(`${id}-`), lane = at(`${batching}-lane`);
  lane.load(new Run({ live: true }));
  await control({ batching, max_num_seqs: places, paused: false });
  const { block_size, num_blocks, max_num_batched_tokens } = config;
  lane.add({ config: { batching, max_num_seqs: places, block_size, num_blocks, max_num_batched_tokens } });
  const hear = (record) => {
    if (record.request && mine(record.request.request_id)) lane.add(record);
    if (record.tokens && mine(record.tokens.request_id)) lane.add(record);
    const scheduled = record.step?.scheduled.filter((part) => mine(part.request_id)) ?? [];
    if (!scheduled.length) return;
    lane.add({ step: { ...record.step, scheduled, finished: record.step.finished?.filter(mine),
      preempted: record.step.preempted?.filter((each) => mine(each.request_id)) } });
    at(`${batching}-result`).textContent = `${lane.run.totals.at(-1).finished} of ${count} stories finished …`;
  };
  hearing.add(hear);
  try {
    await burst(count, id);
    for (let tries = 0; lane.run.totals.at(-1)?.finished < count && tries < 50; tries++) await wait(100);
  } finally {
    hearing.delete(hear);
  }
  return tell(batching, lane.run, places);
}

// The totals of a run, from its trace: seconds from first arrival to last token, tokens, and places that worked.
function tell(batching, run, places) {
  const seconds = run.elapsed(run.steps.length);
  const { outputs, worked } = run.totals.at(-1), share = worked / (places * run.steps.length);
  const rate = `${plural(Math.round(outputs / seconds), "token")} per second`, percent = `${Math.round(100 * share)} %`;
  const more = ` for ${plural(outputs, "token")} in ${plural(run.steps.length, "step")}: ${rate}.`;
  at(`${batching}-result`).replaceChildren(make("b", {}, `${seconds.toFixed(2)} s`), more,
    make("br"), "Of all places in all steps, ", make("b", {}, percent), " worked.");
  return { seconds, share, run };
}

async function both() {
  const count = Number(at("both-stories").value);
  const places = Math.min(Number(at("both-places").value), config.most_num_seqs ?? Infinity);
  const { batching, max_num_seqs, paused } = config;
  stopClock();
  at("clock").hidden = at("signs").hidden = at("why").hidden = true;
  at("lanes").hidden = false;
  at("verdict").classList.add("said");
  at("both").disabled = true;
  for (const name of ["static", "continuous"]) {
    const lane = at(`${name}-lane`);
    lane.load(new Run({ live: true }));
    lane.span = 0;
    lane.axis?.remove();
    at(`${name}-result`).textContent = "runs next";
    lane.parentElement.classList.remove("first");
  }
  try {
    at("verdict").textContent = `${count} stories, ${places} places, static batching …`;
    const one = await measured("static", count, places);
    at("continuous-lane").span = one.seconds; // the second run grows on the axis of the first
    at("verdict").textContent = `The same ${count} stories, ${places} places, continuous batching …`;
    const two = await measured("continuous", count, places);
    at("verdict").textContent = verdict(one, two, count);
    at("why").textContent = why(one, two);
    at("why").hidden = !at("why").textContent;
    const winner = two.seconds <= one.seconds ? "continuous" : "static";
    at(`${winner}-lane`).parentElement.classList.add("first");
    showAgain(one.run, two.run);
  } catch (error) {
    at("verdict").textContent = error.message;
  } finally {
    await control({ batching, max_num_seqs, paused });
    at("both").disabled = false;
  }
}

function verdict(one, two, count) {
  const took = ({ run, seconds }) => `${plural(run.steps.length, "step")}, ${seconds.toFixed(2)}\u00a0s`;
  const said = `The same ${count} stories: static batches ${took(one)}; continuous batching ${took(two)}`;
  const times = one.seconds / two.seconds;
  if (times < 1.02) return `${said}: not faster. Was this machine busy with other work?`;
  return `${said}: ${times.toFixed(1)} times as fast.`;
}

// Why the gain in seconds is smaller than the gain in steps; nothing if it is not.
function why(one, two) {
  const steps = (one.run.steps.length / two.run.steps.length).toFixed(1), times = one.seconds / two.seconds;
  if (times < 1.02 || Number(steps) <= Number(times.toFixed(1))) return "";
  const each = ({ run, seconds }) => `${((1000 * seconds) / run.steps.length).toFixed(1)} ms`;
  return `Static batches need ${steps} times as many steps, but a step with fewer working places is shorter: `
    + `${each(one)} on average, instead of ${each(two)}. This engine computes nothing for a held place; the loss `
    + "is that no other request can use it meanwhile. An engine that pads also computes held places, and loses more.";
}

// --- both runs again, on one clock ---

const TICKS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600]; // seconds between two ticks
const SIGNS = [["waiting", "waiting"], ["prefill", "prefill: reads its prompt"],
  ["decode", "decoding: makes one token per step"], ["held", "place held by a finished request"],
  ["finished", "finished"], ["coming", "pale: still to come"]];
let ticking = 0, length = 0;
const lanes = () => [at("static-lane"), at("continuous-lane")];

function showAgain(...runs) {
  length = Math.max(...runs.map((run) => run.elapsed(run.steps.length)));
  for (const lane of lanes()) {
    lane.span = length;
    lane.axis = axis(length);
    lane.parts.rows.append(lane.axis);
  }
  at("clock").hidden = at("signs").hidden = false;
  at("clock-time").max = length;
  setClock(RED.matches ? length : 0);
  if (!RED.matches) playClock();
}

// Seconds over the rows of a lane: a line for each tick, and one for now.
function axis(seconds) {
  const apart = TICKS.find((each) => seconds / each <= 6) ?? seconds;
  const whole = make("div", { class: "axis", "aria-hidden": "true" });
  for (let tick = 0; tick * apart <= seconds; tick++) {
    const share = (tick * apart) / seconds, text = `${Number((tick * apart).toFixed(2))} s`;
    const line = make("i", { class: share > 0.85 ? "tick last" : "tick" }, text);
    line.style.setProperty("--at", share);
    whole.append(line);
  }
  whole.append(make("i", { class: "now" }));
  return whole;
}

// The legend of the rows, in the colours of the states.
function signs() {
  const list = make("ul", { "aria-label": "Signs" });
  for (const [sign, name] of SIGNS) {
    const box = make("span", { class: `sign ${sign}`, "aria-hidden": "true" });
    box.style.setProperty("--of", PALETTE.states[sign === "coming" ? "decode" : sign]?.color ?? null);
    list.append(make("li", {}, box, name));
  }
  list.append(make("li", {}, make("span", { class: "sign now", "aria-hidden": "true" }), "this moment, on both sides"));
  at("signs").append(list, make("p", {}, "A letter is a story, the same on both sides and in the engine below. "
    + "A place has the colour of its story, with a strip in the colour of what it does."));
}

function setClock(seconds) {
  at("clock-time").value = seconds;
  const slower = PLAYED_FOR / length, times = slower > 1.5 ? `, shown ${slower.toFixed(0)} times slower` : "";
  at("clock-text").textContent = `${seconds.toFixed(2)} of ${length.toFixed(2)} s${times}`;
  at("clock-time").setAttribute("aria-valuetext", `${seconds.toFixed(2)} seconds`);
  for (const lane of lanes()) {
    lane.time = seconds;
    lane.axis.lastChild.style.setProperty("--at", seconds / length);
  }
}

function playClock() {
  let before = performance.now();
  if (Number(at("clock-time").value) >= length) setClock(0);
  const tick = (now) => {
    const seconds = Math.min(length, Number(at("clock-time").value) + ((now - before) / 1000) * (length / PLAYED_FOR));
    before = now;
    setClock(seconds);
    if (seconds >= length) stopClock();
    else ticking = requestAnimationFrame(tick);
  };
  ticking = requestAnimationFrame(tick);
  at("clock-play").textContent = "Pause";
}

function stopClock() {
  cancelAnimationFrame(ticking);
  ticking = 0;
  at("clock-play").textContent = "Play";
}

// --- sparklines: tokens per second, time to first token, time between tokens, all on the engine's clock ---

const measures = { throughput: [], ttft: [], itl: [] }; // [second, value], the last WINDOW seconds
const arrivals = new Map(), lastTokens = new Map();
let drawing = 0;

function measure(record) {
  if (record.format) {
    for (const points of Object.values(measures)) points.length = 0;
    arrivals.clear();
    lastTokens.clear();
  }
  if (record.request) arrivals.set(record.request.request_id, record.request.arrival_time);
  if (!record.step) return;
  const { end_time: now, scheduled, finished = [] } = record.step;
  let sampled = 0;
  for (const { request_id: id, num_sampled } of scheduled) {
    if (!num_sampled) continue;
    sampled += num_sampled;
    if (lastTokens.has(id)) measures.itl.push([now, now - lastTokens.get(id)]);
    else if (arrivals.has(id)) measures.ttft.push([now, now - arrivals.get(id)]);
    lastTokens.set(id, now);
  }
  for (const id of finished) for (const known of [arrivals, lastTokens]) known.delete(id);
  measures.throughput.push([now, sampled]);
  for (const points of Object.values(measures)) {
    const stale = points.findIndex(([time]) => time > now - WINDOW);
    if (stale > 200) points.splice(0, stale);
  }
  drawing ||= setTimeout(drawSparks, 200);
}

function drawSparks() {
  drawing = 0;
  const now = measures.throughput.at(-1)?.[0] ?? 0;
  const middle = (points) => points.map(([, value]) => value).sort((a, b) => a - b)[points.length >> 1];
  const span = Math.min(1, now - (measures.throughput[0]?.[0] ?? now)) || 1;
  const rate = measures.throughput.reduce((sum, [time, value]) => sum + (time > now - 1 ? value : 0), 0) / span;
  const ms = (seconds) => (seconds === undefined ? "–" : `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`);
  const per = (value) => `${Math.round(value).toLocaleString("en")} tokens/s`;
  const shown = { throughput: per(rate), ttft: ms(middle(measures.ttft.slice(-8))),
    itl: ms(middle(measures.itl.slice(-200))) }; // medians of the last ones
  for (const [name, text] of Object.entries(shown)) {
    at(`${name}-value`).textContent = text;
    at(name).setAttribute("aria-label", `${at(name).previousElementSibling.textContent}, the last ${WINDOW} seconds`);
    const most = drawSpark(at(name), measures[name], now, name === "throughput");
    const highest = name === "throughput" ? per(most) : ms(most || undefined);
    const scale = [`${WINDOW} s ago`, `highest bar: ${highest}`, "now"];
    at(name).nextElementSibling.replaceChildren(...scale.map((each) => make("span", {}, each)));
  }
}

// A bar for each of 80 intervals of time: the sum per second, or the mean. Returns the highest.
function drawSpark(canvas, points, now, isRate) {
  const width = canvas.clientWidth, height = 40, scale = devicePixelRatio || 1, bins = 80, each = WINDOW / bins;
  Object.assign(canvas, { width: width * scale, height: height * scale });
  const sums = new Float64Array(bins), counts = new Float64Array(bins);
  for (const [time, value] of points) {
    const bin = bins - 1 - Math.floor((now - time) / each);
    if (bin < 0) continue;
    sums[bin] += value;
    counts[bin] += 1;
  }
  const values = sums.map((sum, bin) => (isRate ? sum / each : sum / Math.max(1, counts[bin])));
  const most = Math.max(...values);
  const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
  pen.scale(scale, scale);
  pen.fillStyle = style.getPropertyValue("--line");
  pen.fillRect(0, height - 1, width, 1);
  pen.fillStyle = style.getPropertyValue("--ink");
  values.forEach((value, bin) => {
    const tall = (value / (most || 1)) * (height - 3);
    pen.fillRect((bin * width) / bins, height - 1 - tall, Math.max(1, width / bins - 1), tall);
  });
  return most;
}

// --- light and dark ---

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  const dark = (name ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  at("theme").textContent = dark ? "Light" : "Dark";
  at("theme").setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
  document.dispatchEvent(new Event("themechange"));
  drawSparks();
}

at("theme").addEventListener("click", () => {
  const name = at("theme").textContent.toLowerCase();
  localStorage.setItem("minillm-theme", name);
  theme(name);
});
at("ask").addEventListener("submit", ask);
for (const button of document.querySelectorAll("[data-burst]")) {
  button.addEventListener("click", () => burst(Number(button.dataset.burst), fresh("story")).catch((error) => {
    at("reply").textContent = error.message;
  }));
}
at("pause").addEventListener("click", () => control({ paused: !config.paused }));
at("step").addEventListener("click", () => control({ step: 1 }));
at("steps").addEventListener("click", () => control({ step: 10 }));
for (const radio of document.getElementsByName("batching")) {
  radio.addEventListener("change", () => control({ batching: radio.value }));
}
for (const slider of document.querySelectorAll("[data-control]")) {
  slider.addEventListener("input", () => (at(`${slider.id}-value`).textContent = slider.value));
  slider.addEventListener("change", () => control({ [slider.dataset.control]: Number(slider.value) }));
}
at("both").addEventListener("click", both);
at("clock-play").addEventListener("click", () => (ticking ? stopClock() : playClock()));
at("clock-time").addEventListener("input", () => {
  stopClock();
  setClock(Number(at("clock-time").value));
});
hearing.add(measure);
signs();
const themed = () => theme(localStorage.getItem("minillm-theme"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themed);
themed();
follow();
