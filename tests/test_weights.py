"""Checkpoints load whole, in shards and in any dtype; whatever does not fit is refused with its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import minillm
from minillm import load_model
from minillm.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from minillm.weights import read_config
from tiny_models import BASE, all_logits, random_token_ids, random_transformers_model

PROMPT = random_token_ids(20)


def load_ids_only(folder, **options):
    return load_model(folder, skip_tokenizer_init=True, **options).model


@pytest.fixture
def copy(checkpoint, tmp_path):
    """kind -> folder of a copy that a test may break."""
    return lambda kind="llama": shutil.copytree(checkpoint(kind), tmp_path / kind)


def change_config(folder, **changed):
    """Write values into config.json; None removes the entry."""
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder, change):
    """Rewrite model.safetensors as `change(tensors)` leaves it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture
def no_allocation(monkeypatch):
    """Building a decoder fails the test."""
    monkeypatch.setattr("minillm.weights.Decoder", lambda config: pytest.fail("allocated for a bad checkpoint"))


# --- what loads ------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_the_whole_one(checkpoint, tmp_path):
    random_transformers_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    whole, sharded = load_ids_only(checkpoint("llama")), load_ids_only(tmp_path)
    assert torch.equal(all_logits(whole, PROMPT), all_logits(sharded, PROMPT))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", torch.bfloat16])
def test_weights_take_the_dtype_asked_for_and_rope_stays_float32(dtype, checkpoint):
    model = load_ids_only(checkpoint("llama"), dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert model.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.inv_freq.dtype == torch.float32
    assert torch.equal(model.inv_freq, load_ids_only(checkpoint("llama")).inv_freq)


def test_a_loaded_model_is_ready_for_inference_only(checkpoint):
    model = load_ids_only(checkpoint("llama"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_tokenizer_comes_along_and_hides_the_vocabularys_padding(copy, tokenizer):
    folder = copy()
    tokenizer.save_pretrained(folder)
    change_config(folder, vocab_size=512)
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(512, 64) for name in EMBEDDINGS}))
    model, loaded = load_model(folder)
    assert loaded.encode("the fox") == tokenizer.encode("the fox")
    assert model.config.vocab_size == 512
    assert model.config.num_tokens == len(tokenizer) < 512
    assert all_logits(model, [1, 2]).shape == (2, len(tokenizer))


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def test_a_tied_checkpoint_may_carry_its_output_head(copy):
    folder = copy("qwen3")
    before = all_logits(load_ids_only(folder), PROMPT)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(all_logits(load_ids_only(folder), PROMPT), before)


def test_old_checkpoints_may_carry_rope_frequencies(copy):
    folder = copy()
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_ids_only(folder)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"rope_theta": 5e5}, minillm.RopeConfig(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            minillm.RopeConfig(theta=5e5, scaling="linear", factor=2.0),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
             | {"original_max_position_embeddings": 64}},
            minillm.RopeConfig(scaling="llama3", factor=8.0, original_max_position=64),
        ),
    ],
)  # fmt: skip
def test_rope_as_config_files_wrote_it_before_transformers_5(old, expected, copy):
    folder = copy()
    change_config(folder, rope_parameters=None, **old)
    assert read_config(folder).rope == expected


def test_a_stray_sliding_window_has_no_effect_on_a_llama(copy):
    folder = copy()
    change_config(folder, sliding_window=5)
    assert read_config(folder).sliding_windows == ()


@pytest.mark.parametrize(
    ("kind", "windows"),
    [("llama", ()), ("mistral-window", (7, 7, 7)), ("qwen2", (None,) * 3), ("qwen2-window", (None, 9, 9))],
)
def test_windows_are_those_of_each_layer(kind, windows, checkpoint):
    config = read_config(checkpoint(kind))
    assert [config.sliding_window(layer) for layer in range(3)] == list(windows or (None,) * 3)


def test_eos_falls_back_from_generation_config_to_config_to_the_familys_default(copy):
    folder = copy()
    assert read_config(folder).eos_token_ids == (3, 5)
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=7)
    assert read_config(folder).eos_token_ids == (7,)
    change_config(folder, eos_token_id=None)
    assert read_config(folder).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "Qwen3ForCausalLM"]),
        ({"model_type": None, "architectures": None}, ["None", "MistralForCausalLM"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, ["'yarn'", "linear", "llama3"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["0.5"]),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(changed, said, copy, no_allocation):
    folder = copy()
    change_config(folder, **changed)
    with pytest.raises(UnsupportedModelError) as error:
        load_ids_only(folder)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("content", ["{broken", "[1, 2]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_broken_config_is_a_typed_error(content, copy, no_allocation):
    folder = copy()
    (folder / "config.json").write_text(content)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        load_ids_only(folder)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "storyteler"])
def test_an_unknown_name_lists_what_exists(name):
    with pytest.raises(ModelNotFoundError, match="storyteller.*local checkpoint folder.*hub id") as error:
        load_model(name)
    assert repr(name) in str(error.value)


def test_a_hub_id_that_cannot_be_had_lists_what_exists(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr("minillm.weights.snapshot_download", offline)
    with pytest.raises(ModelNotFoundError, match="'someone/something'.*no connection.*storyteller"):
        load_model("someone/something")


def test_nothing_but_json_and_safetensors_is_downloaded(monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        raise OSError("enough")

    monkeypatch.setattr("minillm.weights.snapshot_download", download)
    with pytest.raises(ModelNotFoundError):
        load_model("someone/something")
    (patterns,) = asked.values()
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in patterns)


def test_an_unknown_dtype_lists_the_known(checkpoint):
    with pytest.raises(ConfigError, match="'int8'.*float32, bfloat16"):
        load_model(checkpoint("llama"), dtype="int8")


# --- tensors ---------------------------------------------------------------------------------------------------------

NORM = "model.layers.1.input_layernorm.weight"


def remove(tensors):
    del tensors[NORM]


def add(tensors):
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)


def widen(tensors):
    tensors[NORM] = torch.ones(65)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, ["missing " + NORM, "not expected none"]),
        (add, ["missing none", "not expected model.layers.1.self_attn.q_proj.bias"]),
        (widen, [NORM, "(65,)", f"({BASE['hidden_size']},)"]),
    ],
)
def test_tensors_that_do_not_match_the_config_are_named_before_any_is_allocated(change, said, copy, no_allocation):
    folder = copy()
    change_tensors(folder, change)
    with pytest.raises(CheckpointError) as error:
        load_ids_only(folder)
    for part in said:
        assert part in str(error.value)


def test_a_long_list_of_missing_tensors_is_cut_short(copy, no_allocation):
    folder = copy()
    change_config(folder, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.3.* and 14 more"):
        load_ids_only(folder)


def test_pickled_weights_are_refused_and_not_opened(copy, monkeypatch, no_allocation):
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(CheckpointError, match="pickled weights .pytorch_model.bin.*safe_serialization"):
        load_ids_only(folder)


def test_a_folder_without_weights_or_config_is_refused(copy, tmp_path):
    folder = copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_ids_only(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_ids_only(folder)


def test_broken_safetensors_are_refused(copy, no_allocation):
    folder = copy()
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_ids_only(folder)


def test_a_missing_shard_is_named(tmp_path, no_allocation):
    random_transformers_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"not there: {lost.name}"):
        load_ids_only(tmp_path)


@pytest.mark.parametrize("content", ["{broken", "{}", "[]"])
def test_a_broken_index_of_shards_is_refused(content, copy, no_allocation):
    folder = copy()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a readable list of shards"):
        load_ids_only(folder)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_without_tokenizer_says_how_to_load_it_all_the_same(kind, checkpoint):
    """transformers makes up an empty tokenizer for a Qwen folder without one."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*skip_tokenizer_init=True"):
        load_model(checkpoint(kind))


def test_a_broken_tokenizer_is_a_typed_error(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_model(folder)
