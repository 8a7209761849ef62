"""Chapter 4's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

from functools import partial

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import KVCache, checks, masked_attention
from minillm.attention import masks

# chunk_mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda start, end: torch.arange(end) <= torch.arange(start, end)[:, None],
        lambda start, end: torch.ones(end, end, dtype=torch.bool).tril()[start:],
        lambda start, end: torch.ones(end - start, end, dtype=torch.bool).tril(start),
        lambda start, end: masks.rectangular(end - start, end),
        lambda start, end: torch.tensor([[column <= row for column in range(end)] for row in range(start, end)]),
        lambda start, end: torch.from_numpy(np.tri(end, end, dtype=bool)[start:]),
        lambda start, end: torch.cat([torch.ones(end - start, start).bool(), masks.causal(end - start)], dim=1),
    ],
    ids=["positions", "last rows", "tril", "package", "lists", "numpy", "two parts"],
)
def test_chunk_mask_accepts(right, capsys):
    assert passes(checks.chunk_mask, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda start, end: masks.causal(end - start), "got       mask (3, 3) #../##./###"),  # the cache forgotten
        (lambda start, end: torch.ones(end - start, end).bool().tril(), "got       mask (3, 7) #....../"),  # not offset
        (lambda start, end: torch.ones(end - start, end).bool(), "got       mask (3, 7) #######/#######"),
        (lambda start, end: masks.causal(end), "got       mask (7, 7)"),
        (lambda start, end: masks.causal(end)[start:].T, "got       mask (7, 3)"),
        (lambda start, end: masks.causal(end)[start:].float(), "five Trues"),
        (lambda start, end: masks.causal(end)[start:].int().tolist(), "A bool tensor"),
        (lambda start, end: torch.ones(end - start, end).bool().tril(start - 1), "got       mask (3, 7) ####.../"),
        (
            lambda start, end: torch.cat([torch.zeros(end - start, start).bool(), masks.causal(end - start)], dim=1),
            "got       mask (3, 7) ....#../",  # sees its own chunk only
        ),
    ],
    ids=[
        "own chunk",
        "not offset",
        "all",
        "whole square",
        "transposed",
        "floats",
        "lists",
        "not itself",
        "no earlier chunk",
    ],
)
def test_chunk_mask_refuses(wrong, told):
    assert told in message(checks.chunk_mask, wrong)


# read_in_chunks -----------------------------------------------------------------------------------


def read(model, prompt_ids, m, kernel, *, restart=False, triangle=False, own_kernel=False, rows=-1, twice=False):
    """The right answer, and with an argument one of the wrong ones."""
    cache = KVCache(model.config, capacity=len(prompt_ids), dtype=model.dtype)
    for start in range(0, len(prompt_ids), m):
        end = min(start + m, len(prompt_ids))
        mask = masks.rectangular(end - start, end)
        if triangle:
            mask &= torch.arange(end) >= start
        attend = partial(attend_to, cache, masked_attention if own_kernel else kernel, mask)
        positions = torch.arange(start, end) - (start if restart else 0)
        hidden = model(torch.tensor(prompt_ids[start:end]), positions, attend)
        cache.advance(end - start)
    if twice:
        model(torch.tensor(prompt_ids[:1]), torch.tensor([0]), lambda layer, q, k, v: q)
    return model.logits(hidden[rows])


def attend_to(cache, kernel, mask, layer, q, k, v):
    return kernel(q, *cache.append(layer, k, v), mask)


def read_with_lists(model, prompt_ids, m, kernel):
    """Keeps its own tensors, splits the ids, masks by positions."""
    kept, start = {}, 0
    for chunk in torch.tensor(prompt_ids).split(m):
        places = torch.arange(start + len(chunk))

        def attend(layer, q, k, v, places=places):
            kept.setdefault(layer, []).append((k, v))
            keys, values = map(torch.cat, zip(*kept[layer], strict=True))
            return kernel(q, keys, values, places <= places[-len(q) :, None])

        hidden = model(chunk, places[start:], attend)
        start += len(chunk)
    return model.logits(hidden)[-1].numpy()


def read_without_a_cache(model, prompt_ids, m, kernel):
    for end in range(m, len(prompt_ids) + m, m):
        ids = torch.tensor(prompt_ids[:end])
        hidden = model(ids, torch.arange(len(ids)), lambda layer, q, k, v: kernel(q, k, v, masks.causal(len(q))))
    return model.logits(hidden[-1])


def read_the_new_alone(model, prompt_ids, m, kernel):
    for start in range(0, len(prompt_ids), m):
        ids = torch.tensor(prompt_ids[start : start + m])
        positions = torch.arange(start, start + len(ids))
        hidden = model(ids, positions, lambda layer, q, k, v: kernel(q, k, v, masks.causal(len(q))))
    return model.logits(hidden[-1])


def read_full_chunks_only(model, prompt_ids, m, kernel):
    return read(model, prompt_ids[: max(1, len(prompt_ids) // m) * m], m, kernel)


def read_equal_chunks(model, prompt_ids, m, kernel):
    num = -(-len(prompt_ids) // m)
    return read(model, prompt_ids, -(-len(prompt_ids) // num), kernel)


def read_at_once(model, prompt_ids, m, kernel):
    return read(model, prompt_ids, len(prompt_ids), kernel)


def read_and_say_nothing(model, prompt_ids, m, kernel):
    read(model, prompt_ids, m, kernel)


@pytest.mark.parametrize("right", [read, read_with_lists])
def test_read_in_chunks_accepts(right, capsys):
    assert passes(checks.read_in_chunks, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (read_at_once, "at most m tokens, here 4"),
        (read_without_a_cache, "at most m tokens, here 4"),
        (partial(read, twice=True), "Each token is computed once"),
        (read_full_chunks_only, "All tokens of the prompt"),
        (partial(read, restart=True), "Positions go on counting"),
        (read_equal_chunks, "Cut after every m tokens"),
        (partial(read, own_kernel=True), "Attend by `kernel("),
        (partial(read, rows=slice(None)), "the last token of the last chunk"),
        (partial(read, rows=0), "attends to the earlier chunks too"),
        (read_the_new_alone, "attends to the earlier chunks too"),
        (partial(read, triangle=True), "attends to the earlier chunks too"),
        (read_and_say_nothing, "does it end with `return`"),
    ],
)
def test_read_in_chunks_refuses(wrong, told):
    assert told in message(checks.read_in_chunks, wrong)


def test_the_passes_are_shown():
    text = message(checks.read_in_chunks, partial(read, restart=True))
    assert "got       passes at [0, 1, 2, 3], [0, 1, 2]; logits tensor (24,)" in text
    assert "expected  passes at [0, 1, 2, 3], [4, 5, 6]; logits tensor (24,)" in text


# windowed_attend ----------------------------------------------------------------------------------


def windowed(kept, window, layer, q, k, v, *, keep=0, masked=True, offset=0, where=None):
    """The right answer, and with an argument one of the wrong ones."""
    where = layer if where is None else where
    if where in kept:
        k, v = torch.cat([kept[where][0], k]), torch.cat([kept[where][1], v])
    first = max(0, len(k) - window + 1 - keep)
    kept[where] = k[first:], v[first:]
    places = torch.arange(len(k))
    mine = places[-len(q) :, None]
    mask = places <= mine
    if masked:
        mask &= places > mine - window + offset
    return masked_attention(q, k, v, mask)


def windowed_in_lists(kept, window, layer, q, k, v):
    """A row of keys after the other, each query by itself."""
    rows, outputs = kept.setdefault(layer, []), []
    for query, key, value in zip(q, k, v, strict=True):
        rows.append((key, value))
        del rows[:-window]
        keys, values = map(torch.stack, zip(*rows, strict=True))
        outputs.append(masked_attention(query[None], keys, values, torch.ones(1, len(rows), dtype=torch.bool)))
    del rows[: len(rows) - window + 1]
    return torch.cat(outputs)


def windowed_by_a_slice_from_behind(kept, window, layer, q, k, v):
    """Right but for a window of 1: there the slice begins at -0."""
    answer = windowed(kept, window, layer, q, k, v, keep=100)
    kept[layer] = tuple(x[-(window - 1) :] for x in kept[layer])
    return answer


def windowed_with_the_last_pass(kept, window, layer, q, k, v):
    old_k, old_v = kept.get(layer, (k[:0], v[:0]))
    first = max(0, len(k) - window + 1)
    kept[layer] = k[first:], v[first:]
    k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
    return masked_attention(q, k, v, masks.causal(len(k), window=window)[-len(q) :])


@pytest.mark.parametrize("right", [windowed, windowed_in_lists])
def test_windowed_attend_accepts(right, capsys):
    checks.windowed_attend(right)
    said = "✓ windowed_attend: 6 cases, and the budget: window - 1 tokens kept per layer\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (partial(windowed, keep=100), "at most 3"),
        (windowed_by_a_slice_from_behind, "x[-0:] is all of x"),
        (partial(windowed, keep=1), "got       4 tokens kept in a layer"),
        (partial(windowed, masked=False), "Inside one pass, too"),
        (partial(windowed, keep=-1), "positions are those of the text"),
        (partial(windowed, offset=1), "Inside one pass, too"),
        (partial(windowed, offset=-1), "Inside one pass, too"),
        (partial(windowed, where=0), "Each layer keeps its own"),
        (windowed_with_the_last_pass, "positions are those of the text"),
    ],
    ids=["all kept", "-0", "one too many", "no window", "one too few", "short", "long", "one layer", "the last pass"],
)
def test_windowed_attend_refuses(wrong, told):
    assert told in message(checks.windowed_attend, wrong)
