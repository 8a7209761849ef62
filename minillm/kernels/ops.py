"""The small operations between the matrix products of a step, in plain torch: what `triton_ops` fuses, in its names.

Each is what `model.py` computes, put together as one kernel can do it; and sampling, with noise that is counted
instead of drawn from a generator's state, so that any program can make the noise of any token by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels import reference
from minillm.model import rotate
from minillm.sampling import GREEDY_BELOW

PHILOX_ROUNDS = 10
PHILOX_FACTORS = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW_HALF = 0xFFFFFFFF  # of 64 bits
NOISE_STRIDE = (
    512  # one count makes the noise of four token ids, so far apart: a program reads 512 neighbours four times
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add [T, hidden] `x` to `residual` in place, and normalise the sum -> [T, hidden]."""
    residual += x
    return F.rms_norm(residual, weight.shape, weight, eps)


def norm_rotate_store(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """From [T, (Hq + 2 * Hkv) * D] of a fused projection: RMSNorm of q's and k's heads if there are weights [D], RoPE
    by `model.rope_rotation`'s tables, keys and values to their [T] slots of a layer's pool -> [T, Hq, D] queries.

    A token whose slot is negative is padding and not stored.
    """
    heads = qkv.unflatten(-1, (-1, keys.shape[-1]))  # [T, Hq + 2 * Hkv, D]
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)
    if q_weight is not None:
        q, k = (F.rms_norm(x, weight.shape, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    reference.store_kv(keys, values, slots, rotate(k, rotation), v)
    return rotate(q, rotation)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * ff] -> silu(first half) * second half, [T, ff]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sample_rows(logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    """[R, ids] logits of R requests -> [R] token ids, drawn from softmax(logits / temperature) in one pass.

    The largest of logits / temperature + Gumbel noise is a draw from the softmax (Gumbel 1954; Maddison et al. 2014):
    no sum, no sorting, no second look. `temperatures` [R] float32, below GREEDY_BELOW for the likeliest token, of
    several the first. `seeds` and `draws` [R] int64: the noise follows from them and the token id alone, so a request
    gets the same tokens whatever its neighbours are. -1 for a row that has NaN or +infinity.
    """
    greedy = temperatures < GREEDY_BELOW
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores / torch.where(greedy, 1.0, temperatures)[:, None]
    drawn = (scores + gumbel_noise(seeds, draws, logits.shape[-1])).argmax(-1)
    token_ids = torch.where(greedy, logits.argmax(-1), drawn)
    return torch.where(logits.amax(-1) < torch.inf, token_ids, -1)


def gumbel_noise(seeds: Tensor, draws: Tensor, num_ids: int) -> Tensor:
    """[R] seeds and numbers of draws -> [R, num_ids] float32 noise, the same for the same three numbers.

    Of a number u in (0, 1) noise is -log(-log(1 - u)): a large one comes of a small u, where float32 is finest.
    """
    counts = torch.arange(-(-num_ids // (4 * NOISE_STRIDE)) * NOISE_STRIDE, device=seeds.device)
    bits = torch.stack(philox(counts, seeds[:, None], draws[:, None]), dim=-2)  # [R, 4, counts]
    bits = bits.unflatten(-1, (-1, NOISE_STRIDE)).transpose(-3, -2).flatten(1)[:, :num_ids]
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # rounding must not make it 1
    exponential = torch.where(u < 2.0**-10, u + 0.5 * u * u, -torch.log(1 - u))
    return -torch.log(exponential)


def philox(counts: Tensor, seeds: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 random bits each, int64, for (counts, draws) under a seed.

    The counter is (counts, 0, low and high half of draws), the key both halves of the seed. Shapes broadcast.
    """
    key = [seeds & LOW_HALF, (seeds >> 32) & LOW_HALF]
    c0, c1, c2, c3 = counts & LOW_HALF, torch.zeros_like(counts), draws & LOW_HALF, (draws >> 32) & LOW_HALF
    for _ in range(PHILOX_ROUNDS):
        left, right = c0 * PHILOX_FACTORS[0], c2 * PHILOX_FACTORS[1]  # wraps at 64 bits: both halves stay right
        c0, c1 = ((right >> 32) & LOW_HALF) ^ c1 ^ key[0], right & LOW_HALF
        c2, c3 = ((left >> 32) & LOW_HALF) ^ c3 ^ key[1], left & LOW_HALF
        key = [(half + step) & LOW_HALF for half, step in zip(key, PHILOX_KEY_STEPS, strict=True)]
    return c0, c1, c2, c3
