"""Chapter 9, the inner loop of a decode kernel: it runs on requests of several lengths, beside attention in torch.

A wrong answer is compared with what typical mistakes give, to name the one that was made. Where there is no Triton the
check says so and checks nothing.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.checks.base import Case, CheckFailed, NotWrittenYet, call, describe, failure, is_written

KEYS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE = 8, 4, 2, 16
TOLERANCE = 1e-4  # of float32 sums over a few dozen keys, each near 1
TWICE = "`queries` are divided by √D already; here the scores are divided a second time."
NOT_KEPT = "The next tile needs the new best: is `best` still what it was before the loop?"
THIS_TILE = "The new best is the larger of two: the old one, and the tile's largest score."
INVERTED = "NaN: the old sums count for exp(best - new best), not exp(new best - best), which is infinite at first."
MISTAKES = (TWICE, NOT_KEPT, THIS_TILE, INVERTED)
TOO_EARLY = (
    "✗ my_decode: Triton was imported before the first cell of this notebook told it to interpret kernels. "
    "Restart the kernel, and run the notebook from its first cell on."
)
NO_PRODUCT = "A kernel has no `@`: multiply, with axes added by None, and take `tl.sum` over the axis that goes."


class Batch(NamedTuple):
    """Requests of random keys and values, once as they lie in the pool of a layer and once as they are."""

    q: Tensor  # [B, Hq, D]
    keys: Tensor  # [N, block_size, Hkv, D], NaN wherever no token is
    values: Tensor
    tables: Tensor  # [B, W], blocks in random order; behind a request's own ones stands a block of NaN
    own: list[tuple[Tensor, Tensor]]  # keys and values of each request, [length, Hkv, D] each

    def __repr__(self) -> str:
        lengths = [len(k) for k, _ in self.own]
        return f"lengths {lengths}, {self.group} query heads per key head, tiles of {KEYS} keys, blocks of {BLOCK_SIZE}"

    @property
    def group(self) -> int:
        return self.q.shape[1] // NUM_KV_HEADS


def my_decode(kernel: Any) -> None:
    """The page's `@triton.jit` kernel, launched on requests of several lengths, beside attention in torch."""
    if not is_written(kernel):
        raise NotWrittenYet("✗ my_decode: not written yet. Replace the `raise NotImplementedError` above.")
    if not hasattr(kernel, "__getitem__"):  # what Triton makes of a function can be launched on a grid
        print("my_decode: nothing was checked. Triton is not installed (there is one for Linux on x86_64 only).")
        return
    if not torch.cuda.is_available() and not _interprets():
        raise CheckFailed(TOO_EARLY)
    cases = [
        _loop([KEYS], 1, "One full tile: scores, the largest of a row, weights exp(score - largest), and two sums."),
        _loop([3], 1, "The text ends inside the tile: what is not seen gets the score -inf, before the maximum."),
        _loop([5 * KEYS], 1, "When a larger score comes, total and acc so far count for exp(best - new best) of it."),
        _loop([1, 2 * KEYS + 1, KEYS - 1], 1, "Several requests: each ends somewhere else."),
        _loop([4 * KEYS], 60, "Large scores: exp(score) alone is infinite. Take the largest so far off first."),
        _unseen("Maximum and sum are of the keys that are seen: give the others the score -inf *before* the maximum."),
        _loop([0, 4], 1, "A request without keys (padding) makes no round of the loop: best, total, acc stay."),
        _loop([KEYS + 3], 1, "Four query heads share a key head: a row of scores for each of them.", group=4),
    ]
    for case in cases:
        got = _answer(kernel, case)
        if not _near(got, case.expected):
            raise CheckFailed(_difference(got, case))
    print(f"✓ my_decode: {len(cases)} cases")


def _interprets() -> bool:
    """Whether Triton's own functions are interpreted, which was decided when Triton was first imported."""
    import triton.language as tl

    return type(tl.max).__name__ != "JITFunction"


# --- requests --------------------------------------------------------------------------------------------------------


def _loop(lengths: list[int], spread: float, hint: str, group: int = 2) -> Case:
    """Requests of these lengths; `spread`: how far from 0 their queries lie, and so the scores."""
    batch = _batch(lengths, spread, group)
    expected = torch.stack([_attention(q, k, v) for q, (k, v) in zip(batch.q, batch.own, strict=True)])
    return Case((batch,), expected, hint)


def _batch(lengths: list[int], spread: float, group: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = (torch.randperm(sum(counts), generator=generator) + 1).tolist()  # block 0 stays NaN
    pool = torch.full((2, 1 + sum(counts), BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE), math.nan)
    tables = torch.zeros(len(lengths), 1 + max(counts), dtype=torch.int64)
    own = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)], dtype=torch.int64)
        token = torch.arange(length)
        k, v = torch.randn(2, length, NUM_KV_HEADS, HEAD_SIZE, generator=generator)
        place = tables[row, token // BLOCK_SIZE], token % BLOCK_SIZE
        pool[0][place], pool[1][place] = k, v
        own.append((k, v))
    q = spread * torch.randn(len(lengths), NUM_KV_HEADS * group, HEAD_SIZE, generator=generator)
    return Batch(q, pool[0], pool[1], tables, own)


def _unseen(hint: str) -> Case:
    """Three keys with the scores -400: against the 0 of a key that is not seen they would count for nothing."""
    batch = _batch([3], 1, 2)
    for tensor, value in ((batch.q, -400 / math.sqrt(HEAD_SIZE)), (batch.keys, 1.0), (batch.values, 3.0)):
        tensor[~tensor.isnan()] = value
    own = [(torch.full_like(k, 1.0), torch.full_like(v, 3.0)) for k, v in batch.own]
    return Case((batch._replace(own=own),), torch.full_like(batch.q, 3.0), hint)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Hq, D] query at the end of [n, Hkv, D] keys and values -> [Hq, D]; zeros where there is no key."""
    scores, v = _scores(q, k), _shared(v, len(q))
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[Hq, n]."""
    return torch.einsum("hd,khd->hk", q, _shared(k, len(q))) / math.sqrt(HEAD_SIZE)


def _shared(x: Tensor, num_heads: int) -> Tensor:
    """[n, Hkv, D] -> [n, Hq, D]: to each query head the one it shares."""
    return x.repeat_interleave(num_heads // NUM_KV_HEADS, dim=1)


# --- the kernel ------------------------------------------------------------------------------------------------------


def _answer(kernel: Any, case: Case) -> Tensor:
    """What the kernel gives for a case; an exception in it becomes a failure that names it."""
    try:
        return call("my_decode", _launched(kernel), case, describe)
    except CheckFailed as failed:
        if "for @" not in str(failed):  # "unsupported operand type(s) for @"
            raise
        raise CheckFailed(str(failed).replace(case.hint, NO_PRODUCT)) from failed.__cause__


def _launched(kernel: Any) -> Callable[[Batch], Tensor]:
    """The kernel on the whole grid, one program per request and key head, where its kind runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def launched(batch: Batch) -> Tensor:
        q, keys, values, tables = (x.to(device) for x in batch[:4])
        lengths = torch.tensor([len(k) for k, _ in batch.own], device=device)
        out = torch.full_like(q, math.nan)
        kernel[(len(q), NUM_KV_HEADS)](
            q, keys, values, tables, lengths, out, tables.shape[1], 1 / math.sqrt(HEAD_SIZE),
            NUM_KV_HEADS=NUM_KV_HEADS, GROUP=batch.group, D=HEAD_SIZE, BLOCK_SIZE=BLOCK_SIZE, KEYS=KEYS,
        )  # fmt: skip
        return out.cpu()

    return launched


def _near(got: Tensor, expected: Tensor, equal_nan: bool = False) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE, equal_nan=equal_nan)


# --- what is said of a wrong answer ----------------------------------------------------------------------------------


def _difference(got: Tensor, case: Case) -> str:
    """The message: the first place where it differs, and what may have led there."""
    differs = ~torch.isclose(got, case.expected, rtol=0, atol=TOLERANCE)
    request, head, number = place = tuple(differs.nonzero()[0].tolist())
    came = f"got       {got[place]:.5g} for request {request}, query head {head}, number {number} of {HEAD_SIZE}"
    wanted = f"{case.expected[place]:.5g} there; {int(differs.sum())} of {got.numel()} numbers are wrong"
    hint = _mistake(got, case.args[0]) or case.hint
    return failure("my_decode", replace(case, hint=hint), came, wanted)


def _mistake(got: Tensor, batch: Batch) -> str | None:
    """The typical mistake that gives these very numbers."""
    for mistake in MISTAKES:
        tried = [_tiles(q, k, v, mistake) for q, (k, v) in zip(batch.q, batch.own, strict=True)]
        if _near(got, torch.stack(tried), equal_nan=True):
            return mistake
    return None


def _tiles(q: Tensor, k: Tensor, v: Tensor, mistake: str) -> Tensor:
    """`_attention` tile by tile, as a kernel with this mistake does it."""
    scores, v = _scores(q, k), _shared(v, len(q))
    if mistake == TWICE:
        scores = scores / math.sqrt(HEAD_SIZE)
    best, total, acc = torch.full((len(q),), -math.inf), torch.zeros(len(q)), torch.zeros_like(q)
    for first in range(0, len(k), KEYS):
        tile = scores[:, first : first + KEYS]
        new_best = tile.amax(-1) if mistake == THIS_TILE else torch.maximum(best, tile.amax(-1))
        weights = (tile - new_best[:, None]).exp()
        rescale = (new_best - best if mistake == INVERTED else best - new_best).exp()
        total = total * rescale + weights.sum(-1)
        acc = acc * rescale[:, None] + torch.einsum("hk,khd->hd", weights, v[first : first + KEYS])
        best = best if mistake == NOT_KEPT else new_best
    return acc / torch.where(total == 0, 1.0, total)[:, None]
