"""Peak memory is measured as it is calculated and falls with the chunk; chunked generation says what naive says."""

import dataclasses
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import ModelConfig, SamplingParams, generate_cached, generate_chunked, generate_naive
from minillm.attention import masks
from minillm.attention.attention import masked_attention
from minillm.costs.activations import activation_bytes, chunk_that_fits
from minillm.costs.kv_bytes import kv_bytes_per_token
from minillm.costs.peak_memory import PeakMemory
from minillm.costs.shapes import LLAMA_2_7B, LLAMA_3_8B, SHAPES
from minillm.errors import ConfigError
from minillm.ladder import generation
from minillm.model.decoder import Decoder
from tiny_models import LADDER_TOLERANCE, difference, random_token_ids

THIN = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
)
WIDE = dataclasses.replace(THIN, hidden_size=128, intermediate_size=1024, num_attention_heads=1, num_key_value_heads=1)
LONG = random_token_ids(1024, vocab_size=50)
PROMPT = random_token_ids(40, seed=1)
ONE = SamplingParams(max_tokens=1, ignore_eos=True)
SIX = SamplingParams(max_tokens=6, ignore_eos=True)


def peak_beside_cache(model: Decoder, prompt: list[int], chunk_size: int) -> int:
    """Measured bytes at the peak of reading a prompt with the readable kernel, without its cache."""
    with PeakMemory() as memory:
        generate_chunked(model, prompt, ONE, chunk_size=chunk_size, kernel=masked_attention)
    return memory.peak_bytes - kv_bytes_per_token(model.config, dtype_bytes=4) * len(prompt)


# --- measured --------------------------------------------------------------------------------------------------------


def test_what_is_alive_at_once_counts_and_what_is_freed_does_not():
    with PeakMemory() as memory:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1  # 8,000
        del first
        third = second * 2  # 8,000 again
        del second, third
        torch.zeros(1500)  # 6,000
    assert memory.peak_bytes == 8000


def test_views_and_writing_in_place_take_no_memory():
    with PeakMemory() as memory:
        tensor = torch.zeros(10, 100)
        tensor.add_(1)[3:].T.unflatten(0, (-1, 10))[0] += 5
        assert tensor.view(-1).chunk(2)[0].data_ptr() == tensor.data_ptr()
    assert memory.peak_bytes == 4000


def test_tensors_from_outside_and_views_of_them_do_not_count():
    outside = torch.ones(100, 100)
    with PeakMemory() as memory:
        torch.mul(outside[:50].T, 2, out=outside[50:].T)
        outside[0].sum()
    assert memory.peak_bytes == 4  # the sum


def test_operations_within_one_operation_are_seen():
    x = torch.ones(4, 100, 50)
    with PeakMemory() as memory:
        torch.einsum("bik,bjk->bij", x, x).sum()
    assert memory.peak_bytes >= 4 * 4 * 100 * 100


def test_measuring_changes_nothing_and_ends_with_the_block():
    model = Decoder(THIN)
    plain = generate_chunked(model, LONG[:50], SIX, chunk_size=7)
    with PeakMemory() as memory:
        watched = generate_chunked(model, LONG[:50], SIX, chunk_size=7)
    peak = memory.peak_bytes
    kept = torch.zeros(10_000_000)
    assert (watched.token_ids, memory.peak_bytes) == (plain.token_ids, peak)
    assert peak < kept.nbytes


def test_an_error_in_the_block_passes_through_and_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="half way"), PeakMemory() as memory:
        torch.zeros(100)
        raise RuntimeError("half way")
    assert memory.peak_bytes == 400
    with PeakMemory() as after:
        torch.zeros(10)
    assert after.peak_bytes == 40


@pytest.mark.gpu
def test_on_cuda_the_allocator_is_asked():
    with PeakMemory("cuda") as memory:
        first = torch.zeros(1 << 20, device="cuda")
        second = first + 1
        del first, second
    assert 2 << 22 <= memory.peak_bytes <= 3 << 22


# --- calculated ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [THIN, WIDE], ids=["scores are most", "the MLP is most"])
@pytest.mark.parametrize("chunk_size", [1024, 512, 128, 100])
def test_measured_is_calculated_within_a_twentieth(config, chunk_size):
    gc.collect()
    measured = peak_beside_cache(Decoder(config), LONG, chunk_size)
    calculated = activation_bytes(config, chunk_size, len(LONG), dtype_bytes=4)
    assert measured == pytest.approx(calculated.total, rel=0.05)
    assert (calculated.total == calculated.mlp_tokens) == (config is WIDE)


def test_the_peak_falls_as_chunks_shrink_and_layers_do_not_raise_it():
    chunk_sizes = (1024, 512, 256, 128, 64)
    model, deep = Decoder(THIN), Decoder(dataclasses.replace(THIN, num_hidden_layers=4))
    peaks = [peak_beside_cache(model, LONG, chunk_size) for chunk_size in chunk_sizes]
    assert all(larger > 1.8 * smaller for larger, smaller in zip(peaks, peaks[1:], strict=False))
    assert peak_beside_cache(deep, LONG, 256) == pytest.approx(peaks[2], rel=0.01)


def test_a_fused_kernel_needs_no_table_of_scores():
    plain = activation_bytes(LLAMA_2_7B, 4096, 100_000)
    fused = activation_bytes(LLAMA_2_7B, 4096, 100_000, fused=True)
    assert plain.scores == 2 * (3 * 32 * 4096 * 100_000 + 100_000 * 4096)
    assert plain.mask == 4096 * 100_000
    assert (fused.scores, fused.mask) == (0, 0)
    assert fused.mlp_tokens == plain.mlp_tokens == fused.total == 2 * 4096 * (2 * 4096 + 4 * 11_008)
    assert fused.attention == fused.attention_tokens == plain.attention_tokens


@pytest.mark.parametrize(
    ("chunk_size", "num_keys", "dtype_bytes", "told"),
    [
        (0, 8, 2, "chunk_size is 0"),
        (9, 8, 2, "a chunk of 9 tokens looks at 8 keys"),
        (4, 8, 0, "dtype_bytes is 0"),
    ],
)
def test_impossible_chunks_are_refused(chunk_size, num_keys, dtype_bytes, told):
    with pytest.raises(ConfigError, match=told):
        activation_bytes(THIN, chunk_size, num_keys, dtype_bytes)


# --- what fits -------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(list(SHAPES)),
    free_bytes=st.integers(10_000_000, 100_000_000_000),
    num_tokens=st.integers(1, 20_000),
    fused=st.booleans(),
)
def test_the_chunk_fits_and_the_next_larger_does_not(name, free_bytes, num_tokens, fused):
    def needed(size):
        return activation_bytes(SHAPES[name], size, num_tokens, fused=fused).total

    if needed(1) > free_bytes:
        with pytest.raises(ConfigError, match=f"{free_bytes:,} are free"):
            chunk_that_fits(SHAPES[name], free_bytes, num_tokens, fused=fused)
        return
    chunk_size = chunk_that_fits(SHAPES[name], free_bytes, num_tokens, fused=fused)
    assert 1 <= chunk_size <= num_tokens
    assert needed(chunk_size) <= free_bytes
    if chunk_size < num_tokens:
        assert chunk_size & (chunk_size - 1) == 0
        assert needed(min(2 * chunk_size, num_tokens)) > free_bytes


def test_a_prompt_that_fits_whole_is_not_cut():
    assert chunk_that_fits(LLAMA_3_8B, 10**12, 3000) == 3000


def test_exactly_enough_is_enough_and_a_byte_less_is_not():
    enough = activation_bytes(LLAMA_2_7B, 64, 1000).total
    assert chunk_that_fits(LLAMA_2_7B, enough, 1000) == 64
    assert chunk_that_fits(LLAMA_2_7B, enough - 1, 1000) == 32


def test_no_room_and_no_prompt_are_refused():
    with pytest.raises(ConfigError, match="chunks of a single token need .* bytes .* 1,000 are free; shorten"):
        chunk_that_fits(LLAMA_2_7B, 1000, 4096)
    with pytest.raises(ConfigError, match="num_prompt_tokens is 0"):
        chunk_that_fits(LLAMA_2_7B, 10**9, 0)


# --- the rung of the ladder ------------------------------------------------------------------------------------------


def first_logits(model: Decoder, generate, *args, **options) -> torch.Tensor:
    """The logits from which a way of generating draws its first token."""
    drawn = []
    logits = model.logits
    model.logits = lambda hidden: drawn.append(logits(hidden)) or drawn[-1]
    try:
        generate(model, *args, ONE, **options)
    finally:
        model.logits = logits
    assert len(drawn) == 1, "the output head runs once, for the last token of the last chunk"
    return drawn[0]


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
def test_chunks_of_any_size_give_the_logits_and_tokens_of_one_pass(kind, load):
    model = load(kind, torch.float64)

    @settings(max_examples=15)
    @given(num_tokens=st.integers(2, 40), data=st.data())
    def agree(num_tokens, data):
        prompt = PROMPT[:num_tokens]
        chunk_size = data.draw(st.integers(1, num_tokens - 1))  # at least two chunks
        naive, chunked = (
            generate_naive(model, prompt, SIX),
            generate_chunked(model, prompt, SIX, chunk_size=chunk_size),
        )
        assert chunked.token_ids == generate_cached(model, prompt, SIX).token_ids == naive.token_ids
        chunks = [step for step in chunked.trace.steps if step.scheduled[0].why == "prefill"]
        assert len(chunks) == -(-num_tokens // chunk_size) >= 2
        assert max(step.num_tokens for step in chunks) == chunk_size
        assert chunked.counters.tokens_computed == num_tokens + 5
        assert sum(step.score_entries for step in chunks) == sum(
            (end - start) * end
            for start in range(0, num_tokens, chunk_size)
            for end in [min(start + chunk_size, num_tokens)]
        )
        expected = first_logits(model, generate_naive, prompt)
        assert difference(first_logits(model, generate_chunked, prompt, chunk_size=chunk_size), expected) <= (
            LADDER_TOLERANCE
        )

    agree()


def restart_positions(monkeypatch):
    monkeypatch.setattr(generation, "positions", lambda start, end, model: torch.arange(end - start))


def do_not_offset_the_mask(monkeypatch):
    """Row r of a chunk sees keys 0..r, as if the chunk were the first."""
    mask = lambda rows, columns, **_: torch.ones(rows, columns, dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr(masks, "rectangular", mask)


def see_the_own_chunk_only(monkeypatch):
    def mask(rows, columns, **_):
        before = torch.zeros(rows, columns - rows, dtype=torch.bool)
        return torch.cat([before, torch.ones(rows, rows, dtype=torch.bool).tril()], dim=1)

    monkeypatch.setattr(masks, "rectangular", mask)


@pytest.mark.parametrize(
    "break_it", [restart_positions, do_not_offset_the_mask, see_the_own_chunk_only], ids=lambda twin: twin.__name__
)
def test_a_broken_twin_of_chunked_is_noticed(break_it, load, monkeypatch):
    model = load("llama", torch.float64)
    expected = first_logits(model, generate_cached, PROMPT)
    break_it(monkeypatch)
    in_one_pass = first_logits(model, generate_cached, PROMPT)  # without a second chunk there is nothing to break
    assert difference(in_one_pass, expected) <= LADDER_TOLERANCE
    assert difference(first_logits(model, generate_chunked, PROMPT, chunk_size=16), expected) > 1e-3
