"""Between text and token ids: encoding with typed errors, and decoding that can stream and stop."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from minillm.errors import PromptError

CONTEXT = 8  # prompt tokens decoded along with the output: some tokenizers drop the space before a first word
UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character, or not yet


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text -> token ids. Raises PromptError for empty text and for text that has no UTF-8 form."""
    if not isinstance(text, str):
        raise PromptError(f"a text prompt must be a str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"character {error.start} of the prompt ({text[error.start]!r}) is half of a surrogate pair and cannot be "
            "encoded; remove it or pass the whole character"
        ) from error
    token_ids = tokenizer.encode(text)
    if not text or not token_ids:  # a tokenizer that begins every text with a token makes something of nothing
        raise PromptError("the prompt is empty; give at least one token, such as 'Once'")
    return token_ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]]:
    """A conversation in the model's own chat template, ready for its answer -> (text, token ids).

    `messages` are {"role": …, "content": …}. Raises PromptError if the model has no template, or for other messages.
    """
    if tokenizer.chat_template is None:
        raise PromptError("this model has no chat template: it continues text; give it a plain prompt, without chat")
    if not messages:
        raise PromptError("the conversation is empty; give at least one message")
    for place, message in enumerate(messages):
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise PromptError(f"message {place} is {message!r}; it needs 'role' and 'content'")
        encode(tokenizer, message["content"])
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is the checkpoint's own code, and may raise anything
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error
    return text, tokenizer.encode(text, add_special_tokens=False)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds to those before it, leading space included: the labels of masks and timelines."""
    texts = []
    for before, token_id in zip([None, *token_ids], token_ids, strict=False):
        context = [] if before is None else [before]  # some tokenizers drop the space before a first word
        texts.append(tokenizer.decode([*context, token_id])[len(tokenizer.decode(context)) :])
    return texts


class Detokenizer:
    """Text of a growing list of tokens, given out as soon as it is final.

    Held back are bytes that do not yet make a whole character and a tail that may grow into a stop string. Once
    `stopped_by` is set, the text ends right before that stop string, wherever within its tokens it began.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt_token_ids: Sequence[int] = ()
    ):
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.text = ""  # all that has been given out
        self.stopped_by: str | None = None
        self._pending = ""  # decoded, but held back
        self._window = list(prompt_token_ids[-CONTEXT:])  # the last tokens; how one is decoded depends on them
        self._num_decoded = len(self._window)  # of these, how many have had their text taken

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that has become final with it, often ''."""
        self._window.append(token_id)
        new = self._new_text()
        if new and not new.endswith(UNFINISHED):
            self._pending += new
            self._window, self._num_decoded = self._window[self._num_decoded :], len(self._window) - self._num_decoded
        return self._give_out(len(self._pending) - self._held_back())

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take tokens whose text nobody waits for before `finish`: as `add` for each, but decoded all at once."""
        already, self._window = self._window, [*self._window, *token_ids]
        new = self._new_text()
        if UNFINISHED in new:  # how many of these signs broken bytes give may depend on what they are decoded with
            self._window = already
            for token_id in token_ids:
                self.add(token_id)
            return
        self._pending += new
        self._window = self._window[-CONTEXT:]
        self._num_decoded = len(self._window)

    def finish(self) -> str:
        """No more tokens come: return what was held back, with unfinished characters shown as U+FFFD."""
        if self.stopped_by is None:
            self._pending += self._new_text()
        return self._give_out(len(self._pending))

    def _new_text(self) -> str:
        """What the window's tokens say beyond those whose text has been taken."""
        return self._decode(self._window)[len(self._decode(self._window[: self._num_decoded])) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=True)

    def _give_out(self, num_characters: int) -> str:
        found = [(self._pending.find(stop), stop) for stop in self.stop if stop in self._pending]
        if found:
            num_characters, self.stopped_by = min(found)
        new, self._pending = self._pending[:num_characters], self._pending[num_characters:]
        if self.stopped_by is not None:
            self._pending = ""
        self.text += new
        return new

    def _held_back(self) -> int:
        """Characters at the end of the pending text that may be the beginning of a stop string."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if self._pending.endswith(stop[:n])), default=0
        )
