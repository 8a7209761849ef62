"""The arithmetic of shapes and cards: the chapter's numbers, and the counts of the model's own matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm import costs
from minillm.attention.attention import masked_attention
from minillm.bench.gpu.scale import FULL
from minillm.bench.gpu.workloads import w1_jobs
from minillm.costs import shapes
from minillm.errors import ConfigError
from minillm.ladder.attend import CausalAttention
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.simulation.cost_model import MODELS
from minillm.trace.events import ScheduledTokens, StepEvent

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


def test_published_shapes_have_their_published_sizes():
    billions = {name: round(shape.num_parameters / 1e9, 2) for name, shape in MODELS.items()}
    assert billions == {
        "LLaMA-7B": 6.74,
        "LLaMA-13B": 13.02,
        "Llama-2-7B": 6.74,
        "Llama-2-70B": 68.98,
        "Llama-3-8B": 8.03,
        "Llama-3.2-1B": 1.24,
        "Qwen3-0.6B": 0.6,
        "Qwen3-8B": 8.19,
    }


@pytest.mark.parametrize("num_tokens", [2, 7, 33])
def test_predicted_flops_are_those_torch_counts_in_a_forward_pass(num_tokens):
    model = Decoder(SMALL)
    attend = CausalAttention(SMALL, masked_attention)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        hidden = model(torch.zeros(num_tokens, dtype=torch.long), torch.arange(num_tokens), attend)
        model.logits(hidden[-1:])
    predicted = costs.tokenwise_flops(SMALL, num_tokens) + costs.attention_flops(SMALL, attend.score_entries)
    assert counter.get_total_flops() == predicted


def test_attention_is_a_small_part_of_the_work_at_a_thousand_tokens():
    share = costs.attention_flops(shapes.LLAMA_2_7B, 1000 * 1000) / costs.tokenwise_flops(shapes.LLAMA_2_7B, 1000)
    assert 0.03 < share < 0.05


def test_attention_overtakes_the_rest_near_six_times_the_width():
    width = shapes.LLAMA_2_7B.hidden_size

    def overtaken(n):
        return costs.attention_flops(shapes.LLAMA_2_7B, n * n) > costs.tokenwise_flops(shapes.LLAMA_2_7B, n)

    assert not overtaken(int(5.9 * width))
    assert overtaken(int(6.3 * width))


def test_caching_saves_about_half_of_the_number_of_tokens_in_flops():
    ratio = costs.naive_flops(SMALL, 1, 60) / costs.cached_flops(SMALL, 1, 60)
    assert ratio == pytest.approx((60 + 1) / 2, rel=0.2)


def test_a_7b_prompt_of_100_tokens_takes_an_rtx_4090_about_14_ms_not_200():
    assert 0.012 < costs.prefill_seconds(shapes.LLAMA_2_7B, shapes.RTX_4090, 100) < 0.015
    assert 0.012 < costs.decode_seconds(shapes.LLAMA_2_7B, shapes.RTX_4090, context=100) < 0.02


def test_decode_is_bound_by_arithmetic_only_in_large_batches():
    def seconds(batch_size):
        return costs.decode_seconds(shapes.LLAMA_2_7B, shapes.H200, context=0, batch_size=batch_size)

    assert seconds(1) == seconds(64)
    assert seconds(1024) > 2 * seconds(64)


def test_a_card_without_bandwidth_is_refused():
    with pytest.raises(ConfigError, match="bandwidth"):
        shapes.Card("broken", 1, 0.0, 1.0)


# --- rooflines of whole workloads ------------------------------------------------------------------------------------

MEASURED_H200 = shapes.Card("H200, measured", 141_000_000_000, 4.3e12, 790e12)


@pytest.mark.parametrize(
    "name, thousand_tokens_a_second",
    [("Qwen3-0.6B", 36.2), ("Llama-3.2-1B", 70.0), ("Qwen3-8B", 12.7), ("Llama-2-7B", 6.5)],
)
def test_what_256_requests_at_once_allow_step_by_step(name, thousand_tokens_a_second):
    """nano-vllm's requests; the table that the kernels are measured against."""
    lengths = [(len(job.prompt), job.num_outputs) for job in w1_jobs(FULL)]
    seconds = costs.workload_seconds(shapes.SHAPES[name], MEASURED_H200, lengths)
    assert round(sum(outputs for _, outputs in lengths) / seconds / 1000, 1) == thousand_tokens_a_second


def test_a_step_is_the_formula_of_the_roofline():
    card, config, batch, context = MEASURED_H200, shapes.QWEN3_0_6B, 256, 700
    weights = costs.matmul_parameters(config)
    cache = batch * context * 28 * 2 * 8 * 128 * 2 / 4.3e12
    expected = max(2 * weights / 4.3e12, 2 * weights * batch / 790e12) + cache
    assert costs.decode_seconds(config, card, context, batch) == pytest.approx(expected)
    only_read = costs.decode_seconds(shapes.LLAMA_2_7B, card, 0, 1)
    assert 1 / only_read == pytest.approx(325, abs=0.5)


def test_entries_of_chunks_add_up_to_those_of_the_prompt():
    n = 23
    assert costs.causal_entries(0, n) == sum(range(1, n + 1))
    assert costs.causal_entries(0, 7) + costs.causal_entries(7, 8) + costs.causal_entries(8, n) == n * (n + 1) / 2


def event(*parts: ScheduledTokens) -> StepEvent:
    return StepEvent(0, 0.0, 1.0, parts)


def whole(request_id: str, start: int, num_tokens: int, samples: bool = True) -> ScheduledTokens:
    return ScheduledTokens(request_id, start, num_tokens, "prefill", num_sampled=int(samples))


def test_a_trace_batched_as_the_workload_says_takes_as_long():
    lengths = [(5, 3), (9, 2)]
    steps = [
        event(whole("a", 0, 5), whole("b", 0, 9)),
        event(whole("a", 5, 1), whole("b", 9, 1)),
        event(whole("a", 6, 1)),
    ]
    expected = costs.workload_seconds(SMALL, MEASURED_H200, lengths)
    assert costs.trace_seconds(SMALL, MEASURED_H200, steps) == pytest.approx(expected)


def test_chunks_and_late_requests_take_longer():
    at_once = [event(whole("a", 0, 5), whole("b", 0, 9))]
    later = [event(whole("a", 0, 5)), event(whole("b", 0, 4, samples=False)), event(whole("b", 4, 5))]
    one, other = (costs.trace_seconds(SMALL, MEASURED_H200, steps) for steps in (at_once, later))
    reading = costs.num_layer_parameters(SMALL) * 2 / 4.3e12
    cached_beginning = 4 * 2 * 2 * 2 * 16 * 2 / 4.3e12  # tokens, K and V, layers, heads, D, bytes
    head = 97 * 32 * 2 / 4.3e12
    assert other - one == pytest.approx(2 * reading + head + cached_beginning)


def test_the_batch_from_which_arithmetic_takes_longer():
    batch = costs.compute_bound_batch(MEASURED_H200)
    assert batch == 184
    config, weights = shapes.LLAMA_3_8B, costs.matmul_parameters(shapes.LLAMA_3_8B)
    reading = 2 * weights / 4.3e12
    below, at = (costs.decode_seconds(config, MEASURED_H200, 0, size) for size in (batch - 1, batch))
    assert below == pytest.approx(reading) and at > reading
