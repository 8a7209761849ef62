"""Text comes from bytes and pieces, never from what two lossy decodes differ by: over every kind of tokenizer."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minillm import token_texts
from minillm.text import BYTE_CHARACTERS, Detokenizer, TokenDecoder

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_NAMES = {byte: character for character, byte in BYTE_CHARACTERS.items()}
SPECIAL = ["<unk>", "<|begin|>", "<|end|>"]
WORDS = ["the", "fox", "saw", "a", "b", "ab", "can", "'", "n't", "not", "do", ".", ",", "!", "é", "日本"]


def special_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([token for token in SPECIAL if token != "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's and Qwen's kind; some tokens hold a part of a character, or the end of one and the next one's start."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("Ŀ", "ç"), ("Ġ", "ð"), ("o", "x")]
    pieces = alphabet + [left + right for left, right in merges]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return special_tokenizer(backend)


def byte_fallback(strip: bool = True) -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's kind: ▁ is a space, a character without a token is one token for each byte."""
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    pieces = ["<unk>", *BYTES, "▁", "a", "b", *(left + right for left, right in merges), "\ufffd", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * strip + [normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strip)
    return special_tokenizer(backend)


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind: words get their spaces when they are decoded, and marks lose them."""
    pieces = ["<unk>", *WORDS, *("##" + word for word in WORDS)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return special_tokenizer(backend)


def metaspace() -> PreTrainedTokenizerFast:
    """T5's kind: ▁ before each word, the first one's is no space."""
    pieces = [*("▁" + word for word in WORDS), *WORDS, "▁"]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return special_tokenizer(backend)


def suffixes() -> PreTrainedTokenizerFast:
    """The first GPT's kind: the end of a word is marked, and is a space if another one follows."""
    pieces = [
        "<unk>",
        *"abcdefghijklmnopqrstuvwxyz.,!'",
        *(letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz."),
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
    return special_tokenizer(backend)


class Slow:
    """A tokenizer in Python: no `backend_tokenizer`, and pieces as it likes to write them."""

    def __init__(self, fast: PreTrainedTokenizerFast, says_bytes: bool = True):
        self.fast, self.says_bytes = fast, says_bytes
        self.encode, self.convert_tokens_to_ids = fast.encode, fast.convert_tokens_to_ids
        self.all_special_ids = fast.all_special_ids

    def __len__(self):
        return len(self.fast)

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        assert clean_up_tokenization_spaces is False, "a clean-up of its own looks at more than one token"
        return self.fast.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_id):
        return self.fast.convert_ids_to_tokens(token_id) if self.says_bytes else self.fast.decode([token_id])


KINDS = {
    "byte-level": byte_level(),
    "byte fallback": byte_fallback(),
    "byte fallback, spaces kept": byte_fallback(strip=False),
    "word pieces": word_pieces(),
    "metaspace": metaspace(),
    "suffixes": suffixes(),
    "slow byte fallback": Slow(byte_fallback()),
    "slow byte-level": Slow(byte_level()),
    "slow, without bytes": Slow(byte_level(), says_bytes=False),
}
EXACT = [kind for kind in KINDS if kind != "slow, without bytes"]  # those that say what their tokens are
BYTE_KINDS = [kind for kind in EXACT if "byte" in kind]
words = st.lists(st.sampled_from([*WORDS, " ", "  ", "🦊", "한국어", "👩‍👩‍👧", "\n"]), min_size=1, max_size=8)
texts = words.map("".join) | words.map(" ".join)


def ids_of(kind: str, text: str) -> list[int]:
    return KINDS[kind].encode(text, add_special_tokens=False)


def id_of(kind: str, piece: str) -> int:
    return KINDS[kind].convert_tokens_to_ids(piece)


def bytes_of(kind: str, data: bytes) -> list[int]:
    """One token for each byte."""
    if "fallback" in kind:
        return [id_of(kind, f"<0x{byte:02X}>") for byte in data]
    return [id_of(kind, BYTE_NAMES[byte]) for byte in data]


def decoded(kind: str, token_ids: list[int]) -> str:
    """What decoding everything at once gives, special tokens left out.

    If one byte of a run is broken, byte fallback makes U+FFFD of every byte, of whole characters too. Nobody can know
    that before the run is over; SentencePiece, where it comes from, spoils the broken bytes only, and so do we.
    """
    tokenizer = KINDS[kind]
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "fallback" not in kind or "\ufffd" not in text:
        return text
    spoken = [token_id for token_id in token_ids if token_id not in tokenizer.all_special_ids]
    pieces = [tokenizer.convert_ids_to_tokens(token_id) for token_id in spoken]
    data = b"".join(
        bytes.fromhex(piece[3:5]) if piece in BYTES else piece.replace("▁", " ").encode() for piece in pieces
    )
    text = re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8", "surrogateescape"))
    return text if "kept" in kind else text.removeprefix(" ")


def stream(kind: str, token_ids: list[int], prompt: list[int] = (), **options) -> tuple[list[str], Detokenizer]:
    """The text given out with each token and at the end; ends as generation would."""
    detokenizer, given_out = Detokenizer(KINDS[kind], prompt_token_ids=prompt, **options), []
    for token_id in token_ids:
        given_out.append(detokenizer.add(token_id))
        if detokenizer.stopped_by is not None:
            break
    given_out.append(detokenizer.finish())
    assert "".join(given_out) == detokenizer.text
    return given_out, detokenizer


def text_of(kind: str, token_ids: list[int], prompt: list[int] = (), **options) -> str:
    return stream(kind, token_ids, prompt, **options)[1].text


# --- over all kinds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, data=st.data())
def test_streamed_text_is_what_decoding_everything_at_once_gives(kind, text, data):
    token_ids = ids_of(kind, text)
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, output = token_ids[:cut], token_ids[cut:]
    given_out, detokenizer = stream(kind, output, prompt)
    said = text_of(kind, prompt).rstrip("\ufffd")  # a character that the prompt leaves unfinished is the output's
    assert said + detokenizer.text == decoded(kind, token_ids)
    assert "\ufffd" not in "".join(given_out)
    whole = Detokenizer(KINDS[kind], (), prompt)
    whole.extend(output)
    whole.finish()
    assert whole.text == detokenizer.text


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
def test_any_tokens_stream_to_what_they_decode_to(kind, data):
    ids = st.lists(st.integers(0, len(KINDS[kind]) - 1), max_size=12)
    broken = st.lists(st.sampled_from(b"\xf0\x9f\xa6\x8a\xed\xa0\xff"))
    broken = broken.map(lambda data: bytes_of(kind, bytes(data)))
    token_ids = data.draw(
        st.lists(ids | broken if kind in BYTE_KINDS else ids, max_size=3).map(lambda each: sum(each, []))
    )
    everything = decoded(kind, token_ids)
    assert text_of(kind, token_ids) == everything
    cut = data.draw(st.integers(0, len(token_ids)))
    text = text_of(kind, token_ids[cut:], token_ids[:cut])
    assert everything.endswith(text)
    assert decoded(kind, token_ids[:cut]).startswith(everything[: len(everything) - len(text)])
    whole = Detokenizer(KINDS[kind], (), token_ids[:cut])
    whole.extend(token_ids[cut:])
    whole.finish()
    assert whole.text == text


@pytest.mark.parametrize("kind", EXACT)
@given(text=texts, data=st.data())
def test_the_text_ends_before_any_stop_string(kind, text, data):
    token_ids = ids_of(kind, text)
    everything = decoded(kind, token_ids)
    if not everything:
        return
    start = data.draw(st.integers(0, len(everything) - 1))
    stop = everything[start : data.draw(st.integers(start + 1, len(everything)))]
    cut = data.draw(st.integers(0, len(token_ids)))
    said = text_of(kind, token_ids[:cut])
    output = text_of(kind, token_ids[cut:], token_ids[:cut])
    given_out, detokenizer = stream(kind, token_ids[cut:], token_ids[:cut], stop=[stop, stop + "#"])
    assert detokenizer.text == output.partition(stop)[0]
    assert detokenizer.stopped_by == (stop if stop in output else None)
    included = text_of(kind, token_ids[cut:], token_ids[:cut], stop=[stop], include_stop=True)
    assert included == "".join(output.partition(stop)[:2])
    assert said is not None and "\ufffd" not in "".join(given_out)


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
def test_the_texts_of_tokens_joined_are_the_whole_text(kind, data):
    token_ids = data.draw(texts.map(lambda text: ids_of(kind, text)))
    token_ids = data.draw(st.sampled_from([token_ids, token_ids[:-1], token_ids[1:]]))
    labels = token_texts(KINDS[kind], token_ids)
    assert len(labels) == len(token_ids) and "".join(labels) == decoded(kind, token_ids)
    decoder = TokenDecoder(KINDS[kind], skip_special_tokens=False)
    for place, (token_id, label) in enumerate(zip(token_ids, labels, strict=True)):
        others = data.draw(st.lists(st.integers(0, len(KINDS[kind]) - 1), max_size=2))
        texts_of_each = decoder.would_add([*others, token_id], final=place == len(token_ids) - 1)
        assert texts_of_each[-1] == label, "asking for others changes nothing"
        decoder.add(token_id)
