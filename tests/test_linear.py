"""Packed weights: the same products but for rounding, and a model that still knows its output projection."""

import dataclasses

import pytest
import torch

from minillm import CausalAttention, ModelConfig
from minillm.model.decoder import Decoder
from minillm.model.linear import LEAST_PACKED, Linear, pack_linears, worth_packing

CONFIG = ModelConfig(
    vocab_size=4000,
    hidden_size=64,
    intermediate_size=1600,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
needs_onednn = pytest.mark.skipif(not worth_packing(torch.zeros(LEAST_PACKED)), reason="no oneDNN on this machine")


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_linear_is_packed_and_multiplies_the_same(bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear(500, 400, bias=bias), Linear(400, 10, bias=bias))
    x = torch.randn(3, 500)
    with torch.inference_mode():
        expected = model(x)
        pack_linears(model)
        assert model[0].weight is None and model[0].packed is not None
        assert model[1].packed is None  # small
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.skipif(
    not worth_packing(torch.zeros(1, dtype=torch.bfloat16)), reason="no bfloat16 products on this processor"
)
@pytest.mark.parametrize("shape", [(7, 40), (300, 500)])
def test_every_bfloat16_linear_is_packed_and_rounds_as_before(shape):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear(shape[1], shape[0], dtype=torch.bfloat16))
    x = torch.randn(3, shape[1]).bfloat16()
    with torch.inference_mode():
        exact = torch.nn.functional.linear(x.double(), model[0].weight.double(), model[0].bias.double())
        plain = (model(x).double() - exact).abs().max()
        pack_linears(model)
        assert model[0].weight is None and model[0].packed is not None
        assert (model(x).double() - exact).abs().max() <= 1.5 * plain


def test_what_is_not_packed():
    assert not worth_packing(torch.zeros(LEAST_PACKED, dtype=torch.float64))
    assert not worth_packing(torch.zeros(LEAST_PACKED - 1))


@needs_onednn
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_tokens", [None, 100])
def test_a_packed_model_gives_the_same_logits_however_few_ids_its_tokenizer_has(tied, num_tokens):
    """With 100 of 4000 ids the part of the output projection that is used is too small to pack; the whole is not."""
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(CONFIG, tie_word_embeddings=tied, num_tokens=num_tokens)).eval()
    token_ids = torch.arange(7)
    with torch.inference_mode():
        plain = model.logits(model(token_ids, token_ids, CausalAttention(model.config)))
        model.pack()
        assert model.layers[0].mlp.gate_up_proj.packed is not None
        packed = model.logits(model(token_ids, token_ids, CausalAttention(model.config)))
    assert packed.shape == (7, num_tokens or 4000)
    assert torch.allclose(packed, plain, atol=1e-5)


@pytest.mark.parametrize(("vocab_size", "num_tokens", "stride"), [(200, 130, 192), (150, 130, 130), (128, None, 128)])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_an_odd_vocabulary_are_rows_of_an_aligned_product(vocab_size, num_tokens, stride, tied):
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size, tie_word_embeddings=tied, num_tokens=num_tokens)
    model, hidden = Decoder(config), torch.randn(3, CONFIG.hidden_size)
    plain = model.logits(hidden)
    assert plain.is_contiguous() and plain.shape == (3, config.num_sampled_ids)
    away = model.to("meta").logits(hidden.to("meta"))  # as on a GPU
    assert away.shape == plain.shape and away.stride() == (stride, 1)
