"""What passes between a scheduler and an executor: the plan of one step, and its result. Plain data, no tensors.

Layer 2 writes plans and layer 3 carries them out; both import this, and neither needs the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from minillm.errors import Positive
from minillm.sampling import PromptLogprobs, SamplingParams, TokenLogprobs
from minillm.trace import Why

NULL_BLOCK = 0  # never handed out: what the padding of a rectangle of block tables points at


@dataclass(frozen=True)
class RunnerOptions:
    """What a worker reads: how it is to compute, and the largest steps it must have memory for."""

    attention_backend: str = "auto"  # "reference", "cpu", "cuda", "triton", "flash"; "auto" = the fastest that fits
    enforce_eager: bool = False  # on a GPU: no CUDA graphs, every kernel is launched from Python
    fused_ops: bool = True  # neighbouring small operations run as one kernel where one exists
    max_num_seqs: Positive = 64  # requests that run at the same time: how large graphs and buffers are made
    max_num_batched_tokens: Positive = 512  # tokens of one step
    max_model_len: Positive = 2048  # prompt and output tokens of one request
    block_size: Positive = 16  # tokens in a block of the cache


DEFAULT_OPTIONS = RunnerOptions()


class NewRequest(NamedTuple):
    """A request that joins the batch: what an executor must know until it is finished or preempted.

    Its tokens are sent only here. The executor keeps what it samples later and reads it in the next step: a plan
    contains positions only.
    """

    request_id: str
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()  # so far; some if it has been in the batch before
    eos_token_ids: Sequence[int] = ()

    @property
    def num_tokens_at_most(self) -> int:
        """Prompt and longest possible output."""
        return len(self.prompt_token_ids) + self.params.max_tokens

    @property
    def known_tokens(self) -> dict[str, Sequence[int]]:
        """What sampling needs of its tokens; `ending_ids` cannot be sampled before `params.min_tokens`."""
        ending_ids = (*self.params.stop_token_ids, *self.eos_token_ids)
        prompt, output = self.prompt_token_ids, self.output_token_ids
        return {"prompt_token_ids": prompt, "output_token_ids": output, "ending_ids": ending_ids}


class BlockMove(NamedTuple):
    """Whole blocks of cache to copy before anything is computed: sources[i] to targets[i].

    "copy" is within the pool (copy-on-write), "swap_out" from the pool to host memory, "swap_in" back. The moves of a
    plan are carried out one after the other, in their order.
    """

    kind: Literal["copy", "swap_out", "swap_in"]
    sources: Sequence[int]
    targets: Sequence[int]


class ScheduledRequest(NamedTuple):
    """Consecutive tokens of one request to compute in this step.

    Where the cache is paged, `block_ids` is the part of its block table that is new since the last plan, from entry
    `first_block` on; empty if the table is unchanged.
    """

    request_id: str
    start: int  # position of the first of them; everything before has been computed
    num_tokens: int  # how many
    samples: bool  # True: the logits of the last of them give a new token
    why: Why  # for the trace; an executor need not know
    first_block: int = 0
    block_ids: Sequence[int] = ()
    num_recomputed: int = 0  # its first tokens, computed before a preemption; for the trace

    @property
    def end(self) -> int:
        """Position after the last of them: how many tokens have been computed after the step."""
        return self.start + self.num_tokens


@dataclass
class SchedulerOutput:
    """The plan of one step: plain data, no tensors."""

    step: int
    start_time: float  # seconds on the scheduler's clock
    decodes: dict[str, int] = field(default_factory=dict)  # requests that compute one token and sample: position
    others: list[ScheduledRequest] = field(default_factory=list)  # all others, after them
    new_requests: list[NewRequest] = field(default_factory=list)  # join the batch in this step
    finished_ids: list[str] = field(default_factory=list)  # left the batch since the last plan: forget them first
    preempted_ids: list[str] = field(default_factory=list)  # preempted in this plan: forget them too
    block_moves: list[BlockMove] = field(default_factory=list)  # before anything is computed, in this order
    num_tokens: int = 0  # tokens to compute, without padding
    row_length: int | None = None  # padded batching: every row is padded to this many tokens
    padding_rows: list[str] = field(default_factory=list)  # padded batching: ended requests that still take a row
    launched: float | None = None  # on the scheduler's clock, set by the caller that launched it; for the trace

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """All requests in one form, for reading.

        `decodes` is the same without an object per request: making and reading 256 objects takes 0.15 ms.
        """
        decodes = [ScheduledRequest(name, start, 1, True, "decode") for name, start in self.decodes.items()]
        return decodes + self.others

    @property
    def num_requests(self) -> int:
        """Requests that compute something."""
        return len(self.decodes) + len(self.others)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens pushed through the model, padding included."""
        if self.row_length is None:
            return self.num_tokens
        return self.row_length * (self.num_requests + len(self.padding_rows))


class ModelOutput(NamedTuple):
    """What an executor returns for a plan."""

    token_ids: Mapping[str, int]  # the new token of every scheduled request that samples and did not fail
    score_entries: int  # query-key pairs scored, in one head of one layer
    logprobs: Mapping[str, TokenLogprobs] = MappingProxyType({})  # of requests that ask for them
    failed: Mapping[str, str] = MappingProxyType({})  # requests that sample but got no token, and why
    device_times: tuple[float, float] | None = None  # when the device began and ended the step, on time.perf_counter
    prompt_logprobs: Mapping[str, PromptLogprobs] = MappingProxyType({})  # of requests that ask for these


class PendingOutput(Protocol):
    """A step that has been launched; the device may still be computing it."""

    def result(self) -> ModelOutput:
        """Wait for the step and return its result, the same every time. Raises what the step raised."""


def not_finite(request_id: str) -> str:
    """The message for a request whose logits or hidden states are NaN or infinite."""
    return f"what the model computed for request {request_id!r} is not finite; its cache was discarded"
