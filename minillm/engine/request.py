"""One request on its way through the engine. No torch: the scheduler and the simulator use these."""

import sys
from collections.abc import Sequence

from minillm.errors import Count, PromptError, SamplingParamsError, check_kind, check_seconds, check_text, shown
from minillm.runtime import NewRequest
from minillm.sampling import SamplingParams, finish_reason, limited

GIVEN = (
    "request_id",
    "prompt_token_ids",
    "params",
    "eos_token_ids",
    "arrival_time",
    "priority",
    "predicted_output_tokens",
    "cache_salt",
)  # what a caller says of a request: the arguments of its constructor
FAR = sys.maxsize  # a milestone that is never reached


def output_id(request_id: str, index: int) -> str:
    """What the scheduler calls the request that makes the output `index` of a prompt: "a", "a.1", "a.2", ..."""
    return f"{request_id}.{index}" if index else request_id


class Request:
    """Prompt, output so far, and how far both have been computed.

    `num_tokens` counts prompt and output, the newest sampled token included. Keys and values exist for
    `num_computed_tokens` of them; the rest, `num_tokens - num_computed_tokens`, is what is still to compute. Right
    after sampling that is 1 (the newest token), during a prefill it is the rest of the prompt: prefill, a chunk of it
    and decode are all "compute the next n tokens".

    While a step is in flight, both run ahead of what has been read: tokens that it computes count as computed, and the
    one it will sample counts in `num_tokens`, unless it is the last possible one, which is never computed.
    `output_token_ids` holds known tokens only.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        eos_token_ids: Sequence[int] = (),
        arrival_time: float = 0.0,
        priority: int = 0,
        predicted_output_tokens: int | None = None,
        cache_salt: str = "",
    ):
        """`arrival_time` in seconds on the run's clock; a smaller `priority` goes first, as in vLLM.

        `predicted_output_tokens` is what "sjf" sorts by; unknown, `max_tokens` stands in. Requests share cached
        prefixes only with those of the same `cache_salt`. Raises PromptError for an empty prompt.
        """
        check_text("request_id", request_id, error=PromptError)
        check_text("cache_salt", cache_salt, error=PromptError)
        if isinstance(prompt_token_ids, str | bytes) or not isinstance(prompt_token_ids, Sequence):
            raise PromptError(f"the prompt of {request_id!r} is {shown(prompt_token_ids)}; it must be a list of ids")
        if len(prompt_token_ids) == 0:
            raise PromptError(f"request {request_id!r} has an empty prompt; give at least one token id")
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = check_kind("params", params, SamplingParams, error=SamplingParamsError)
        self.eos_token_ids = check_kind("eos_token_ids", eos_token_ids, Sequence[int])
        self.arrival_time = check_seconds("arrival_time", arrival_time)
        self.priority = check_kind("priority", priority, int)
        self.predicted_output_tokens = check_kind("predicted_output_tokens", predicted_output_tokens, Count | None)
        self.predicted_output_tokens = self.predicted_output_tokens or params.max_tokens or FAR
        self.output_token_ids: list[int] = []
        self.num_prompt_tokens = len(prompt_token_ids)
        # Prompt and longest possible output; without `max_tokens` known as soon as a scheduler is asked.
        self.num_tokens_at_most = FAR if params.max_tokens is None else self.num_prompt_tokens + params.max_tokens
        self.num_tokens = self.num_prompt_tokens
        self.num_computed_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.first_token_time: float | None = None  # when it had been read, by the scheduler's clock
        self.last_token_time: float | None = None  # of the newest token
        self.cache_salt = cache_salt
        self.queue_number: int | None = None  # place among equals, given once by the queue
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when the request was first admitted
        self.num_preemptions = 0
        self.num_ever_computed = 0  # as num_computed_tokens, but does not fall when a preemption loses the cache
        self.children: list[Request] = []  # the other outputs of the same prompt, if params.n > 1
        self.prefix_keys: list = []  # of its full blocks, kept by the block manager
        self.plain_until = 0  # positions before this one are decoded one per step, and need no new block
        self.milestone = FAR  # with this many computed tokens the scheduler has something to do
        self.plain_below = FAR  # the same, or the last token there may be; 0 after the end
        eos_token_ids = () if params.ignore_eos else self.eos_token_ids
        self.ending_ids = frozenset((*params.stop_token_ids, *eos_token_ids))  # each may end it

    def limit(self, most_tokens: int) -> None:
        """Without `max_tokens` the output may grow until prompt and output have `most_tokens` tokens.

        Raises SamplingParamsError if `min_tokens` does not fit.
        """
        if self.params.max_tokens is None:
            self.params = limited(self.params, self.num_prompt_tokens, most_tokens)
            self.predicted_output_tokens = min(self.predicted_output_tokens, self.params.max_tokens)
            self.num_tokens_at_most = self.num_prompt_tokens + self.params.max_tokens

    def copy(self, **changes) -> "Request":
        """The same request with nothing computed yet, except for `changes`, named as in the constructor."""
        given = {name: getattr(self, name) for name in GIVEN}
        return Request(**given | changes)

    def announcement(self) -> NewRequest:
        """What an executor must know before its first tokens come."""
        output_token_ids = tuple(self.output_token_ids)
        return NewRequest(self.request_id, self.params, self.prompt_token_ids, output_token_ids, self.eos_token_ids)

    def token_ids(self, start: int, end: int) -> Sequence[int]:
        """The known ids at positions start..end-1, from the prompt, the output, or across both."""
        n = self.num_prompt_tokens
        if end <= n:
            return self.prompt_token_ids[start:end]
        if start >= n:
            return self.output_token_ids[start - n : end - n]
        return [*self.prompt_token_ids[start:], *self.output_token_ids[: end - n]]

    def append(self, token_id: int) -> bool:
        """Take a sampled token, which `num_tokens` may count already; True if it ends the request."""
        self.output_token_ids.append(token_id)
        num_known = self.num_prompt_tokens + len(self.output_token_ids)
        if num_known > self.num_tokens:
            self.num_tokens = num_known
        if num_known < self.num_tokens_at_most and token_id not in self.ending_ids:
            return False
        reason, stop_reason = finish_reason(self.output_token_ids, self.params, self.eos_token_ids)
        if reason is None:
            return False
        self.num_tokens = num_known
        self.end(reason, stop_reason)
        return True

    def end(self, finish_reason: str, stop_reason: int | str | None = None) -> None:
        """The request has ended, and why."""
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        self.plain_below = 0

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output, the newest token that has been read included."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, prompt {self.num_prompt_tokens}, output {len(self.output_token_ids)}, "
            f"computed {self.num_computed_tokens})"
        )
