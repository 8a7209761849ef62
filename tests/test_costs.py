"""The arithmetic of shapes and cards: the chapter's numbers, and the counts of the model's own matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm import costs, shapes
from minillm.attention import CausalAttention, masked_attention
from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.model import Decoder

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
    billions = {name: round(shape.num_parameters / 1e9, 2) for name, shape in shapes.SHAPES.items()}
    assert billions == {
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
