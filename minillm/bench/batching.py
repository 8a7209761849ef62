"""Static, dynamic and continuous batching on the storyteller: the same requests, one thread, real runs.

    minillm bench batching --json batching.json

The policies take turns, so that a disturbance of the machine affects all of them. Ratios are taken within a turn, and
their median is reported. A cost model calibrated on other requests predicts the same ratio without the model.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

from minillm.bench.measuring import (
    MAX_MODEL_LEN,
    TEMPERATURE,
    TIMERS,
    MeasuredRun,
    calibration_steps,
    load,
    measure,
    simulate,
    surroundings,
)
from minillm.engine import Request, SchedulerConfig
from minillm.errors import check_options
from minillm.sampling import SamplingParams
from minillm.simulation import BATCHING, Calibrated, Report, made_request
from minillm.storyteller import corpus

MOST_NEW_TOKENS = 512


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    model, tokenizer = load(arguments.model)
    config = SchedulerConfig(arguments.max_num_seqs, max_num_batched_tokens=256, max_model_len=MAX_MODEL_LEN)
    requests = natural_requests(tokenizer, model.config.eos_token_ids, arguments.requests, arguments.seed)
    turns, steps = [], []
    for number in range(arguments.repeats):
        steps += calibration_steps(model, arguments.timer, seed=number)
        turns.append(turn(model, requests, config, arguments.timer, number))
    rounded = different_requests(turns)
    if rounded:
        exact = turn(model.double(), requests, config, arguments.timer, 0)
        check_same_outputs(exact)
    simulated = simulate_same_lengths(Calibrated.fit(steps), requests, turns[0]["continuous"].outputs, config)
    result = summary(turns, simulated, arguments.timer, rounded) | surroundings()
    result["max_num_seqs"] = config.max_num_seqs
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench batching", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", default="storyteller", help="storyteller, or a checkpoint folder with its vocabulary"
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timer", default="cpu", choices=list(TIMERS), help="cpu: undisturbed by other programs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    check_options(arguments, at_least_one=("requests", "max_num_seqs", "repeats"), files=("json",))
    return arguments


# --- requests --------------------------------------------------------------------------------------------------------


def natural_requests(tokenizer, eos_token_ids: tuple[int, ...], num_requests: int, seed: int) -> list[Request]:
    """Typical requests to the storyteller, in random order: questions (greedy), requests for stories and beginnings of
    stories (sampled, each with its own seed). Each ends when the model ends it.
    """
    rng = random.Random(f"bench batching {seed}")
    requests = []
    for i in range(num_requests):
        text, greedy = natural_prompt(rng)
        params = SamplingParams(temperature=0.0 if greedy else TEMPERATURE, max_tokens=MOST_NEW_TOKENS, seed=i)
        requests.append(Request(f"req {i}", tokenizer(text).input_ids, params, eos_token_ids=eos_token_ids))
    return requests


def natural_prompt(rng: random.Random) -> tuple[str, bool]:
    """A prompt and whether it is answered greedily: a question (3 of 5), a request for a story, or its beginning."""
    kind = rng.choice(("question", "question", "question", "request", "opening"))
    if kind == "question":
        return corpus.chat_prompt(corpus.chat_turn(rng).question), True
    if kind == "request":
        length = rng.choice(("short", "long"))
        return corpus.chat_prompt(corpus.story_turn(rng, length, "object").question), False
    return "Once upon a time", False


# --- runs ------------------------------------------------------------------------------------------------------------


def turn(model, requests: list[Request], config: SchedulerConfig, timer: str, number: int) -> dict[str, MeasuredRun]:
    """Run every batching policy once; each turn begins with a different one."""
    names = list(BATCHING)
    order = names[number % len(names) :] + names[: number % len(names)]
    return {batching: measure(model, requests, batching, config, timer) for batching in order}


def different_requests(turns: list[dict[str, MeasuredRun]]) -> list[str]:
    """Requests that did not get the same tokens under every batching policy in every turn.

    In float32 this can happen where two tokens are equal up to rounding, about once in 10^5 tokens: with a different
    number of rows, sums are rounded in a different order. In float64 it must not happen.
    """
    expected = turns[0]["static"].outputs
    every = [run.outputs for runs in turns for run in runs.values()]
    return [request_id for request_id in expected if any(one[request_id] != expected[request_id] for one in every)]


def check_same_outputs(runs: dict[str, MeasuredRun]) -> None:
    """Check that all batching policies give the same tokens in float64. Raises AssertionError, naming the requests."""
    different = different_requests([runs])
    if different:
        raise AssertionError(f"the ways of batching gave other tokens than static batching for {', '.join(different)}")


def simulate_same_lengths(
    cost_model, requests: list[Request], outputs: dict[str, tuple[int, ...]], config: SchedulerConfig
) -> dict[str, Report]:
    """Predicted reports for requests with the measured output lengths."""
    known = [
        made_request(request.request_id, 0.0, request.num_prompt_tokens, len(outputs[request.request_id]))
        for request in requests
    ]
    return {batching: simulate(cost_model, known, batching, config) for batching in BATCHING}


# --- results ---------------------------------------------------------------------------------------------------------


def summary(turns: list[dict[str, MeasuredRun]], simulated: dict[str, Report], timer: str, rounded: list[str]) -> dict:
    """The record: a dictionary for JSON. `rounded`: the requests that got different tokens in float32."""
    ways = {}
    for batching in BATCHING:
        runs = [runs[batching] for runs in turns]
        one = runs[0].report
        ways[batching] = {
            "useful_tokens_per_second": statistics.median(tokens_per_second(run, timer) for run in runs),
            "steps": one.num_steps,
            "computed_tokens": one.computed_tokens,
            "useful_tokens": one.useful_tokens,
            "seconds": [run.seconds for run in runs],
            "simulated_seconds": simulated[batching].makespan,
        }
    continuous = turns[0]["continuous"]
    lengths = sorted(map(len, continuous.outputs.values()))
    return {
        "ratio_continuous_over_static": ratios(turns, timer),
        "ratio_by_wall_clock": ratios(turns, "wall"),
        "simulated_ratio": simulated["static"].makespan / simulated["continuous"].makespan,
        "batching": ways,
        "output_tokens": {"sum": sum(lengths), "shortest": lengths[0], "longest": lengths[-1]},
        "requests": len(lengths),
        "identical_outputs": not rounded,
        "different_by_rounding": rounded,  # identical in float64
        "timer": timer,
    }


def ratios(turns: list[dict[str, MeasuredRun]], timer: str) -> dict:
    """Useful tokens per second of continuous batching, relative to static batching: per turn, and the median."""
    repeats = [
        tokens_per_second(runs["continuous"], timer) / tokens_per_second(runs["static"], timer) for runs in turns
    ]
    return {"median": statistics.median(repeats), "repeats": repeats}


def tokens_per_second(run: MeasuredRun, timer: str) -> float:
    """Useful tokens per second: only tokens that a request asked for."""
    return run.report.output_tokens / run.seconds[timer]


def table(result: dict) -> str:
    """The record as text."""
    output = result["output_tokens"]
    lines = [
        f"{result['requests']} requests, outputs of {output['shortest']} to {output['longest']} tokens, together "
        f"{output['sum']}; {result['max_num_seqs']} at a time; {result['machine']}",
        f"{'':12}{'useful tokens/s':>16}{'steps':>8}{'computed tokens':>16}{'useful':>8}{'share':>8}{'seconds':>9}"
        f"{'simulated':>11}",
    ]
    for batching, row in result["batching"].items():
        seconds = statistics.median(each[result["timer"]] for each in row["seconds"])
        share = row["useful_tokens"] / row["computed_tokens"]
        lines.append(
            f"{batching:12}{row['useful_tokens_per_second']:>16.0f}{row['steps']:>8}{row['computed_tokens']:>16}"
            f"{row['useful_tokens']:>8}{share:>8.1%}{seconds:>9.2f}{row['simulated_seconds']:>11.2f}"
        )
    ratio = result["ratio_continuous_over_static"]
    repeats = ", ".join(f"{value:.2f}" for value in ratio["repeats"])
    lines.append(f"continuous / static: {ratio['median']:.2f} (median of {repeats})")
    error = result["simulated_ratio"] / ratio["median"] - 1
    lines.append(f"simulated:           {result['simulated_ratio']:.2f} ({error:+.1%})")
    rounded = ", ".join(result["different_by_rounding"])
    same = f"identical in float64; float32 rounded {rounded} differently" if rounded else "identical in every token"
    lines.append(f"outputs:             {same}")
    return "\n".join(lines)
