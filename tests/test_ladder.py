"""Naive, cached, chunked and ragged generation give the same logits and tokens, each with the work it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import (
    CachedAttention,
    KVCache,
    SamplingParams,
    generate_cached,
    generate_chunked,
    generate_naive,
    generate_ragged,
    masked_attention,
    sdpa_attention,
)
from minillm.attention import masks
from minillm.ladder.generation import as_tensor, positions
from tiny_models import LADDER_TOLERANCE, TOLERANCE, ScriptedModel, all_logits, difference, random_token_ids

KINDS = ["llama", "mistral-window", "qwen2-window", "qwen3"]
KERNELS = [masked_attention, sdpa_attention]
PROMPT = random_token_ids(40, seed=1)
PASSES = [11, 1, 9, 3, 1, 1, 14]  # tokens in each pass: chunks of a prompt and decode steps, mixed; 40 together

token_ids = st.integers(0, 198)
prompts = st.lists(token_ids, min_size=1, max_size=24)


@torch.inference_mode()
def cached_logits(model, ids, passes, kernel=sdpa_attention) -> torch.Tensor:
    """[T, ids] logits of a sequence fed to one cache in passes of the given lengths."""
    cache = KVCache(model.config, len(ids) + 1, model.dtype)
    logits, start = [], 0
    for length in passes:
        new = as_tensor(ids[start : start + length], model)
        hidden = model(new, positions(start, start + length, model), CachedAttention(model.config, cache, kernel))
        cache.advance(length)
        logits.append(model.logits(hidden))
        start += length
    assert start == len(ids)
    return torch.cat(logits)


@st.composite
def sequence_in_passes(draw):
    """A sequence and how many of its tokens each pass computes."""
    passes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    length = sum(passes)
    return draw(st.lists(token_ids, min_size=length, max_size=length)), passes


# --- same logits, same tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_passes_give_the_logits_of_one_pass_at_every_position(kind, kernel, load):
    model = load(kind, torch.float64)
    assert difference(cached_logits(model, PROMPT, PASSES, kernel), all_logits(model, PROMPT)) <= LADDER_TOLERANCE


@given(case=sequence_in_passes())
def test_however_a_sequence_is_cut_into_passes_the_logits_are_the_same(case, load):
    ids, passes = case
    model = load("mistral-window", torch.float64)
    assert difference(cached_logits(model, ids, passes), all_logits(model, ids)) <= LADDER_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_cached_passes_agree_in_float32_when_teacher_forced(kind, load):
    model = load(kind, torch.float32)
    assert difference(cached_logits(model, PROMPT, PASSES), all_logits(model, PROMPT)) <= TOLERANCE[torch.float32]


def test_a_new_last_token_changes_no_earlier_row(load):
    model = load("llama", torch.float64)
    whole = all_logits(model, PROMPT)
    for length in (1, 7, 39):
        assert difference(all_logits(model, PROMPT[:length]), whole[:length]) <= LADDER_TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rung_says_the_same_tokens(kind, kernel, load):
    model = load(kind, torch.float64)

    @settings(max_examples=10)
    @given(prompt=prompts, chunk_size=st.integers(1, 10))
    def agree(prompt, chunk_size):
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        naive = generate_naive(model, prompt, params, kernel=kernel).token_ids
        assert generate_cached(model, prompt, params, kernel=kernel).token_ids == naive
        assert generate_chunked(model, prompt, params, chunk_size=chunk_size, kernel=kernel).token_ids == naive

    agree()


@pytest.mark.parametrize("dense", [True, False])
def test_ragged_says_the_tokens_each_prompt_says_alone(dense, load):
    model = load("mistral-window", torch.float64)

    @settings(max_examples=10)
    @given(several=st.lists(prompts, min_size=1, max_size=4), seed=st.integers(0, 99))
    def agree(several, seed):
        params = [SamplingParams(max_tokens=3 + i, temperature=float(i % 2), seed=seed) for i in range(len(several))]
        together = generate_ragged(model, several, params, dense=dense)
        alone = [generate_naive(model, prompt, own) for prompt, own in zip(several, params, strict=True)]
        assert [result.token_ids for result in together] == [result.token_ids for result in alone]

    agree()


def test_seeded_sampling_is_the_same_on_every_rung(load):
    model = load("llama", torch.float64)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    results = {generate(model, PROMPT, params).token_ids for generate in (generate_naive, generate_cached)}
    assert len(results) == 1
    assert (
        generate_cached(model, PROMPT, SamplingParams(max_tokens=20, temperature=1.0, seed=8)).token_ids not in results
    )


# --- the work each rung promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_output", [1, 2, 9])
@pytest.mark.parametrize("num_prompt", [1, 2, 17])
def test_counters_of_naive_and_cached_are_the_sums_of_the_chapter(num_prompt, num_output, load):
    model, prompt = load("llama"), PROMPT[:num_prompt]
    params = SamplingParams(max_tokens=num_output, ignore_eos=True)
    lengths = range(num_prompt, num_prompt + num_output)  # of the sequence at each pass

    naive = generate_naive(model, prompt, params).counters
    assert naive.forward_passes == num_output
    assert naive.tokens_computed == sum(lengths)
    assert naive.score_entries == sum(n * n for n in lengths)

    cached = generate_cached(model, prompt, params).counters
    assert cached.forward_passes == num_output
    assert cached.tokens_computed == num_prompt + num_output - 1
    assert cached.score_entries == num_prompt**2 + sum(lengths[1:])


def test_the_model_is_called_with_exactly_the_tokens_each_rung_needs():
    params = SamplingParams(max_tokens=3)
    calls = {}
    for name, generate in {
        "naive": generate_naive,
        "cached": generate_cached,
        "chunked": lambda *args: generate_chunked(*args, chunk_size=2),
    }.items():
        model = ScriptedModel([7, 8, 9], num_prompt_tokens=5)
        assert generate(model, [1, 2, 3, 4, 5], params).token_ids == (7, 8, 9)
        calls[name] = model.calls
    assert calls == {
        "naive": [(0, 5), (0, 6), (0, 7)],
        "cached": [(0, 5), (5, 1), (6, 1)],
        "chunked": [(0, 2), (2, 2), (4, 1), (5, 1), (6, 1)],
    }


@pytest.mark.parametrize(("dense", "score_entries"), [(True, (5 + 3) ** 2 + (6 + 4) ** 2), (False, 25 + 9 + 36 + 16)])
def test_dense_ragged_scores_all_pairs_and_sparse_only_each_prompts_own(dense, score_entries, load):
    results = generate_ragged(
        load("llama"), [PROMPT[:5], PROMPT[5:8]], SamplingParams(max_tokens=2, ignore_eos=True), dense=dense
    )
    assert results[0].counters.score_entries == score_entries
    assert results[0].counters.tokens_computed == 5 + 3 + 6 + 4


def test_the_cache_holds_no_more_than_it_needs(load, monkeypatch):
    capacities = []
    init = KVCache.__init__

    def recording_init(self, config, capacity, *args):
        capacities.append(capacity)
        init(self, config, capacity, *args)

    monkeypatch.setattr(KVCache, "__init__", recording_init)
    result = generate_cached(load("llama"), PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
    assert capacities == [len(PROMPT) + 4]  # the last token sampled is never fed back
    assert [step.cached_tokens for step in result.trace.steps] == [40, 41, 42, 43, 44]


# --- a pass that fails -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_pass_that_fails_half_way_leaves_the_cache_as_it_was(load):
    model = load("llama", torch.float64)
    cache = KVCache(model.config, len(PROMPT), model.dtype)
    attend = CachedAttention(model.config, cache)
    model(as_tensor(PROMPT[:30], model), positions(0, 30, model), attend)
    cache.advance(30)
    before = cache.keys[:, :30].clone()

    def fail_in_layer_1(layer, q, k, v):
        if layer == 1:
            raise RuntimeError("out of memory")
        return attend(layer, q, k, v)

    with pytest.raises(RuntimeError, match="out of memory"):
        model(as_tensor([0] * 10, model), positions(30, 40, model), fail_in_layer_1)
    assert cache.length == 30
    assert torch.equal(cache.keys[:, :30], before)

    logits = model.logits(model(as_tensor(PROMPT[30:], model), positions(30, 40, model), attend))
    assert difference(logits, all_logits(model, PROMPT)[30:]) <= LADDER_TOLERANCE


# --- broken twins: the comparison of logits must notice each ---------------------------------------------------------


def write_one_place_off(monkeypatch):
    def append(self, layer, k, v):
        start, end = self.length, self.length + k.shape[0]
        self.keys[layer, start + 1 : end + 1], self.values[layer, start + 1 : end + 1] = k, v
        return self.keys[layer, :end], self.values[layer, :end]

    monkeypatch.setattr(KVCache, "append", append)


def share_one_layer(monkeypatch):
    append = KVCache.append
    monkeypatch.setattr(KVCache, "append", lambda self, layer, k, v: append(self, 0, k, v))


def return_one_token_too_few(monkeypatch):
    append = KVCache.append

    def short(self, layer, k, v):
        keys, values = append(self, layer, k, v)
        start = 1 if self.length else 0  # the oldest token is lost
        return keys[start:], values[start:]

    monkeypatch.setattr(KVCache, "append", short)


def forget_to_advance(monkeypatch):
    monkeypatch.setattr(KVCache, "advance", lambda self, num_tokens: None)


def advance_one_too_far(monkeypatch):
    advance = KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda self, n: advance(self, n + (self.length == 0)))


def restart_positions(monkeypatch):
    monkeypatch.setitem(
        cached_logits.__wrapped__.__globals__, "positions", lambda start, end, model: torch.arange(end - start)
    )


def decode_positions_off_by_one(monkeypatch):
    shifted = lambda start, end, model: torch.arange(start, end) + (start > 0)  # noqa: E731
    monkeypatch.setitem(cached_logits.__wrapped__.__globals__, "positions", shifted)


def align_mask_at_the_top(monkeypatch):
    """Row r of a chunk sees keys 0..r, as if nothing came before it."""
    mask = lambda rows, columns, **_: torch.ones(rows, columns, dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr(masks, "rectangular", mask)


def see_the_whole_chunk(monkeypatch):
    monkeypatch.setattr(masks, "rectangular", lambda rows, columns, **_: torch.ones(rows, columns, dtype=torch.bool))


TWINS = [
    write_one_place_off,
    share_one_layer,
    return_one_token_too_few,
    forget_to_advance,
    advance_one_too_far,
    restart_positions,
    decode_positions_off_by_one,
    align_mask_at_the_top,
    see_the_whole_chunk,
]


@pytest.mark.parametrize("break_it", TWINS, ids=lambda twin: twin.__name__)
def test_the_ladder_fails_for_a_broken_twin(break_it, load, monkeypatch):
    model = load("llama", torch.float64)
    expected = all_logits(model, PROMPT)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what a twin reads by mistake must not depend on old memory
    break_it(monkeypatch)
    assert difference(cached_logits(model, PROMPT, PASSES), expected) > 1e-3
