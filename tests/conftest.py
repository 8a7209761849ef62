"""Fixtures all tests share. One thread, offline, no progress bars: the same results everywhere."""

import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():  # read when Triton is first imported, which transformers does below
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import minillm
from tiny_models import random_transformers_model

settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("same every time")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def pytest_collection_modifyitems(config, items):
    """Tests that need a CUDA device, a real model or Ray say why they are skipped where there is none."""
    for marker, needs in (("real", "a real model"), ("cluster", "Ray")):
        for item in items if config.getoption("-m") != marker else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {needs} and minutes; make test-{marker} runs it"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


SENTENCES = [
    "Once upon a time, there was a little fox who lived by the river.",
    "The fox saw a crêpe in the naïve café. Was it hers? It was not.",
    "Hello, my name is John. The end.",
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """kind -> folder of a random checkpoint of that kind, written once."""
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            random_transformers_model(kind).save_pretrained(folders[kind])
        return folders[kind]

    return folder_of


@pytest.fixture
def copy(checkpoint, tmp_path):
    """kind -> folder of a copy that a test may break."""
    return lambda kind="llama": shutil.copytree(checkpoint(kind), tmp_path / kind)


@pytest.fixture
def no_allocation(monkeypatch):
    """Building a decoder fails the test."""
    monkeypatch.setattr("minillm.model.weights.Decoder", lambda *shape: pytest.fail("allocated for a bad checkpoint"))


@pytest.fixture(scope="session")
def load(checkpoint):
    """(kind, dtype) -> our model, a fresh one that a test may break."""

    def load(kind, dtype=torch.float32):
        return minillm.load_model(checkpoint(kind), dtype=dtype, skip_tokenizer_init=True).model

    return load


@pytest.fixture(scope="session")
def load_reference(checkpoint):
    """(kind, dtype) -> transformers' model, not to be changed."""
    loaded = {}

    def load(kind, dtype=torch.float32):
        if (kind, dtype) not in loaded:
            reference = AutoModelForCausalLM.from_pretrained(checkpoint(kind), dtype=dtype, attn_implementation="eager")
            reference.generation_config.eos_token_id = None
            loaded[kind, dtype] = reference.eval()
        return loaded[kind, dtype]

    return load


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer (GPT-2's and Qwen's kind) of a few hundred ids; emoji fall apart into bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def byte_fallback_tokenizer():
    """A tokenizer of Llama 2's and Mistral's kind: ▁ for spaces, a token a byte for what it does not know, a BOS."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "x"), ("▁", "f"), ("▁f", "ox")]
    vocabulary = {piece: i for i, piece in enumerate(pieces + [left + right for left, right in merges])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def default_handler():
    """Ctrl-C raises KeyboardInterrupt, even if the tests run in the background, where a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
