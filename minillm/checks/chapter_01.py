"""The exercises of chapter 1: the loop, the times of a request, how a token is chosen, and a loop with fewer passes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.checks.base import Case, as_list, describe, realised, run_check, same_value
from minillm.sampling import SamplingParams, next_token_probabilities
from minillm.trace import RequestRecord, ScheduledTokens, StepEvent, Trace

VOCABULARY = 10  # of the fake models: the ids 0 to 9


# --- the loop ---


def greedy_generate(function: Callable) -> None:
    """Check `greedy_generate(next_logits, prompt, max_tokens, eos_token_ids)` on fake models with a known answer."""
    run_check("greedy_generate", observed(function), greedy_cases(), same=same_answer, show=show_answer)


class FakeModel:
    """Prefers the id that `rule` makes of the whole sequence, and counts how often it was asked.

    All logits are negative, so that a search for the best one that starts at 0 finds nothing.
    """

    def __init__(self, name: str, rule: Callable[[list[int]], int]):
        self.__name__ = name
        self.rule = rule
        self.num_passes = 0

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        self.num_passes += 1
        best = self.rule([int(token_id) for token_id in token_ids]) % VOCABULARY
        return -1.0 - (torch.arange(VOCABULARY) - best).abs().float()  # [VOCABULARY]


@dataclass(frozen=True)
class Answer:
    """What a call gave back, and what it did on the way."""

    token_ids: Any
    num_passes: int
    changed_prompt: list | None = None  # the prompt after the call, if that changed it
    is_budget: bool = False  # fewer passes are right too


def greedy_cases() -> Iterable[Case]:
    """Each case calls a fresh model; `expected` follows from the model's rule by hand."""

    def case(
        name: str, rule: Callable, prompt: list[int], limit: int, eos: tuple, output: list[int], hint: str
    ) -> Case:
        return Case((FakeModel(name, rule), prompt, limit, eos), Answer(output, len(output)), hint)

    def last_plus_1(token_ids: list[int]) -> int:
        return token_ids[-1] + 1

    return [
        case("last_plus_1", last_plus_1, [3], 4, (9,), [4, 5, 6, 7], "Return the new tokens only, max_tokens of them."),
        case("sum_of_all", sum, [1, 2], 5, (), [3, 6, 2, 4, 8], "Each pass needs the prompt and every token so far."),
        case("last_plus_1", last_plus_1, [6, 7], 9, (9,), [8, 9], "Stop after an end token; it belongs to the output."),
        case("last_plus_1", last_plus_1, [8], 5, (9,), [9], "The very first new token may already be an end token."),
        case("last_plus_1", last_plus_1, [1], 9, (7, 4), [2, 3, 4], "Any of the ids in eos_token_ids ends the output."),
        case("last_plus_1", last_plus_1, [9, 0], 3, (9,), [1, 2, 3], "An end token inside the prompt ends nothing."),
        case("last_plus_1", last_plus_1, [3, 9], 3, (9,), [0, 1, 2], "An end token at the prompt's end ends nothing."),
        case("last_plus_1", last_plus_1, [5], 1, (), [6], "max_tokens counts new tokens, not the prompt."),
    ]


def observed(function: Callable) -> Callable[..., Answer]:
    """`function`, with an eye on how many passes it makes and on what happens to the prompt."""

    def call(next_logits: FakeModel, prompt: list[int], max_tokens: int, eos_token_ids: tuple) -> Answer:
        before = list(prompt)
        output = realised(function(next_logits, prompt, max_tokens, eos_token_ids))
        return Answer(output, next_logits.num_passes, None if prompt == before else prompt)

    return call


def same_answer(got: Answer, expected: Answer) -> bool:
    """The same ids, from as many passes or within the budget, and the prompt as it was."""
    same_ids = same_value(got.token_ids, expected.token_ids)
    within = got.num_passes <= expected.num_passes if expected.is_budget else got.num_passes == expected.num_passes
    return same_ids and within and got.changed_prompt is None


def show_answer(answer: Answer) -> str:
    passes = f"{answer.num_passes} forward pass" + ("" if answer.num_passes == 1 else "es")
    passes = f"at most {passes}" if answer.is_budget else passes
    prompt = "" if answer.changed_prompt is None else f"; it changed the prompt to {answer.changed_prompt}, so copy it"
    return f"{describe(answer.token_ids)} in {passes}{prompt}"


# --- times ---


def request_metrics(function: Callable) -> None:
    """Check `request_metrics(arrival_time, token_times)` against the metrics of a trace with the same times."""
    run_check("request_metrics", function, (metrics_case(*each) for each in METRICS), advise=on_metrics)


NO_GAP = "A single token has no gap: the mean ITL is then 0.0."
METRICS = [
    (0.0, [0.25, 0.375, 0.5], "Return three numbers: (ttft, mean_itl, e2e)."),
    (4.0, [4.5, 4.625, 4.75, 5.0], "Return three numbers: (ttft, mean_itl, e2e)."),
    (1.0, [1.5, 1.5625, 2.5], "Return three numbers: (ttft, mean_itl, e2e)."),
    (2.0, [2.75], NO_GAP),
]


def on_metrics(got: Any, case: Case) -> str | None:
    """Which of the three is wrong, and how."""
    got, times = as_list(got), case.args[1]
    if not isinstance(got, list) or len(got) != 3:
        return "Return three numbers: (ttft, mean_itl, e2e)."
    ttft, mean_itl, _ = (same_value(one, other) for one, other in zip(got, case.expected, strict=True))
    if not ttft:
        first = same_value(got[0], times[0])
        return "TTFT is a duration: subtract the arrival time." if first else "TTFT ends with the first token."
    if not mean_itl:
        gaps = "Mean ITL: n tokens have n - 1 gaps; add up the gaps and divide by their number."
        return gaps if len(times) > 1 else NO_GAP
    last = same_value(got[2], times[-1])
    return "E2E is a duration: subtract the arrival time." if last else "E2E ends with the last token."


def metrics_case(arrival_time: float, token_times: list[float], hint: str) -> Case:
    trace = trace_of(arrival_time, token_times)
    gaps = trace.inter_token_latencies("req")
    mean_itl = sum(gaps) / len(gaps) if gaps else 0.0
    return Case((arrival_time, token_times), (trace.ttft("req"), mean_itl, trace.end_to_end("req")), hint)


def trace_of(arrival_time: float, token_times: Sequence[float]) -> Trace:
    """The trace of one request whose tokens came at these times."""
    trace = Trace(requests=[RequestRecord("req", arrival_time, 1)])
    start_times = [arrival_time, *token_times]
    for step, (start, end) in enumerate(zip(start_times, token_times, strict=False)):
        part = ScheduledTokens("req", step, 1, "decode" if step else "prefill", num_sampled=1)
        trace.steps.append(StepEvent(step, start, end, (part,)))
    return trace


# --- choosing ---


def temperature_probabilities(function: Callable) -> None:
    """Check `temperature_probabilities(logits, temperature)` against minillm's sampler."""
    greedy = "Temperature 0 is greedy: probability 1 for the largest logit, 0 for the others."
    divide = "Divide the logits by the temperature first, then softmax."
    cases = [
        ([2.0, 1.0, 0.0, -1.0], 1.0, "Temperature 1 changes nothing: softmax(logits)."),
        ([2.0, 1.0, 0.0, -1.0], 0.5, divide),
        ([2.0, 1.0, 0.0, -1.0], 2.0, divide),
        ([-3.0, -1.0, -2.0], 0.0, greedy),
        ([0.5, 4.0], 0.0, greedy),
        ([1.0, 3.0, 3.0], 0.0, "Of two equal logits one gets all: argmax names the first."),
        ([800.0, 801.0, 799.0], 1.0, "exp(800) overflows: subtract the largest logit first, or use torch's softmax."),
        ([1.0, 0.0, 3.0], 0.01, "A small temperature makes large numbers: subtract the largest before exp."),
    ]
    run_check("temperature_probabilities", function, (temperature_case(*each) for each in cases))


def temperature_case(logits: list[float], temperature: float, hint: str) -> Case:
    given = torch.tensor(logits)
    return Case((given, temperature), next_token_probabilities(given, SamplingParams(temperature=temperature)), hint)


def top_p_probabilities(function: Callable) -> None:
    """Check `top_p_probabilities(probabilities, top_p)` on distributions that are summed up by hand."""
    smallest = "Keep the likeliest tokens until they reach top_p together: the one that crosses the line stays in."
    cases = [
        ([0.5, 0.3, 0.15, 0.05], 0.7, smallest),
        ([0.05, 0.3, 0.15, 0.5], 0.9, "The tokens keep their places in the vocabulary: sort to choose, then go back."),
        ([0.4, 0.35, 0.25], 0.2, "The likeliest token always stays, even when it is above top_p alone."),
        ([0.1, 0.6, 0.3], 1.0, "top_p = 1 keeps everything."),
        ([0.25, 0.2, 0.45, 0.1], 0.6, "What stays must add up to 1 again."),
        ([0.5, 0.25, 0.25], 0.5, "Reaching top_p exactly is enough: the first has 0.5 alone, and nobody else stays."),
        ([0.125, 0.5, 0.125, 0.25], 0.75, "0.5 and 0.25 reach 0.75 exactly: what the likelier ones have, < top_p."),
    ]
    run_check("top_p_probabilities", function, (top_p_case(*each) for each in cases))


def top_p_case(probabilities: list[float], top_p: float, hint: str) -> Case:
    kept, together = set(), 0.0
    for place in sorted(range(len(probabilities)), key=lambda place: -probabilities[place]):
        if together < top_p:
            kept.add(place)
            together += probabilities[place]
    expected = [share / together if place in kept else 0.0 for place, share in enumerate(probabilities)]
    return Case((torch.tensor(probabilities), top_p), torch.tensor(expected), hint)


# --- fewer passes than tokens ---


def few_passes(function: Callable) -> None:
    """Check `few_passes(all_logits, prompt, max_tokens, eos_token_ids)`: greedy's ids within a budget of passes."""
    run_check("few_passes", observed(function), few_passes_cases(), same=same_answer, show=show_answer)


class Reciter(FakeModel):
    """Continues a text that it knows by heart, with scores after every id; anything else it continues with nonsense."""

    def __init__(self, text: Sequence[int]):
        super().__init__("reciter", self.next_id)
        self.text = list(text)
        self.size = max(text) + 1  # of the vocabulary

    def next_id(self, token_ids: list[int]) -> int:
        known = token_ids == self.text[: len(token_ids)] and len(token_ids) < len(self.text)
        return self.text[len(token_ids)] if known else (7 * sum(token_ids) + 3 * len(token_ids)) % self.size

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """[T] -> [T, vocabulary]: row i depends on the ids up to i alone, as under a causal mask."""
        self.num_passes += 1
        ids = [int(token_id) for token_id in token_ids]
        best = torch.tensor([self.next_id(ids[: end + 1]) for end in range(len(ids))])
        return -1.0 - (torch.arange(self.size) - best[:, None]).abs().float()


def few_passes_cases() -> Iterable[Case]:
    """A song of five verses with a refrain: 3 new ids, then the same 20, five times. The end is id 79."""
    refrain = [*range(10, 30)]
    song = [id_ for verse in range(5) for id_ in (*range(40 + 3 * verse, 43 + 3 * verse), *refrain)]
    end, verse = (79,), [*refrain[:10], 79, *refrain[10:]]  # an end token in the prompt ends nothing

    def case(prompt: list[int], text: list[int], limit: int, eos: tuple, budget: int, hint: str) -> Case:
        output = text[len(prompt) :][:limit]
        output = output[: output.index(eos[0]) + 1] if eos and eos[0] in output else output
        return Case((Reciter(text), prompt, limit, eos), Answer(output, budget, is_budget=True), hint)

    none = "Nothing repeats here: a pass with an empty draft gives one token."
    several = "Check several drafted ids in one pass."
    begin = "Begin with a single id; the end token belongs to the output."
    stop = "Stop at an end token inside a draft too."
    return [
        case([1, 2], [1, 2, *range(40, 79)], 20, end, 20, none),
        case([1, 2], [1, 2, *song, 79], 115, (), 60, several),
        case([1], [1, *song[:46], 79], 60, end, 47, begin),
        case([1, *verse, 2], [1, *verse, 2, *verse], 20, end, 6, stop),
        case([1, 2], [1, 2, *song], 57, (), 57, "Stop at max_tokens, also inside a draft that the model agrees with."),
        case([*song[:23], 1], [*song[:23], 1, *refrain[4:], 2, 3], 18, (), 6, "Draft from the prompt too."),
    ]
