"""Checkpoints load whole, in shards and in any dtype; whatever does not fit is refused with its name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minillm import LLM, SamplingParams, load_model
from minillm.errors import CheckpointError, ConfigError
from tiny_models import (
    BASE,
    TOLERANCE,
    all_logits,
    change_config,
    change_tensors,
    difference,
    random_token_ids,
    random_transformers_model,
)

PROMPT = random_token_ids(20)


def load_ids_only(folder, **options):
    return load_model(folder, skip_tokenizer_init=True, **options).model


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


@pytest.mark.parametrize(("name", "expected"), [("half", torch.float16), ("float", torch.float32)])
def test_a_dtype_has_its_other_names(name, expected, checkpoint):
    assert load_ids_only(checkpoint("llama"), dtype=name).dtype == expected


@pytest.mark.parametrize("said", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {}], ids=str)
def test_dtype_auto_is_the_checkpoints_own(said, copy):
    folder = copy()
    change_config(folder, **{"dtype": None} | said)
    change_tensors(folder, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    assert load_ids_only(folder, dtype="auto").dtype == (torch.bfloat16 if said else torch.float16)
    with LLM(folder, dtype="auto", skip_tokenizer_init=True, verbose=False, num_blocks=20) as llm:
        assert llm.engine.model.dtype == (torch.bfloat16 if said else torch.float16)


def test_dtype_auto_of_what_the_model_does_not_run_in_is_refused(copy):
    folder = copy()
    change_config(folder, dtype="int8")
    with pytest.raises(ConfigError, match="'int8'.*half"):
        load_ids_only(folder, dtype="auto")


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


def head_of_its_own(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()


def test_a_tied_checkpoint_with_another_output_head_is_not_tied(copy):
    """As transformers does it, which tells of it too."""
    folder = copy("qwen3")
    change_tensors(folder, head_of_its_own)
    with pytest.warns(UserWarning, match="lm_head.weight is another matrix.*not tied"):
        model = load_ids_only(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    theirs = reference(torch.tensor([PROMPT])).logits[0].detach()
    assert difference(all_logits(model, PROMPT), theirs) <= TOLERANCE[torch.float32]
    assert not model.config.tie_word_embeddings
    assert model.config.num_parameters == sum(weight.numel() for weight in model.parameters())
    with pytest.warns(UserWarning), LLM(folder, skip_tokenizer_init=True, verbose=False, num_blocks=20) as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        assert not llm.engine.model_config.tie_word_embeddings
    assert output.outputs[0].token_ids[0] == int(theirs[-1].argmax())


def test_a_tied_checkpoint_may_carry_its_matrix_as_the_output_head_only(copy):
    folder = copy("qwen3")
    before = all_logits(load_ids_only(folder), PROMPT)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(all_logits(load_ids_only(folder), PROMPT), before)


def test_old_checkpoints_may_carry_rope_frequencies(copy):
    folder = copy()
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_ids_only(folder)


def test_an_unknown_dtype_lists_the_known(checkpoint):
    with pytest.raises(ConfigError, match="'int8'.*float32, bfloat16"):
        load_model(checkpoint("llama"), dtype="int8")


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from minillm.model import read_config
from minillm.model import load_decoder

def load(folder):
    return load_decoder(folder, read_config(folder), torch.float32, "cpu", pack=True)

def memory(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

small, large = map(Path, sys.argv[1:])
load(small)  # whatever is imported or set up when first needed
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = memory("VmRSS")
model = load(large)
print(memory("VmHWM") - before, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_loading_needs_little_more_memory_than_the_model(checkpoint, tmp_path):
    """By the kernel's count, mapped files included: neither the whole file is in memory nor all layers twice."""
    size = {"vocab_size": 3000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    AutoModelForCausalLM.from_config(LlamaConfig(**BASE | size)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, checkpoint("llama"), tmp_path]
    peak, held = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert held > 60e6
    assert peak < 1.4 * held


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


@pytest.mark.parametrize(
    "content",
    [
        "{broken",
        "{}",
        "[]",
        '{"weight_map": {"a": 1}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": "../x.safetensors"}}',
    ]
    + ['{"weight_map": {"a": "pytorch_model.bin"}}', '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'],
)
def test_a_broken_index_of_shards_is_refused(content, copy, no_allocation):
    folder = copy()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json"):
        load_ids_only(folder)
