"""What clients send and get, field by field as OpenAI's API and vLLM have it: types and their limits.

Types are strict: "5" is not a number, True is not 1, and NaN is refused. An unknown field is kept apart, so that the
log can name it. A known field that is not implemented is refused rather than answered wrongly.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic reads the one of `typing` from Python 3.12 on

from minillm.sampling import MOST_LOGPROBS

MOST_OUTPUTS = 1024  # of one request: n for each of its prompts
MOST_BIASES = 1024  # each costs something in every step
WHOLE_64 = {"ge": -(2**63), "le": 2**63 - 1}

Text = Annotated[str, Field(min_length=1)]
# fail_fast: a million wrong items count as one error.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**63 - 1)]], Field(min_length=1, fail_fast=True)]
Prompts = (
    Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MOST_OUTPUTS, fail_fast=True)]
)
StopText = Annotated[str, Field(min_length=1, max_length=256)]  # all are searched for after every token
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
NotImplementedHere = None  # the type of fields that change the answer in a way this server cannot


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = False  # one more event at the end, with the numbers of tokens
    continuous_usage_stats: bool | None = False  # with `include_usage`: the numbers so far in every event


class SamplingRequest(Body):
    """What completions and chat have in common. Fields with a name of `SamplingParams` mean the same there."""

    model: str | None = None  # None = the one that is served
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=1e-30, le=1e30)] | None = 1.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(**WHOLE_64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    min_tokens: Count | None = 0
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=1024, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    prompt_logprobs: Logprobs | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(**WHOLE_64)] | None = 0  # the smallest first, with scheduling_policy="priority"
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # share prefixes with it alone
    return_token_ids: bool | None = False
    user: str | None = None  # not used

    @model_validator(mode="after")
    def _check_stream(self):
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "is only for streams; set stream to true, or leave it out")
        if self.prompt_logprobs is not None and self.stream:
            raise refusal("prompt_logprobs", "is not possible in a stream; set stream to false, or leave it out")
        return self

    @property
    def num_outputs(self) -> int:
        """n, for each prompt."""
        return 1 if self.n is None else self.n


class CompletionRequest(SamplingRequest):
    prompt: Prompts
    max_tokens: Positive | None = 16  # null = as many as fit
    logprobs: Logprobs | None = None
    echo: bool | None = False  # the prompt again, before what is new
    suffix: NotImplementedHere = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to list beside each; None = no log-probabilities."""
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Text
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None


class ResponseFormat(Body):
    type: Literal["text"]


class Conversation(Body):
    """A chat, and how it becomes a prompt: the arguments of `LLM.chat`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_continues(self):
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal("continue_final_message", "continues the last message; set add_generation_prompt to false")
        return self


class ChatRequest(SamplingRequest, Conversation):
    max_completion_tokens: Positive | None = None  # the newer name of max_tokens; null = as many as fit
    logprobs: bool | None = False
    top_logprobs: Logprobs | None = None  # how many of the likeliest tokens beside each; needs `logprobs`
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    functions: NotImplementedHere = None
    audio: NotImplementedHere = None

    @model_validator(mode="after")
    def _check_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "needs logprobs; set logprobs to true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As for completions."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingRequest(Body):
    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"  # base64 of float32, little-endian
    dimensions: NotImplementedHere = None
    user: str | None = None


class TokenizePrompt(Body):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChat(Conversation):
    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    tokens: Annotated[list[Count], Field(fail_fast=True)]
    model: str | None = None


def refusal(param: str, reason: str) -> PydanticCustomError:
    """An error about fields that contradict each other; raised while a body is checked."""
    return PydanticCustomError("contradiction", "{reason}", {"param": param, "reason": reason})


# --- answers: plain dicts, with these fields -------------------------------------------------------------------------


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: int  # the HTTP status


class ErrorAnswer(TypedDict):
    error: Error


class CachedTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None


class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobList = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(TypedDict):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None  # "stop", "length" or "abort"; null in a stream until the end
    stop_reason: int | str | None  # the stop token's id or the stop string
    token_ids: NotRequired[list[int] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[PromptLogprobList | None]


class CompletionAnswer(TypedDict):
    """Also each event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage]
    service_tier: NotRequired[None]
    system_fingerprint: NotRequired[None]


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None
    annotations: None
    audio: None
    function_call: None
    tool_calls: list
    reasoning: None


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None


class ChatAnswer(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: None
    system_fingerprint: None
    prompt_logprobs: PromptLogprobList | None
    prompt_token_ids: list[int] | None


class ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int] | None]


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage]
    prompt_token_ids: NotRequired[list[int] | None]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    permission: list


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Embedding(TypedDict):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingAnswer(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class TokenizeAnswer(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(TypedDict):
    prompt: str


class Version(TypedDict):
    version: str
