"""Sampling in one pass over the logits, in Triton: `sampling.sample_rows`, with its noise made where it is added.

The logits are read once. With few rows, several programs share one, and a second kernel picks among their best. How
many depends only on shapes, so that CUDA graphs can be captured. Greedy rows make no noise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.checks import check_sample_rows
from minillm.kernels.triton_kernels import INTERPRETED, LIMITS, processors
from minillm.sampling import GREEDY_BELOW, NOISE_STRIDE, PHILOX_ROUNDS

SAMPLE_PROGRAMS = 8  # per processor, to share the logits among
MOST_PARTS = 64  # of a row of logits
LOADED = 16  # numbers of which a multiple is loaded together


def sample_rows(logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    """[R, ids] logits -> [R] token ids, drawn from softmax(logits / temperature), by counted noise. Raises KernelError.

    The same ids as `sampling.sample_rows`, unless two scores are equal up to rounding. Rows of logits may lie apart.
    """
    check_sample_rows(logits, temperatures, seeds, draws, LIMITS, rows_apart=True)
    num_rows, num_ids = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return token_ids
    parts, tiles_a_part = sample_parts(num_rows, num_ids, processors(logits.device))
    scores = torch.empty(num_rows, parts, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_rows, parts, dtype=torch.int32, device=logits.device)
    _sample_kernel[(num_rows, parts)](
        logits, temperatures, seeds, draws, scores, best, logits.stride(0), readable(logits), num_ids, tiles_a_part,
        STRIDE=NOISE_STRIDE, ROUNDS=PHILOX_ROUNDS, GREEDY=GREEDY_BELOW, COMPILED=not INTERPRETED, num_warps=4,
    )  # fmt: skip
    _pick_kernel[(num_rows,)](scores, best, token_ids, parts, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return token_ids


def readable(logits: Tensor) -> int:
    """How many numbers of each row to load: with some of those between rows they are a multiple of LOADED.

    Without such a gap, or where the memory ends after the last row's ids, just those.
    """
    (num_rows, num_ids), stride = logits.shape, logits.stride(0)
    end = logits.storage_offset() + num_rows * stride
    ends_behind = end * logits.element_size() <= logits.untyped_storage().nbytes()
    return min(stride, triton.cdiv(num_ids, LOADED) * LOADED) if ends_behind and stride >= num_ids else num_ids


def sample_parts(num_rows: int, num_ids: int, num_processors: int) -> tuple[int, int]:
    """Into how many parts a row of logits is cut, and how many tiles of 4 * NOISE_STRIDE ids each has at most."""
    tiles = triton.cdiv(num_ids, 4 * NOISE_STRIDE)
    parts = max(1, min(tiles, MOST_PARTS, SAMPLE_PROGRAMS * num_processors // num_rows))
    tiles_a_part = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, tiles_a_part), tiles_a_part


# --- kernels ---


@triton.jit
def _log2(x, COMPILED: tl.constexpr):
    """By the GPU's own instruction, which is off by at most 2^-22 near 1; `tl.log` is about 25 instructions."""
    if COMPILED:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _gumbel(bits, COMPILED: tl.constexpr):
    """Noise of 32 random bits, as `sampling.gumbel_noise` makes it, in units of ln 2 and minus a constant.

    Near 0, where the logarithm of 1 - u would be too coarse, a series makes it.
    """
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # 2^-32; 1 - 2^-24
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))  # next is u^5 / 5: 2 * 10^-7 of it at 1/32
    return -_log2(tl.where(u < 0.03125, series * 1.4426950408889634, -_log2(1.0 - u, COMPILED)), COMPILED)


@triton.jit
def _take_better(score, token_id, logits, first, noise, factor, num_read, num_ids, STRIDE: tl.constexpr):
    """The better of each lane's best so far and its next token: of equal ones the first stays.

    NaN once taken stays, because nothing is larger; it is what a logit that is NaN or +infinity gives.
    """
    own = first + tl.arange(0, STRIDE)
    logit = tl.load(logits + own, mask=own < num_read, other=float("-inf")).to(tl.float32)
    logit = tl.where(own < num_ids, logit, float("-inf"))  # what is read after them may be anything
    new = tl.where(logit < float("inf"), logit * factor + noise, float("nan"))
    better = (new > score) | (new != new)
    return tl.where(better, new, score), tl.where(better, own, token_id)


@triton.jit(
    do_not_specialize=["num_ids", "tiles_a_part"], do_not_specialize_on_alignment=["temperatures", "seeds", "draws"]
)
def _sample_kernel(
    logits, temperatures, seeds, draws, scores, best, row_stride, num_read, num_ids, tiles_a_part,
    STRIDE: tl.constexpr, ROUNDS: tl.constexpr, GREEDY: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """One part of one row of logits per program: tiles of 4 * STRIDE ids, whose noise STRIDE counts make."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    seed = tl.load(seeds + row)
    draw = tl.load(draws + row)
    logits += row * row_stride
    lane = tl.arange(0, STRIDE)
    first_tile = part * tiles_a_part
    end_tile = tl.minimum(first_tile + tiles_a_part, tl.cdiv(num_ids, 4 * STRIDE))
    score = tl.full([STRIDE], float("-inf"), tl.float32)
    token_id = first_tile * 4 * STRIDE + lane
    if temperature < GREEDY:
        for tile in range(4 * first_tile, 4 * end_tile):
            first = tile * STRIDE
            score, token_id = _take_better(score, token_id, logits, first, 0.0, 1.0, num_read, num_ids, STRIDE)
    else:
        factor = 1.4426950408889634 / temperature  # scores, too, in units of ln 2
        low = (draw & 0xFFFFFFFF).to(tl.uint32)
        high = ((draw >> 32) & 0xFFFFFFFF).to(tl.uint32)
        for tile in range(first_tile, end_tile):
            count = (tile * STRIDE + lane).to(tl.uint32)
            zero = count * 0
            n0, n1, n2, n3 = tl.philox(seed, count, zero, zero + low, zero + high, ROUNDS)
            first = tile * 4 * STRIDE
            noise = _gumbel(n0, COMPILED)
            score, token_id = _take_better(score, token_id, logits, first, noise, factor, num_read, num_ids, STRIDE)
            first += STRIDE
            noise = _gumbel(n1, COMPILED)
            score, token_id = _take_better(score, token_id, logits, first, noise, factor, num_read, num_ids, STRIDE)
            first += STRIDE
            noise = _gumbel(n2, COMPILED)
            score, token_id = _take_better(score, token_id, logits, first, noise, factor, num_read, num_ids, STRIDE)
            first += STRIDE
            noise = _gumbel(n3, COMPILED)
            score, token_id = _take_better(score, token_id, logits, first, noise, factor, num_read, num_ids, STRIDE)
    _store_best(scores, best, row * tl.num_programs(1) + part, score, token_id)


@triton.jit
def _store_best(scores, best, place, score, token_id):
    """The best of all lanes, of equal ones the lowest id; NaN if any lane has it."""
    broken = tl.max((score != score).to(tl.int32), axis=0) > 0
    most = tl.max(tl.where(score != score, float("-inf"), score), axis=0)
    tl.store(scores + place, tl.where(broken, float("nan"), most))
    tl.store(best + place, tl.min(tl.where(score == most, token_id, 0x7FFFFFFF), axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def _pick_kernel(scores, best, token_ids, num_parts, PARTS: tl.constexpr):
    """The best part of one row per program; -1 if any of them is NaN."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    real = part < num_parts
    score = tl.load(scores + row * num_parts + part, mask=real, other=float("-inf"))
    token_id = tl.load(best + row * num_parts + part, mask=real, other=0x7FFFFFFF)
    broken = tl.max((score != score).to(tl.int32), axis=0) > 0
    most = tl.max(tl.where(score != score, float("-inf"), score), axis=0)
    chosen = tl.min(tl.where(score == most, token_id, 0x7FFFFFFF), axis=0)
    tl.store(token_ids + row, tl.where(broken, -1, chosen).to(tl.int64))
