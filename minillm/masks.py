"""Who may look at whom: boolean attention masks.

Every function returns a bool tensor [T_query, T_key]; row = the token that looks, column = the token it looks at,
True = may look. A False entry becomes -inf before the softmax and so weight 0 (Vaswani et al. 2017, section 3.2.3).
"""

import torch

from minillm.errors import MaskError


def causal(num_tokens: int, *, window: int | None = None, device=None) -> torch.Tensor:
    """Lower-triangular mask [n, n]: token i sees tokens 0..i, itself included.

    `window` limits the view to the last `window` tokens, the looking one counted (Mistral 7B, section 2).
    Raises MaskError if `num_tokens` < 0 or `window` < 1.
    """
    return rectangular(num_tokens, num_tokens, window=window, device=device)


def rectangular(num_queries: int, num_keys: int, *, window: int | None = None, device=None) -> torch.Tensor:
    """Causal mask [num_queries, num_keys] of the *last* `num_queries` tokens of a sequence of `num_keys`.

    The query in row r sits at position num_keys - num_queries + r. With one row this is a decode step (all True);
    with several it is a chunk of a prompt whose earlier part is already cached.
    Raises MaskError if there are more queries than keys, or a size is negative, or `window` < 1.
    """
    if num_queries < 0 or num_queries > num_keys:
        raise MaskError(
            f"{num_queries} queries do not fit a sequence of {num_keys} keys: the queries are the last tokens of "
            "the sequence, so 0 <= num_queries <= num_keys"
        )
    if window is not None and window < 1:
        raise MaskError(f"window is {window}; a token sees at least itself, so use window >= 1 or None")
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_positions = torch.arange(num_keys, device=device)[None, :]
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return mask
