"""Who may look at whom: boolean attention masks.

Every function returns a bool tensor [T_query, T_key]; row = the token that looks, column = the token it looks at,
True = may look. A False entry becomes -inf before the softmax and so weight 0 (Vaswani et al. 2017, section 3.2.3).
"""

from collections.abc import Sequence

import torch

from minillm.errors import Count, MaskError, Positive, check_device, checked

MOST_ENTRIES = 2**32  # of a mask, a byte each
_takes = checked(error=MaskError)


@_takes
def causal(num_tokens: Count, *, window: Positive | None = None, device=None) -> torch.Tensor:
    """Lower-triangular mask [n, n]: token i sees tokens 0..i, itself included.

    `window` limits the view to the last `window` tokens, the query's own included (Mistral 7B, section 2).
    Raises MaskError if `num_tokens` < 0 or `window` < 1.
    """
    return rectangular(num_tokens, num_tokens, window=window, device=device)


@_takes
def rectangular(num_queries: Count, num_keys: Count, *, window: Positive | None = None, device=None) -> torch.Tensor:
    """Causal mask [num_queries, num_keys] of the *last* `num_queries` tokens of a sequence of `num_keys`.

    The query in row r sits at position num_keys - num_queries + r. With one row this is a decode step (all True);
    with several it is a chunk of a prompt whose earlier part is already cached.
    Raises MaskError if there are more queries than keys, or a size is negative, or `window` < 1.
    """
    if num_queries > num_keys:
        raise MaskError(
            f"{num_queries} queries do not fit a sequence of {num_keys} keys: the queries are the last tokens of "
            "the sequence, so 0 <= num_queries <= num_keys"
        )
    _check_size(num_queries, num_keys)
    device = None if device is None else check_device("device", device)
    return visible(torch.arange(num_keys - num_queries, num_keys, device=device), num_keys, window)


@_takes
def visible(positions: torch.Tensor, num_keys: Count, window: Positive | None = None) -> torch.Tensor:
    """Which of the first `num_keys` tokens of its sequence each query sees: [..., Tq] positions -> [..., Tq, num_keys].

    A query sees tokens up to itself, only the last `window` of them if given; at position -1 it sees nothing.
    """
    _check_size(positions.numel(), num_keys)
    keys = torch.arange(num_keys, device=positions.device)
    mask = keys <= positions[..., None]
    if window is not None:
        mask &= keys > positions[..., None] - window
    return mask


@_takes
def left_padded(
    num_tokens: Count, padded_length: Count, *, window: Positive | None = None, device=None
) -> torch.Tensor:
    """Causal mask [padded_length, padded_length] of a prompt with pads in front, as one row of a static batch has it.

    Pads see nothing and are not seen: their rows and columns are all False.
    Raises MaskError if the tokens do not fit the padded length.
    """
    return padded(num_tokens, num_tokens, padded_length, padded_length, window=window, device=device).roll(
        padded_length - num_tokens, dims=1
    )


@_takes
def padded(
    num_queries: Count,
    num_keys: Count,
    num_rows: Count,
    num_columns: Count,
    *,
    window: Positive | None = None,
    device=None,
) -> torch.Tensor:
    """The rectangular mask of a request inside the larger [num_rows, num_columns] rectangle of its batch.

    The queries sit at the bottom, pads in front; the keys at the left, with room for longer requests after them. All
    else is False. Raises MaskError if they do not fit.
    """
    if num_queries > num_rows or num_keys > num_columns:
        raise MaskError(
            f"{num_queries} queries and {num_keys} keys do not fit a rectangle of {num_rows} x {num_columns}; "
            "pad to the longest request of the batch"
        )
    _check_size(num_rows, num_columns)
    device = None if device is None else check_device("device", device)
    mask = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=device)
    own = rectangular(num_queries, num_keys, window=window, device=device)
    mask[num_rows - num_queries :, :num_keys] = own
    return mask


@_takes
def block_diagonal(lengths: Sequence[Count], *, window: Positive | None = None, device=None) -> torch.Tensor:
    """Causal mask [n, n] of concatenated prompts, n = sum of `lengths`: no token sees another prompt.

    Raises MaskError if a length is negative.
    """
    _check_size(sum(lengths), sum(lengths))
    return torch.block_diag(*(causal(length, window=window, device=device) for length in lengths)).bool()


def _check_size(num_rows: int, num_columns: int) -> None:
    if num_rows * num_columns > MOST_ENTRIES:
        raise MaskError(
            f"a mask of {num_rows} x {num_columns} has more than {MOST_ENTRIES} entries; compute fewer tokens at once"
        )
