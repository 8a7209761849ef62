"""Text becomes token ids with typed errors; token ids become text that streams whole characters and stops in time."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from minillm import encode, token_texts
from minillm.errors import ConfigError, PromptError
from minillm.model.text import Detokenizer, encode_chat

TEXTS = [
    "The fox saw a crêpe in the naïve café.",
    "emoji 🦊 and 👩‍👩‍👧 and 日本語",
    "🦊",
    " leading and trailing space ",
    "line\n\nbreaks\tand tabs",
]
pieces = st.lists(st.sampled_from(["the", " fox", "é", "🦊", "日本", " ", "a", "b", "ab", "\n", "."]), min_size=1)
texts = pieces.map("".join)


def stream(tokenizer, token_ids, stop=(), prompt=()):
    """The pieces given out for each token and at the end, and the detokenizer; stops as generation would."""
    detokenizer, given_out = Detokenizer(tokenizer, stop, prompt), []
    for token_id in token_ids:
        given_out.append(detokenizer.add(token_id))
        if detokenizer.stopped_by is not None:
            break
    given_out.append(detokenizer.finish())
    return given_out, detokenizer


# --- encoding --------------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_inverse(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_special_tokens_have_their_names(tokenizer):
    assert token_texts(tokenizer, [tokenizer.eos_token_id, *encode(tokenizer, "The")[:1]])[0] == "<|endoftext|>"


def test_token_texts_keep_their_leading_space(tokenizer):
    labels = token_texts(tokenizer, encode(tokenizer, "The fox saw"))
    assert "".join(labels) == "The fox saw"
    assert " fox" in labels


@pytest.mark.parametrize("kind", ["tokenizer", "byte_fallback_tokenizer"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), ("ab\ud83e", "character 2 .*surrogate"), (b"bytes", "str, got bytes"), (None, "str, got NoneType")],
)
def test_text_that_cannot_be_a_prompt_is_refused(kind, text, message, request):
    with pytest.raises(PromptError, match=message):
        encode(request.getfixturevalue(kind), text)


def test_empty_text_is_refused_even_if_every_text_begins_with_a_token():
    class BeginsEveryText:
        def encode(self, text):
            return [1]

    with pytest.raises(PromptError, match="empty"):
        encode(BeginsEveryText(), "")


@pytest.mark.parametrize("written", ["{{ bos_token }}", "<s>", ""])
def test_a_conversation_begins_as_its_template_says_and_not_twice(written, byte_fallback_tokenizer):
    """A tokenizer that begins every text with <s> does not add another one, nor one that the template leaves out."""
    tokenizer = copy.deepcopy(byte_fallback_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = written + "{{ messages[0].content }}"
    assert encode(tokenizer, "the fox")[0] == 1 == tokenizer.bos_token_id
    text, token_ids = encode_chat(tokenizer, [{"role": "user", "content": "the fox"}])
    assert token_ids.count(1) == (1 if written else 0) and token_ids[0] == (1 if written else token_ids[0])
    assert text == ("<s>" if written else "") + "the fox"


@pytest.mark.parametrize("message", ["the fox", {"role": "user"}, {"content": "a"}, {"tool_calls": []}, 5, None])
def test_what_is_no_message_is_refused(message, byte_fallback_tokenizer):
    tokenizer = copy.deepcopy(byte_fallback_tokenizer)
    tokenizer.chat_template = "the fox"
    with pytest.raises(PromptError, match="message 1 is .*it needs 'role' and 'content'"):
        encode_chat(tokenizer, [{"role": "assistant", "tool_calls": []}, message])


@pytest.mark.parametrize("content", [5, {"text": "a"}, b"a", True])
def test_content_that_is_no_text_and_no_parts_is_refused(content, byte_fallback_tokenizer):
    tokenizer = copy.deepcopy(byte_fallback_tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(PromptError, match="the content of message 0 is"):
        encode_chat(tokenizer, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "the fox>"),
        ({"add_generation_prompt": False}, "the fox"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "the fox"),
    ],
)
def test_an_answer_is_begun_or_the_last_message_goes_on(options, text, byte_fallback_tokenizer):
    tokenizer = copy.deepcopy(byte_fallback_tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    messages = [{"role": "user", "content": "the fox"}]
    assert encode_chat(tokenizer, messages, **options)[0] == text
    with pytest.raises(ConfigError, match="set add_generation_prompt=False"):
        encode_chat(tokenizer, messages, continue_final_message=True)


# --- streaming -------------------------------------------------------------------------------------------------------


@given(text=texts)
def test_streamed_pieces_are_the_text(text, tokenizer):
    given_out, detokenizer = stream(tokenizer, tokenizer.encode(text))
    assert "".join(given_out) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in given_out)


def test_a_character_of_several_tokens_comes_out_with_its_last_one(tokenizer):
    token_ids = tokenizer.encode("🦊")
    assert len(token_ids) == 4
    assert stream(tokenizer, token_ids)[0] == ["", "", "", "🦊", ""]


def test_a_character_that_never_ends_is_shown_as_replacement_at_the_end(tokenizer):
    given_out, _ = stream(tokenizer, [*tokenizer.encode("fox"), *tokenizer.encode("🦊")[:3]])
    assert "".join(given_out) == "fox\ufffd"
    assert "\ufffd" not in "".join(given_out[:-1])


@given(token_ids=st.lists(st.integers(0, 300), max_size=20))
def test_any_tokens_stream_to_what_they_decode_to(token_ids, tokenizer):
    given_out, detokenizer = stream(tokenizer, token_ids)
    assert "".join(given_out) == detokenizer.text == tokenizer.decode(token_ids, skip_special_tokens=True)


@given(token_ids=st.lists(st.integers(0, 290), max_size=20))
def test_any_bytes_stream_without_an_error(token_ids, byte_fallback_tokenizer):
    """tokenizers' own DecodeStream raises "Invalid prefix" for some of these."""
    given_out, detokenizer = stream(byte_fallback_tokenizer, token_ids)
    assert "".join(given_out) == detokenizer.text


def test_the_space_before_the_first_word_survives(byte_fallback_tokenizer):
    """Decoded on their own, the tokens of " fox" lose their space."""
    prompt, fox = byte_fallback_tokenizer.encode("the"), byte_fallback_tokenizer.encode("fox 🦊")
    assert byte_fallback_tokenizer.decode(fox) == "fox 🦊"
    assert stream(byte_fallback_tokenizer, fox, prompt=prompt)[1].text == " fox 🦊"
    assert stream(byte_fallback_tokenizer, fox)[1].text == "fox 🦊"


@pytest.mark.parametrize("special", [0, 1, 2])
def test_special_tokens_are_silent_and_disturb_nothing(special, byte_fallback_tokenizer):
    the, fox = (byte_fallback_tokenizer.encode(word) for word in ("the", "fox"))
    assert stream(byte_fallback_tokenizer, [*the, special, *fox])[1].text == "the fox"


# --- stop strings ----------------------------------------------------------------------------------------------------


@given(text=texts, data=st.data())
def test_text_ends_right_before_the_stop_string_wherever_token_borders_lie(text, data, tokenizer):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    token_ids = tokenizer.encode(text)
    given_out, detokenizer = stream(tokenizer, token_ids, (stop,))
    assert detokenizer.stopped_by == stop
    assert "".join(given_out) == detokenizer.text == text[: text.find(stop)]
    num_taken = len(given_out) - 1
    assert stop in tokenizer.decode(token_ids[:num_taken])
    assert stop not in tokenizer.decode(token_ids[: num_taken - 1]), "it should have stopped earlier"


@given(text=texts, stop=texts)
def test_a_stop_string_that_does_not_come_changes_nothing(text, stop, tokenizer):
    given_out, detokenizer = stream(tokenizer, tokenizer.encode(text), (stop + "#",))
    assert "".join(given_out) == detokenizer.text == text
    assert detokenizer.stopped_by is None


def test_a_tail_that_may_become_a_stop_string_is_held_back(tokenizer):
    token_ids = [token_id for character in "xabaabac" for token_id in tokenizer.encode(character)]
    given_out, detokenizer = stream(tokenizer, token_ids, ("abac",))
    assert given_out == ["x", "", "", "", "aba", "", "", "", ""]
    assert detokenizer.text == "xaba"


def test_of_several_stop_strings_the_one_that_begins_first_counts(tokenizer):
    given_out, detokenizer = stream(tokenizer, tokenizer.encode("the fox saw the fox"), ("saw", "fox", "hen"))
    assert (detokenizer.text, detokenizer.stopped_by) == ("the ", "fox")
