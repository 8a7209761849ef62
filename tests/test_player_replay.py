"""The player's replay of a trace, run in node, says what the pictures say: letters, captions, block tables, pool."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import minillm
from minillm.engine import BlockManager, Scheduler, SchedulerConfig
from minillm.player.files import MODULES
from minillm.simulation import (
    BATCHING,
    SimulatedExecutor,
    VirtualClock,
    make_requests,
    preset,
    run,
    uniform,
)
from minillm.trace import Trace, save_trace
from minillm.viz import PoolState, Timeline, palette, pool_states
from minillm.viz.blocks import LETTERS
from test_viz_blocks import BLOCK_SIZE, random_run

PLAYER = Path(minillm.__file__).parent / "player"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on this machine")

TELL = """
import { readFileSync } from "node:fs";
import { Run } from "PLAYER/replay.js";

const [path, order, live, forget] = process.argv.slice(2);
const lines = readFileSync(path, "utf8");
let run = Run.read(lines);
if (live) {
  run = new Run({ live: true });
  run.add({ config: JSON.parse(live) });
  for (const line of lines.trim().split("\\n")) run.add(JSON.parse(line));
  if (forget) run.forget(Number(forget));
}
const pool = (index) => {
  const view = run.view(index);
  if (!view) return null;
  const { tables, numTokens, written, cached } = view.now;
  const state = [tables, numTokens, written].map(Object.fromEntries);
  return JSON.parse(JSON.stringify([...state, [...cached], view.use, view.blockSize, view.numBlocks]));
};
const positions = [...Array(run.steps.length + 1).keys()];
const visited = { forwards: positions, backwards: [...positions].reverse(), jumping: positions.map(
  (index) => (index * 37) % positions.length) }[order];
const pools = {};
for (const index of visited) pools[index] = pool(index);
console.log(JSON.stringify({
  letters: Object.fromEntries(run.requests.map((each) => [each.id, run.letters(each)])),
  captions: run.steps.map((_, index) => run.caption(index)),
  sentences: positions.map((index) => run.sentence(index)),
  totals: run.totals,
  pools: positions.map((index) => pools[index]),
}));
"""


def told(trace: Trace, folder: Path, order: str = "forwards", live: dict | None = None, forget: int = 0) -> dict:
    """What replay.js says of a trace; `live` is the configuration with which it comes line by line.

    `forget`: how many of its steps are dropped when all have come.
    """
    script = folder / "tell.mjs"
    script.write_text(TELL.replace("PLAYER", PLAYER.as_uri()))
    path = save_trace(trace, folder / "run.jsonl")
    command = [NODE, "--no-warnings", script, path, order, *([json.dumps(live), str(forget or "")] if live else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def as_json(state: PoolState) -> list:
    """A pool as TELL prints it."""
    use = {"used": state.use.used, "cached": state.use.cached, "free": state.use.free, "null": state.use.null}
    fields = [state.tables, state.num_tokens, state.written, state.cached, use, state.block_size, state.num_blocks]
    return json.loads(json.dumps(fields))


def simulated(batching: str, **limits) -> Trace:
    """Twelve requests of different lengths under a way of batching, without a model."""
    clock = VirtualClock()
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256} | limits
    scheduler = BATCHING[batching](SchedulerConfig(**limits), clock)
    arrivals = {"arrivals": "poisson", "rate": 400.0, "seed": 1}
    requests = make_requests(12, uniform(4, 40), uniform(1, 20), **arrivals)
    return run(scheduler, SimulatedExecutor(preset("Llama-2-7B", "h200"), clock), requests, clock)


@needs_node
@pytest.mark.parametrize("order", ["forwards", "backwards", "jumping"])
@pytest.mark.parametrize("mode, aborts, n", [("recompute", False, 1), ("swap", True, 1), ("recompute", True, 3)])
def test_block_tables_and_pool_are_those_of_the_pictures(tmp_path, mode, aborts, n, order):
    preemptions = shared = aborted = 0
    for seed in range(3):
        trace = random_run(seed, mode, aborts=aborts, n=n).trace
        expected = pool_states(trace, BLOCK_SIZE)
        assert told(trace, tmp_path, order)["pools"] == [as_json(state) for state in expected]
        preemptions += sum(len(step.preempted) for step in trace.steps)
        shared += sum(state.num_saved for state in expected)
        aborted += sum("aborted" in state.fates.values() for state in expected)
    assert preemptions and shared and bool(aborted) == aborts


@needs_node
def test_a_long_run_is_replayed_from_its_snapshots(tmp_path):
    clock = VirtualClock()
    config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=32, max_model_len=64)
    scheduler = Scheduler(config, clock, block_manager=BlockManager(40, BLOCK_SIZE, enable_prefix_caching=True))
    requests = make_requests(120, uniform(1, 30), uniform(1, 30), arrivals="at once", seed=3)
    trace = run(scheduler, SimulatedExecutor(preset("Llama-2-7B", "4090"), clock), requests, clock)
    assert len(trace.steps) > 3 * 64  # steps from one snapshot to the next
    assert told(trace, tmp_path, "jumping")["pools"] == [as_json(each) for each in pool_states(trace, BLOCK_SIZE)]


@needs_node
def test_a_live_run_comes_to_the_same_blocks(tmp_path):
    trace = random_run(1).trace
    expected = pool_states(trace, BLOCK_SIZE)
    live = {"block_size": BLOCK_SIZE, "num_blocks": expected[0].num_blocks, "max_num_seqs": 6}
    assert told(trace, tmp_path, "jumping", live)["pools"] == [as_json(state) for state in expected]


@needs_node
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_what_a_long_live_run_lets_go_of_changes_nothing_later(tmp_path, mode):
    trace, forgotten = random_run(1, mode).trace, 9
    live = {"block_size": BLOCK_SIZE, "num_blocks": 14, "max_num_seqs": 6}
    whole = told(trace, tmp_path, "jumping", live)
    rest = told(trace, tmp_path, "jumping", live, forgotten)
    assert rest["pools"] == whole["pools"][forgotten:]
    assert rest["totals"] == whole["totals"][forgotten:]
    assert rest["sentences"][:-1] == whole["sentences"][forgotten:-1]
    for name, letters in rest["letters"].items():
        assert letters == whole["letters"][name][forgotten:].rstrip()
    ended = {name for step in trace.steps[:forgotten] for name in step.finished}
    assert ended and rest["letters"].keys() == whole["letters"].keys() - ended


@needs_node
def test_live_the_blocks_of_an_aborted_request_go_when_the_trace_counts_them_as_free(tmp_path):
    aborted = 0
    for seed in range(6):
        trace = random_run(seed, aborts=True).trace
        expected = pool_states(trace, BLOCK_SIZE)
        live = {"block_size": BLOCK_SIZE, "num_blocks": 14, "max_num_seqs": 6}
        found = told(trace, tmp_path, "backwards", live)["pools"]
        aborted += sum("aborted" in state.fates.values() for state in expected)
        *tables, cached, use, _, _ = found[-1]
        *as_expected, at_last, used, _, _ = as_json(expected[-1])
        assert (tables, sorted(cached), use) == (as_expected, sorted(at_last), used)
    assert aborted


@needs_node
@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_letters_and_captions_are_those_of_the_timeline(tmp_path, batching):
    trace = simulated(batching)
    picture = Timeline(trace, "steps")
    found = told(trace, tmp_path)
    assert found["letters"] == {each: picture.letters(each, 1.0, len(trace.steps)) for each in picture.request_ids}
    assert found["captions"] == [picture.caption(step) for step in range(len(trace.steps))]
    used = set("".join(found["letters"].values()))
    assert set("wPD.") <= used and bool(used & set("xd")) == (batching != "continuous")
    assert found["totals"][-1]["tokens"] == sum(step.num_tokens for step in trace.steps)
    assert found["totals"][-1]["useful"] == sum(step.num_useful for step in trace.steps)


@needs_node
def test_preempted_requests_have_the_timelines_letters(tmp_path):
    for mode, letter in (("recompute", "!"), ("swap", "s")):
        trace = random_run(0, mode).trace
        picture = Timeline(trace, "steps")
        found = told(trace, tmp_path)["letters"]
        assert found == {each: picture.letters(each, 1.0, len(trace.steps)) for each in picture.request_ids}
        assert letter in "".join(found.values())


@needs_node
def test_the_sentence_counts_places_held_by_finished_requests(tmp_path):
    static, continuous = simulated("static"), simulated("continuous")
    said = told(static, tmp_path)["sentences"]
    held = [len({p.request_id for p in s.scheduled if p.why == "padding"} - working(s)) for s in static.steps]
    assert max(held) > 1
    for step, count, sentence in zip(static.steps, held, said, strict=False):
        assert sentence.startswith(f"{len(working(step))} of 4 places work")
        assert (f"{count} places are held by finished requests" in sentence) == (count > 1), sentence
    assert not any("held" in sentence for sentence in told(continuous, tmp_path)["sentences"])
    assert said[-1] == "12 requests finished."


def working(step) -> set[str]:
    return {part.request_id for part in step.scheduled if part.why != "padding"}


@needs_node
def test_what_is_no_trace_is_refused_by_line(tmp_path):
    script = tmp_path / "read.mjs"
    script.write_text(f'import {{ Run }} from "{PLAYER.as_uri()}/replay.js";\nRun.read(process.argv[2]);\n')

    def error(text: str) -> str:
        return subprocess.run([NODE, script, text], capture_output=True, text=True, timeout=60).stderr

    header = '{"format": "minillm trace", "version": 1}'
    assert "line 2 of the trace is not JSON" in error(header + "\n{")
    assert "not a trace" in error('{"request": {"request_id": "a", "arrival_time": 0, "num_prompt_tokens": 1}}')
    assert "version 2" in error(header.replace("1", "2"))
    assert error(header) == ""


def test_colours_and_letters_are_those_of_the_pictures():
    found = json.loads(re.sub(r"^.*?PALETTE = |;\s*$", "", (PLAYER / "palette.js").read_text(), flags=re.DOTALL))
    entries = {name: (state.letter, state.name, state.color) for name, state in palette.STATES.items()}
    assert {name: tuple(state.values()) for name, state in found["states"].items()} == entries
    for name in ("cached", "free", "empty"):
        state = getattr(palette, name.upper())
        assert tuple(found[name].values()) == (state.letter, state.name, state.color)
    assert tuple(found["owners"]) == palette.OWNER_COLORS
    assert found["letters"] == LETTERS


def test_the_component_is_small_and_can_be_put_into_a_page():
    sources = {name: (PLAYER / name).read_text() for name in (*MODULES, "trace-player.css")}
    assert sum(len(source.splitlines()) for source in sources.values()) <= 1500
    for source in sources.values():
        assert max(map(len, source.splitlines())) <= 120
        assert "</" + "script" not in source
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|https?://", source)
