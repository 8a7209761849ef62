"""Chapter 3's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

from functools import partial

import pytest
import torch

from check_answers import message, passes
from minillm import checks, masked_attention, masks, sdpa_attention

# cached_attend ------------------------------------------------------------------------------------


def attend(kept, layer, q, k, v):
    """The right answer: joined tensors, the last rows of the causal mask."""
    if layer in kept:
        k, v = torch.cat([kept[layer][0], k]), torch.cat([kept[layer][1], v])
    kept[layer] = k, v
    return masked_attention(q, k, v, masks.causal(len(k))[-len(q) :])


def attend_with_lists(kept, layer, q, k, v):
    """A list of rows per layer, a mask from positions, the other kernel."""
    rows = kept.setdefault(layer, [])
    rows += list(zip(k, v, strict=True))
    keys, values = map(torch.stack, zip(*rows, strict=True))
    places = torch.arange(len(rows))
    return sdpa_attention(q, keys, values, places <= places[-len(q) :, None])


def attend_in_one_dict(kept, layer, q, k, v):
    """Two entries per layer, a row of output at a time."""
    for name, new in (("k", k), ("v", v)):
        kept[layer, name] = torch.cat([kept.get((layer, name), new[:0]), new])
    keys, values = kept[layer, "k"], kept[layer, "v"]
    ends = range(len(keys) - len(q) + 1, len(keys) + 1)
    one = torch.ones(1, len(keys), dtype=torch.bool)
    rows = [
        masked_attention(row[None], keys[:end], values[:end], one[:, :end]) for row, end in zip(q, ends, strict=True)
    ]
    return torch.cat(rows)


def attend_to_the_new_alone(kept, layer, q, k, v):
    return masked_attention(q, k, v, masks.causal(len(k)))


def attend_keeping_the_first_pass(kept, layer, q, k, v):
    if layer in kept:
        k, v = torch.cat([kept[layer][0], k]), torch.cat([kept[layer][1], v])
    kept.setdefault(layer, (k, v))
    return masked_attention(q, k, v, masks.causal(len(k))[-len(q) :])


def attend_keeping_the_last_pass(kept, layer, q, k, v):
    old, kept[layer] = kept.get(layer), (k, v)
    if old:
        k, v = torch.cat([old[0], k]), torch.cat([old[1], v])
    return masked_attention(q, k, v, masks.causal(len(k))[-len(q) :])


def attend_with_one_layer(kept, layer, q, k, v):
    return attend(kept, 0, q, k, v)


def attend_to_everybody(kept, layer, q, k, v):
    attend(kept, layer, q, k, v)
    return masked_attention(q, *kept[layer], torch.ones(len(q), len(kept[layer][0]), dtype=torch.bool))


def attend_with_the_first_rows(kept, layer, q, k, v):
    attend(kept, layer, q, k, v)
    return masked_attention(q, *kept[layer], masks.causal(len(kept[layer][0]))[: len(q)])


def attend_new_before_old(kept, layer, q, k, v):
    if layer in kept:
        k, v = torch.cat([k, kept[layer][0]]), torch.cat([v, kept[layer][1]])
    kept[layer] = k, v
    return masked_attention(q, k, v, masks.causal(len(k))[-len(q) :])


def attend_values_not_joined(kept, layer, q, k, v):
    if layer in kept:
        k = torch.cat([kept[layer], k])
    kept[layer] = k
    return masked_attention(q, k, k, masks.causal(len(k))[-len(q) :])


def attend_elsewhere(everything, kept, layer, q, k, v):
    return attend(everything, layer, q, k, v)


def attend_without_a_result(kept, layer, q, k, v):
    attend(kept, layer, q, k, v)


@pytest.mark.parametrize("right", [attend, attend_with_lists, attend_in_one_dict])
def test_cached_attend_accepts(right, capsys):
    assert passes(checks.cached_attend, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (attend_to_the_new_alone, "attends to all four"),
        (attend_keeping_the_first_pass, "not only those of the last pass"),
        (attend_keeping_the_last_pass, "not only those of the last pass"),
        (attend_with_one_layer, "keys and values of its own"),
        (attend_to_everybody, "under the causal mask"),
        (attend_with_the_first_rows, "attends to all four"),
        (attend_new_before_old, "Take the last two rows"),
        (attend_values_not_joined, "under the causal mask"),
        (partial(attend_elsewhere, {}), "remember nothing outside"),
        (attend_without_a_result, "does it end with `return`"),
    ],
)
def test_cached_attend_refuses(wrong, told):
    assert told in message(checks.cached_attend, wrong)


def test_the_passes_of_a_failed_case_are_named():
    assert "cached_attend(passes: 3 tokens in layer 0, 1 token in layer 0)" in message(
        checks.cached_attend, attend_to_the_new_alone
    )


# generate_with_cache ------------------------------------------------------------------------------


def generate(model, prompt_ids, num_outputs, attend, first=0, from_zero=False, whole=False, more=0, echo=False):
    """The right answer, and with an argument one of the wrong ones."""
    token_ids, computed = list(prompt_ids), first
    for _ in range(num_outputs + more):
        new = token_ids if whole else token_ids[computed:]
        positions = torch.arange(len(new)) + (0 if from_zero or whole else len(token_ids) - len(new))
        hidden = model(torch.tensor(new), positions, attend)
        computed = len(token_ids)
        token_ids.append(int(model.logits(hidden[-1]).argmax()))
    return token_ids if echo else token_ids[len(prompt_ids) : len(prompt_ids) + num_outputs]


def prefill_then_decode(model, prompt_ids, num_outputs, attend):
    """Two parts and a generator; the logits of all rows; positions from a count."""
    hidden = model(torch.tensor(prompt_ids), torch.arange(len(prompt_ids)), lambda *args: attend(*args))
    for position in range(len(prompt_ids), len(prompt_ids) + num_outputs):
        token = model.logits(hidden)[-1].argmax()
        yield token
        if position < len(prompt_ids) + num_outputs - 1:
            hidden = model(token[None], torch.tensor([position]), attend)


def token_by_token(model, prompt_ids, num_outputs, attend):
    for place, token_id in enumerate(prompt_ids[:-1]):
        model(torch.tensor([token_id]), torch.tensor([place]), attend)
    return generate(model, prompt_ids, num_outputs, attend, first=len(prompt_ids) - 1)


def without_the_attend(model, prompt_ids, num_outputs, attend):
    return generate(model, prompt_ids, num_outputs, lambda layer, q, k, v: q)


def of_the_first_row(model, prompt_ids, num_outputs, attend):
    token_ids, new = [], list(prompt_ids)
    for _ in range(num_outputs):
        start = len(prompt_ids) + len(token_ids) - len(new)
        hidden = model(torch.tensor(new), torch.arange(start, start + len(new)), attend)
        new = [int(model.logits(hidden[0]).argmax())]
        token_ids += new
    return token_ids


@pytest.mark.parametrize("right", [generate, prefill_then_decode])
def test_generate_with_cache_accepts(right, capsys):
    assert passes(checks.generate_with_cache, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (partial(generate, whole=True), "feed one token per pass"),
        (partial(generate, from_zero=True), "Positions go on counting"),
        (partial(generate, more=1), "never fed back"),
        (partial(generate, echo=True), "without the prompt"),
        (partial(generate, first=1), "The first pass computes the whole prompt"),
        (token_by_token, "The first pass computes the whole prompt"),
        (without_the_attend, "Hand `attend` to the model"),
        (of_the_first_row, "of the last row"),
    ],
)
def test_generate_with_cache_refuses(wrong, told):
    assert told in message(checks.generate_with_cache, wrong)


def test_what_passed_the_model_is_shown():
    text = message(checks.generate_with_cache, partial(generate, from_zero=True))
    assert "passes: [5, 1, 4] at [0, 1, 2], [4] at [0], [2] at [0]" in text
    assert "passes: [5, 1, 4] at [0, 1, 2], [4] at [3]," in text


# cache_append -------------------------------------------------------------------------------------


def append(keys, values, length, k, v):
    """The right answer in slices."""
    end = length + k.shape[0]
    if end > keys.shape[0]:
        raise ValueError("full")
    keys[length:end] = k
    values[length:end] = v
    return end


def append_in_a_loop(keys, values, length, k, v):
    """Row by row; refuses with another exception."""
    if len(k) > len(keys) - length:
        raise RuntimeError("full")
    for key, value in zip(k, v, strict=True):
        keys[length], values[length] = key, value
        length += 1
    return torch.tensor(length)


def append_with_narrow(keys, values, length, k, v):
    assert length + len(k) <= len(keys), "full"
    keys.narrow(0, length, len(k)).copy_(k)
    values.index_copy_(0, torch.arange(length, length + len(v)), v)
    return length + len(v)


def append_unchecked(keys, values, length, k, v):
    keys[length : length + len(k)] = k
    values[length : length + len(k)] = v
    return length + len(k)


def append_until_it_breaks(keys, values, length, k, v):
    for row in range(len(k)):
        keys[length + row] = k[row]
        values[length + row] = v[row]
    return length + len(k)


def append_to_new_tensors(keys, values, length, k, v):
    keys = torch.cat([keys[:length], k])
    values = torch.cat([values[:length], v])
    return len(keys)


def append_at_the_front(keys, values, length, k, v):
    keys[: len(k)], values[: len(k)] = k, v
    return length + len(k)


def append_keys_twice(keys, values, length, k, v):
    return append(keys, values, length, k, k)


def append_forgetting_the_values(keys, values, length, k, v):
    return append(keys, values.clone(), length, k, v)


def append_counting_the_new(keys, values, length, k, v):
    return append(keys, values, length, k, v) - length


def append_returning_nothing(keys, values, length, k, v):
    append(keys, values, length, k, v)


def append_saying_full_too_early(keys, values, length, k, v):
    if length + len(k) >= len(keys):
        raise ValueError("full")
    return append(keys, values, length, k, v)


def append_returning_none_when_full(keys, values, length, k, v):
    return append(keys, values, length, k, v) if length + len(k) <= len(keys) else None


def append_only_two_numbers(keys, values, length, k, v):
    end = append(keys, values, length, k, v)
    keys[length:end, :, 2:] = 0
    return end


@pytest.mark.parametrize("right", [append, append_in_a_loop, append_with_narrow])
def test_cache_append_accepts(right, capsys):
    assert passes(checks.cache_append, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (append_unchecked, "before the first write"),
        (append_until_it_breaks, "before the first write"),
        (append_to_new_tensors, "into the tensors given"),
        (append_at_the_front, "got       length 3; keys [15 16] [3 4] [0 0] [0 0]"),
        (
            append_keys_twice,
            "expected  length 3; keys [1 2] [3 4] [15 16] [0 0]; values [-1 -2] [-3 -4] [-15 -16] [0 0]",
        ),
        (append_forgetting_the_values, "values [-1 -2] [-3 -4] [0 0] [0 0]"),
        (append_counting_the_new, "got       length 1;"),
        (append_returning_nothing, "got       length None;"),
        (append_saying_full_too_early, "raised    ValueError: full"),
        (append_returning_none_when_full, "expected  an exception; keys [1 2] [3 4] [5 6] [7 8]"),
        (append_only_two_numbers, "Any number of heads"),
    ],
)
def test_cache_append_refuses(wrong, told):
    assert told in message(checks.cache_append, wrong)


def test_writing_some_rows_before_refusing_is_shown():
    text = message(checks.cache_append, lambda keys, *rest: append_until_it_breaks_later(keys, *rest))
    assert "got       an exception; keys [1 2] [3 4] [15 16] [17 18]" in text


def append_until_it_breaks_later(keys, values, length, k, v):
    """Refuses a full cache at once, but fills the free rows of one that is nearly full."""
    if length == len(keys) and len(k):
        raise ValueError("full")
    return append_until_it_breaks(keys, values, length, k, v)


# cache_bytes --------------------------------------------------------------------------------------


def bytes_of(config, num_tokens, dtype_bytes):
    return 2 * num_tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_bytes


def bytes_by_allocating(config, num_tokens, dtype_bytes):
    layer = torch.empty(num_tokens, 2, config.num_key_value_heads, config.head_dim, dtype=torch.uint8)
    return sum(layer.nbytes for _ in range(config.num_hidden_layers)) * torch.tensor(dtype_bytes)


@pytest.mark.parametrize(
    "right", [bytes_of, lambda c, n, size: float(2 * c.num_hidden_layers * c.key_value_size) * n * size]
)
def test_cache_bytes_accepts(right, capsys):
    assert passes(checks.cache_bytes, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda c, n, size: bytes_of(c, n, size) / 2, "a key *and* a value"),
        (lambda c, n, size: bytes_of(c, n, size) // c.num_hidden_layers, "expected  524288"),
        (lambda c, n, size: bytes_of(c, n, size) / 2**20, "got       0.5"),
        (lambda c, n, size: bytes_of(c, 1, size), "A thousand tokens"),
        (lambda c, n, size: 2 * n * c.num_hidden_layers * c.query_size * size, "Count KV heads"),
        (lambda c, n, size: bytes_of(c, n, 2), "Use dtype_bytes"),
        (
            lambda c, n, size: bytes_of(c, n, size) // c.head_dim * (c.hidden_size // c.num_attention_heads),
            "Take config.head_dim",
        ),
    ],
    ids=["keys only", "one layer", "MiB", "one token", "query heads", "always two bytes", "head_dim from the width"],
)
def test_cache_bytes_refuses(wrong, told):
    assert told in message(checks.cache_bytes, wrong)


# score_endings ------------------------------------------------------------------------------------


def score(model, prompt_ids, endings):
    """The right answer: a walk over the tree of endings, with a copy of the cache at every branch."""
    scores = [0.0] * len(endings)

    def follow(kept, token_ids, start, rows, depth):
        kept = dict(kept)
        positions = torch.arange(start, start + len(token_ids))
        hidden = model(torch.tensor(token_ids), positions, partial(attend, kept))
        log_probs = model.logits(hidden[-1]).log_softmax(-1)
        for token_id in {endings[row][depth] for row in rows}:
            same = [row for row in rows if endings[row][depth] == token_id]
            for row in same:
                scores[row] += float(log_probs[token_id])
            longer = [row for row in same if len(endings[row]) > depth + 1]
            if longer:
                follow(kept, [token_id], start + len(token_ids), longer, depth + 1)

    follow({}, prompt_ids, 0, range(len(endings)), 0)
    return scores


def score_by_memory(model, prompt_ids, endings):
    """Remembers the cache and the log-probabilities behind every beginning."""
    seen = {}

    def behind(beginning):
        if beginning not in seen:
            kept, new = ({}, prompt_ids) if not beginning else (dict(behind(beginning[:-1])[0]), [beginning[-1]])
            end = len(prompt_ids) + len(beginning)
            hidden = model(torch.tensor(new), torch.arange(end - len(new), end), partial(attend, kept))
            seen[beginning] = kept, model.logits(hidden[-1]).log_softmax(-1)
        return seen[beginning]

    for ending in endings:
        yield sum(behind(tuple(ending[:place]))[1][token_id] for place, token_id in enumerate(ending))


def score_from_the_prompt(model, prompt_ids, endings, copy=dict, log=True):
    """The prompt once, then each ending in a pass of its own: right scores over the budget."""
    prompt, scores = {}, []
    hidden = model(torch.tensor(prompt_ids), torch.arange(len(prompt_ids)), partial(attend, prompt))
    for ending in endings:
        rows, kept = [hidden[-1:]], copy(prompt)
        if ending[1:]:
            positions = torch.arange(len(prompt_ids), len(prompt_ids) + len(ending) - 1)
            rows.append(model(torch.tensor(ending[:-1]), positions, partial(attend, kept)))
        logits = model.logits(torch.cat(rows))
        table = logits.log_softmax(-1) if log else logits
        scores.append(float(table[torch.arange(len(ending)), ending].sum()))
    return scores


@pytest.mark.parametrize("right", [score, score_by_memory])
def test_score_endings_accepts(right, capsys):
    checks.score_endings(right)
    assert capsys.readouterr().out == "✓ score_endings: 5 cases, and the puzzle: 13 tokens computed, 53 one by one\n"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (score_from_the_prompt, "expected  at most 13"),
        (partial(score_from_the_prompt, copy=lambda kept: kept), "follows the prompt, not the first ending"),
        (partial(score_from_the_prompt, log=False), "Add up the log-probabilities"),
        (lambda *args: score(*args)[:1], "follows the prompt, not the first ending"),
    ],
    ids=["over the budget", "one cache for all", "logits", "one ending"],
)
def test_score_endings_refuses(wrong, told):
    assert told in message(checks.score_endings, wrong)
