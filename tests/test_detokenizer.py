"""Text comes from bytes and pieces, never from what two lossy decodes differ by: over every kind of tokenizer."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minillm import SamplingParams, token_texts
from minillm.engine.outputs import Completion
from minillm.engine.request import Request
from minillm.model.text import BYTE_CHARACTERS, Detokenizer, TokenDecoder
from minillm.sampling.params import TokenLogprobs

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
    output = text_of(kind, token_ids[cut:], token_ids[:cut])
    given_out, detokenizer = stream(kind, token_ids[cut:], token_ids[:cut], stop=[stop, stop + "#"])
    assert detokenizer.text == output.partition(stop)[0]
    assert detokenizer.stopped_by == (stop if stop in output else None)
    included = text_of(kind, token_ids[cut:], token_ids[:cut], stop=[stop], include_stop=True)
    assert included == "".join(output.partition(stop)[:2])
    assert "\ufffd" not in "".join(given_out)


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
def test_the_texts_of_tokens_joined_are_the_whole_text(kind, data):
    token_ids = data.draw(texts.map(lambda text: ids_of(kind, text)))
    token_ids = data.draw(st.sampled_from([token_ids, token_ids[:-1], token_ids[1:]]))
    labels = token_texts(KINDS[kind], token_ids)
    assert len(labels) == len(token_ids) and "".join(labels) == decoded(kind, token_ids)
    assert token_texts(KINDS[kind], np.array(token_ids[1:], int), torch.tensor(token_ids[:1])) == labels[1:]
    decoder = TokenDecoder(KINDS[kind], skip_special_tokens=False)
    for place, (token_id, label) in enumerate(zip(token_ids, labels, strict=True)):
        others = data.draw(st.lists(st.integers(0, len(KINDS[kind]) - 1), max_size=2))
        texts_of_each = decoder.would_add([*others, token_id], final=place == len(token_ids) - 1)
        assert texts_of_each[-1] == label, "asking for others changes nothing"
        decoder.add(token_id)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_tokens", range(1, 9))
def test_decoded_tokens_of_an_output_joined_are_its_text(kind, num_tokens, streams):
    """The prompt ends within a character, and so do some of the outputs."""
    token_ids = [*bytes_of(kind, "🦊".encode()), *ids_of(kind, "b"), *bytes_of(kind, "🦊".encode())][1 : num_tokens + 1]
    prompt = [id_of(kind, "a"), bytes_of(kind, b"\xf0")[0]]
    request = Request("a", prompt, SamplingParams(logprobs=2, max_tokens=num_tokens))
    completion, news = Completion(0, request, KINDS[kind], streams=streams), ""
    for token_id in token_ids:
        request.append(token_id)
        completion.take(token_id, TokenLogprobs(-1.0, 1, [token_id, id_of(kind, "b")], [-1.0, -2.0]))
        news += completion.delta().text
    output = completion.cumulative()
    said = [entry[token_id].decoded_token for entry, token_id in zip(output.logprobs, token_ids, strict=True)]
    assert output.finish_reason == "length" and "".join(said) == output.text == news
    assert output.text == decoded(kind, [*prompt, *token_ids]).removeprefix("a")
    others = [entry[id_of(kind, "b")].decoded_token for entry in output.logprobs]
    assert others[0].endswith("b") and others[0].startswith("\ufffd"), "the character would never be whole"
    assert len(others) < 4 or others[3] == "b", "the character is whole"


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte fallback", "slow byte fallback"])
def test_bytes_of_the_prompt_do_not_spoil_those_of_the_output(kind):
    fox = bytes_of(kind, "🦊".encode())
    assert text_of(kind, [*fox, id_of(kind, "a")], prompt=ids_of(kind, "한국어")) == "🦊a"
    space_ab = [id_of(kind, piece) for piece in ("▁", "a", "b")]
    assert text_of(kind, [fox[3], *space_ab], prompt=[id_of(kind, "a"), *fox[:3]]) == "🦊 ab"
    assert text_of(kind, [*fox, *fox[:1], *fox]) == "🦊\ufffd🦊"


@pytest.mark.parametrize("kind", BYTE_KINDS)
@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"\xff\xff", ["\ufffd", "\ufffd", ""]),  # no character has this byte
        (b"\xf0\x9f\xa6\x8a", ["", "", "", "🦊", ""]),
        (b"\xf0\x9f\xf0\x9f\xa6\x8a", ["", "", "broken", "", "", "🦊", ""]),
        (b"\xed\xa0\xff", ["", "two", "\ufffd", ""]),  # half of a surrogate pair
        (b"\xa6\xf0", ["\ufffd", "", "\ufffd"]),
    ],
)
def test_a_replacement_character_comes_out_as_soon_as_nothing_can_make_a_character(kind, data, texts):
    broken = "\ufffd\ufffd" if "fallback" in kind else "\ufffd"  # for each byte, or for what might have begun one
    texts = [text.replace("broken", broken).replace("two", "\ufffd\ufffd") for text in texts]
    assert stream(kind, bytes_of(kind, data))[0] == texts


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "slow, without bytes"])
@pytest.mark.parametrize("piece", ["\xff", "\xf0"])
def test_an_endless_run_of_bytes_costs_the_same_for_each(kind, piece, monkeypatch):
    byte = bytes_of("byte-level" if "bytes" in kind else kind, piece.encode("latin-1"))[0]
    sizes, decode = [], TokenDecoder._decode
    monkeypatch.setattr(
        TokenDecoder, "_decode", lambda self, ids, skip=None: sizes.append(len(ids)) or decode(self, ids, skip)
    )
    detokenizer = Detokenizer(KINDS[kind], stop=["stop"])
    given_out = [detokenizer.add(byte) for _ in range(300)]
    assert max(sizes) <= 5 and len(sizes) <= 300 * 8
    assert len(detokenizer.text) >= 296 and all(len(text) == 1 for text in given_out[4:]), "it streams"
    assert len(detokenizer._pending) == 0


def test_a_token_that_looks_like_a_byte_is_text():
    """Byte-level BPE may have a piece "<0x41>", which says just that."""
    backend = Tokenizer(models.BPE({"<0x41>": 0, "ĠA": 1, "ð": 2}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts(tokenizer, [0, 1, 2, 0]) == ["<0x41>", " A", "", "\ufffd<0x41>"]


def test_a_byte_of_space_that_begins_a_text_is_dropped_as_any_other_space():
    space, a = bytes_of("byte fallback", b" ")[0], id_of("byte fallback", "a")
    assert text_of("byte fallback", [space, space, a]) == " a" == decoded("byte fallback", [space, space, a])
    assert text_of("byte fallback", [space, a], prompt=[a]) == " a"


@pytest.mark.parametrize("kind", ["byte fallback", "word pieces", "metaspace", "suffixes"])
def test_special_tokens_do_not_take_the_space_of_the_word_behind_them(kind):
    begin, end = id_of(kind, "<|begin|>"), id_of(kind, "<|end|>")
    first, second = ids_of(kind, "a"), ids_of(kind, "ab")
    for prompt in (first, [begin, *first], [*first, *[end] * 9]):
        assert text_of(kind, second, prompt) == text_of(kind, [end, *second], prompt) == " ab"
    assert text_of(kind, second, [begin]) == "ab"


# --- stop strings ----------------------------------------------------------------------------------------------------

AB_END = ["a", "<|end|>", "b", "a", "<|begin|>", "<|end|>", "b"]


@pytest.mark.parametrize("kind", BYTE_KINDS)
@pytest.mark.parametrize(
    ("stop", "text", "stopped_by"),
    [
        ("<|end|>", "a", "<|end|>"),
        ("a<|end|>", "", "a<|end|>"),
        ("<|end|>b", "a", "<|end|>b"),
        ("<|begin|><|end|>b", "aba", "<|begin|><|end|>b"),
        (["<|begin|>", "<|end|>"], "a", "<|end|>"),
        (["ba", "<|begin|>"], "a", "ba"),
        ("ab", "", "ab"),  # as the text says it
        (["<|end|>x", "ab"], "", "ab"),  # also where names are looked at
        ("b<|end|>", "abab", None),
        ("<|end|>a", "abab", None),
        (["end", "|>"], "abab", None),  # a name is there as a whole or not at all
    ],
)
def test_names_of_special_tokens_stop_and_are_not_in_the_text(kind, stop, text, stopped_by):
    token_ids = [id_of(kind, piece) for piece in AB_END]
    stop = [stop] if isinstance(stop, str) else stop
    _, detokenizer = stream(kind, token_ids, [id_of(kind, "a")], stop=stop)
    assert (detokenizer.text, detokenizer.stopped_by) == (text, stopped_by)
    included = text_of(kind, token_ids, [id_of(kind, "a")], stop=stop, include_stop=True)
    assert included == text + (stopped_by or "")


def test_the_name_of_the_last_token_of_all_stops_too():
    a, end = id_of("byte-level", "a"), id_of("byte-level", "<|end|>")
    detokenizer = Detokenizer(KINDS["byte-level"], ["a<|end|>"])
    assert (detokenizer.take([a], None), detokenizer.take([end], "length")) == ("", "")
    assert detokenizer.stopped_by == "a<|end|>"


def test_special_tokens_that_no_stop_string_holds_cost_nothing():
    detokenizer = Detokenizer(KINDS["byte-level"], stop=["ab"])
    for piece in ["a", *["<|end|>"] * 50]:
        detokenizer.add(id_of("byte-level", piece))
    assert detokenizer._pending == "a"


@pytest.mark.parametrize("stop", [["xab", "bc", "c"], ["c", "bc", "xab"], ["bc", "c"], ["c", "bc"]])
def test_of_stop_strings_that_one_token_completes_the_earliest_counts(stop):
    backend = Tokenizer(models.BPE({"a": 0, "abcd": 1, "x": 2}, []))
    backend.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), stop)
    given_out = [detokenizer.add(token_id) for token_id in ([2, 1] if "xab" in stop else [0, 1])]
    first = "xab" if "xab" in stop else "bc"
    assert detokenizer.stopped_by == first and "".join(given_out) == ("" if "xab" in stop else "aa")


@pytest.mark.parametrize(
    ("min_tokens", "stop", "text"),
    [
        (0, ["ab"], ""),
        (1, ["ab"], ""),
        (2, ["ab"], "ab"),  # the first one ends with the second token, which is exempt
        (3, ["ab"], "ab"),
        (3, ["bab"], "a"),  # begins before, ends behind
        (4, ["bab"], "abab"),
        (4, ["ab", "bab b"], "abab"),
    ],
)
def test_stop_strings_count_if_they_end_behind_min_tokens(min_tokens, stop, text):
    token_ids = [id_of("byte-level", piece) for piece in "abab"]
    assert text_of("byte-level", token_ids, stop=stop, min_tokens=min_tokens) == text


def test_a_special_token_behind_min_tokens_stops():
    token_ids = [id_of("byte-level", piece) for piece in ("a", "<|end|>", "<|end|>", "b")]
    for min_tokens, text, num_tokens in ((1, "a", 2), (2, "a", 3), (3, "ab", 4)):
        given_out, detokenizer = stream("byte-level", token_ids, stop=["<|end|>"], min_tokens=min_tokens)
        assert (detokenizer.text, len(given_out) - 1) == (text, num_tokens)


# --- one output of a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("streams", "stop", "texts", "finish_reason"),
    [
        (True, [], ["b", "a", "b", "a", "b"], "length"),
        (True, ["ab"], ["b", "", ""], "stop"),
        (False, ["ab"], ["b", "", ""], "stop"),  # somebody has to look for it
        (False, [], ["", "", "", "", "babab"], "length"),  # made once, at the end
        (True, ["bb"], ["", "ba", "", "ba", "b"], "length"),
    ],
)
def test_the_text_of_an_output_comes_as_early_as_somebody_waits_for_it(streams, stop, texts, finish_reason):
    request = Request("r", [id_of("byte-level", "a")], SamplingParams(max_tokens=5, stop=stop))
    output, told = Completion(0, request, KINDS["byte-level"], streams), []
    while output.finish_reason is None:
        token_id = id_of("byte-level", "ba"[len(told) % 2])
        request.append(token_id)
        output.take(token_id, None)
        told.append(output.delta().text)
    assert (told, output.finish_reason) == (texts, finish_reason)
    assert output.cumulative().text == "".join(texts)
    assert output.hears_each_token == (streams or bool(stop))
