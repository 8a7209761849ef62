"""Every check takes unusual right answers, in any number type and container, and refuses plausible wrong ones.

The tests of each chapter ask for the messages; here each exercise is asked the same two questions: is only the answer
judged, and all of it? Right answers here use up, sort or scale what they are given, or come as generators, numpy's
numbers, Fractions. Wrong ones are one slip away from the right one.
"""

import asyncio
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import checks, costs, masked_attention, sdpa_attention
from minillm.attention import masks
from minillm.costs.kv_bytes import kv_bytes_per_token
from minillm.simulation import Assumptions, ChatLengths

RIGHT, WRONG = [], []


def right(check):
    """Register an unusual right answer of a check."""
    return lambda function: RIGHT.append((check, function)) or function


def wrong(check):
    """Register a plausible wrong answer of a check."""
    return lambda function: WRONG.append((check, function)) or function


def each(registered):
    ids = [f"{check.__name__}-{function.__name__}" for check, function in registered]
    return pytest.mark.parametrize(("check", "answer"), registered, ids=ids)


# chapter 1 ----------------------------------------------------------------------------------------


@right(checks.greedy_generate)
def as_a_generator(next_logits, prompt, max_tokens, eos_token_ids):
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(int(next_logits(token_ids).argmax()))
        yield token_ids[-1]
        if token_ids[-1] in eos_token_ids:
            return


@right(checks.greedy_generate)
def as_an_array(*args):
    return np.array(list(as_a_generator(*args)))


@wrong(checks.greedy_generate)
def looks_at_the_prompts_last_token(next_logits, prompt, max_tokens, eos_token_ids):
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens and token_ids[-1] not in eos_token_ids:
        token_ids.append(int(next_logits(token_ids).argmax()))
    return token_ids[len(prompt) :]


@wrong(checks.greedy_generate)
def limit_of_all_tokens(next_logits, prompt, max_tokens, eos_token_ids):
    return list(as_a_generator(next_logits, prompt, max_tokens - len(prompt) + 1, eos_token_ids))


@right(checks.request_metrics)
def pops_the_times(arrival_time, token_times):
    last = token_times.pop()
    first = token_times.pop(0) if token_times else last
    gaps = len(token_times) + 1 if last > first else 0
    return first - arrival_time, (last - first) / gaps if gaps else 0.0, last - arrival_time


@right(checks.request_metrics)
def in_fractions(arrival_time, token_times):
    times = [Fraction(time) - Fraction(arrival_time) for time in token_times]
    yield times[0]
    yield (times[-1] - times[0]) / max(1, len(times) - 1)
    yield np.float32(times[-1])


@wrong(checks.request_metrics)
def longest_gap(arrival_time, token_times):
    gaps = np.diff(token_times)
    return token_times[0] - arrival_time, gaps.max() if len(gaps) else 0.0, token_times[-1] - arrival_time


@wrong(checks.request_metrics)
def end_to_end_from_the_first_token(arrival_time, token_times):
    mean = np.diff(token_times).mean() if len(token_times) > 1 else 0.0
    return token_times[0] - arrival_time, mean, token_times[-1] - token_times[0]


@right(checks.temperature_probabilities)
def scaled_in_place(logits, temperature):
    if temperature == 0:
        best = logits.argmax()
        logits.zero_()[best] = 1
        return logits
    logits /= temperature
    return logits.softmax(-1)


@right(checks.temperature_probabilities)
def temperature_in_numpy(logits, temperature):
    logits = logits.numpy().astype(np.float64)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    powers = np.exp((logits - logits.max()) / temperature)
    return powers / powers.sum()


@wrong(checks.temperature_probabilities)
def powers_not_summed(logits, temperature):
    return logits.softmax(-1) ** (1 / max(temperature, 1e-9))


@right(checks.top_p_probabilities)
def zeroed_in_place(probabilities, top_p):
    ordered, places = probabilities.sort(descending=True)
    probabilities[places[ordered.cumsum(-1) - ordered >= top_p]] = 0.0
    return probabilities / probabilities.sum()


@right(checks.top_p_probabilities)
def as_a_tuple_of_numpys_numbers(probabilities, top_p):
    return tuple(zeroed_in_place(probabilities, top_p).numpy())


@wrong(checks.top_p_probabilities)
def one_more_when_met_exactly(probabilities, top_p):
    ordered, places = probabilities.sort(descending=True)
    probabilities[places[ordered.cumsum(-1) - ordered > top_p]] = 0.0
    return probabilities / probabilities.sum()


@wrong(checks.top_p_probabilities)
def at_least_two(probabilities, top_p):
    ordered, places = probabilities.sort(descending=True)
    gone = ordered.cumsum(-1) - ordered >= top_p
    gone[:2] = False
    probabilities[places[gone]] = 0.0
    return probabilities / probabilities.sum()


@right(checks.few_passes)
def passes_as_a_generator(all_logits, prompt, max_tokens, eos_token_ids):
    token_ids, left = np.array(prompt), max_tokens
    while left:
        places = [i for i in range(1, len(token_ids) - 1) if list(token_ids[i - 1 : i + 1]) == list(token_ids[-2:])]
        draft = token_ids[places[-1] + 1 :][:left] if places else token_ids[:0]
        chosen = all_logits(torch.tensor([*token_ids, *draft]))[len(token_ids) - 1 :].argmax(-1).numpy()
        agreed = int(np.cumprod(chosen[:-1] == draft).sum())
        for token_id in chosen[: agreed + 1][:left]:
            yield token_id
            left -= 1
            if token_id in eos_token_ids:
                return
            token_ids = np.append(token_ids, token_id)


@wrong(checks.few_passes)
def asks_again_for_each(all_logits, prompt, max_tokens, eos_token_ids):
    output = list(passes_as_a_generator(all_logits, prompt, max_tokens, eos_token_ids))
    for written in range(len(output)):
        all_logits([*prompt, *output[:written]])
    return output


@wrong(checks.few_passes)
def one_more_than_the_limit(all_logits, prompt, max_tokens, eos_token_ids):
    return list(passes_as_a_generator(all_logits, prompt, max_tokens + 1, eos_token_ids))


# chapter 2 ----------------------------------------------------------------------------------------


@right(checks.causal_mask)
def numpys_triangle(n):
    return np.tri(n, dtype=bool)


@right(checks.causal_mask)
def rows_in_tuples_of_numpys_bools(n):
    return tuple(tuple(np.bool_(column <= row) for column in range(n)) for row in range(n))


@wrong(checks.causal_mask)
def of_bytes(n):
    return torch.ones(n, n, dtype=torch.uint8).tril()


@right(checks.attention)
def attention_in_place(q, k, v, mask):
    q /= math.sqrt(q.shape[1])
    scores = (q @ k.T).masked_fill_(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num_(0.0) @ v


@right(checks.attention)
def attention_in_numpy(q, k, v, mask):
    q, k, v, mask = (x.numpy() for x in (q, k, v, mask))
    scores = np.where(mask, q @ k.T / math.sqrt(q.shape[1]), -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) @ v


@wrong(checks.attention)
def scaled_by_the_number_of_keys(q, k, v, mask):
    scores = (q @ k.T / math.sqrt(len(k))).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


@wrong(checks.attention)
def masked_after_the_softmax(q, k, v, mask):
    return ((q @ k.T / math.sqrt(q.shape[1])).softmax(-1) * mask) @ v


@right(checks.window_mask)
def window_in_numpy(n, window):
    return np.tri(n, dtype=bool) & ~np.tri(n, k=-window, dtype=bool)


@wrong(checks.window_mask)
def window_beside_itself(n, window):
    return masks.causal(n) & ~masks.causal(n).tril(-window - 1)


@right(checks.all_heads)
def heads_as_a_batch(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    q /= math.sqrt(q.shape[2])
    scores = q.transpose(0, 1) @ k.repeat_interleave(group, 1).permute(1, 2, 0)
    weights = scores.masked_fill_(~mask, -math.inf).softmax(-1).nan_to_num_(0.0)
    return (weights @ v.repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)


@wrong(checks.all_heads)
def key_heads_in_turn(q, k, v, mask):
    times = q.shape[1] // k.shape[1]
    return heads_as_a_batch(q, k.repeat(1, times, 1), v.repeat(1, times, 1), mask)


@right(checks.layer_flops)
def flops_of_the_model_divided(config, n):
    yield Fraction(costs.tokenwise_flops(config, n, num_logit_rows=0), config.num_hidden_layers)
    yield np.float64(costs.attention_flops(config, n * n)) / config.num_hidden_layers


@wrong(checks.layer_flops)
def flops_without_the_upper_triangle(config, n):
    tokenwise, attention = flops_of_the_model_divided(config, n)
    return tokenwise, attention * (n + 1) / (2 * n)


@right(checks.find_mask)
def mask_in_numpy(look, n):
    window = look(np.array([0])).sum().item()
    changed = np.array([look(torch.arange(shift, n, window)).tolist() for shift in (0, 1)])
    changed[1, 0] = True  # no token at or before it was replaced
    begins = (changed[:, :-1] & ~changed[:, 1:]).any(0)
    prompt = np.concatenate([[0], begins.cumsum()])
    return (prompt[:, None] == prompt) & np.tri(n, dtype=bool) & ~np.tri(n, k=-window, dtype=bool)


@wrong(checks.find_mask)
def mask_without_the_shifted_look(look, n):
    return mask_in_numpy(lambda places: look(places - places[0]), n)


@wrong(checks.find_mask)
def mask_with_a_look_too_many(look, n):
    look([n - 1])
    return mask_in_numpy(look, n)


# chapter 3 ----------------------------------------------------------------------------------------


@right(checks.cache_append)
def append_and_clear_the_new(keys, values, length, k, v):
    end = np.int64(length + len(k))
    if end > len(keys):
        raise IndexError("full")
    keys[length:end], values[length:end] = k, v
    k.zero_(), v.zero_()
    return end


@wrong(checks.cache_append)
def append_behind_the_capacity(keys, values, length, k, v):
    end = append_and_clear_the_new(keys, values, length, k, v)
    return min(end + 1, len(keys))


@right(checks.cached_attend)
def attend_and_clear_the_new(kept, layer, q, k, v):
    rows = kept.setdefault(layer, ([], []))
    for row, new in zip(rows, (k, v), strict=True):
        row.append(new.clone())
    keys, values = map(torch.cat, rows)
    out = sdpa_attention(q, keys, values, masks.rectangular(len(q), len(keys)))
    for each in (q, k, v):
        each.zero_()
    return out.numpy()


@wrong(checks.cached_attend)
def attend_not_to_itself(kept, layer, q, k, v):
    attend_and_clear_the_new(kept, layer, q.clone(), k.clone(), v.clone())
    keys, values = map(torch.cat, kept[layer])
    return masked_attention(q, keys, values, masks.causal(len(keys))[-len(q) :].roll(-1, 0))


@right(checks.generate_with_cache)
def pops_the_prompt(model, prompt_ids, num_outputs, attend):
    new, length = torch.tensor([prompt_ids.pop(0) for _ in range(len(prompt_ids))]), 0
    for _ in range(num_outputs):
        hidden = model(new, torch.arange(length, length + len(new)), attend)
        length += len(new)
        new = model.logits(hidden[-1:]).argmax(-1)
        yield np.int64(new)


@wrong(checks.generate_with_cache)
def feeds_the_last_two(model, prompt_ids, num_outputs, attend):
    token_ids, start = list(prompt_ids), 0
    for _ in range(num_outputs):
        hidden = model(torch.tensor(token_ids[start:]), torch.arange(start, len(token_ids)), attend)
        start = len(token_ids) - 1
        token_ids.append(int(model.logits(hidden[-1]).argmax()))
    return token_ids[len(prompt_ids) :]


@right(checks.cache_bytes)
def bytes_as_a_float(config, num_tokens, dtype_bytes):
    return np.prod([2.0, config.num_hidden_layers, config.key_value_size, num_tokens, dtype_bytes])


@wrong(checks.cache_bytes)
def bytes_of_the_hidden_size(config, num_tokens, dtype_bytes):
    return 2 * config.num_hidden_layers * config.hidden_size * num_tokens * dtype_bytes


@right(checks.score_endings)
def a_branch_for_each_token(model, prompt_ids, endings):
    branches = [({}, list(prompt_ids), 0, {row: list(ending) for row, ending in enumerate(endings)})]
    scores = np.zeros(len(endings))
    while branches:
        kept, new, start, left = branches.pop()
        hidden = model(torch.tensor(new), torch.arange(start, start + len(new)), partial(attend_joined, kept))
        log_probs = model.logits(hidden[-1]).log_softmax(-1)
        following = {}
        for row, (token_id, *rest) in left.items():
            scores[row] += log_probs[token_id]
            if rest:
                following.setdefault(token_id, {})[row] = rest
        branches += [(dict(kept), [token_id], start + len(new), rows) for token_id, rows in following.items()]
    return scores


def attend_joined(kept, layer, q, k, v):
    kept[layer] = tuple(map(torch.cat, zip(kept.get(layer, (k[:0], v[:0])), (k, v), strict=True)))
    return sdpa_attention(q, *kept[layer], masks.rectangular(len(q), len(kept[layer][0])))


@wrong(checks.score_endings)
def mean_over_the_tokens(model, prompt_ids, endings):
    return a_branch_for_each_token(model, prompt_ids, endings) / np.array([len(ending) for ending in endings])


# chapter 4 ----------------------------------------------------------------------------------------


@right(checks.chunk_mask)
def chunk_rows_in_lists(start, end):
    return [[column <= row for column in range(end)] for row in range(start, end)]


@right(checks.chunk_mask)
def chunk_in_numpy(start, end):
    return np.tri(end, dtype=bool)[start:]


@wrong(checks.chunk_mask)
def chunk_not_itself(start, end):
    return torch.arange(end) < torch.arange(start, end)[:, None]


@right(checks.read_in_chunks)
def pops_its_chunks(model, prompt_ids, m, kernel):
    kept, start = {}, 0
    while prompt_ids:
        ids = [prompt_ids.pop(0) for _ in range(min(m, len(prompt_ids)))]

        def attend(layer, q, k, v):
            kept[layer] = tuple(map(torch.cat, zip(kept.get(layer, (k[:0], v[:0])), (k, v), strict=True)))
            return kernel(q, *kept[layer], masks.rectangular(len(q), len(kept[layer][0])))

        hidden = model(torch.tensor(ids), torch.arange(start, start + len(ids)), attend)
        start += len(ids)
    return model.logits(hidden)[-1].tolist()


@wrong(checks.read_in_chunks)
def keeps_one_chunk(model, prompt_ids, m, kernel):
    kept = {}

    def attend(layer, q, k, v):
        old, kept[layer] = kept.get(layer, (k[:0], v[:0])), (k, v)
        k, v = (torch.cat(pair) for pair in zip(old, (k, v), strict=True))
        return kernel(q, k, v, masks.rectangular(len(q), len(k)))

    for start in range(0, len(prompt_ids), m):
        ids = torch.tensor(prompt_ids[start : start + m])
        hidden = model(ids, torch.arange(start, start + len(ids)), attend)
    return model.logits(hidden[-1])


@right(checks.windowed_attend)
def a_ring_of_rows(kept, window, layer, q, k, v):
    out = []
    for query, new in zip(q, zip(k, v, strict=True), strict=True):
        rows = [*kept.get(layer, []), torch.stack(new)]  # [2, Hkv, D] each
        keys, values = torch.stack(rows, dim=1)
        out.append(masked_attention(query[None], keys, values, torch.ones(1, len(rows), dtype=torch.bool)))
        kept[layer] = rows[max(0, len(rows) - window + 1) :]
    return torch.cat(out).numpy()


@wrong(checks.windowed_attend)
def a_window_of_what_is_kept(kept, window, layer, q, k, v):
    old_k, old_v = kept.get(layer, (k[:0], v[:0]))
    keys, values = torch.cat([old_k, k])[-window:], torch.cat([old_v, v])[-window:]
    kept[layer] = keys[1:], values[1:]
    return masked_attention(q[-len(keys) :], keys, values, masks.causal(len(keys))[-len(q) :])


# chapter 5 ----------------------------------------------------------------------------------------


@right(checks.padding)
def padding_after_a_sort(lengths):
    lengths.sort()
    longest = lengths.pop()
    real = sum(lengths) + longest
    rows = len(lengths) + 1
    return sum((Fraction(longest - length) for length in lengths), Fraction()), Decimal(real) / (rows * longest)


@wrong(checks.padding)
def padding_per_row(lengths):
    return max(lengths) - sum(lengths) / len(lengths), sum(lengths) / (len(lengths) * max(lengths))


@right(checks.left_pad)
def rows_in_tuples(prompts, pad_id):
    length = max(map(len, prompts))
    rows = [(*[pad_id] * (length - len(prompt)), *prompt) for prompt in prompts]
    return tuple(rows), [range(len(prompt) - length, len(prompt)) for prompt in prompts]


@wrong(checks.left_pad)
def in_the_callers_lists(prompts, pad_id):
    length = max(map(len, prompts))
    positions = [[0] * (length - len(prompt)) + list(range(len(prompt))) for prompt in prompts]
    for prompt in prompts:
        prompt[:0] = [pad_id] * (length - len(prompt))
    return prompts, positions


@wrong(checks.left_pad)
def positions_from_one(prompts, pad_id):
    rows, positions = rows_in_tuples(prompts, pad_id)
    return rows, [[place + 1 for place in row] for row in positions]


@right(checks.padding_mask)
def padding_mask_in_numpy(num_tokens, padded_length):
    mask = np.tri(padded_length, dtype=bool)
    mask[:, : padded_length - num_tokens] = False
    return mask


@wrong(checks.padding_mask)
def pads_look_at_tokens(num_tokens, padded_length):
    mask = torch.ones(padded_length, padded_length, dtype=torch.bool)
    mask[:, : padded_length - num_tokens] = False
    return mask


@right(checks.padded_pass)
def through_a_view(model, rectangle, positions, row_masks, attention):
    rows, columns = rectangle.shape

    def attend(layer, q, k, v):
        return attention(*(x.view(rows, columns, *x.shape[1:]) for x in (q, k, v)), row_masks).reshape(q.shape)

    return model(rectangle.view(-1), positions.view(-1), attend).view(rows, columns, -1)


@wrong(checks.padded_pass)
def rows_and_columns_exchanged(model, rectangle, positions, row_masks, attention):
    return through_a_view(model, rectangle.T.contiguous(), positions.T.contiguous(), row_masks, attention)


@right(checks.static_batches)
def batches_that_are_used_up(lengths, rows):
    order = sorted(range(len(lengths)), key=lambda i: sum(lengths[i]))
    batches = [order[first : first + rows] for first in range(0, len(order), rows)]

    def columns(batch):
        return sum(map(max, zip(*(lengths[i] for i in batch), strict=True)))

    improved = True
    while improved:
        improved = False
        for one in batches:
            for other in batches:
                for i in range(len(one)):
                    for j in range(len(other)):
                        before = columns(one) + columns(other)
                        one[i], other[j] = other[j], one[i]
                        if columns(one) + columns(other) < before:
                            improved = True
                        else:
                            one[i], other[j] = other[j], one[i]
    lengths.clear()
    yield from map(np.array, batches)


@wrong(checks.static_batches)
def batches_by_the_sum(lengths, rows):
    order = sorted(range(len(lengths)), key=lambda i: sum(lengths[i]))
    return [order[first : first + rows] for first in range(0, len(order), rows)]


# chapter 6 ----------------------------------------------------------------------------------------


@right(checks.block_diagonal_mask)
def blocks_while_there_are_lengths(lengths):
    blocks = []
    while lengths:
        blocks.append(torch.ones(lengths[0], lengths.pop(0)).tril())
    return torch.block_diag(*blocks).bool().numpy()


@wrong(checks.block_diagonal_mask)
def blocks_of_later_prompts_look_back(lengths):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return masks.causal(len(owner)) & (owner[:, None] <= owner + 1)


@right(checks.restarting_positions)
def positions_as_they_come(lengths):
    while lengths:
        yield from range(lengths.pop(0))


@wrong(checks.restarting_positions)
def positions_with_a_gap(lengths):
    return [position for length in lengths for position in range(length + 1)]


@right(checks.attend_caches)
def caches_in_place(q, k, v, lengths, caches):
    rows = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    out = []
    for number, (q_, k_, v_) in enumerate(rows):
        keys, values = caches[number]
        caches[number] = [torch.cat([keys, k_]), torch.cat([values, v_])]
        out.append(sdpa_attention(q_, *caches[number], masks.rectangular(len(q_), len(caches[number][0]))))
    return [torch.cat(out).numpy(), caches]


@wrong(checks.attend_caches)
def new_tokens_see_the_whole_chunk(q, k, v, lengths, caches):
    out, caches = caches_in_place(q, k, v, lengths, caches)
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = []
    for first, n, (keys, values) in zip(firsts, lengths, caches, strict=True):
        rows.append(sdpa_attention(q[first : first + n], keys, values, torch.ones(n, len(keys), dtype=torch.bool)))
    return torch.cat(rows), caches


@right(checks.few_rectangles)
def cut_where_it_is_best(lengths, num_calls):
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = {0: (0, [])}
    for _ in range(num_calls):
        grown = dict(best)
        for end in range(1, len(order) + 1):
            longest = lengths[order[end - 1]]
            for first, (cost, groups) in best.items():
                if first < end and cost + (end - first) * longest**2 < grown.get(end, (math.inf,))[0]:
                    grown[end] = cost + (end - first) * longest**2, [*groups, order[first:end]]
        best = grown
    return iter(best[len(order)][1])


@wrong(checks.few_rectangles)
def groups_of_one_size(lengths, num_calls):
    order, size = sorted(range(len(lengths)), key=lengths.__getitem__), math.ceil(len(lengths) / num_calls)
    return [order[first : first + size] for first in range(0, len(order), size)]


# chapter 7 ----------------------------------------------------------------------------------------


@right(checks.schedule_step)
def schedule_as_they_come(running, waiting, budget, max_num_seqs):
    seats = max_num_seqs - len(running)
    running.sort(key=lambda pair: pair[1] > 1)
    while budget and (running or (waiting and seats)):
        if not running:
            seats -= 1
        request_id, remaining = (running or waiting).pop(0)
        num_tokens = min(remaining, budget)
        budget -= num_tokens
        yield [request_id, num_tokens]


@right(checks.schedule_step)
def schedule_as_items(*args):
    return {request_id: np.float64(num_tokens) for request_id, num_tokens in schedule_as_they_come(*args)}.items()


@wrong(checks.schedule_step)
def schedule_with_nothings(running, waiting, budget, max_num_seqs):
    plan = dict(schedule_as_they_come(list(running), list(waiting), budget, max_num_seqs))
    return [(request_id, plan.get(request_id, 0)) for request_id, _ in running + waiting]


@right(checks.serve_continuously)
def tokens_as_they_come(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    left, waiting, running, new = {n: [*ids] for n, ids in prompts.items()}, [*prompts], [], {n: [] for n in prompts}
    while running or waiting:
        lists = [[(name, len(left[name])) for name in names] for names in (running, waiting)]
        plan = dict(schedule(*lists, budget, max_num_seqs))
        running += [name for name in waiting if name in plan]
        waiting = waiting[sum(name in plan for name in waiting) :]
        passed = machine.compute({name: tuple(left[name].pop(0) for _ in range(num)) for name, num in plan.items()})
        for name in [name for name in passed if not left[name]]:
            left[name].append(passed[name])
            new[name].append(np.int64(passed[name]))
            if passed[name] in machine.eos_token_ids or len(new[name]) == max_tokens[name]:
                running.remove(name)
                machine.forget(name)
    return new


@wrong(checks.serve_continuously)
def all_prompts_again(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    """No cache: computes prompt and answer anew for each token."""
    new = {name: [] for name in prompts}
    for name, ids in prompts.items():
        while len(new[name]) < max_tokens[name]:
            new[name].append(machine.compute({name: [*ids, *new[name]]})[name])
        machine.forget(name)
    return new


@wrong(checks.serve_continuously)
def a_pass_for_each_request(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    new = {}
    for name in prompts:
        own = {name: prompts[name]}
        new |= tokens_as_they_come(own, max_tokens, budget, max_num_seqs, schedule, machine)
    return new


@right(checks.queue_order)
def queue_from_behind(lengths, places):
    """Longest first from the end of time backwards, the short ones before them."""
    numbers = sorted(range(len(lengths)), key=lambda number: lengths[number])
    end, free = max(max(lengths), sum(lengths) / places), [Fraction()] * places
    while numbers:
        first = free.index(min(free))
        late = free[first] + lengths[numbers[0]] + lengths[numbers[-1]] > end
        number = numbers.pop(-late)
        free[first] += lengths[number]
        yield np.int64(number)


@wrong(checks.queue_order)
def short_and_long_in_turns(lengths, places):
    numbers = sorted(range(len(lengths)), key=lambda number: lengths[number])
    return [numbers.pop(-(len(numbers) % 2)) for _ in range(len(numbers))]


# chapter 8 ----------------------------------------------------------------------------------------


@right(checks.allocate)
def allocated_as_an_array(table, free, num_tokens, block_size):
    missing = max(0, math.ceil(num_tokens / block_size) - len(table))
    if missing > len(free):
        return None
    return np.array(table + [free.pop(0) for _ in range(missing)], dtype=int)


@wrong(checks.allocate)
def copied_out_of_free(table, free, num_tokens, block_size):
    return allocated_as_an_array(table, list(free), num_tokens, block_size)


@wrong(checks.allocate)
def table_used_up(table, free, num_tokens, block_size):
    if num_tokens > (len(table) + len(free)) * block_size:
        table.clear()
        return None
    return allocated_as_an_array(table, free, num_tokens, block_size)


@right(checks.begin_table)
def a_table_of_fractions(keys, num_tokens, block_of, count, free, block_size):
    table = []
    while (len(table) + 1) * block_size < num_tokens and len(table) < len(keys) and keys[len(table)] in block_of:
        table.append(block_of[keys[len(table)]])
    num_found = Fraction(len(table) * block_size)
    while len(table) * block_size < num_tokens:
        if len(free) * block_size < num_tokens - len(table) * block_size:
            return None
        table.append(free.pop())
    count.update({block: count.get(block, 0) + 1 for block in table})
    block_of |= {key: block for key, block in zip(keys, table, strict=False) if key not in block_of}
    return np.array(table), num_found


@wrong(checks.begin_table)
def a_key_moves_to_the_new_block(keys, num_tokens, block_of, count, free, block_size):
    answer = a_table_of_fractions(keys, num_tokens, block_of, count, free, block_size)
    if answer is not None:
        block_of |= dict(zip(keys, answer[0].tolist(), strict=False))
    return answer


@right(checks.make_room)
def room_by_slices(name, num_tokens, running, tables, free, block_size):
    preempted = []
    while math.ceil(num_tokens / block_size) > len(tables[name]) + len(free):
        preempted.append(running[-1])
        free[:0], tables[running[-1]] = tables[running[-1]], ()
        del running[-1]
        if preempted[-1] == name:
            return np.array(preempted)
    while len(tables[name]) * block_size < num_tokens:
        tables[name].append(free.pop(0))
    return (each for each in preempted)


@wrong(checks.make_room)
def blocks_before_they_are_needed(name, num_tokens, running, tables, free, block_size):
    return room_by_slices(name, num_tokens + 1, running, tables, free, block_size)


@right(checks.schedule_paged)
def paged_one_by_one(running, waiting, tables, free, budget, max_num_seqs, block_size):
    names, plan, preempted = [name for name, _, _ in running], [], []
    while running:
        name, computed, remaining = running.pop(0)
        if name in names and budget:
            preempted += list(room_by_slices(name, computed + min(remaining, budget), names, tables, free, block_size))
        if name in names and budget:
            plan.append([name, Fraction(min(remaining, budget))])
            budget -= min(remaining, budget)
    while waiting and budget and not preempted and len(names) < max_num_seqs:
        name, num_tokens = waiting.pop(0)
        if num_tokens > len(free) * block_size:
            break
        tables[name] = []
        names.append(name)
        room_by_slices(name, min(num_tokens, budget), names, tables, free, block_size)
        plan.append([name, min(num_tokens, budget)])
        budget -= plan[-1][1]
    return plan, preempted


@wrong(checks.schedule_paged)
def admitted_without_a_look_at_the_blocks(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """A request is admitted when its first chunk finds blocks, not all of it."""
    small = [(name, min(num_tokens, block_size)) for name, num_tokens in waiting]
    return paged_one_by_one(running, small, tables, free, budget, max_num_seqs, block_size)


@right(checks.choose_victim)
def young_until_used_again(idle, now):
    idle.sort(key=lambda each: (each[1] + 8 * min(each[2], 5) - 8, -each[3]))
    return Fraction(idle.pop(0)[0])


@wrong(checks.choose_victim)
def the_head_of_a_text(idle, now):
    return min(idle, key=lambda each: (each[1], each[3]))[0]


# chapter 9 ----------------------------------------------------------------------------------------


@right(checks.decode_step_seconds)
def seconds_by_popping(shape, card, contexts):
    num_requests, cached = len(contexts), 0
    while contexts:
        cached += contexts.pop()
    reading = Fraction(2 * costs.matmul_parameters(shape)) / Fraction(card.bandwidth)
    arithmetic = Fraction(2 * costs.matmul_parameters(shape) * num_requests) / Fraction(card.flops)
    return max(reading, arithmetic) + cached * kv_bytes_per_token(shape) / Fraction(card.bandwidth)


@wrong(checks.decode_step_seconds)
def seconds_for_a_mean_context(shape, card, contexts):
    return seconds_by_popping(shape, card, [sum(contexts) // len(contexts)] * len(contexts))


@right(checks.slot_of)
def slot_by_popping(table, position, block_size):
    while position >= block_size:
        table.pop(0)
        position -= block_size
    return np.float64(table[0] * block_size + position)


@wrong(checks.slot_of)
def slot_behind_a_whole_table(table, position, block_size):
    return table[position // block_size] * block_size + position


@right(checks.paged_decode)
def decoded_in_place(q, keys, values, table, length):
    keys.mul_(q.shape[1] ** -0.5)
    k, v = (pool[table].flatten(0, 1)[:length] for pool in (keys, values))
    out = []
    for head in range(len(q)):
        own = head * k.shape[1] // len(q)
        out.append(((k[:, own] @ q[head]).softmax(0) @ v[:, own]).numpy())
    return np.stack(out)


@wrong(checks.paged_decode)
def whole_blocks_with_zeros(q, keys, values, table, length):
    return decoded_in_place(q, keys.nan_to_num(), values.nan_to_num(), table, len(table) * keys.shape[1])


@right(checks.merge_softmax)
def merged_as_a_generator(one, other):
    best = max(one[0], other[0])
    weights = [math.exp(part[0] - best) if part[1] else 0.0 for part in (one, other)]
    yield best
    yield weights[0] * one[1] + weights[1] * other[1]
    yield weights[0] * one[2] + weights[1] * other[2]


@wrong(checks.merge_softmax)
def merged_as_if_equal(one, other):
    return max(one[0], other[0]), one[1] + other[1], one[2] + other[2]


@right(checks.key_number)
def number_as_a_float(load, thread, head, num_heads):
    return (np.float64(thread // 2) * num_heads + head) * 64 + load * 16 + thread % 2 * 8


@wrong(checks.key_number)
def heads_exchanged(load, thread, head, num_heads):
    return number_as_a_float(load, thread, num_heads - 1 - head, num_heads)


# chapter 10 ---------------------------------------------------------------------------------------


@right(checks.sse_events)
def events_of_one_buffer(chunks):
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while (found := re.search(rb"\r?\n\r?\n|\A\r?\n", buffer)) is not None:
            lines = bytes(buffer[: found.start()]).decode().replace("\r\n", "\n").split("\n")
            del buffer[: found.end()]
            data = [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]
            if data == ["[DONE]"]:
                return
            if data:
                yield "\n".join(data)


@wrong(checks.sse_events)
def events_without_their_blanks(chunks):
    return (event.lstrip() for event in events_of_one_buffer(chunks))


@right(checks.admission)
def seconds_as_a_fraction(num_requests, most, ended):
    ended.sort()
    recent = [ended.pop(0) for _ in range(sum(seconds < 10 for seconds in ended))]
    wanted = Fraction(10 * num_requests, 2 * max(1, len(recent)))
    return None if num_requests < most else Fraction(min(60, max(1, math.ceil(wanted))))


@wrong(checks.admission)
def seconds_until_all_have_ended(num_requests, most, ended):
    return None if num_requests < most else seconds_as_a_fraction(2 * num_requests, most, ended)


@right(checks.run_engine)
async def a_callback_for_each_output(engine, wishes, queues):
    def hand_over(output):
        queues.get(output.request_id, asyncio.Queue()).put_nowait(output)

    with ThreadPoolExecutor(1) as thread:
        while True:
            pending = [] if engine.has_unfinished_requests() else [await wishes.get()]
            while not wishes.empty():
                pending.append(wishes.get_nowait())
            for request_id, wish in pending:
                try:
                    wish()
                except Exception as error:
                    queues.get(request_id, asyncio.Queue()).put_nowait(error)
            if engine.has_unfinished_requests():
                list(map(hand_over, await asyncio.wrap_future(thread.submit(engine.step))))


@wrong(checks.run_engine)
async def outputs_only_at_the_end(engine, wishes, queues):
    class Last:
        def __contains__(self, request_id):
            return request_id in queues

        def get(self, request_id, other):
            return self

        def put_nowait(self, output):
            if output.finished:
                queues[output.request_id].put_nowait(output)

        def __getitem__(self, request_id):
            return queues[request_id]

    await a_callback_for_each_output(engine, wishes, Last())


@right(checks.stream_request)
async def a_queue_that_is_forgotten_first(engine, wishes, queues, request_id, prompt, params):
    queues[request_id] = queue = asyncio.Queue()
    wishes.put_nowait((request_id, partial(engine.add_request, request_id, prompt, params)))
    abort = (request_id, partial(engine.abort_request, request_id))
    try:
        while not isinstance(output := await queue.get(), Exception):
            if output.finished:
                abort = None
            yield output
            if output.finished:
                return
        abort = None
        raise output
    finally:
        queues.pop(request_id)
        if abort:
            wishes.put_nowait(abort)


@wrong(checks.stream_request)
async def the_last_output_is_missing(engine, wishes, queues, request_id, prompt, params):
    async with aclosing(a_queue_that_is_forgotten_first(engine, wishes, queues, request_id, prompt, params)) as all_of:
        async for output in all_of:
            if not output.finished:
                yield output


# chapter 11 ---------------------------------------------------------------------------------------


def peeled(trace):
    """Seconds of the run, and what is left of them without the host, without ended rows, without padding."""
    seconds = [trace.makespan, 0.0, 0.0, 0.0]
    while trace.steps:
        step = trace.steps.pop()
        useful, padding, ended, again = step.uses
        for layer, tokens in enumerate((step.num_tokens, step.num_tokens - ended, useful + again), start=1):
            seconds[layer] += step.computing * tokens / step.num_tokens
    return np.array(seconds)


@right(checks.take)
def waiting_time(num_prompt_tokens, ahead):
    return (sum(ahead) + num_prompt_tokens) / 4_300 < 1


@wrong(checks.take)
def as_many_prompts_as_fit(num_prompt_tokens, ahead):
    return len(ahead) < 16


@right(checks.engine_arguments)
def small_pieces():
    return {"block_size": 8, "enable_prefix_caching": True, "max_num_batched_tokens": 256, "watermark": 0.1}


@wrong(checks.engine_arguments)
def shared_beginnings_alone():
    return {"enable_prefix_caching": True}


@right(checks.explain)
def peeled_by_an_array(trace_a, trace_b):
    a, b = peeled(trace_a), peeled(trace_b)
    factors = (a[:-1] / a[1:]) / (b[:-1] / b[1:])
    return dict(
        zip(("host", "waiting", "padding", "memory"), [*factors, Fraction(a[-1]) / Fraction(b[-1])], strict=True)
    )


@wrong(checks.explain)
def ended_rows_count_as_padding(trace_a, trace_b):
    factors = peeled_by_an_array(trace_a, trace_b)
    return factors | {"padding": factors["waiting"], "waiting": factors["padding"]}


@right(checks.setting_with)
def by_numpys_numbers(factor):
    prompt_sigma, output_sigma, rows = (1.3, 0.8, 1) if factor == 24 else (0.1, 0.1, 32)
    return Assumptions(rows=np.int64(rows), lengths=ChatLengths(output_sigma=output_sigma, prompt_sigma=prompt_sigma))


@wrong(checks.setting_with)
def the_same_rows_for_both(factor):
    return replace(by_numpys_numbers(factor), rows=1)


@right(checks.better_within)
def by_sorting(limit, a, b):
    runs = [
        (served, name)
        for name, points in (("a", a), ("b", b))
        for _, offered, served, late in points
        if late <= limit and (offered is None or served / offered >= 0.9)
    ]
    loops = {a.pop().loop, b.pop().loop}
    return np.str_(max(runs)[1]) if runs and len(loops) == 1 else None


@wrong(checks.better_within)
def by_what_is_offered(limit, a, b):
    def most(points):
        return max((p.offered or p.served for p in points if p.latency <= limit), default=0)

    if a[0].loop != b[0].loop or not most(a) + most(b):
        return None
    return "a" if most(a) > most(b) else "b"


# chapter 12 ---------------------------------------------------------------------------------------


@right(checks.part_of)
def cut_into_nested_lists(weight, rank, size, by):
    """Of the transposed matrix, columns are rows."""
    rows = weight.T.tolist() if by == "columns" else weight.tolist()
    mine = rows[rank * len(rows) // size :][: len(rows) // size]
    return zip(*mine, strict=True) if by == "columns" else iter(mine)


@wrong(checks.part_of)
def from_the_other_end(weight, rank, size, by):
    return weight.chunk(size, 1 if by == "columns" else 0)[-rank]


@right(checks.mlp_on_rank)
def scales_its_parts(x, gate, up, down, add_up):
    wide = gate.T @ x.T
    wide *= torch.sigmoid(wide)
    wide *= up.mul_(2).T @ x.T
    return add_up(wide.T @ down.div_(2)).add_(x).numpy()


@wrong(checks.mlp_on_rank)
def a_share_of_x_and_a_second_sum(x, gate, up, down, add_up):
    size = add_up(torch.ones(1))
    return add_up(x / size + (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down)


@right(checks.ring_seconds)
def of_fractions(num_bytes, num_ranks, bandwidth, latency):
    rounds = 2 * num_ranks - 2
    return rounds * (Fraction(latency) + Fraction(num_bytes, num_ranks) / Fraction(bandwidth))


@wrong(checks.ring_seconds)
def one_round_more(num_bytes, num_ranks, bandwidth, latency):
    return (2 * num_ranks - 1) * (latency + num_bytes / num_ranks / bandwidth)


def halves_then_doubles(num_ranks, turn):
    """Partners differ in one bit, and what is sent is `turn`ed for the last rank."""
    ranks = range(num_ranks)
    distances = [distance for distance in (8, 4, 2, 1) if distance < num_ranks]
    for distance in distances:
        yield {
            (rank, rank ^ distance, frozenset(p for p in ranks if (p ^ rank ^ distance) < distance)) for rank in ranks
        }
    for distance in distances[::-1]:
        yield {(rank, rank ^ distance, frozenset(p for p in ranks if (p ^ rank) < distance)) for rank in turn(ranks)}


@right(checks.fast_plan)
def as_sets(num_ranks):
    return halves_then_doubles(num_ranks, list)


@wrong(checks.fast_plan)
def one_rank_does_not_hand_on(num_ranks):
    return halves_then_doubles(num_ranks, lambda ranks: ranks[:-1])


@right(checks.choose_replica)
def empties_what_it_gets(blocks, sent, loads, most_ahead):
    least, holders = min(loads), list(range(len(loads)))
    for block in blocks:
        still = [replica for replica in holders if block in sent[replica]]
        if not still:
            break
        holders, sent[still[0]] = still, sent[still[0]] - {None}
    if blocks and blocks[0] not in sent[holders[0]] or not blocks:
        return np.argmin(loads)
    best = min(holders, key=loads.__getitem__)
    return Fraction(best if loads[best] <= least + most_ahead else loads.index(least))


@wrong(checks.choose_replica)
def ties_to_the_first_holder(blocks, sent, loads, most_ahead):
    held = [next((n for n, block in enumerate(blocks) if block not in each), len(blocks)) for each in sent]
    best = held.index(max(held))
    return best if held[best] and loads[best] <= min(loads) + most_ahead else loads.index(min(loads))


# ---------------------------------------------------------------------------------------------------


@each(RIGHT)
def test_an_unusual_right_answer_is_accepted(check, answer, capsys):
    assert passes(check, answer, capsys)


@each(RIGHT)
def test_a_right_answer_is_accepted_twice(check, answer, capsys):
    """What the first call did to its arguments is not seen by the second one."""
    assert passes(check, answer, capsys) and passes(check, answer, capsys)


@each(WRONG)
def test_a_plausible_wrong_answer_is_refused(check, answer):
    message(check, answer)


def test_each_exercise_is_asked_both_questions():
    exercises = {getattr(checks, name) for name in checks.__all__}
    exercises = {check for check in exercises if check.__module__.startswith("minillm.checks.chapter_")}
    kernels = {checks.my_decode}  # in test_checks_09.py: a kernel must lie in a file
    for registered in (RIGHT, WRONG):
        assert {check for check, _ in registered} | kernels == exercises
