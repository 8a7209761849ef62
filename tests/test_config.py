"""Impossible shapes are refused with their numbers; derived sizes follow; importing minillm loads no torch."""

import dataclasses
import subprocess
import sys

import pytest

import minillm
from minillm import ModelConfig, RopeConfig
from minillm.costs.shapes import LLAMA_2_7B, LLAMA_2_70B
from minillm.errors import ConfigError, MiniLLMError

SHAPE = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("field", SHAPE)
def test_every_size_is_at_least_1(field):
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{field} is {value}.*at least 1"):
            ModelConfig(**SHAPE | {field: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_key_value_heads": 3}, "4 query heads.*3 key-value heads"),
        ({"num_key_value_heads": 8}, "4 query heads.*8 key-value heads"),
        ({"head_dim": 5}, "head_dim is 5.*even"),
        ({"sliding_windows": (4, None)}, "2 sliding windows.*3 layers"),
        ({"sliding_windows": (4, 0, 4)}, "sliding_windows.*at least 1"),
        ({"num_tokens": 11}, "num_tokens is 11.*10"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"eos_token_ids": (3, 10)}, "eos token id 10.*10"),
        ({"eos_token_ids": (-1,)}, "eos token id -1"),
    ],
)
def test_contradictions_are_refused_with_their_numbers(changed, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SHAPE | changed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling": "yarn"}, "'yarn'.*'default', 'linear', 'llama3'"),
        ({"theta": 0.0}, r"theta \(0.0\)"),
        ({"factor": -2.0}, r"factor \(-2.0\)"),
        ({"scaling": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "got 4.0 and 1.0"),
    ],
)
def test_impossible_rope_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**values)


def test_derived_sizes():
    config = ModelConfig(**SHAPE, num_tokens=7, sliding_windows=(None, 4, 4))
    assert (config.query_size, config.key_value_size, config.num_sampled_ids) == (24, 12, 7)
    assert [config.sliding_window(layer) for layer in range(3)] == [None, 4, 4]
    without = ModelConfig(**SHAPE)
    assert (without.num_sampled_ids, without.sliding_window(2)) == (10, None)


def test_published_shapes_have_the_published_number_of_parameters():
    assert LLAMA_2_7B.num_parameters == 6_738_415_616
    assert LLAMA_2_70B.num_parameters == 68_976_648_192


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SHAPE).vocab_size = 3


def test_every_name_minillm_promises_exists():
    assert set(minillm.__all__) <= set(dir(minillm))
    for name in minillm.__all__:
        assert getattr(minillm, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no_such_name"):
        minillm.no_such_name  # noqa: B018


def test_every_error_is_a_minillm_error_and_a_value_error():
    from minillm import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    kinds.remove(errors.WorkerDiedError)  # which no caller can correct
    assert len(kinds) > 5
    assert all(issubclass(kind, MiniLLMError) and issubclass(kind, ValueError) for kind in kinds)


def test_importing_the_parts_without_tensors_loads_neither_torch_nor_transformers():
    code = (
        "import sys, minillm, minillm.trace.events, minillm.model.config, minillm.errors, minillm.sampling.params; "
        "sys.exit(' '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
