"""The checks of chapter 1 take right solutions of any layout, refuse the usual mistakes, and say what is wrong."""

import math

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import checks

# --- greedy_generate ---


def generate(next_logits, prompt, max_tokens, eos_token_ids):
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens:
        token_ids.append(int(next_logits(token_ids).argmax()))
        if token_ids[-1] in eos_token_ids:
            break
    return token_ids[len(prompt) :]


def generate_with_tensors(next_logits, prompt, max_tokens, eos_token_ids):
    sequence = torch.tensor(prompt)
    for _ in range(max_tokens):
        sequence = torch.cat([sequence, next_logits(sequence).argmax(-1, keepdim=True)])
        if int(sequence[-1]) in eos_token_ids:
            return sequence[len(prompt) :]
    return sequence[len(prompt) :]


def generate_with_recursion(next_logits, prompt, max_tokens, eos_token_ids):
    if max_tokens == 0:
        return ()
    logits = next_logits(tuple(prompt)).tolist()
    best = max(range(len(logits)), key=logits.__getitem__)
    if best in eos_token_ids:
        return (best,)
    return (best, *generate_with_recursion(next_logits, [*prompt, best], max_tokens - 1, eos_token_ids))


@pytest.mark.parametrize("solution", [generate, generate_with_tensors, generate_with_recursion])
def test_greedy_generate_accepts(solution, capsys):
    assert passes(checks.greedy_generate, solution, capsys)


def test_greedy_generate_refuses_prompt_and_output_together():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        return [*prompt, *generate(next_logits, prompt, max_tokens, eos_token_ids)]

    told = message(checks.greedy_generate, solution)
    assert "call      greedy_generate(last_plus_1, [3], 4, (9,))" in told
    assert "got       [3, 4, 5, 6, 7] in 4 forward passes" in told
    assert "expected  [4, 5, 6, 7] in 4 forward passes" in told


def test_greedy_generate_refuses_to_feed_the_newest_token_only():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        output, newest = [], list(prompt)
        for _ in range(max_tokens):
            output.append(int(next_logits(newest).argmax()))
            newest = output[-1:]
            if output[-1] in eos_token_ids:
                break
        return output

    assert "Each pass needs the prompt and every token so far" in message(checks.greedy_generate, solution)


def test_greedy_generate_refuses_to_go_on_after_the_end():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        return generate(next_logits, prompt, max_tokens, ())

    assert "Stop after an end token" in message(checks.greedy_generate, solution)


def test_greedy_generate_refuses_to_drop_the_end_token():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        output = generate(next_logits, prompt, max_tokens, eos_token_ids)
        return [token_id for token_id in output if token_id not in eos_token_ids]

    assert "got       [8] in 2 forward passes" in message(checks.greedy_generate, solution)


def test_greedy_generate_refuses_a_pass_too_many():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        output = generate(next_logits, prompt, max_tokens, eos_token_ids)
        next_logits([*prompt, *output])
        return output

    assert "got       [4, 5, 6, 7] in 5 forward passes" in message(checks.greedy_generate, solution)


def test_greedy_generate_refuses_to_look_at_the_first_end_id_only():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        return generate(next_logits, prompt, max_tokens, eos_token_ids[:1])

    assert "Any of the ids" in message(checks.greedy_generate, solution)


def test_greedy_generate_refuses_to_write_into_the_prompt():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        output = generate(next_logits, prompt, max_tokens, eos_token_ids)
        prompt += output
        return output

    assert "changed the prompt to [3, 4, 5, 6, 7], so copy it" in message(checks.greedy_generate, solution)


@pytest.mark.parametrize("nothing", [None, 4, ["a"], [[4, 5, 6, 7]]])
def test_greedy_generate_refuses_what_is_no_list_of_ids(nothing):
    assert "got  " in message(checks.greedy_generate, lambda *arguments: nothing)


def test_greedy_generate_shows_an_exception():
    def solution(next_logits, prompt, max_tokens, eos_token_ids):
        return next_logits(prompt)[99]

    assert "raised    IndexError" in message(checks.greedy_generate, solution)


# --- request_metrics ---


def metrics(arrival_time, token_times):
    gaps = len(token_times) - 1
    mean_itl = (token_times[-1] - token_times[0]) / gaps if gaps else 0.0
    return token_times[0] - arrival_time, mean_itl, token_times[-1] - arrival_time


def metrics_with_a_loop(arrival_time, token_times):
    gaps = [token_times[i] - token_times[i - 1] for i in range(1, len(token_times))]
    return [token_times[0] - arrival_time, sum(gaps) / max(1, len(gaps)), token_times[-1] - arrival_time]


def metrics_with_tensors(arrival_time, token_times):
    times = torch.tensor(token_times) - arrival_time
    mean_itl = times.diff().mean() if len(times) > 1 else torch.zeros(())
    return torch.stack([times[0], mean_itl, times[-1]])


def metrics_with_numpy(arrival_time, token_times):
    times = np.array(token_times) - arrival_time
    return np.array([times[0], np.diff(times).mean() if len(times) > 1 else 0.0, times[-1]])


@pytest.mark.parametrize("solution", [metrics, metrics_with_a_loop, metrics_with_tensors, metrics_with_numpy])
def test_request_metrics_accepts(solution, capsys):
    assert passes(checks.request_metrics, solution, capsys)


def test_request_metrics_refuses_to_forget_the_arrival():
    def solution(arrival_time, token_times):
        return metrics(0.0, token_times)

    told = message(checks.request_metrics, solution)
    assert "call      request_metrics(4.0, [4.5, 4.625, 4.75, 5.0])" in told
    assert "expected  (0.5, 0.16666666666666666, 1.0)" in told
    assert "subtract the arrival time" in told


def test_request_metrics_refuses_to_divide_by_the_number_of_tokens():
    def solution(arrival_time, token_times):
        ttft, _, e2e = metrics(arrival_time, token_times)
        return ttft, (token_times[-1] - token_times[0]) / len(token_times), e2e

    message(checks.request_metrics, solution)


def test_request_metrics_refuses_to_fail_on_a_single_token():
    def solution(arrival_time, token_times):
        mean_itl = (token_times[-1] - token_times[0]) / (len(token_times) - 1)
        return token_times[0] - arrival_time, mean_itl, token_times[-1] - arrival_time

    told = message(checks.request_metrics, solution)
    assert "raised    ZeroDivisionError" in told and "A single token has no gap" in told


@pytest.mark.parametrize(
    ("place", "slip", "told"),
    [
        (0, lambda arrival, times: times[0], "TTFT is a duration"),
        (0, lambda arrival, times: times[-1] - arrival, "TTFT ends with the first token"),
        (1, lambda arrival, times: (times[-1] - times[0]) / len(times), "Mean ITL: n tokens have n - 1 gaps"),
        (2, lambda arrival, times: times[-1], "E2E is a duration"),
        (2, lambda arrival, times: times[-1] - times[0], "E2E ends with the last token"),
    ],
)
def test_request_metrics_hints_at_the_one_that_is_wrong(place, slip, told):
    def solution(arrival_time, token_times):
        answer = [*metrics(arrival_time, token_times)]
        answer[place] = slip(arrival_time, token_times)
        return answer

    hint = message(checks.request_metrics, solution).splitlines()[-1]
    assert told in hint


@pytest.mark.parametrize("nothing", [None, 0.25, (0.25, 0.125), {"ttft": 0.25}])
def test_request_metrics_refuses_what_is_no_triple(nothing):
    message(checks.request_metrics, lambda *arguments: nothing)


# --- temperature_probabilities ---


def temperature(logits, temperature):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    return (logits / temperature).softmax(-1)


def temperature_with_lists(logits, temperature):
    logits = logits.tolist()
    if temperature == 0:
        best = logits.index(max(logits))
        return [float(place == best) for place in range(len(logits))]
    powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("solution", [temperature, temperature_with_lists])
def test_temperature_probabilities_accepts(solution, capsys):
    assert passes(checks.temperature_probabilities, solution, capsys)


@pytest.mark.parametrize(
    ("solution", "told"),
    [
        (lambda logits, temperature: (logits * temperature).softmax(-1), "Divide the logits by the temperature"),
        (lambda logits, temperature: logits.softmax(-1) / max(temperature, 1e-9), "Divide the logits"),
        (lambda logits, temperature: (logits / temperature).softmax(-1), "Temperature 0 is greedy"),
        (lambda logits, temperature: temperature_naively(logits, temperature), "exp(800) overflows"),
        (lambda logits, temperature: logits / (temperature or 1), "Temperature 1 changes nothing"),
        (lambda logits, temperature: int(logits.argmax()), "Temperature 1 changes nothing"),
        (lambda logits, temperature: all_the_largest(logits, temperature), "Of two equal logits one gets all"),
    ],
    ids=["times", "after-softmax", "zero-divided", "overflow", "no-softmax", "an-id", "ties"],
)
def test_temperature_probabilities_refuses(solution, told):
    assert told in message(checks.temperature_probabilities, solution)


def all_the_largest(logits, temperature):
    if temperature == 0:
        return (logits == logits.max()).float()
    return temperature_naively(logits - logits.max(), temperature)


def temperature_naively(logits, temperature):
    if temperature == 0:
        return temperature_with_lists(logits, 0)
    powers = (logits / temperature).exp()
    return powers / powers.sum()


# --- top_p_probabilities ---


def top_p(probabilities, top_p):
    ordered, order = probabilities.sort(descending=True)
    kept = order[ordered.cumsum(-1) - ordered < top_p]
    inside = torch.zeros_like(probabilities)
    inside[kept] = probabilities[kept]
    return inside / inside.sum()


def top_p_with_lists(probabilities, top_p):
    probabilities = probabilities.tolist()
    kept, total = [], 0.0
    for index in sorted(range(len(probabilities)), key=lambda index: -probabilities[index]):
        if total < top_p:
            kept.append(index)
            total += probabilities[index]
    return [p / total if index in kept else 0.0 for index, p in enumerate(probabilities)]


@pytest.mark.parametrize("solution", [top_p, top_p_with_lists])
def test_top_p_probabilities_accepts(solution, capsys):
    assert passes(checks.top_p_probabilities, solution, capsys)


def top_p_without_the_token_that_crosses(probabilities, top_p):
    ordered, order = probabilities.sort(descending=True)
    inside = torch.zeros_like(probabilities)
    kept = order[ordered.cumsum(-1) <= top_p]
    inside[kept] = probabilities[kept]
    return inside / inside.sum()


def top_p_in_sorted_order(probabilities, top_p):
    ordered = probabilities.sort(descending=True).values
    ordered = ordered * (ordered.cumsum(-1) - ordered < top_p)
    return ordered / ordered.sum()


def top_p_of_each_token(probabilities, top_p):
    inside = probabilities * (probabilities >= 1 - top_p)
    return inside / inside.sum()


def top_p_without_division(probabilities, top_p_):
    inside = top_p(probabilities, top_p_)
    return torch.where(inside > 0, probabilities, 0.0)


@pytest.mark.parametrize(
    "solution",
    [
        top_p_without_the_token_that_crosses,
        top_p_in_sorted_order,
        top_p_of_each_token,
        top_p_without_division,
        lambda probabilities, top_p: probabilities,
    ],
)
def test_top_p_probabilities_refuses(solution):
    assert "call      top_p_probabilities(tensor (" in message(checks.top_p_probabilities, solution)


# --- few_passes ---


def few(all_logits, prompt, max_tokens, eos_token_ids, *, known=2, longest=8, drafted=None):
    """The right answer: drafts what followed the last `known` ids, and checks the whole draft in one pass."""
    ids = [int(id_) for id_ in prompt]
    while len(ids) - len(prompt) < max_tokens:
        draft = (drafted or follows)(ids, known)[:longest]
        chosen = all_logits(ids + draft).argmax(-1).tolist()[len(ids) - 1 :]
        for choice, guess in zip(chosen, [*draft, None], strict=True):
            ids.append(choice)
            if choice in eos_token_ids or len(ids) - len(prompt) == max_tokens:
                return ids[len(prompt) :]
            if choice != guess:
                break
    return ids[len(prompt) :]


def follows(ids, known):
    for start in range(len(ids) - known - 1, -1, -1):
        if ids[start : start + known] == ids[-known:]:
            return ids[start + known :]
    return []


@pytest.mark.parametrize(
    "solution",
    [
        few,
        lambda *arguments: few(*arguments, longest=1000),
        lambda *arguments: torch.tensor(few(*arguments, known=1)),
        lambda *arguments: tuple(few(*arguments, known=3)),
    ],
    ids=["eight", "all", "one-known", "three-known"],
)
def test_few_passes_accepts(solution, capsys):
    assert passes(checks.few_passes, solution, capsys)


def one_by_one(all_logits, prompt, max_tokens, eos_token_ids):
    return generate(lambda ids: all_logits(ids)[-1], prompt, max_tokens, eos_token_ids)


def takes_the_draft_on_trust(all_logits, prompt, max_tokens, eos_token_ids):
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(int(all_logits(ids)[-1].argmax()))
        if ids[-1] in eos_token_ids:
            break
        ids += follows(ids, 2)[:4]
    return ids[len(prompt) :][:max_tokens]


def goes_on_after_the_end(all_logits, prompt, max_tokens, eos_token_ids):
    return few(all_logits, prompt, max_tokens, ())


def checks_a_row_too_early(all_logits, *arguments):
    return few(lambda ids: all_logits(ids).roll(1, 0), *arguments)


@pytest.mark.parametrize(
    ("solution", "told"),
    [
        (one_by_one, "expected  [40, 41"),
        (lambda *arguments: few(*arguments, longest=1), "Check several drafted ids"),
        (takes_the_draft_on_trust, "Check several drafted ids"),
        (goes_on_after_the_end, "the end token belongs"),
        (checks_a_row_too_early, "Nothing repeats here"),
        (lambda *arguments: few(*arguments, drafted=lambda ids, known: [0]), "Check several drafted ids"),
    ],
    ids=["greedy", "drafts-of-one", "on-trust", "no-end", "row-too-early", "always-zero"],
)
def test_few_passes_refuses(solution, told):
    text = message(checks.few_passes, solution)
    assert told in text and "in at most" in text


def test_few_passes_refuses_to_write_into_the_prompt():
    def solution(all_logits, prompt, *arguments):
        output = few(all_logits, list(prompt), *arguments)
        prompt += output
        return output

    assert "so copy it" in message(checks.few_passes, solution)
