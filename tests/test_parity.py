"""Our decoder gives transformers' logits and tokens, for every supported kind of checkpoint; broken twins do not."""

import copy
import math

import pytest
import torch

from minillm import CausalAttention, SamplingParams, generate_cached, generate_naive, masked_attention, sdpa_attention
from minillm.attention import masks
from minillm.model.config import RopeConfig
from minillm.model.decoder import rope_frequencies, rope_rotation
from tiny_models import BASE, KINDS, TOLERANCE, all_logits, difference, random_token_ids

PROMPT = random_token_ids(100)
causal = masks.causal  # the right one, while a twin has put another in its place


@torch.inference_mode()
def reference_logits(reference, token_ids) -> torch.Tensor:
    return reference(torch.tensor([token_ids])).logits[0]


def parity_error(model, reference, attend=None) -> float:
    """How far our logits of the whole prompt are from transformers', as a multiple of what is allowed."""
    ours = all_logits(model, PROMPT, attend)
    return difference(ours, reference_logits(reference, PROMPT)) / TOLERANCE[model.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, dtype, load, load_reference):
    assert parity_error(load(kind, dtype), load_reference(kind, dtype)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_plain_attention_reaches_parity_too(kind, load, load_reference):
    model = load(kind, torch.float64)
    attend = CausalAttention(model.config, kernel=masked_attention)
    assert parity_error(model, load_reference(kind, torch.float64), attend) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_tokens_are_those_of_transformers(kind, load, load_reference):
    whole = load_reference(kind).generate(torch.tensor([PROMPT]), max_new_tokens=64, do_sample=False)
    expected = tuple(whole[0, len(PROMPT) :].tolist())
    assert len(set(expected)) > 10, "the model repeats itself: the comparison would prove little"
    for generate in (generate_naive, generate_cached):
        assert generate(load(kind), PROMPT, SamplingParams(max_tokens=64, ignore_eos=True)).token_ids == expected


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_at_most_twice_as_wrong_as_transformers(kind, load, load_reference):
    theirs = load_reference(kind, torch.bfloat16)
    exact = reference_logits(copy.deepcopy(theirs).double(), PROMPT)  # the same rounded weights, exact arithmetic
    their_error = difference(reference_logits(theirs, PROMPT), exact)
    our_error = difference(all_logits(load(kind, torch.bfloat16), PROMPT), exact)
    assert 0 < our_error <= 2 * their_error


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_parameters_is_that_of_transformers(kind, load, load_reference):
    model = load(kind)
    assert model.config.num_parameters == sum(weight.numel() for weight in load_reference(kind).parameters())
    assert model.config.num_parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_angles_are_those_of_positions_that_bfloat16_does_not_have(dtype):
    """Of the whole numbers above 256, bfloat16 has every second; of those above 512, every fourth."""
    cos, signed_sin = rope_rotation(rope_frequencies(RopeConfig(), 8), torch.tensor([257, 1001]), dtype)
    assert cos[:, 0, 0].tolist() == pytest.approx([math.cos(257), math.cos(1001)], abs=5e-3)
    assert signed_sin[:, 0, 4].tolist() == pytest.approx([math.sin(257), math.sin(1001)], abs=5e-3)


def test_moving_every_position_alike_changes_nothing(load):
    """RoPE is relative: why the twin with wrong positions below shifts only half of them."""
    model = load("llama", torch.float64)
    ids, here = torch.tensor(PROMPT), torch.arange(len(PROMPT))
    with torch.inference_mode():
        at_0, at_50 = (model.logits(model(ids, here + start, CausalAttention(model.config))) for start in (0, 50))
    assert difference(at_50, at_0) <= TOLERANCE[torch.float32]  # angles are rounded to float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_angles_of_rope_are_exact_where_bfloat16_has_no_such_position(dtype):
    """257 and 1001 need more than bfloat16's 8 binary digits: rounded before the product, an angle is off by 1."""
    positions = torch.tensor([0, 1, 257, 1001])
    frequencies = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.cat((positions[:, None] * frequencies,) * 2, dim=-1)  # [4, 64], each frequency twice
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(32)
    cos, signed_sin = rope_rotation(rope_frequencies(RopeConfig(), 64), positions, dtype)
    allowed = torch.finfo(torch.bfloat16).eps / 2 if dtype == torch.bfloat16 else 2e-4
    assert (cos[:, 0].double() - angles.cos()).abs().max() <= allowed
    assert (signed_sin[:, 0].double() - sign * angles.sin()).abs().max() <= allowed


# --- broken twins: each makes one mistake that a reader could make, and the comparison above must notice it ----------


def shift_late_positions(model, monkeypatch):
    forward, late = model.forward, len(PROMPT) // 2
    monkeypatch.setattr(model, "forward", lambda ids, where, attend: forward(ids, where + (where >= late), attend))


def use_mask(change):
    """Every layer's mask is `change(mask, window)`."""

    def break_it(model, monkeypatch):
        monkeypatch.setattr(
            masks, "causal", lambda n, *, window=None, device=None: change(causal(n, window=window), window)
        )

    return break_it


def use_kernel(kernel):
    """Attention is computed by `kernel`."""

    def break_it(model, monkeypatch):
        monkeypatch.setattr("minillm.ladder.attend.CausalAttention.__call__", plain_call(kernel))

    return break_it


def plain_call(kernel):
    def call(self, layer, q, k, v):
        return kernel(q, k, v, masks.causal(len(q), window=self.config.sliding_window(layer)))

    return call


def group_by_repeat(q, k, v, mask):
    """Gives key head h to query heads h, h + Hkv, ... where neighbours should share one."""
    repeats = q.shape[1] // k.shape[1]
    return sdpa_attention(q, k.repeat(1, repeats, 1), v.repeat(1, repeats, 1), mask)


def scale_by_hidden_size(q, k, v, mask):
    """Divides by sqrt(hidden / heads) where it should be sqrt(head_dim)."""
    usual_head_dim = BASE["hidden_size"] // BASE["num_attention_heads"]
    return sdpa_attention(q * math.sqrt(q.shape[-1] / usual_head_dim), k, v, mask)


def zero(name):
    """The parameters called `name` are left out."""

    def break_it(model, monkeypatch):
        for parameter in named(model, name):
            parameter.zero_()

    return break_it


def swap_rows(name, first, second, size):
    """`size` rows from `first` on change places with those from `second` on, in the parameters called `name`."""

    def break_it(model, monkeypatch):
        for parameter in named(model, name):
            rows = parameter.clone()
            parameter[first : first + size] = rows[second : second + size]
            parameter[second : second + size] = rows[first : first + size]

    return break_it


def named(model, name):
    found = [parameter for full_name, parameter in model.named_parameters() if full_name.endswith(name)]
    assert found, f"no parameter is called {name}"
    return found


def forget_rope_scaling(model, monkeypatch):
    model.inv_freq = rope_frequencies(RopeConfig(theta=model.config.rope.theta), model.config.head_dim)


def rotate_neighbours(model, monkeypatch):
    """Pairs x[2i] with x[2i + 1], as Meta's own checkpoints do and transformers' do not."""

    def rotate(x, rotation):
        half = x.shape[-1] // 2
        cos, sin, even, odd = rotation[0][..., half:], rotation[1][..., half:], x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    monkeypatch.setattr("minillm.model.decoder.rotate", rotate)


def drop_qk_norm(model, monkeypatch):
    for layer in model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = None


def use_smaller_eps(model, monkeypatch):
    for norm in (module for module in model.modules() if hasattr(module, "eps")):
        norm.eps = 1e-6


def swap_norms(model, monkeypatch):
    for layer in model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def tie_embeddings(model, monkeypatch):
    model.lm_head = None


Q, KV, FF = 64, 32, BASE["intermediate_size"]  # rows of q, of k and v with two heads, of gate and up
TWINS = {
    "positions off by one from the middle on": ("llama", shift_late_positions),
    "mask transposed": ("llama", use_mask(lambda mask, window: mask.T)),
    "mask without diagonal": ("llama", use_mask(lambda mask, window: mask.tril(-1))),
    "no mask": ("llama", use_mask(lambda mask, window: torch.ones_like(mask))),
    "window one too small": ("mistral-window", use_mask(lambda mask, window: mask.triu(2 - window))),
    "window one too large": ("mistral-window", use_mask(lambda mask, window: causal(len(mask), window=window + 1))),
    "no window": ("mistral-window", use_mask(lambda mask, window: causal(len(mask)))),
    "window in every layer": ("qwen2-window", use_mask(lambda mask, window: mask.triu(1 - 9))),
    "heads grouped by repeat": ("llama", use_kernel(group_by_repeat)),
    "scaled by the hidden size": ("qwen3", use_kernel(scale_by_hidden_size)),
    "no RoPE scaling, linear": ("llama-rope-linear", forget_rope_scaling),
    "no RoPE scaling, llama3": ("llama-rope-llama3", forget_rope_scaling),
    "RoPE of neighbouring pairs": ("llama", rotate_neighbours),
    "no qk-norm": ("qwen3", drop_qk_norm),
    "wrong eps": ("llama", use_smaller_eps),
    "norms exchanged": ("llama", swap_norms),
    "q and k exchanged": ("llama-mha", swap_rows("qkv_proj.weight", 0, Q, Q)),
    "k and v exchanged": ("llama", swap_rows("qkv_proj.weight", Q, Q + KV, KV)),
    "k and v biases exchanged": ("qwen2", swap_rows("qkv_proj.bias", Q, Q + KV, KV)),
    "gate and up exchanged": ("llama", swap_rows("gate_up_proj.weight", 0, FF, FF)),
    "no qkv bias": ("qwen2", zero("qkv_proj.bias")),
    "no attention output bias": ("llama-biases-tied", zero("o_proj.bias")),
    "no MLP input bias": ("llama-biases-tied", zero("gate_up_proj.bias")),
    "no MLP output bias": ("llama-biases-tied", zero("down_proj.bias")),
    "output head tied though it is not": ("llama", tie_embeddings),
}


@pytest.mark.parametrize("twin", TWINS)
def test_parity_fails_for_a_broken_twin(twin, load, load_reference, monkeypatch):
    kind, break_it = TWINS[twin]
    model = load(kind)
    break_it(model, monkeypatch)
    assert parity_error(model, load_reference(kind)) > 10


def test_the_twins_own_wiring_is_right(load, load_reference, monkeypatch):
    """With the right kernel or mask put in the same way, parity holds: the twins fail for their mistake alone."""
    model = load("mistral-window")
    use_kernel(sdpa_attention)(model, monkeypatch)
    use_mask(lambda mask, window: mask)(model, monkeypatch)
    assert parity_error(model, load_reference("mistral-window")) <= 1
