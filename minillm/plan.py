"""What passes between a scheduler and an executor: the plan of one step, and what came of it. Plain data, no tensors.

Layer 2 writes plans and layer 3 carries them out; both import this, and neither needs the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minillm.sampling_params import SamplingParams
from minillm.trace import Why


class NewRequest(NamedTuple):
    """What an executor must know once about a request before its first tokens come."""

    request_id: str
    params: SamplingParams
    num_tokens_at_most: int  # prompt and longest possible output


class ScheduledRequest(NamedTuple):
    """Consecutive tokens of one request to compute in this step."""

    request_id: str
    start: int  # position of the first of them; everything before has been computed
    token_ids: Sequence[int]
    samples: bool  # True: the logits of the last of them give a new token
    why: Why  # for the trace; an executor need not know


@dataclass
class SchedulerOutput:
    """The plan of one step: plain data, no tensors."""

    step: int
    start_time: float  # seconds on the scheduler's clock
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)  # first scheduled in this step
    finished_ids: list[str] = field(default_factory=list)  # left since the last plan: forget their caches
    num_tokens: int = 0  # tokens to compute, without padding
    row_length: int | None = None  # padded batching: every row is padded to this many tokens
    padding_rows: list[str] = field(default_factory=list)  # padded batching: ended requests that still take a row

    @property
    def num_slots(self) -> int:
        """Tokens pushed through the model, padding included."""
        if self.row_length is None:
            return self.num_tokens
        return self.row_length * (len(self.scheduled) + len(self.padding_rows))


class ModelOutput(NamedTuple):
    """What an executor returns for a plan."""

    token_ids: Mapping[str, int]  # the new token of every scheduled request that samples
    score_entries: int  # query-key pairs scored, in one head of one layer
