"""Chapter 2, attention and masks: who may look at whom, and what looking costs."""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.attention import masked_attention, masks
from minillm.checks.base import Case, run_check


def causal_mask(function: Callable) -> None:
    """`causal_mask(n)` -> bool [n, n], lower-triangular with the diagonal."""
    hints = {
        1: "The answer is a bool tensor [n, n], not one of numbers. A token always sees itself.",
        2: "Row = the looking token. Row 0 sees column 0 only, row 1 sees both. Is yours mirrored?",
        7: "Row i is True in the columns 0..i and False to the right of them.",
        12: "The size must follow n.",
    }
    run_check("causal_mask", function, [Case((n,), masks.causal(n), hint) for n, hint in hints.items()])


def visible_tokens(function: Callable) -> None:
    """`visible_tokens(mask, row)` -> the columns in which that row is True, from left to right."""
    nobody = masks.causal(3)
    nobody[1] = False
    cases = [
        Case(
            (masks.causal(7), 3), [0, 1, 2, 3], "Read along the row, mask[row]; a column says who looks *at* a token."
        ),
        Case((masks.causal(7), 0), [0], "The first token sees itself: position 0 counts."),
        Case((masks.causal(7), 6), [0, 1, 2, 3, 4, 5, 6], "Give the positions of the True entries, not their number."),
        Case((masks.causal(7, window=3), 5), [3, 4, 5], "Not every row begins at 0: look at the entries themselves."),
        Case((masks.rectangular(3, 7), 0), [0, 1, 2, 3, 4], "A mask need not be square: go through all its columns."),
        Case((nobody, 1), [], "A row may be all False; then the answer is an empty list."),
    ]
    run_check("visible_tokens", function, cases)


def attention(function: Callable) -> None:
    """`attention(q, k, v, mask)` of one head: [Tq, D], [Tk, D], [Tk, D], bool [Tq, Tk] -> [Tq, D]."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(7, 16, generator=generator) for _ in range(3))
    empty_row = masks.causal(7)
    empty_row[2] = False
    same_score = torch.zeros(2, 4)
    two_values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]])
    inputs = [
        (q[:1], k[:1], v[:1], masks.causal(1)),
        (same_score, same_score, two_values, masks.causal(2)),
        (q, k, v, masks.causal(7)),
        (q[4:], k, v, masks.rectangular(3, 7)),
        (q, k, v, empty_row),
        (60 * q, k, v, masks.causal(7)),
    ]
    hints = [
        "With one token there is one weight, 1.0, so the output is its value.",
        "Equal scores give equal weights: row 0 is its own value, row 1 the mean of both. Softmax over a row (dim=-1).",
        "softmax(q kᵀ / √D) v: divide by the square root of D = 16; hide with -inf *before* the softmax.",
        "There may be fewer queries than keys: take the shapes from q and k.",
        "Row 2 may look at nobody. A softmax over nothing but -inf is NaN; return zeros for it.",
        "Large scores: subtract the row's maximum before exp, as torch's softmax does, or exp overflows.",
    ]
    cases = [Case(args, _one_head(*args), hint) for args, hint in zip(inputs, hints, strict=True)]
    run_check("attention", function, cases)


def window_mask(function: Callable) -> None:
    """`window_mask(n, window)` -> bool [n, n]: the last `window` tokens, the looking one counted."""
    hints = {
        (7, 3): "Token 6 sees 4, 5 and 6: three tokens, itself counted, and nothing in the future.",
        (7, 1): "With a window of 1 each token sees itself alone.",
        (7, 7): "A window as long as the text hides nothing: this is the causal mask.",
        (7, 100): "A window longer than the text hides nothing: this is the causal mask.",
        (1, 1): "One token sees itself.",
        (12, 5): "Token i sees the tokens j with i - window < j <= i.",
    }
    cases = [Case((n, window), masks.causal(n, window=window), hint) for (n, window), hint in hints.items()]
    run_check("window_mask", function, cases)


def attention_share(function: Callable) -> None:
    """`attention_share(n, d)` -> FLOP of attention / FLOP of the token-wise work in one layer: 4n²d / 24nd²."""
    hints = {
        (1000, 4096): "Attention is 4·n²·d (two products, a multiply-add counts as 2), the rest 24·n·d².",
        (
            24_576,
            4096,
        ): "At n = 6d both cost the same: the answer is attention / rest, not attention / (attention + rest).",
        (10_000, 4096): "Ten times the tokens: attention costs 100 times as much, the rest 10 times.",
        (1, 128): "One token still has one score to compute; the share is small, not 0.",
    }
    run_check("attention_share", function, [Case(args, _share(*args), hint) for args, hint in hints.items()])


def _one_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return masked_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]


def _share(n: int, d: int) -> float:
    return (4 * n**2 * d) / (24 * n * d**2)
