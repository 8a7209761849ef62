"""The log of a run, from which every timeline, waste and latency picture is drawn.

A run, whether of the ladder, the engine or the simulator, appends one `StepEvent` for each forward pass. Pictures and
metrics read the `Trace` and nothing else, so the same figure draws a simulated run, a CPU run and a GPU run.
Times are seconds on the run's own clock; position 0 is a request's first token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Why = Literal["prefill", "decode", "recompute", "padding"]
WASTE = ("padding", "recompute")  # tokens computed for nothing, or for the second time


@dataclass(frozen=True)
class RequestRecord:
    """What is known of a request when it arrives."""

    request_id: str
    arrival_time: float  # seconds
    num_prompt_tokens: int


@dataclass(frozen=True)
class ScheduledTokens:
    """Consecutive tokens of one request, computed in one step."""

    request_id: str
    start: int  # position of the first token computed
    num_tokens: int  # tokens pushed through the model
    why: Why  # "recompute": these tokens had been computed before
    num_sampled: int = 0  # new tokens that came out of this step for the request (0 or 1)
    first_block: int = 0  # paged cache: `block_ids` replaced the block table from this entry on
    block_ids: tuple[int, ...] = ()  # paged cache: new entries of the block table; () if it did not change

    @property
    def end(self) -> int:
        """Position after the last token computed."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Preemption:
    """A running request that gave its blocks to others before the step."""

    request_id: str
    mode: Literal["recompute", "swap"]  # what will bring its keys and values back
    num_tokens: int  # tokens whose keys and values left the pool


@dataclass(frozen=True)
class BlockUse:
    """Who holds the blocks of a paged pool; the four sum to its size."""

    used: int  # in a block table
    cached: int  # in none, but kept for requests that begin with the same tokens
    free: int
    null: int = 1  # the block that stands for padding

    @property
    def total(self) -> int:
        """Blocks of the pool."""
        return self.used + self.cached + self.free + self.null


@dataclass(frozen=True)
class StepEvent:
    """One forward pass: who took part with how many tokens, and what was left waiting.

    Where the next step is launched before this one's tokens are read, it starts, as told here, when they have been:
    from `start_time` to `end_time` no two steps overlap. What host and device do meanwhile is in the last three fields.

    (*) At `end_time`. If the next step has been planned by then (it has a `planned`), what it takes and writes counts.
    """

    step: int
    start_time: float  # seconds
    end_time: float  # seconds; tokens sampled in this step exist from here on
    scheduled: tuple[ScheduledTokens, ...]
    finished: tuple[str, ...] = ()  # ids of the requests that ended with this step
    num_waiting: int = 0  # requests that had arrived but took no part
    score_entries: int = 0  # query-key pairs scored, in one head of one layer
    cached_tokens: int = 0  # tokens whose keys and values are held after the step (*), each request counting its own
    preempted: tuple[Preemption, ...] = ()  # before the step
    copied_blocks: tuple[tuple[int, int], ...] = ()  # copy-on-write before the step: (from, to)
    blocks: BlockUse | None = None  # paged cache: after the step (*)
    planned: float | None = None  # seconds, when the host began to plan the step, if that was before `start_time`
    launched: float | None = None  # seconds, when the host had launched the step
    device: tuple[float, float] | None = None  # seconds, when the device began and ended the step

    @property
    def num_tokens(self) -> int:
        """Tokens pushed through the model in this step, padding included."""
        return sum(part.num_tokens for part in self.scheduled)

    @property
    def num_useful(self) -> int:
        """Tokens among them that were neither padding nor computed before."""
        return sum(part.num_tokens for part in self.scheduled if part.why not in WASTE)

    @property
    def duration(self) -> float:
        """Seconds the step took."""
        return self.end_time - self.start_time


@dataclass
class Trace:
    """Requests in order of arrival and steps in order of time."""

    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)

    def request(self, request_id: str) -> RequestRecord:
        """The record of one request. Raises KeyError for an id that is not in the trace."""
        for record in self.requests:
            if record.request_id == request_id:
                return record
        raise KeyError(f"no request {request_id!r} in this trace; it has {[r.request_id for r in self.requests]}")

    def parts(self, request_id: str) -> Iterator[tuple[StepEvent, ScheduledTokens]]:
        """The steps a request took part in, each with the tokens it computed there."""
        for step in self.steps:
            for part in step.scheduled:
                if part.request_id == request_id:
                    yield step, part

    def token_times(self, request_id: str) -> list[float]:
        """When each output token of the request came into being, in seconds on the run's clock."""
        return [step.end_time for step, part in self.parts(request_id) for _ in range(part.num_sampled)]

    def ttft(self, request_id: str) -> float:
        """Time to first token: arrival to first output token, seconds."""
        return self.token_times(request_id)[0] - self.request(request_id).arrival_time

    def inter_token_latencies(self, request_id: str) -> list[float]:
        """ITL (also TBT): seconds between consecutive output tokens; empty for a single token. Its mean is the TPOT."""
        times = self.token_times(request_id)
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]

    def end_to_end(self, request_id: str) -> float:
        """E2E: arrival to the end of the step in which the request leaves the batch with its result, seconds.

        In a static batch that is later than its last token; in a run that was cut short it is the last token there is.
        """
        left = [step.end_time for step in self.steps if request_id in step.finished]
        end = left[0] if left else self.token_times(request_id)[-1]
        return end - self.request(request_id).arrival_time
