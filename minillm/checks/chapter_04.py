"""Chapter 4, chunked prefill: how many chunks, which tokens, what each may see, and how large they may be."""

from collections.abc import Callable
from typing import Any

from minillm.attention import masks
from minillm.checks.base import Case, is_number, nested, run_check, same_value


def num_chunks(function: Callable) -> None:
    """`num_chunks(n, m)` -> passes for a prompt of n tokens, at most m a pass."""
    hints = {
        (7, 4): "4 tokens and then the other 3: a pass that is not full is a pass too, so round up.",
        (8, 4): "8 tokens are exactly two full passes.",
        (9, 4): "Two full passes leave one token, and it needs a pass of its own.",
        (3, 4): "A prompt shorter than a chunk takes one pass.",
        (7, 1): "One token a pass: as many passes as tokens.",
        (100_000, 4096): "24 full chunks are 98,304 tokens; the other 1,696 need one more.",
    }
    cases = [Case((n, m), -(-n // m), hint) for (n, m), hint in hints.items()]
    run_check("num_chunks", function, cases)


def chunk_ranges(function: Callable) -> None:
    """`chunk_ranges(n, m)` -> the chunks as [(start, end), ...], end exclusive."""
    hints = {
        (7, 4): "Return pairs (start, end), the first of them (0, 4).",
        (8, 4): "8 tokens fill two chunks; there is no third, empty one.",
        (3, 4): "A prompt that is shorter than a chunk is one chunk.",
        (1, 1): "One token, one chunk.",
        (5, 1): "Each token is a chunk of its own: (0, 1), (1, 2), ...",
        (1000, 384): "Only the last chunk may be shorter than m.",
    }
    cases = [Case((n, m), _ranges(n, m), hint) for (n, m), hint in hints.items()]
    run_check("chunk_ranges", function, cases, advise=_on_ranges)


def _on_ranges(got: Any, case: Case) -> str | None:
    """What is wrong with the pairs: the first of these that fits."""
    n, pairs = case.args[0], nested(got)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return "Return pairs (start, end) of whole numbers, one for each chunk."
    starts, ends = ([pair[place] for pair in case.expected] for place in (0, 1))
    if len(pairs) > len(ends):
        return "That is a chunk too many, and none of them may be empty."
    if len(pairs) < len(ends):
        return "The chunks must hold all n tokens; the last one may be shorter than m."
    got_starts, got_ends = ([pair[place] for pair in pairs] for place in (0, 1))
    if not same_value(got_starts, starts):
        return "The chunks start at 0, m, 2 m, ..."
    if same_value(got_ends, [end - 1 for end in ends]):
        return "`end` is the first token that no longer belongs to the chunk, as in a slice; this is the last one."
    if same_value(got_ends, [end - start for start, end in case.expected]):
        return "This is start and length. Give start and end."
    beyond = is_number(got_ends[-1]) and got_ends[-1] > n
    return "A chunk must not reach beyond the prompt: its end is at most n." if beyond else None


def chunk_mask(function: Callable) -> None:
    """`chunk_mask(start, end)` -> bool [end - start, end]: what the tokens start..end-1 may see of 0..end-1."""
    hints = {
        (4, 7): "A bool tensor. Row 0 belongs to token 4: it sees the tokens 0..4, so it begins with five Trues.",
        (0, 4): "Nothing came before the first chunk: this is the causal mask of 4 tokens.",
        (6, 7): "A chunk of one token is a decode step: one row, all True.",
        (0, 1): "One token sees itself.",
        (2, 4): "A row for each token of the chunk, a column for each token up to its end: 2 x 4.",
        (5, 12): "Row r belongs to token start + r and is True in the columns 0..start + r.",
    }
    cases = [Case((start, end), masks.causal(end)[start:], hint) for (start, end), hint in hints.items()]
    run_check("chunk_mask", function, cases)


def chunk_for_memory(function: Callable) -> None:
    """`chunk_for_memory(free_bytes, bytes_per_token)` -> the largest power of two whose tokens fit, or 0."""
    hints = {
        (1000, 100): "10 tokens fit; the largest power of two that is not more than 10 is 8.",
        (800, 100): "8 tokens fit exactly, and 8 is a power of two: exactly full is allowed.",
        (799, 100): "8 tokens would need one byte too many.",
        (100, 100): "One token fits, and 1 is a power of two (2 to the power of 0).",
        (99, 100): "Not even one token fits: the answer is 0.",
        (0, 7): "No memory, no chunk: the answer is 0.",
        (24_000_000_000, 104_448): "229,779 tokens fit; 2 to the power of 17 is 131,072, the next one is too many.",
        (2**34 - 1, 1): "One byte less than 2 to the power of 34.",
    }
    cases = [Case(args, _largest_power(*args), hint) for args, hint in hints.items()]
    run_check("chunk_for_memory", function, cases)


def _ranges(n: int, m: int) -> list[tuple[int, int]]:
    return [(start, min(start + m, n)) for start in range(0, n, m)]


def _largest_power(free_bytes: int, bytes_per_token: int) -> int:
    tokens = free_bytes // bytes_per_token
    return 1 << (tokens.bit_length() - 1) if tokens else 0
