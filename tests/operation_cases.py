"""What the fused small operations must give, and a forward pass made of them, for any module that has them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm import sampling
from minillm.kernels import dispatch
from minillm.kernels.dispatch import PagedAttention, fused
from minillm.model.config import RopeConfig
from minillm.model.decoder import rope_frequencies, rope_rotation, rotate
from test_kernel_attention import cache_of, step_of
from tiny_models import random_token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to values near 1: some roundings, of which torch makes one after each operation.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def check_add_rms_norm(fused, dtype: torch.dtype, num_tokens: int = 3, size: int = 100) -> None:
    x, residual = random(num_tokens, size, dtype=dtype), random(num_tokens, size, dtype=dtype, seed=1)
    residual[0] *= 1e-3  # small enough for eps to count
    x[0] *= 1e-3
    weight, eps = random(size, dtype=dtype, seed=2), 1e-5
    total = residual + x
    out = fused.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(residual, total)
    assert_near(out, F.rms_norm(total, (size,), weight, eps))


def check_silu_mul(fused, dtype: torch.dtype, num_tokens: int = 3, size: int = 1100) -> None:
    gate_up = 3 * random(num_tokens, 2 * size, dtype=dtype)
    gate_up[0, :2] = torch.tensor([-100.0, 100.0])
    gate, up = gate_up.chunk(2, dim=-1)
    assert_near(fused.silu_mul(gate_up), F.silu(gate) * up)


def check_norm_rotate_store(fused, dtype: torch.dtype, head_size: int = 32, heads=(6, 3), normed=True) -> None:
    num_heads, num_kv_heads = heads
    qkv = random(5, (num_heads + 2 * num_kv_heads) * head_size, dtype=dtype)
    qkv[1] *= 1e-3  # small enough for eps to count
    weights = [1 + random(head_size, dtype=dtype, seed=seed) if normed else None for seed in (1, 2)]
    positions = torch.tensor([0, 7, 100, 3, 1], device=DEVICE)
    rotation = rope_rotation(rope_frequencies(RopeConfig(), head_size).to(DEVICE), positions, dtype)
    slots = integers(20, -1, 33, 47, 16)
    # The layer in the middle of three: what is written beside it shows.
    pool = torch.full((2, 3, 3, 16, num_kv_heads, head_size), math.nan, dtype=dtype, device=DEVICE)
    pools = pool[:, 1]
    q = fused.norm_rotate_store(qkv, *heads, *weights, 1e-5, rotation, slots, *pools)

    parts = qkv.unflatten(-1, (-1, head_size)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    expected = list(parts)
    for i, weight in enumerate(weights):
        if weight is not None:
            expected[i] = F.rms_norm(expected[i], (head_size,), weight, 1e-5)
        expected[i] = rotate(expected[i], rotation)
    assert_near(q, expected[0])
    stored = slots >= 0
    for own, new in zip(pools, expected[1:], strict=True):
        flat = own.flatten(0, 1)
        assert_near(flat[slots[stored]], new[stored])
        flat[slots[stored]] = math.nan
    assert pool.isnan().all()  # nothing is written beside the slots


def both_forwards(model, operations, backend_name: str) -> tuple[Tensor, Tensor]:
    """Logits of a mixed step with random blocks before it: with the model's own operations, and fused, on equal caches.

    The fused layers behind the first have what is unchecked, as a runner's.
    """
    step = step_of([1, 17, 30], [(0, 3), (33, 36)])
    config = model.config
    backend = dispatch.choose(backend_name, config, model.dtype, DEVICE, 16)
    ways, found = (None, model.bound(fused(operations), fused(getattr(operations, "unchecked", operations)))), []
    for layers in ways:
        cache = cache_of(config, model.dtype, 20)
        token_ids = torch.tensor(random_token_ids(len(step.positions)), device=DEVICE)
        attend = PagedAttention(backend, config, cache.layers, step.inputs)
        found.append((model.logits(model(token_ids, step.positions, attend, layers)), cache.keys))
    (plain, own_keys), (ours, keys) = found
    torch.testing.assert_close(keys, own_keys, rtol=1e-4, atol=1e-4)
    return plain, ours


# --- sampling ---


def sampling_case(num_rows: int, num_ids: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """Logits, temperatures (every third row greedy), seeds over all 64 bits, numbers of draws."""
    temperatures = torch.tensor([0.0, 0.6, 1.0, 1e-6, 2.0, 0.8])[torch.arange(num_rows) % 6].to(DEVICE)
    seeds = torch.arange(num_rows, device=DEVICE) * 0x1234_5678_9ABC_DEF - 2**62
    draws = torch.arange(num_rows, device=DEVICE) * (2**31 - 1)
    return [3 * random(num_rows, num_ids, dtype=dtype, seed=seed), temperatures, seeds, draws]


def check_same_tokens(sampler, num_ids: int = 4096, dtype=torch.float32, num_rows: int = 6, seed: int = 0) -> None:
    case = sampling_case(num_rows, num_ids, dtype, seed)
    assert sampler.sample_rows(*case).tolist() == sampling.sample_rows(*case).tolist()


def check_the_last_token(sampler) -> None:
    """It is the likeliest, behind all whole tiles."""
    case = sampling_case(4, 2500)
    case[0][:, -1] = 50
    assert sampler.sample_rows(*case).tolist() == [2499] * 4


def check_first_of_equals(sampler, dtype: torch.dtype = torch.float16) -> None:
    """Greedy rows are argmax, and of equal logits the first."""
    logits, temperatures, *numbers = sampling_case(6, 2500, dtype)
    logits[0, [2499, 2100, 700]] = logits[0].max() + 1
    logits[3] = 2.0
    ids = sampler.sample_rows(logits, temperatures, *numbers)
    assert ids.dtype == torch.int64 and ids.shape == (6,)
    assert ids[[0, 3]].tolist() == [700, 0] == logits.argmax(-1)[[0, 3]].tolist()
    everything = sampler.sample_rows(logits, torch.zeros_like(temperatures), *numbers)
    assert torch.equal(everything, logits.argmax(-1))


def check_not_finite(sampler, temperature: float, place: int) -> None:
    """-1 for rows with NaN or +infinity, and for no others."""
    logits, temperatures, *numbers = sampling_case(5, 2500)
    temperatures.fill_(temperature)
    expected = sampler.sample_rows(logits, temperatures, *numbers)
    logits[1, place], logits[3, place] = math.nan, math.inf
    logits[4, 1:] = -math.inf
    ids = sampler.sample_rows(logits, temperatures, *numbers)
    assert ids.tolist() == [expected[0], -1, expected[2], -1, 0]
    logits[4] = -math.inf
    assert sampler.sample_rows(logits, temperatures, *numbers)[4] == 0


def check_rows_alone(sampler) -> None:
    """A row's token depends on nothing but its own."""
    logits, temperatures, seeds, draws = case = sampling_case(7, 2100)
    together = sampler.sample_rows(*case)
    alone = [sampler.sample_rows(*(x[row : row + 1] for x in case)) for row in range(7)]
    assert torch.equal(together, torch.cat(alone))
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4], device=DEVICE)
    assert torch.equal(together[order], sampler.sample_rows(*(x[order] for x in case)))
