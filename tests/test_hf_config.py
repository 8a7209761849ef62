"""A checkpoint's own files decide, or it is refused by name: no key of a configuration is overlooked in silence."""

import copy as copying
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from minillm import RopeConfig, SamplingParams, generate_cached, load_model
from minillm.errors import CheckpointError, MiniLLMError, UnsupportedModelError
from minillm.model.hf_config import NOT_IMPLEMENTED, llama_config, load_tokenizer, model_config, read_config
from minillm.model.text import BYTE_CHARACTERS, LightTokenizer, encode_chat
from minillm.sampling import SamplingState, sample
from minillm.storyteller import CHECKPOINT_DIR
from tiny_models import KINDS, TOLERANCE, all_logits, change_config, difference, random_token_ids

PROMPT = random_token_ids(20)
FAMILIES = ("llama", "mistral-window", "qwen2", "qwen2-window", "qwen3")


def load_ids_only(folder, **options):
    return load_model(folder, skip_tokenizer_init=True, **options).model


# --- config surgery --------------------------------------------------------------------------------------------------

FULL, SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Every key of transformers' four configuration classes, and some that they read without declaring them, with values
# that are not the default.
OTHER_VALUES = {
    "transformers_version": ["4.40.0"],
    "architectures": [["LlamaModel"], []],
    "output_hidden_states": [True],
    "return_dict": [False],
    "dtype": ["bfloat16"],
    "chunk_size_feed_forward": [2],
    "is_encoder_decoder": [True],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "vocab_size": [198, 200],
    "hidden_size": [32],
    "intermediate_size": [95],
    "num_hidden_layers": [2, 4],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4, None],
    "hidden_act": ["gelu", "relu", "swish"],
    "max_position_embeddings": [64],
    "initializer_range": [0.5],
    "rms_norm_eps": [0.01],
    "use_cache": [False],
    "pad_token_id": [7],
    "bos_token_id": [9],
    "eos_token_id": [8, [8, 9]],
    "pretraining_tp": [2],
    "tie_word_embeddings": [True, False],
    "rope_parameters": [
        {"rope_theta": 100.0, "rope_type": "default"},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 0.5},
        {"rope_theta": 1e4, "rope_type": "linear"},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": "4"},
        {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
        {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        {"rope_theta": 1e4, "rope_type": "no such"},
        {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_theta": 100.0, "rope_type": "default"}},
        LLAMA3 | {"original_max_position_embeddings": 32},
        LLAMA3,
        {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"},
    ],
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "mlp_bias": [True],
    "head_dim": [8, 32, None],
    "sliding_window": [3, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2],
    "layer_types": [
        FULL,
        SLIDING,
        ["full_attention", "sliding_attention", "full_attention"],
        ["linear_attention"] * 3,
        ["chunked_attention"] * 3,
        ["attention"] * 3,
        FULL[:2],
    ],
    "is_causal": [False],
    "per_layer_config": [{"1": {"intermediate_size": 64}}],
    "rope_theta": [100.0],
    "rope_scaling": [{"type": "linear", "factor": 2.0}],
    "partial_rotary_factor": [0.5],
    "original_max_position_embeddings": [32],
    "attention_chunk_size": [4],
    "quantization_config": [{"quant_method": "fp8"}],
}
TOP_LEVEL_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # read if there is no `rope_parameters`


def test_the_surgery_below_knows_every_key_of_transformers():
    keys = {field.name for kind in FAMILIES for field in dataclasses.fields(type(KINDS[kind]))}
    assert keys - OTHER_VALUES.keys() == set()


@torch.inference_mode()
def reference_logits(folder) -> torch.Tensor | None:
    """transformers' logits of the prompt; None if it does not load or run the checkpoint as it stands."""
    try:
        reference, said = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if said["missing_keys"] or said["mismatched_keys"]:  # filled up with random numbers
            return None
        reference.config.return_dict = True  # how the logits are handed out, not what they are
        return reference.eval()(torch.tensor([PROMPT])).logits[0]
    except Exception:  # whatever a model raises that cannot be built
        return None


@pytest.mark.parametrize("kind", FAMILIES)
def test_config_surgery(kind, checkpoint, tmp_path, subtests):
    """Each key set to another value: our logits are transformers', or the checkpoint is refused by name."""
    (tmp_path / "model.safetensors").symlink_to(checkpoint(kind) / "model.safetensors")
    whole = (checkpoint(kind) / "config.json").read_text()
    loaded, refused = set(), set()
    for key, values in OTHER_VALUES.items():
        for value in values:
            (tmp_path / "config.json").write_text(whole)
            change_config(tmp_path, **({"rope_parameters": None} if key in TOP_LEVEL_ROPE else {}) | {key: value})
            with subtests.test(key=key, value=value):
                try:
                    ours = all_logits(load_ids_only(tmp_path), PROMPT)
                except MiniLLMError as error:
                    assert names_it(error, key), error
                    refused.add(key)
                else:
                    theirs = reference_logits(tmp_path)
                    assert theirs is not None, "transformers cannot compute it, and we do"
                    assert difference(ours, theirs) <= TOLERANCE[torch.float32]
                    loaded.add(key)
    assert {"rms_norm_eps", "rope_parameters", "rope_theta", "tie_word_embeddings", "pad_token_id"} <= loaded
    assert {"is_causal", "per_layer_config", "layer_types", "hidden_act", "hidden_size"} <= refused


def names_it(error: MiniLLMError, key: str) -> bool:
    """The message says the key or what it is about, or the tensor whose shape contradicts it."""
    said = str(error)
    shapes = isinstance(error, CheckpointError) and ("tensor model." in said or "layers." in said)
    return shapes or key in said or ABOUT.get(key, key) in said


ABOUT = {
    "quantization_config": "quantised",
    "use_sliding_window": "sliding_window None",
    "tie_word_embeddings": "lm_head.weight",
}


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig(theta=5e5, scaling="linear", factor=2.0),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
             | {"original_max_position_embeddings": 64}},
            RopeConfig(scaling="llama3", factor=8.0, original_max_position=64),
        ),
    ],
)  # fmt: skip
def test_rope_as_config_files_wrote_it_before_transformers_5(old, expected, copy):
    folder = copy()
    change_config(folder, rope_parameters=None, **old)
    assert read_config(folder).rope == expected


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": None, "head_dim": None},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "sliding_window": 7},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "num_key_value_heads": 4},
    ],
)
def test_a_llama_is_read_as_transformers_reads_it_without_its_class(raw):
    raw = {"model_type": "llama", **raw}
    ours, theirs = llama_config(dict(raw)), LlamaConfig.from_dict(dict(raw))
    assert model_config(ours, ()) == model_config(theirs, ())
    assert ours.eos_token_id == theirs.eos_token_id


STORY = """
import sys
from minillm import LLM, SamplingParams
llm = LLM(sys.argv[1], skip_tokenizer_init=True, verbose=False, max_model_len=32, num_blocks=8)
llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["llama", "storyteller"])
def test_nothing_loads_torchs_compiler(kind, checkpoint):
    """It would take a second, and 150 MiB for as long as the process lives."""
    folder = kind if kind == "storyteller" else checkpoint(kind)
    subprocess.run([sys.executable, "-c", STORY, folder], check=True)


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


@pytest.mark.parametrize(
    ("generation", "config", "of_tokenizer", "expected"),
    [
        ([3, 5], 7, None, (3, 5, 7)),
        (7, 7, None, (7,)),
        (None, [7, 9], None, (7, 9)),
        (None, None, 11, (11,)),  # the default of Llama, 2, is another: what the checkpoint names goes first
        ("no file", 7, 11, (7, 11)),
        (5, 7, 11, (5, 7, 11)),
        ("no file", None, 11, (11,)),
        ("no file", None, None, (2,)),
    ],
)
def test_a_text_ends_with_any_id_that_the_checkpoint_names(generation, config, of_tokenizer, expected, copy):
    folder = copy()
    if generation == "no file":
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    change_config(folder, eos_token_id=config)
    tokenizer = None if of_tokenizer is None else a_tokenizer({"a": 0, "end": of_tokenizer})
    assert read_config(folder, tokenizer).eos_token_ids == expected


def a_tokenizer(vocabulary: dict[str, int], end: str | None = "end") -> PreTrainedTokenizerFast:
    """Words of a vocabulary, of which one ends a text."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)


@pytest.mark.parametrize(("highest", "num_tokens"), [(5, 6), (198, 199), (500, 199)])
def test_a_vocabulary_with_holes_can_say_its_highest_id(highest, num_tokens, copy):
    assert read_config(copy(), a_tokenizer({"a": 0, "b": 1, "c": highest}, end=None)).num_tokens == num_tokens


def test_generation_stops_at_an_end_that_only_the_tokenizer_knows(copy):
    folder = copy()
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=None)
    said = load_ids_only(folder)
    first = generate_cached(said, PROMPT, SamplingParams(max_tokens=1, ignore_eos=True)).token_ids[0]
    a_tokenizer({"a": 0, "end": first, "highest": 198}).save_pretrained(folder)
    model, tokenizer = load_model(folder)
    result = generate_cached(model, PROMPT, SamplingParams(max_tokens=9), tokenizer=tokenizer)
    assert (result.token_ids, result.finish_reason) == ((first,), "stop")


@pytest.mark.parametrize("outside", [-1, 199, 300])
def test_an_end_outside_the_vocabulary_is_ignored_with_a_warning(outside, copy):
    folder = copy()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, outside]}))
    with pytest.warns(UserWarning, match=f"eos token id {outside} .*vocabulary of 199 ids and is ignored"):
        assert read_config(folder).eos_token_ids == (5, 3)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("wrong", ["</s>", ["</s>"], 2.5, True, {"a": 1}, [[1]]])
def test_an_end_that_is_no_id_is_refused(file, wrong, copy):
    folder = copy()
    written = json.loads((folder / file).read_text()) | {"eos_token_id": wrong}
    (folder / file).write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=file):
        read_config(folder)


@pytest.mark.parametrize("content", ["{broken", "[1]", "\xff"])
def test_a_broken_generation_config_is_refused(content, copy):
    folder = copy()
    (folder / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="generation_config.json"):
        read_config(folder)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "default", "rope_theta": "10000"}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": -1.0}, "theta"),
    ],
)
def test_rope_numbers_that_are_missing_or_wrong_are_named(changed, name, copy):
    folder = copy()
    change_config(folder, rope_parameters={"rope_theta": 1e4} | changed)
    with pytest.raises(CheckpointError, match=name):
        read_config(folder)


@pytest.mark.parametrize("key", NOT_IMPLEMENTED)
def test_what_changes_the_arithmetic_is_refused_by_name(key, copy):
    folder = copy()
    for harmless in (None, *NOT_IMPLEMENTED[key]):
        change_config(folder, **{key: harmless})
        read_config(folder)
    change_config(folder, **{key: 3})
    with pytest.raises(UnsupportedModelError, match=f"^{key} 3 in config.json"):
        read_config(folder)


@pytest.mark.parametrize(
    ("model_type", "architecture", "wrong"),
    [("foo", "LlamaForCausalLM", "model_type 'foo'"), ("llama", "MistralForCausalLM", "MistralForCausalLM")],
)
def test_what_is_not_supported_is_not_in_the_list_of_what_is(model_type, architecture, wrong, copy):
    folder = copy()
    change_config(folder, model_type=model_type, architectures=[architecture])
    with pytest.raises(UnsupportedModelError) as error:
        read_config(folder)
    refused, supported = str(error.value).split("; supported")
    assert wrong in refused and wrong not in supported


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
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


def test_a_tokenizer_of_vocabulary_and_merges_loads(copy, tokenizer):
    folder = copy("qwen2")
    tokenizer.backend_tokenizer.model.save(str(folder))
    assert not (folder / "tokenizer.json").exists()
    loaded = load_tokenizer(folder)
    assert loaded.decode(loaded.encode("the little fox")) == "the little fox"
    assert len(loaded.encode("fox")) < 3  # the merges were read
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        load_tokenizer(folder)


def test_a_tokenizer_without_a_fast_form_is_a_typed_error(copy, monkeypatch):
    """As transformers gives it for a Mistral checkpoint where mistral-common is installed."""
    folder = copy()
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: object())
    with pytest.raises(CheckpointError, match="tokenizer.json.*skip_tokenizer_init"):
        load_tokenizer(folder)


def test_in_a_vocabulary_with_holes_the_highest_id_can_be_sampled(copy):
    folder = copy()
    a_tokenizer({"a": 0, "b": 1, "end": 5}, end=None).save_pretrained(folder)
    model, tokenizer = load_model(folder)
    assert (len(tokenizer), model.config.num_sampled_ids) == (3, 6)
    model.lm_head.weight[:] = torch.arange(199.0)[:, None]  # the higher an id the likelier
    assert sample(model.logits(torch.ones(1, 64)), [SamplingState.of(SamplingParams(), 6)], [0]).tolist() == [5]


# --- the storyteller, without transformers ---------------------------------------------------------------------------

REFERENCE = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)


@pytest.fixture
def shipped():
    """The storyteller's tokenizer; what a test asks of it, it answers by itself."""
    tokenizer = load_tokenizer(CHECKPOINT_DIR)
    yield tokenizer
    assert type(tokenizer) is LightTokenizer


def test_the_storyteller_is_read_as_transformers_reads_it(shipped, tmp_path):
    elsewhere = shutil.copytree(CHECKPOINT_DIR, tmp_path / "copy")
    assert read_config(CHECKPOINT_DIR, shipped) == read_config(elsewhere, REFERENCE)
    assert [type(load_tokenizer(each)) for each in (CHECKPOINT_DIR, elsewhere)] == [LightTokenizer, type(REFERENCE)]


PIECES = ["<|user|>", "<|end|>", "<|endoftext|> ", " the fox 12", "\n", "🦊"]


@given(texts=st.lists(st.lists(st.text() | st.sampled_from(PIECES)).map("".join)))
def test_its_tokenizer_cuts_texts_as_transformers_does(texts):
    shipped = load_tokenizer(CHECKPOINT_DIR)
    assert list(map(shipped.encode, texts)) == list(map(REFERENCE.encode, texts))
    assert type(shipped) is LightTokenizer


def test_its_tokenizer_knows_the_vocabulary_that_transformers_knows(shipped):
    assert shipped.eos_token_id == REFERENCE.eos_token_id
    for token_id in range(len(REFERENCE) + 2):
        assert shipped.convert_ids_to_tokens(token_id) == REFERENCE.convert_ids_to_tokens(token_id)
    assert shipped.backend_tokenizer.to_str() == REFERENCE.backend_tokenizer.to_str()


ASKED = {
    "encode with options": lambda tokenizer: tokenizer.encode("the fox", add_special_tokens=False),
    "encode a pair": lambda tokenizer: tokenizer.encode("the fox", "ran"),
    "encode no text": lambda tokenizer: tokenizer.encode(["the", "fox"]),
    "several ids": lambda tokenizer: tokenizer.convert_ids_to_tokens([5, 0], skip_special_tokens=True),
    "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
    "decode": lambda tokenizer: tokenizer.decode([0, 50, 60]),
    "call": lambda tokenizer: tokenizer(["the fox"]).input_ids,
    "len": len,
    "a special token": lambda tokenizer: tokenizer.pad_token_id,
    "another end": lambda tokenizer: (setattr(tokenizer, "eos_token", "<|end|>"), tokenizer.eos_token_id),
    "another template": lambda tokenizer: (
        setattr(tokenizer, "chat_template", "{{ messages[0].content }}"),
        encode_chat(tokenizer, [{"role": "user", "content": "the fox"}]),
    ),
    "chat": lambda tokenizer: encode_chat(tokenizer, [{"role": "user", "content": "the fox"}]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_asked_for_more_its_tokenizer_becomes_the_one_of_transformers(asked):
    tokenizer = load_tokenizer(CHECKPOINT_DIR)
    assert ASKED[asked](tokenizer) == ASKED[asked](copying.deepcopy(REFERENCE))
    assert type(tokenizer) is type(REFERENCE)
    assert vars(tokenizer).keys() - {"_whole"} == vars(REFERENCE).keys()


def test_its_tokenizer_may_become_that_one_in_several_threads_at_once():
    """As in a server."""
    asked = [ASKED["chat"], ASKED["decode"], lambda tokenizer: tokenizer.encode("the fox")] * 4
    expected = [each(REFERENCE) for each in asked]
    for _ in range(5):
        tokenizer = load_tokenizer(CHECKPOINT_DIR)
        with ThreadPoolExecutor(len(asked)) as pool:
            assert list(pool.map(lambda each, tokenizer=tokenizer: each(tokenizer), asked)) == expected


@pytest.mark.parametrize("again", [copying.copy, copying.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_its_tokenizer_is_one_too(again, shipped):
    same = again(shipped)
    assert type(same) is LightTokenizer and same is not shipped
    assert same.encode("the fox") == REFERENCE.encode("the fox")
    assert len(same) == len(REFERENCE)


def test_bytes_are_written_as_transformers_writes_them():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {byte: character for character, byte in BYTE_CHARACTERS.items()} == bytes_to_unicode()
