"""Between text and token ids: encoding with typed errors, and decoding that can stream and stop."""

import codecs
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Protocol, runtime_checkable

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from minillm.errors import ConfigError, PromptError, check_flag, check_items, shown
from minillm.sampling import SamplingParams

UNFINISHED = "\ufffd"  # what bytes decode to that are not, or not yet, a whole character
LONGEST_CHARACTER = 4  # bytes, and so tokens at most
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how byte fallback (Llama 2, Mistral) writes a byte
_alphabet = sorted(ByteLevel.alphabet())  # how byte-level BPE writes bytes: visible ones as themselves
BYTE_CHARACTERS = dict(zip(_alphabet, sorted(range(256), key=lambda byte: chr(byte) not in _alphabet), strict=True))
ESCAPED = dict.fromkeys(range(0xDC80, 0xDD00), UNFINISHED)  # what "surrogateescape" makes of broken bytes


@runtime_checkable
class Tokenizer(Protocol):
    """What text is cut into tokens with. All tokenizers of transformers fit; importing those would take long."""

    def encode(self, text: str, **options) -> list[int]: ...

    def convert_ids_to_tokens(self, token_id: int) -> str | None: ...


class LightTokenizer:
    """A tokenizer of transformers that is not imported before it is needed, since that takes longer than a story.

    What is defined here gives the same as transformers does for files like those we ship. Asked for anything else, the
    object becomes what `whole()` returns.
    """

    def __init__(self, file: Path, eos_token: str, whole: Callable[[], Tokenizer]):
        backend = tokenizers.Tokenizer.from_file(str(file))
        vars(self).update(backend_tokenizer=backend, eos_token_id=backend.token_to_id(eos_token), _whole=whole)

    def encode(self, text: str, *arguments, **options) -> list[int]:
        if arguments or options or not isinstance(text, str):
            return self._become().encode(text, *arguments, **options)
        return self.backend_tokenizer.encode(text).ids

    def convert_ids_to_tokens(self, ids: int, *arguments, **options) -> str | None:
        if arguments or options or type(ids) is not int:
            return self._become().convert_ids_to_tokens(ids, *arguments, **options)
        return self.backend_tokenizer.id_to_token(ids)

    def __call__(self, *arguments, **options):
        return self._become()(*arguments, **options)

    def __len__(self) -> int:
        return len(self._become())

    def __getattr__(self, name: str):
        if name.startswith("__"):  # Python's own look-ups, such as how to copy it
            raise AttributeError(name)
        return getattr(self._become(), name)

    def __setattr__(self, name: str, value: object):
        setattr(self._become(), name, value)

    def _become(self) -> Tokenizer:
        whole = self._whole()
        object.__setattr__(self, "__dict__", vars(whole) | {"_whole": self._whole})
        object.__setattr__(self, "__class__", type(whole))
        return self


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text -> token ids. Raises PromptError for empty text and for text that has no UTF-8 form."""
    if not isinstance(text, str):
        raise PromptError(f"a text prompt must be a str, got {type(text).__name__}")
    _check_encodable(text)
    token_ids = tokenizer.encode(text)
    if not text or not token_ids:  # a tokenizer that begins every text with a token returns it for ""
        raise PromptError("the prompt is empty; give at least one token, such as 'Once'")
    return token_ids


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"character {error.start} of the prompt ({text[error.start]!r}) is half of a surrogate pair and cannot be "
            "encoded; remove it or pass the whole character"
        ) from error


# --- chat ------------------------------------------------------------------------------------------------------------


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence | None = None,
    chat_template_kwargs: Mapping | None = None,
) -> tuple[str, list[int]]:
    """A conversation put into the model's own chat template, by default ready for its answer -> (text, token ids).

    `messages` are {"role": …, "content": …}. The template decides what a content may be: a str, text parts, None beside
    tool calls. The other arguments are those of `LLM.chat`. Raises PromptError if the model has no template,
    or for messages that it does not take; ConfigError for arguments that contradict each other.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError("this model has no chat template: it continues text; give it a plain prompt, without chat")
    messages = check_items("a conversation", messages, "messages {'role': …, 'content': …}", error=PromptError)
    if not messages:
        raise PromptError("the conversation is empty; give at least one message")
    for place, message in enumerate(messages):
        _check_message(place, message)
    options = _template_options(add_generation_prompt, continue_final_message, tools, chat_template_kwargs)
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except Exception as error:  # a template is the checkpoint's own code, and may raise anything
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error
    _check_parts_were_read(messages, text)
    _check_encodable(text)
    token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written what begins a text
    if not token_ids:
        raise PromptError("the prompt is empty: the chat template makes no text of these messages; give them content")
    return text, token_ids


def _check_message(place: int, message: object) -> None:
    if not (isinstance(message, Mapping) and "role" in message and ("content" in message or "tool_calls" in message)):
        raise PromptError(f"message {place} is {shown(message)}; it needs 'role' and 'content'")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise PromptError(
            f"the content of message {place} is {shown(content)}; it must be a str, or a list of {{'type': 'text', …}}"
        )


def _template_options(add_generation_prompt, continue_final_message, tools, chat_template_kwargs) -> dict:
    """The arguments of `apply_chat_template`; `chat_template_kwargs` go last, as in vLLM."""
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise ConfigError(f"chat_template_kwargs is {shown(chat_template_kwargs)}; it must be a dict of the template's")
    if tools is not None:
        tools = list(check_items("tools", tools, "tools, as JSON schemas or functions"))
    options = {
        "add_generation_prompt": check_flag("add_generation_prompt", add_generation_prompt),
        "continue_final_message": check_flag("continue_final_message", continue_final_message),
        "tools": tools,
        **(chat_template_kwargs or {}),
        "tokenize": False,
    }
    if options["add_generation_prompt"] and options["continue_final_message"]:
        raise ConfigError(
            "add_generation_prompt begins a new message and continue_final_message goes on with the last one; "
            "with continue_final_message=True, set add_generation_prompt=False"
        )
    return options


def _check_parts_were_read(messages: Sequence[Mapping], text: str) -> None:
    """Raises PromptError if the template only knows a str, and prints a list of parts as Python would."""
    for place, message in enumerate(messages):
        if isinstance(message.get("content"), list | tuple) and str(message["content"]) in text:
            raise PromptError(
                f"the model's chat template does not read a list of parts, the content of message {place}; give a str"
            )


# --- decoding --------------------------------------------------------------------------------------------------------


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text each token adds to those before it, leading space included: the labels of masks and timelines.

    Special tokens have their names. Joined, they are the text of all tokens: a character of several tokens is the text
    of its last one, and the others add "". `before` are the tokens before the first, such as the prompt of an output.
    """
    decoder = TokenDecoder(tokenizer, [int(token_id) for token_id in before], skip_special_tokens=False)
    texts = [decoder.add(int(token_id)) for token_id in token_ids]
    return [*texts[:-1], texts[-1] + decoder.finish()] if texts else []


class TokenDecoder:
    """The text that each token adds to those before it, in whole characters, at a constant cost per token.

    A decoder looks back at most this far: three bytes, before a character is whole; the token before, for the space
    between words; and whether there is one, for the space that begins a text. So bytes go through a UTF-8 decoder,
    which knows when no continuation can make a character. Other tokens are decoded together with the one before. Both
    need only `decode` and `convert_ids_to_tokens` of a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, skip_special_tokens: bool = True):
        """`before` are tokens whose text is known. A character that they leave unfinished comes with its last token."""
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # several times faster
        self._skip = skip_special_tokens
        self._last: list[int] = []  # the token before; decoders look back no further
        self._last_alone = ""  # its text by itself
        self._bytes = b""  # of a character that is not whole yet
        self._errors = "replace"  # one U+FFFD for all bytes of a broken character, or, "surrogateescape", for each
        self._held: list[int] = []  # tokens whose unfinished bytes are not known
        for token_id in self._last_spoken(before):
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that has become final with it."""
        alone = self._decode([token_id])
        if not alone and self.special_name(token_id):
            return ""
        data = self._bytes_of(token_id, alone)
        if data is None or (not self._last and UNFINISHED not in alone):  # a text's first space may be dropped
            return self._add_text(token_id, alone)
        new = self._release(len(self._held))
        self._bytes += data
        self._last, self._last_alone = [token_id], alone
        return new + self._whole_characters()

    def add_all(self, token_ids: Sequence[int]) -> str:
        """As `add` for each, but decoded at once where that gives the same; only `finish` may follow."""
        text = self._decode([*self._last, *token_ids])
        new = text[len(self._last_alone) :]
        if self._bytes or self._held or not text.startswith(self._last_alone) or UNFINISHED in new:
            return "".join(map(self.add, token_ids))
        return new

    def finish(self) -> str:
        """No more tokens come: return what was held back, with unfinished characters shown as U+FFFD."""
        return self._whole_characters(final=True) + self._release(len(self._held))

    def would_add(self, token_ids: Sequence[int], *, final: bool) -> list[str]:
        """What each of these would add if it were the next token; with `final`, if it were the last one."""
        texts = []
        for token_id in token_ids:
            decoder = copy(self)
            texts.append(decoder.add(token_id) + (decoder.finish() if final else ""))
        return texts

    def special_name(self, token_id: int) -> str:
        """The name of a special token, which is skipped; "" for any other."""
        if self._decode([token_id], skip=True):
            return ""
        return self._decode([token_id], skip=False)

    def _add_text(self, token_id: int, alone: str) -> str:
        broken = self._whole_characters(final=True) if self._bytes else ""
        held = [*self._held, token_id]
        new = self._after_last(held)
        if not new.endswith(UNFINISHED):
            self._last, self._last_alone, self._held = [token_id], alone, []
            return broken + new
        self._held = held
        return broken + self._release(len(held) - LONGEST_CHARACTER + 1)  # what this many cannot finish is broken

    def _release(self, count: int) -> str:
        """The text of the first `count` tokens that are held."""
        if count <= 0:
            return ""
        released, self._held = self._held[:count], self._held[count:]
        new = self._after_last(released)
        self._last = released[-1:]
        self._last_alone = self._decode(self._last)
        return new

    def _whole_characters(self, final: bool = False) -> str:
        """Take the bytes that make characters, or never can."""
        surrogate = self._bytes[-2:-1] == b"\xed" and 0xA0 <= self._bytes[-1] < 0xC0  # Python waits for a third byte
        text, num_read = codecs.utf_8_decode(self._bytes, self._errors, final or surrogate)
        self._bytes = self._bytes[num_read:]
        return text.translate(ESCAPED)

    def _bytes_of(self, token_id: int, alone: str) -> bytes | None:
        """A token's bytes, if it is one byte or not made of whole characters; None otherwise."""
        if len(alone) > 1 and UNFINISHED not in alone:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if BYTE_PIECE.fullmatch(piece):
            self._errors = "surrogateescape"
            return bytes.fromhex(piece[3:5])
        if UNFINISHED in alone and all(character in BYTE_CHARACTERS for character in piece):
            return bytes(BYTE_CHARACTERS[character] for character in piece)
        return None

    def _after_last(self, token_ids: list[int]) -> str:
        return self._decode([*self._last, *token_ids])[len(self._last_alone) :]

    def _last_spoken(self, token_ids: Sequence[int]) -> list[int]:
        """The last of the tokens that are not skipped, back to one in which no character is unfinished."""
        spoken = []
        for token_id in reversed(token_ids):
            alone = self._decode([token_id])
            if alone or not self.special_name(token_id):
                spoken.append(token_id)
                if UNFINISHED not in alone or len(spoken) == LONGEST_CHARACTER:
                    break
        return spoken[::-1]

    def _decode(self, token_ids: Sequence[int], skip: bool | None = None) -> str:
        skip = self._skip if skip is None else skip
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skip)
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Text of a growing list of tokens without special ones, given out as soon as it is final.

    Held back are bytes that do not yet make a whole character and a tail that may grow into a stop string. Once
    `stopped_by` is set, the text ends right before that stop string, or right after it with `include_stop`. A stop
    string may hold the names of special tokens, though these are not in the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_token_ids: Sequence[int] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ):
        """Stop strings that end within the first `min_tokens` tokens do not count."""
        self.stop = tuple(stop)
        self.text = ""  # all that has been given out
        self.stopped_by: str | None = None
        self._include_stop = include_stop
        self._num_exempt_tokens = min_tokens  # still to come
        self._num_exempt = 0  # characters of the pending text before which no stop string may end
        self._decoder = TokenDecoder(tokenizer, prompt_token_ids)
        self._pending = ""  # decoded but held back, with names of special tokens that occur in stop strings
        self._named: list[int] = []  # the places in the pending text that belong to such names

    @classmethod
    def for_request(
        cls, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> "Detokenizer | None":
        """The detokenizer for these parameters; None without a tokenizer."""
        if tokenizer is None:
            return None
        return cls(
            tokenizer,
            params.stop_strings,
            prompt_token_ids,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def take(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        """The text that has become final with new tokens of a request, all of it if the request has ended.

        As in vLLM, a token that ends it (`finish_reason` is "stop") is in the text only with `include_stop`.
        """
        if finish_reason == "stop" and not self._include_stop:
            token_ids = token_ids[:-1]
        if finish_reason is not None and not self.stop:
            self.extend(token_ids)
            return self.finish()
        new = "".join(map(self.add, token_ids))
        return new if finish_reason is None else new + self.finish()

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that has become final with it, often ''."""
        new = self._decoder.add(token_id)
        if self.stop and not new:
            new = self._name_to_stop_at(token_id)
            self._named += range(len(self._pending), len(self._pending) + len(new))
        self._pending += new
        if self._num_exempt_tokens > 0:
            self._num_exempt_tokens -= 1
            self._num_exempt = len(self._pending)
        return self._give_out(self._num_final() if self.stop else len(self._pending))

    def extend(self, token_ids: Sequence[int]) -> None:
        """As `add` for each, if there are no stop strings and the text is not needed yet; only `finish` may follow."""
        self._pending += self._decoder.add_all(token_ids)

    def finish(self) -> str:
        """No more tokens come: return what was held back, with unfinished characters shown as U+FFFD."""
        if self.stopped_by is not None:
            return ""
        self._pending += self._decoder.finish()
        return self._give_out(len(self._pending))

    def _name_to_stop_at(self, token_id: int) -> str:
        name = self._decoder.special_name(token_id)
        return name if any(name in stop for stop in self.stop) else ""

    def _give_out(self, num_characters: int) -> str:
        """The first characters of the pending text, or those before a stop string if there is one."""
        found = self._first_stop() if self.stop else None
        if found is not None:
            num_characters, self.stopped_by = found
        new = self._pending[:num_characters]
        if self._named:
            new = "".join(each for place, each in enumerate(new) if place not in self._named)
        if found is not None and self._include_stop:
            new += self.stopped_by
        self._pending = "" if found is not None else self._pending[num_characters:]
        self._named = [place - num_characters for place in self._named if place >= num_characters]
        self._num_exempt -= num_characters
        self.text += new
        return new

    def _first_stop(self) -> tuple[int, str] | None:
        """Where the first stop string of the pending text begins, and which it is."""
        found = []
        for text, places in self._readings():
            for stop in self.stop:
                ends = bisect(places, self._num_exempt - 1)  # the first character at which a stop string may end
                start = text.find(stop, max(0, ends + 1 - len(stop)))
                if start >= 0:
                    found.append((places[start], stop))
        return min(found, default=None)

    def _num_final(self) -> int:
        """Characters of the pending text before the first that may begin a stop string."""
        return min(
            (
                places[-length]
                for text, places in self._readings()
                for stop in self.stop
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=len(self._pending),
        )

    def _readings(self) -> Iterator[tuple[str, Sequence[int]]]:
        """The pending text, and the same without names if there are any; each with the place of every character."""
        yield self._pending, range(len(self._pending))
        if self._named:
            places = sorted(set(range(len(self._pending))).difference(self._named))
            yield "".join(self._pending[place] for place in places), places
