"""Chapter 11's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

from dataclasses import replace

import pytest

from check_answers import message, passes
from minillm import checks
from minillm.checks import chapter_11
from minillm.checks.base import NotWrittenYet
from minillm.simulation import Assumptions
from minillm.simulation import explain as explain_of_package

# explain ------------------------------------------------------------------------------------------


def seconds(trace):
    """Of the run: computed, by the rows of ended requests, by padding."""
    computing = sum(step.computing for step in trace.steps)
    ended = sum(step.computing * step.uses.ended / step.num_tokens for step in trace.steps)
    padding = sum(step.computing * step.uses.padding / step.num_tokens for step in trace.steps)
    return trace.makespan, computing, ended, padding


def explain(trace_a, trace_b):
    def layers(trace):
        total, computing, ended, padding = seconds(trace)
        kept = computing - ended
        useful = kept - padding
        return {"host": total / computing, "waiting": computing / kept, "padding": kept / useful, "memory": useful}

    a, b = layers(trace_a), layers(trace_b)
    return {cause: a[cause] / b[cause] for cause in a}


def by_the_package(trace_a, trace_b):
    factors = explain_of_package(trace_a, trace_b).factors
    return {
        "padding": factors["padding"],
        "waiting": factors["waiting"],
        "memory": factors["memory"] * factors["computing"],
        "host": factors["host"],
    }


def padding_first(trace_a, trace_b):
    def layers(trace):
        total, computing, ended, padding = seconds(trace)
        kept = computing - padding
        return total / computing, computing / kept, kept / (kept - ended), kept - ended

    host, padding, waiting, memory = (one / other for one, other in zip(*map(layers, (trace_a, trace_b)), strict=True))
    return {"padding": padding, "waiting": waiting, "memory": memory, "host": host}


def with_running_sums(trace_a, trace_b):
    """Another way to the same layers: seconds of each use, step by step."""
    products = {}
    for trace, sign in ((trace_a, 1), (trace_b, -1)):
        spent = {"useful": 0.0, "padding": 0.0, "ended": 0.0, "recompute": 0.0}
        for step in trace.steps:
            for use in spent:
                spent[use] += getattr(step.uses, use) * step.computing / step.num_tokens
        left = spent["useful"] + spent["recompute"]
        layers = [trace.makespan, sum(spent.values()), left + spent["padding"], left, 1.0]
        for cause, outer, inner in zip(("host", "waiting", "padding", "memory"), layers, layers[1:], strict=False):
            products[cause] = products.get(cause, 1.0) * (outer / inner) ** sign
    return products


@pytest.mark.parametrize("right", [explain, with_running_sums])
def test_explain_accepts(right, capsys):
    assert passes(checks.explain, right, capsys)


def shares(trace_a, trace_b):
    total, computing, ended, padding = seconds(trace_a)
    return {
        "padding": padding / total,
        "waiting": ended / total,
        "memory": 1 - (padding + ended) / total,
        "host": 1 - computing / total,
    }


def only_a(trace_a, trace_b):
    total, computing, ended, padding = seconds(trace_a)
    useful = computing - ended - padding
    return {
        "padding": (useful + padding) / useful,
        "waiting": computing / (computing - ended),
        "memory": useful / trace_b.makespan,
        "host": total / computing,
    }


def by_counting_tokens(trace_a, trace_b):
    def layers(trace):
        total, computing, *_ = seconds(trace)
        useful, padding, ended, again = map(sum, zip(*(step.uses for step in trace.steps), strict=True))
        every, kept = useful + padding + ended + again, useful + padding + again
        return total / computing, every / kept, kept / (kept - padding), computing * (kept - padding) / every

    host, waiting, padding, memory = (one / other for one, other in zip(*map(layers, (trace_a, trace_b)), strict=True))
    return {"padding": padding, "waiting": waiting, "memory": memory, "host": host}


def all_padding_alike(trace_a, trace_b):
    factors = explain(trace_a, trace_b)
    return factors | {"padding": factors["padding"] * factors["waiting"], "waiting": 1.0}


def computed_again_is_padding(trace_a, trace_b):
    def layers(trace):
        total, computing, ended, padding = seconds(trace)
        padding += sum(step.computing * step.uses.recompute / step.num_tokens for step in trace.steps)
        kept = computing - ended
        return total / computing, computing / kept, kept / (kept - padding), kept - padding

    host, waiting, padding, memory = (one / other for one, other in zip(*map(layers, (trace_a, trace_b)), strict=True))
    return {"padding": padding, "waiting": waiting, "memory": memory, "host": host}


def from_time_zero(trace_a, trace_b):
    """The makespan as the end of the last step: right as long as somebody is there at once."""
    factors = explain(trace_a, trace_b)
    totals = [trace.steps[-1].end_time / trace.makespan for trace in (trace_a, trace_b)]
    return factors | {"host": factors["host"] * totals[0] / totals[1]}


def host_between_steps_only(trace_a, trace_b):
    factors = explain(trace_a, trace_b)
    return factors | {"memory": factors["memory"] * factors["host"], "host": 1.0}


def upside_down(trace_a, trace_b):
    return {cause: 1 / factor for cause, factor in explain(trace_a, trace_b).items()}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (shares, "Return a dict with one number above 0"),
        (only_a, "Divide each number of a by that of b"),
        (by_counting_tokens, "not of all tokens"),
        (all_padding_alike, "step.uses.ended are the tokens"),
        (host_between_steps_only, "Only the host differs here"),
        (computed_again_is_padding, "neither padding nor waiting"),
        (padding_first, "Waiting is the outer layer"),
        (by_the_package, "Only padding differs here"),
        (from_time_zero, "product of the factors must be"),
        (upside_down, "product of the factors must be"),
        (lambda a, b: {"padding": 1.0}, "Return a dict"),
        (lambda a, b: list(explain(a, b).values()), "Return a dict"),
        (lambda a, b: explain(a, b) | {"host": float("nan")}, "Return a dict"),
        (lambda a, b: dict.fromkeys(explain(a, b), (a.makespan / b.makespan) ** 0.25), "Only padding differs here"),
        (lambda a, b: None, "got       None"),
    ],
)
def test_explain_refuses(wrong, told):
    text = message(checks.explain, wrong)
    assert told in text and "call      explain(<" in text and "; product " in text


def test_a_cause_alone_is_nearly_the_whole_ratio():
    """The rule of the exercise, where the answer is known."""
    for cause, case in zip((None, "padding", "waiting", "memory", "host"), chapter_11._explain_cases(), strict=False):
        a, b = case.args
        known = {each: a.makespan / b.makespan if each == cause else 1.0 for each in case.expected}
        assert case.expected == pytest.approx(known, rel=0.04)


# setting_with -------------------------------------------------------------------------------------


def setting_with(factor):
    lengths = Assumptions().lengths
    if factor > 10:
        return Assumptions(rows=1, lengths=replace(lengths, output_sigma=0.8))
    return Assumptions(rows=32, lengths=replace(lengths, prompt_sigma=0.1, output_sigma=0.1))


def by_shorter_outputs(factor):
    lengths = Assumptions().lengths
    if factor > 10:
        return Assumptions(rows=1, lengths=replace(lengths, output_mean=200.0))
    return Assumptions(
        rows=16,
        lengths=replace(lengths, prompt_mean=600.0, output_mean=60.0, prompt_sigma=0.2, output_sigma=0.2),
    )


@pytest.mark.parametrize("right", [setting_with, by_shorter_outputs])
def test_setting_with_accepts(right, capsys):
    assert passes(checks.setting_with, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda factor: setting_with(24), "Give the baseline many rows"),
        (lambda factor: setting_with(3), "A batch of few rows"),
        (lambda factor: {"rows": 1}, "Return an Assumptions"),
        (lambda factor: replace(setting_with(factor), launch_seconds=30e-6), "the launches are the machine's"),
        (lambda factor: replace(setting_with(factor), gpu_memory_utilization=0.5), "raised    "),
        (lambda factor: Assumptions(rows=0), "raised    "),
        (lambda factor: None, "got       None"),
    ],
)
def test_setting_with_refuses(wrong, told):
    assert told in message(checks.setting_with, wrong)


# better_within ------------------------------------------------------------------------------------


def better_within(limit, a, b):
    def most(points):
        good = [p.served for p in points if p.latency <= limit and (p.offered is None or p.served >= 0.9 * p.offered)]
        return max(good, default=0)

    if a[0].loop != b[0].loop or not (most(a) or most(b)):
        return None
    return "a" if most(a) > most(b) else "b"


def by_tuples(limit, a, b):
    best = {}
    for name, points in (("a", a), ("b", b)):
        for loop, offered, served, latency in points:
            if (loop == "closed" or served / offered >= 0.9) and latency <= limit:
                best[served] = name
    loops = {point[0] for point in (*a, *b)}
    return best[max(best)] if best and len(loops) == 1 else None


@pytest.mark.parametrize("right", [better_within, by_tuples])
def test_better_within_accepts(right, capsys):
    assert passes(checks.better_within, right, capsys)


def least_latency(limit, a, b):
    return min("ab", key=lambda name: min(point.latency for point in {"a": a, "b": b}[name]))


def most_served(limit, a, b):
    served = [max((p.served for p in points if p.latency <= limit), default=0) for points in (a, b)]
    return "a" if served[0] > served[1] else "b"


def any_loop(limit, a, b):
    return better_within(limit, [p._replace(loop="open") for p in a], [p._replace(loop="open") for p in b])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (least_latency, "a serves 3.9 requests per second and b 7.8"),
        (most_served, "a queue grows"),
        (any_loop, "open and closed cannot be compared"),
        (lambda limit, a, b: better_within(limit - 1e-6, a, b), "Exactly the limit is within it"),
        (lambda limit, a, b: better_within(limit, a, b) or "b", "cannot be compared"),
        (
            lambda limit, a, b: ["a", "b"][better_within(limit, a, b) == "b"] if a[0].loop == b[0].loop else None,
            "Nobody",
        ),
        (
            lambda limit, a, b: (
                better_within(limit, a, b) if all(any(p.latency <= limit for p in x) for x in (a, b)) else None
            ),
            "better_within(0.4,",
        ),
        (lambda limit, a, b: None, "got       None"),
    ],
)
def test_better_within_refuses(wrong, told):
    assert told in message(checks.better_within, wrong)


# stubs --------------------------------------------------------------------------------------------


def a_stub(*args):
    raise NotImplementedError("write a_stub")


@pytest.mark.parametrize(
    "check", [checks.explain, checks.setting_with, checks.better_within], ids=lambda check: check.__name__
)
def test_what_is_not_written_yet_is_told_so(check):
    with pytest.raises(NotWrittenYet, match=rf"✗ {check.__name__}: not written yet"):
        check(a_stub)


# engine_arguments ---------------------------------------------------------------------------------

BEST = {"enable_prefix_caching": True, "block_size": 8, "watermark": 0.1, "max_num_batched_tokens": 256}


def test_engine_arguments_accepts(capsys):
    assert passes(checks.engine_arguments, lambda: dict(BEST), capsys)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "A long gap is a preempted request"),
        (BEST | {"max_num_batched_tokens": 512}, "longest gap 27 ms"),
        (BEST | {"watermark": 0.0}, "A long gap is a preempted request"),
        (BEST | {"enable_prefix_caching": False}, "share beginnings"),
        (BEST | {"block_size": 16}, "waste fewer slots of the last blocks"),
        (BEST | {"block_size": 0}, "raised"),
        (BEST | {"num_blocks": 10_000}, "a dict with some of max_num_seqs"),
        ("fast", "a dict with some of max_num_seqs"),
    ],
)
def test_engine_arguments_refuses(arguments, told):
    assert told in message(checks.engine_arguments, lambda: arguments)
