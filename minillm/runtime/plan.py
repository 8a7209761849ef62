"""What passes between a scheduler and an executor: the plan of one step, and what came of it. Plain data, no tensors.

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
PENDING = -1  # in place of a token id: what the request's last step sampled, which only the executor may know yet


@dataclass(frozen=True)
class RunnerOptions:
    """What a worker reads: how it is to compute, and the largest steps it must have memory for."""

    attention_backend: str = "auto"  # "reference", "cpu", "cuda", "triton", "flash"; "auto" = the fastest that will do
    enforce_eager: bool = False  # on a GPU: no CUDA graphs, every kernel is launched from Python
    fused_ops: bool = True  # on a GPU: neighbouring small operations run as one kernel
    max_num_seqs: Positive = 64  # requests that run at the same time: how large graphs and buffers are made
    max_num_batched_tokens: Positive = 512  # tokens of one step
    max_model_len: Positive = 2048  # prompt and output tokens of one request
    block_size: Positive = 16  # tokens in a block of the cache


DEFAULT_OPTIONS = RunnerOptions()


class NewRequest(NamedTuple):
    """What an executor must know once about a request before its first tokens come."""

    request_id: str
    params: SamplingParams
    num_tokens_at_most: int  # prompt and longest possible output
    num_sampled: int = 0  # output tokens it has already, if a failed step made it new again: numbers it has drawn
    prompt_token_ids: Sequence[int] = ()  # these three only if its `params` need them
    output_token_ids: Sequence[int] = ()
    ending_ids: Sequence[int] = ()  # eos and stop ids, forbidden before `params.min_tokens`

    @classmethod
    def of(
        cls,
        request_id: str,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
    ) -> "NewRequest":
        """What is to be known of a request that has these tokens, and a number for `max_tokens`."""
        return cls(
            request_id,
            params,
            len(prompt_token_ids) + params.max_tokens,
            len(output_token_ids),
            prompt_token_ids if params.reads_tokens else (),
            tuple(output_token_ids) if params.penalizes else (),
            (*params.stop_token_ids, *eos_token_ids) if params.min_tokens else (),
        )


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
    token_ids: Sequence[int]
    samples: bool  # True: the logits of the last of them give a new token
    why: Why  # for the trace; an executor need not know
    first_block: int = 0
    block_ids: Sequence[int] = ()
    num_recomputed: int = 0  # of its tokens, the first so many had been computed before a preemption; for the trace


@dataclass
class SchedulerOutput:
    """The plan of one step: plain data, no tensors."""

    step: int
    start_time: float  # seconds on the scheduler's clock
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)  # first scheduled in this step
    finished_ids: list[str] = field(default_factory=list)  # left since the last plan: forget their caches
    preempted_ids: list[str] = field(default_factory=list)  # gave way in this plan: their block tables are void
    block_moves: list[BlockMove] = field(default_factory=list)  # before anything is computed, in this order
    num_tokens: int = 0  # tokens to compute, without padding
    row_length: int | None = None  # padded batching: every row is padded to this many tokens
    padding_rows: list[str] = field(default_factory=list)  # padded batching: ended requests that still take a row
    launched: float | None = None  # on the scheduler's clock, noted by whoever launched it; for the trace

    @property
    def num_slots(self) -> int:
        """Tokens pushed through the model, padding included."""
        if self.row_length is None:
            return self.num_tokens
        return self.row_length * (len(self.scheduled) + len(self.padding_rows))


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
        """Wait for the step and read what came of it. Raises what the step raised. The same every time."""


class FinishedOutput(NamedTuple):
    """A step that was computed while it was launched."""

    output: ModelOutput

    def result(self) -> ModelOutput:
        """What came of it."""
        return self.output
