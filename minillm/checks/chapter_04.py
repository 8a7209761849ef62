"""Chapter 4, chunked prefill: the mask of a chunk, the loop that reads in chunks, and a cache with a window."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.attention import masked_attention, masks
from minillm.checks.base import ARRAYS, Case, CheckFailed, call, describe, failure, run_check, same_value, size_of
from minillm.checks.chapter_03 import CountingModel
from minillm.ladder import CausalAttention

# --- chunk_mask ------------------------------------------------------------------------------------------------------


def chunk_mask(function: Callable) -> None:
    """`chunk_mask(start, end)` -> bool [end - start, end]: what the tokens start..end-1 may see of 0..end-1."""
    hints = {
        (4, 7): "A bool tensor. Row 0 belongs to token 4: it sees the tokens 0..4, so it begins with five Trues.",
        (0, 4): "Nothing came before the first chunk: this is the causal mask of 4 tokens.",
        (6, 7): "A chunk of one token is a decode: one row, all True.",
        (0, 1): "One token sees itself.",
        (2, 4): "A row for each token of the chunk, a column for each token up to its end: 2 x 4.",
        (5, 12): "Row r belongs to token start + r and is True in the columns 0..start + r.",
    }
    cases = [Case((start, end), masks.causal(end)[start:], hint) for (start, end), hint in hints.items()]
    run_check("chunk_mask", function, cases)


# --- read_in_chunks --------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What the reader's loop returned, and how it went about it."""

    logits: Any
    passes: list[list[int]]  # positions of each
    with_kernel: bool  # the kernel of the call was used in every layer of every pass


class Kernel:
    """`masked_attention`, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __repr__(self) -> str:
        return "kernel"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        return masked_attention(q, k, v, mask)


def read_in_chunks(function: Callable) -> None:
    """`read_in_chunks(model, prompt_ids, m, kernel)` -> logits after the last token, at most m tokens per pass."""
    prompt = [9, 4, 1, 7, 7, 3, 20, 11]
    hint = (
        "A chunk attends to the earlier chunks too: all rows that `cache.append` returns, under the mask of the chunk."
    )
    cases = [
        Case((CountingModel(), ids, m, Kernel()), _one_pass(ids, m), hint)
        for ids, m in ((prompt[:7], 8), (prompt[:7], 4), (prompt, 4), (prompt[:5], 4), (prompt[:3], 1), (prompt[:1], 1))
    ]

    def read(model: CountingModel, prompt_ids: list[int], m: int, kernel: Kernel) -> Read:
        logits = function(model, prompt_ids, m, kernel)
        return Read(logits, model.passes, kernel.calls >= len(model.passes) * model.config.num_hidden_layers)

    run_check("read_in_chunks", read, cases, same=_same_read, show=_show_read, advise=_on_reading)


def _one_pass(prompt_ids: list[int], m: int) -> Read:
    """The expected logits, from a single pass without a cache."""
    model, n = CountingModel(), len(prompt_ids)
    hidden = model(torch.tensor(prompt_ids), torch.arange(n), CausalAttention(model.config))
    return Read(model.logits(hidden[-1]), [list(range(start, min(start + m, n))) for start in range(0, n, m)], True)


def _same_read(got: Read, expected: Read) -> bool:
    return same_value(got.logits, expected.logits) and got[1:] == expected[1:]


def _show_read(got: Read) -> str:
    passes = ", ".join(map(str, got.passes))
    passes = passes if len(passes) < 200 else passes[:197] + "…"
    return f"passes at {passes or 'none'}; logits {describe(got.logits)}"


def _on_reading(got: Read, case: Case) -> str | None:
    """What is wrong with the passes: the first of these that fits."""
    _, prompt, m, _ = case.args
    computed = [position for positions in got.passes for position in positions]
    if got.logits is None:
        return "Your function returned nothing: does it end with `return`?"
    if any(len(positions) > m for positions in got.passes):
        return f"A pass computes at most m tokens, here {m}."
    if len(computed) > len(prompt):
        return "Each token is computed once: the cache holds the keys and values of the earlier chunks."
    if len(computed) < len(prompt):
        return "All tokens of the prompt must be computed; the last chunk may be shorter than m."
    if computed != list(range(len(prompt))):
        return "Positions go on counting: the chunk start..end-1 stands at torch.arange(start, end)."
    if got.passes != case.expected.passes:
        return "Cut after every m tokens; only the last chunk may be shorter."
    if not got.with_kernel:
        return "Attend by `kernel(q, keys, values, mask)`, in every layer of every pass."
    if not isinstance(got.logits, ARRAYS) or size_of(got.logits) != len(case.expected.logits):
        return "Return the logits of the last token of the last chunk: model.logits(hidden[-1])."
    return None


# --- windowed_attend -------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """One case: the passes (layer, new tokens) of a text, under a window."""

    window: int
    passes: tuple[tuple[int, int], ...]

    def __repr__(self) -> str:
        steps = [f"{num} token{'s' * (num > 1)} in layer {layer}" for layer, num in self.passes]
        return f"window {self.window}; passes: {', '.join(steps)}"


def windowed_attend(function: Callable) -> None:
    """`windowed_attend(kept, window, layer, q, k, v)` -> [T, Hq, D]; `kept` may hold window - 1 tokens per layer."""
    hint = "A token sees itself and the window - 1 tokens before it, of whatever pass; positions are those of the text."
    calls = [
        (Window(4, ((0, 3),)), "A window longer than the text changes nothing: the causal mask."),
        (Window(4, ((0, 7),)), "Inside one pass, too, nobody sees further back than the window."),
        (Window(4, ((0, 3), (0, 1), (0, 1), (0, 1))), hint),
        (Window(4, ((0, 5), (0, 3), (0, 6), (0, 1))), hint),
        (Window(1, ((0, 3), (0, 1), (0, 2))), "With a window of 1 a token sees itself alone, and nothing is kept."),
        (Window(5, ((0, 2), (1, 2), (0, 2), (1, 2), (0, 9), (1, 9), (0, 1), (1, 1))), "Each layer keeps its own."),
    ]
    for run, each_hint in calls:
        for length in range(1, len(run.passes) + 1):  # each pass is judged as the last one
            part = Window(run.window, run.passes[:length])
            case = Case((part,), _attended(_all_kept, part)[0], each_hint)
            output, held = call("windowed_attend", lambda part: _attended(function, part), case, describe)
            if not same_value(output, case.expected):
                got, expected = describe(output), describe(case.expected)
                raise CheckFailed(failure("windowed_attend", case, f"got       {got}", expected))
            if held > run.window - 1:
                budget = "The next token sees window - 1 older ones: keep the last rows only, in every layer."
                if run.window == 1:
                    budget = "With a window of 1 nothing is kept, but x[-0:] is all of x."
                got, expected = f"got       {held:g} tokens kept in a layer", f"at most {run.window - 1}"
                raise CheckFailed(failure("windowed_attend", Case(case.args, None, budget), got, expected))
    print(f"✓ windowed_attend: {len(calls)} cases, and the budget: window - 1 tokens kept per layer")


def _attended(function: Callable, run: Window) -> tuple[Any, float]:
    """What the last pass returned, and how many tokens `kept` holds per layer. 4 query heads share 2 KV heads of 8."""
    kept: dict = {}
    draw = torch.Generator().manual_seed(4)
    for layer, num in run.passes:
        q, k, v = (torch.randn(num, heads, 8, generator=draw) for heads in (4, 2, 2))
        output = function(kept, run.window, layer, q, k, v)
    return output, _numbers(kept) / (2 * 2 * 8) / len({layer for layer, _ in run.passes})


def _numbers(kept: Any) -> int:
    """Numbers in all the tensors of a nest of containers."""
    if isinstance(kept, ARRAYS):
        return size_of(kept)
    values = kept.values() if isinstance(kept, Mapping) else kept if isinstance(kept, (list, tuple)) else ()
    return sum(map(_numbers, values))


def _all_kept(kept: dict, window: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The expected answer: everything is kept, and the mask alone has the window."""
    old_k, old_v = kept.get(layer, (k[:0], v[:0]))
    kept[layer] = keys, values = torch.cat([old_k, k]), torch.cat([old_v, v])
    return masked_attention(q, keys, values, masks.causal(len(keys), window=window)[-len(q) :])
