"""The course's scoreboard: which chapter built which rung of the ladder, with the results of recorded runs."""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from minillm.bench import recorded
from minillm.errors import ConfigError
from minillm.viz import Score, Scoreboard

SERVER = "server"  # not on the ladder: `bench serve` measures it beside the engine of the next line
SERVED_BY = "kernels"  # the rung of the engine in one process


class Chapter(NamedTuple):
    """The rungs that a chapter built; its row shows the last. Without any, `note` says why."""

    number: int
    name: str
    rungs: tuple[str, ...] = ()
    note: str = ""


CHAPTERS = (
    Chapter(1, "generation", ("naive",)),
    Chapter(2, "attention and masks", note="no rung of its own; masks decide who attends to whom, not how fast"),
    Chapter(3, "KV cache", ("cache",)),
    Chapter(4, "chunked prefill", note="no rung of its own; chunks bound the memory of a pass"),
    Chapter(5, "static, dynamic batches", ("static", "dynamic")),
    Chapter(6, "ragged batching", note="no rung of its own; the next one needs it"),
    Chapter(7, "continuous batching", ("continuous",)),
    Chapter(8, "paged KV cache", ("paged",)),
    Chapter(9, "kernels and overlap", ("kernels", "processes")),
    Chapter(10, "three layers", (SERVER,)),
    Chapter(11, "why 24x", note="no rung of its own; it explains the others"),
)


def scoreboard(
    today: int | None = None,
    shape: str = "storyteller",
    *,
    ladder: dict | None = None,
    serve: dict | None = None,
) -> Scoreboard:
    """The picture, from the recorded runs of this shape or from other records. `today`: the highlighted chapter.

    Raises ConfigError if no ladder of this shape is recorded.
    """
    ladder = ladder or recorded.latest("ladder", part=shape)
    serve = serve or recorded.latest("serve", part=shape)
    if ladder is None:
        raise ConfigError(f"no ladder of {shape!r} is recorded; give one, as minillm bench ladder --json writes it")
    part = ladder["parts"][shape]
    scores, factor = [], None
    for chapter in CHAPTERS:
        scores.append(score_of(chapter, part["rungs"], serve and serve["parts"].get(shape), factor))
        factor = scores[-1].factor
    return Scoreboard(
        scores,
        today=today,
        title=f"The course so far: {part['label']}, {part['requests']} requests",
        source=f"measured: {ladder['machine']}, {ladder['date']}; factors: medians of the turns' ratios",
    )


def score_of(chapter: Chapter, rungs: dict, served: dict | None, before: float | None) -> Score:
    """A chapter's row; `before` is the factor of the row above, `served` the record of `bench serve`."""
    unmeasured = Score(chapter.number, chapter.name, factor=before, is_own=False, note=chapter.note)
    if not chapter.rungs:
        return unmeasured
    name = chapter.rungs[-1]
    if name == SERVER and not served:
        return unmeasured._replace(note="no run of bench serve is recorded")
    needed = (SERVED_BY,) if name == SERVER else chapter.rungs
    if missing := [each for each in needed if each not in rungs]:
        return unmeasured._replace(note=f"not in this record: {', '.join(missing)}")
    if name == SERVER:
        return of_server(chapter, served, rungs[SERVED_BY])
    rung = rungs[name]
    return Score(
        chapter.number,
        chapter.name,
        rung["output_tokens_per_second"],
        slots_wasted(rung),
        memory_wasted(rung),
        rung["over_first"],
        note="; ".join(notes(chapter, rungs)),
    )


def notes(chapter: Chapter, rungs: dict) -> Iterator[str]:
    """A note on the conditions of a chapter's numbers."""
    *earlier, last = (rungs[name] for name in chapter.rungs)
    if earlier:
        before = ", ".join(f"{rung['label']} {rung['over_first']:.1f}x" for rung in earlier)
        yield f"{last['label']}; before that {before}"
    if last["requests"] < max(rung["requests"] for rung in rungs.values()):
        yield f"tokens/s of the first {last['requests']} requests only"


def of_server(chapter: Chapter, served: dict, engine: dict) -> Score:
    """The server's row. Its run had different requests, so it has no comparable tokens/s.

    Its factor is the engine's factor times the share of the engine's throughput that the server reaches.
    """
    speed = statistics.median(served["tokens"] / turn["server"]["seconds"] for turn in served["turns"])
    ratio = served["throughput_ratio"]
    note = (
        f"{served['requests']} other requests through HTTP, {speed:,.0f} tokens/s, {ratio:.0%} of what the engine "
        f"reaches with them without a server; so the factor is {ratio:.0%} of {engine['over_first']:.1f}x, the rung "
        f"{engine['label']!r}; slots and memory were not noted"
    )
    return Score(chapter.number, chapter.name, factor=engine["over_first"] * ratio, note=note)


def slots_wasted(rung: dict) -> float:
    """The share of computed tokens that were padding or had been computed before.

    Every token must be computed once, except the last output of each request, which nothing follows.
    """
    needed = rung["prompt_tokens"] + rung["output_tokens"] - rung["requests"]
    return 1 - needed / rung["computed_tokens"]


def memory_wasted(rung: dict) -> float | None:
    """The mean share of reserved bytes that held no token, over steps; None if nothing was reserved or recorded."""
    wasted, reserved = rung["cache"]["wasted"], rung["cache"]["reserved"]
    return wasted["mean"] / reserved["mean"] if wasted and reserved["mean"] else None
