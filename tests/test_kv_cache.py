"""The contiguous cache stores what it is given and refuses what does not fit; bytes are those of the chapter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm import KVCache, ModelConfig, kv_bytes_per_token, what_fits
from minillm.costs.shapes import LLAMA_2_7B, LLAMA_2_70B
from minillm.errors import CacheFullError, ConfigError

SMALL = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    max_position_embeddings=32,
)


def random_kv(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, 2, 2, generator=generator) for _ in "kv"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_what_was_appended_comes_back_in_order(pass_lengths):
    cache = KVCache(SMALL, sum(pass_lengths), torch.float32)
    stored = [([], []) for _ in range(2)]  # keys and values of each layer
    for i, length in enumerate(pass_lengths):
        for layer, (keys, values) in enumerate(stored):
            k, v = random_kv(length, seed=2 * i + layer)
            keys.append(k)
            values.append(v)
            all_keys, all_values = cache.append(layer, k, v)
            assert torch.equal(all_keys, torch.cat(keys))
            assert torch.equal(all_values, torch.cat(values))
        cache.advance(length)
    assert cache.length == cache.capacity == sum(pass_lengths)


def test_length_counts_a_pass_only_when_it_is_over():
    cache = KVCache(SMALL, 8, torch.float32)
    for layer in range(2):
        cache.append(layer, *random_kv(3))
        assert cache.length == 0
    cache.advance(3)
    assert cache.length == 3


def test_a_pass_that_does_not_fit_is_refused_and_changes_nothing():
    cache = KVCache(SMALL, 4, torch.float32)
    for layer in range(2):
        cache.append(layer, *random_kv(3))
    cache.advance(3)
    keys, values = cache.keys[:, :3].clone(), cache.values[:, :3].clone()
    with pytest.raises(CacheFullError, match="2 tokens .* 3 cached .* capacity is 4"):
        cache.append(0, *random_kv(2, seed=1))
    assert cache.length == 3
    assert torch.equal(cache.keys[:, :3], keys)
    assert torch.equal(cache.values[:, :3], values)
    assert cache.append(0, *random_kv(1))[0].shape == (4, 2, 2)  # what fits still goes in


def test_a_cache_of_no_tokens_is_refused():
    with pytest.raises(ConfigError, match="capacity is 0"):
        KVCache(SMALL, 0, torch.float32)


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_allocated_bytes_are_capacity_times_bytes_per_token(dtype, bytes_each):
    assert KVCache(SMALL, 10, dtype).num_bytes == 10 * kv_bytes_per_token(SMALL, bytes_each)


@pytest.mark.parametrize(
    ("config", "num_tokens", "num_bytes"),
    [
        (LLAMA_2_7B, 1, 524_288),
        (LLAMA_2_7B, 1000, 500 * 2**20),  # the chapter's "500 MB" are MiB
        (LLAMA_2_7B, 5000, 2_621_440_000),  # exercise 5.1: ten requests of 500
        (LLAMA_2_70B, 1, 327_680),  # 8 key-value heads: less than the 7B
    ],
)
def test_cache_bytes_are_those_of_the_chapter(config, num_tokens, num_bytes):
    assert num_tokens * kv_bytes_per_token(config) == num_bytes


def test_what_fits_divides_the_card_into_weights_reserve_and_cache():
    fit = what_fits(LLAMA_2_7B, 24 * 10**9)
    assert LLAMA_2_7B.num_parameters == 6_738_415_616
    assert fit.weight_bytes == 2 * 6_738_415_616
    assert fit.reserved_bytes == 2_400_000_000
    assert fit.cache_bytes == 24 * 10**9 - 2 * 6_738_415_616 - 2_400_000_000
    assert fit.num_tokens == fit.cache_bytes // 524_288 == 15_493
    assert fit.num_requests(4096) == 3


def test_nothing_fits_beside_weights_that_do_not():
    fit = what_fits(LLAMA_2_70B, 80 * 10**9)
    assert (fit.cache_bytes, fit.num_tokens, fit.num_requests(100)) == (0, 0, 0)


@pytest.mark.parametrize(
    "arguments", [{"card_bytes": 0}, {"dtype_bytes": 0}, {"reserved_share": 1.0}, {"reserved_share": -0.1}]
)
def test_what_fits_refuses_impossible_sizes(arguments):
    (value,) = arguments.values()
    with pytest.raises(ConfigError, match=str(value)):
        what_fits(LLAMA_2_7B, **{"card_bytes": 24 * 10**9} | arguments)
