"""Chapter 2, attention and masks: who may look at whom, and what looking costs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import costs
from minillm.attention import masked_attention, masks
from minillm.checks.base import Case, as_list, describe, realised, run_check, same_value
from minillm.model import ModelConfig


def causal_mask(function: Callable) -> None:
    """`causal_mask(n)` -> bool [n, n], lower-triangular with the diagonal."""
    hints = {
        1: "The answer is a bool tensor [n, n], not one of numbers. A token always sees itself.",
        2: "Row = the token that attends. Row 0 sees column 0 only, row 1 sees both. Is yours mirrored?",
        7: "Row i is True in the columns 0..i and False to the right of them.",
        12: "The size must follow n.",
    }
    run_check("causal_mask", function, [Case((n,), masks.causal(n), hint) for n, hint in hints.items()])


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
    """`window_mask(n, window)` -> bool [n, n]: the last `window` tokens, itself counted."""
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


def all_heads(function: Callable) -> None:
    """`all_heads(q, k, v, mask)`: [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, D], bool [Tq, Tk] -> [Tq, Hq, D]."""
    generator = torch.Generator().manual_seed(3)
    empty_row = masks.causal(4)
    empty_row[1] = False
    asked = [  # query heads, key heads, mask
        (1, 1, masks.causal(3), "One head: [:, 0] of q, k and v, and a dimension for the heads in the answer."),
        (3, 3, masks.causal(5), "As many key as query heads: each has its own. Stack the heads as dimension 1."),
        (
            4,
            2,
            masks.causal(5),
            "Query heads 0 and 1 share key head 0, 2 and 3 share key head 1: head h uses h // group.",
        ),
        (6, 1, masks.causal(2), "All query heads share the one key head: group = Hq // Hkv."),
        (4, 2, masks.rectangular(2, 6), "There may be fewer queries than keys: the answer has Tq rows."),
        (2, 1, empty_row, "A row that may see nothing gives zeros in every head: your `attention` does that."),
    ]
    cases = []
    for num_heads, num_kv_heads, mask, hint in asked:
        queries, keys = mask.shape
        q = torch.randn(queries, num_heads, 8, generator=generator)
        k, v = torch.randn(2, keys, num_kv_heads, 8, generator=generator)
        cases.append(Case((q, k, v, mask), masked_attention(q, k, v, mask), hint))
    run_check("all_heads", function, cases)


def layer_flops(function: Callable) -> None:
    """`layer_flops(config, n)` -> (FLOP of the token-wise products, FLOP of attention) of one layer."""
    hints = {
        (costs.LLAMA_2_7B, 1000): "A multiply-add is 2 FLOP; every weight is used once per token.",
        (costs.LLAMA_2_7B, 1): "One token has one pair per head.",
        (costs.LLAMA_3_8B, 100): "Fewer key heads: k and v have config.key_value_size numbers each, q has query_size.",
        (costs.QWEN3_0_6B, 3): "The heads together may be wider than hidden_size: use config.query_size.",
    }
    cases = [Case(args, _layer_flops(*args), hint) for args, hint in hints.items()]
    run_check("layer_flops", function, cases, show=_numbers, advise=_which_flops)


def _layer_flops(config: ModelConfig, n: int) -> tuple[int, int]:
    whole = costs.tokenwise_flops(config, n, num_logit_rows=0), costs.attention_flops(config, n * n)
    return whole[0] // config.num_hidden_layers, whole[1] // config.num_hidden_layers


def _numbers(answer: Any) -> str:
    """Both numbers, with separators: they are long."""
    answer = as_list(answer)
    if not isinstance(answer, list):
        return describe(answer)
    return ", ".join(f"{each:,}" if isinstance(each, (int, float)) else describe(each) for each in answer)


def _which_flops(got: Any, case: Case) -> str | None:
    got = as_list(got)
    if not isinstance(got, list) or len(got) != 2:
        return "Return two numbers: (token-wise, attention)."
    if same_value(got[0], case.expected[0]):
        return "The first number is right. Attention is q kᵀ and weights @ v, n² · query_size multiply-adds each."
    if same_value(got[1], case.expected[1]):
        return f"The second number is right. Token-wise: q, k, v, output, and three matrices of the MLP. {case.hint}"
    return None


LOOKS = 3  # that are enough, however long the row


class Row:
    """A row of prompts under a mask that is not given; counts how often it was looked at."""

    __name__ = "look"

    def __init__(self, starts: Sequence[int], size: int, window: int):
        prompt = torch.zeros(size, dtype=torch.long).index_fill(0, torch.tensor(starts), 1).cumsum(0)
        self.mask = (prompt[:, None] == prompt) & masks.causal(size, window=window)
        self.num_looks = 0

    def __call__(self, replaced: Sequence[int]) -> Tensor:
        """bool [n]: the rows that change in a single layer when the tokens at these places are replaced.

        The places are numbers, as in `look([0, 7])`; a bool tensor [n] marks them.
        """
        self.num_looks += 1
        if isinstance(replaced, Tensor) and replaced.dtype == torch.bool:  # one flag for each token
            replaced = replaced.nonzero().flatten()
        places = torch.tensor([int(place) for place in replaced], dtype=torch.long)
        return self.mask[:, places].any(-1)


class Found(NamedTuple):
    """What a call gave back, and how often it looked."""

    mask: Any
    num_looks: int
    is_budget: bool = False  # fewer looks are right too


def find_mask(function: Callable) -> None:
    """`find_mask(look, n)` -> bool [n, n], found with at most three looks."""

    def watched(look: Row, size: int) -> Found:
        found = realised(function(look, size))
        return Found(found, look.num_looks)

    rows = [
        ([0], 8, 3, "A single prompt: its window is as long as the rows that change with token 0."),
        ([0, 9, 14, 31], 48, 5, "Replace every w-th token: where a row does not change, a prompt has ended before it."),
        ([0, 8, 16, 40], 64, 8, "A border right before a replaced token is not seen: shift the places by one."),
        ([0, 7, 13, 22], 31, 6, "The row may end before the last window does."),
        ([0, 3, 6, 9], 12, 3, "Prompts may be as short as the window."),
        ([0, 100, 101], 150, 1, "With a window of 1 each token sees itself alone."),
    ]
    cases = [
        Case((Row(starts, n, window), n), Found(Row(starts, n, window).mask, LOOKS, is_budget=True), hint)
        for starts, n, window, hint in rows
    ]
    run_check("find_mask", watched, cases, same=_same_found, show=_show_found)


def _same_found(got: Found, expected: Found) -> bool:
    return got.num_looks <= expected.num_looks and same_value(got.mask, expected.mask)


def _show_found(found: Found) -> str:
    looks = f"{found.num_looks} look" + ("" if found.num_looks == 1 else "s")
    return f"{describe(found.mask)} in {'at most ' if found.is_budget else ''}{looks}"


def _one_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return masked_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]
