"""The log of a run, from which every timeline, waste and latency picture is drawn.

A run, whether of the ladder, the engine or the simulator, appends one `StepEvent` for each forward pass. Pictures and
metrics read the `Trace` and nothing else, so the same figure draws a simulated run, a CPU run and a GPU run.
Position 0 is a request's first token.

All times are seconds on one clock, the run's own, which begins at 0 when the scheduler or engine is made. A token's
time is the end of the step that computed it: then its id has been read, whether or not it has been delivered. So TTFT
and ITL say when tokens were computed, under every way of batching. A request has ended when it leaves the batch with
its result: with its last token, except in a static batch, where it leaves with all others.

A new field goes below `KW_ONLY` and has a default. `files` reads and writes it by its annotation.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple

from minillm.errors import Count

Why = Literal["prefill", "decode", "recompute", "padding"]
WASTE = ("padding", "recompute")  # wasted tokens, and tokens computed a second time


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What is known of a request when it arrives."""

    request_id: str  # unique in the trace: "a#2" is the second request whose caller named it "a"
    arrival_time: float  # seconds
    num_prompt_tokens: Count
    _: KW_ONLY
    caller_id: str | None = None  # the id its caller gave it, if that is not `request_id`


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """Consecutive tokens of one request, computed in one step."""

    request_id: str
    start: Count  # position of the first token computed
    num_tokens: Count  # tokens pushed through the model
    why: Why  # "recompute": these tokens had been computed before
    num_sampled: Count = 0  # new tokens that came out of this step for the request (0 or 1)
    _: KW_ONLY
    first_block: Count = 0  # paged cache: `block_ids` replaced the block table from this entry on
    block_ids: tuple[Count, ...] = ()  # paged cache: new entries of the block table; () if it did not change

    @property
    def end(self) -> int:
        """Position after the last token computed."""
        return self.start + self.num_tokens


class Uses(NamedTuple):
    """What the tokens of a step were computed for; the four sum to all of them."""

    useful: int
    padding: int  # in the rows of unfinished requests, which are as long as the longest row
    ended: int  # in the rows of requests that had their last token before the step
    recompute: int  # had been computed before a preemption


@dataclass(frozen=True, slots=True)
class Preemption:
    """A running request that lost its blocks to others before the step."""

    request_id: str
    mode: Literal["recompute", "swap"]  # how its keys and values will come back
    num_tokens: Count  # tokens whose keys and values left the pool


@dataclass(frozen=True, slots=True)
class BlockUse:
    """Who holds the blocks of a paged pool; the four sum to its size."""

    used: Count  # in a block table
    cached: Count  # in none, but kept for requests that begin with the same tokens
    free: Count
    _: KW_ONLY
    null: Count = 1  # the block that stands for padding

    @property
    def total(self) -> int:
        """Blocks of the pool."""
        return self.used + self.cached + self.free + self.null


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One forward pass: which requests took part with how many tokens, and what was left waiting.

    If a step is launched before the tokens of the one before are read, its `start_time` is when they have been read: no
    two steps overlap from `start_time` to `end_time`. The last three fields say what host and device do meanwhile.

    (*) At `end_time`. If the next step has been planned by then (it has a `planned`), what it takes and writes counts.
    """

    step: Count
    start_time: float  # seconds
    end_time: float  # seconds; tokens sampled in this step exist from here on
    scheduled: tuple[ScheduledTokens, ...]
    finished: tuple[str, ...] = ()  # ids of the requests that ended with this step
    _: KW_ONLY
    num_waiting: Count = 0  # requests that had arrived but took no part
    score_entries: Count = 0  # query-key pairs scored, in one head of one layer
    cached_tokens: Count = 0  # tokens whose keys and values are held after the step (*), each request counting its own
    preempted: tuple[Preemption, ...] = ()  # before the step
    copied_blocks: tuple[tuple[Count, Count], ...] = ()  # copy-on-write before the step: (from, to)
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
    def uses(self) -> Uses:
        """The step's tokens by what they were computed for."""
        go_on = {part.request_id for part in self.scheduled if part.why != "padding"}
        counts = dict.fromkeys(Uses._fields, 0)
        for part in self.scheduled:
            use = "recompute" if part.why == "recompute" else "useful"
            if part.why == "padding":
                use = "padding" if part.request_id in go_on else "ended"
            counts[use] += part.num_tokens
        return Uses(**counts)

    @property
    def duration(self) -> float:
        """Seconds the step took."""
        return self.end_time - self.start_time

    @property
    def computing(self) -> float:
        """Seconds of the step in which the device computed it; all of them if the trace has no times of a device."""
        if self.device is None:
            return self.duration
        began, ended = max(self.device[0], self.start_time), min(self.device[1], self.end_time)
        return max(0.0, ended - began)


@dataclass
class Trace:
    """Requests in order of arrival and steps in order of time.

    A long run keeps only its last steps: `dropped_steps` came before the first one here, and `dropped_requests` ended
    with them.
    """

    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)
    dropped_steps: Count = 0
    dropped_requests: Count = 0

    @property
    def dropped(self) -> str:
        """What is missing, in words: "the first 200 steps and 3 requests are not kept"; "" if nothing is."""
        if not self.dropped_steps and not self.dropped_requests:
            return ""
        requests = f"{self.dropped_requests:,} request" + ("" if self.dropped_requests == 1 else "s")
        return f"the first {self.dropped_steps:,} steps and {requests} are not kept"

    @property
    def makespan(self) -> float:
        """Seconds from the first arrival, or the first step that is kept, to the end of the last; 0 without a step."""
        if not self.steps:
            return 0.0
        begin = self.steps[0].start_time
        if not self.dropped_steps:
            begin = min([begin, *(record.arrival_time for record in self.requests)])
        return self.steps[-1].end_time - begin

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
        """When each output token of the request was computed, in seconds on the run's clock."""
        return [step.end_time for step, part in self.parts(request_id) for _ in range(part.num_sampled)]

    def knows_first_token(self, record: RequestRecord, part: ScheduledTokens) -> bool:
        """Whether `part`, the first one here that brought the request a token, brought it its very first."""
        return not self.dropped_steps or part.end == record.num_prompt_tokens

    def ttft(self, request_id: str) -> float:
        """Time to first token: arrival to the end of the step that computed the first output token, seconds.

        Raises LookupError if the request has no token yet, or the step of its first one is not kept.
        """
        record = self.request(request_id)
        for step, part in self.parts(request_id):
            if part.num_sampled:
                if not self.knows_first_token(record, part):
                    raise LookupError(f"the step of the first token of {request_id!r} is gone: {self.dropped}")
                return step.end_time - record.arrival_time
        raise LookupError(f"request {request_id!r} has no token in this trace")

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
