"""Writes a run down as a `Trace` while it goes on.

Writing events costs a running engine time, and the trace may never be read. So only a few numbers per step are kept,
about 12 bytes per decoding request. Events are made of them when the trace is asked for.
"""

from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from minillm.engine.request import Request
from minillm.runtime import ScheduledRequest, SchedulerOutput
from minillm.trace import RequestRecord, ScheduledTokens, StepEvent, Trace

MOST_IN_FLIGHT = 2  # plans: one whose tokens are not known yet, and the one made meanwhile


class Recorder:
    """The trace of a run: its last `max_steps` steps (None: all) and the requests that are in progress or named there.

    A caller may use an id again. The trace calls its second life "a#2", so that no two records have one id.
    """

    def __init__(self, max_steps: int | None = None):
        self._steps: deque[NotedStep | StepEvent] = deque(maxlen=max_steps)
        self._num_steps = 0  # ever noted
        self._records: dict[str, RequestRecord] = {}  # in order of arrival
        self._lives: dict[str, list[tuple[int, str]]] = {}  # of reused ids: the step from which a trace id applies
        self._ended: deque[tuple[int, str]] = deque()  # a record may go once this many steps are dropped
        self._never_ran: deque[str] = deque()  # ended without a step
        self._num_dropped_requests = 0
        self._news: list[RequestRecord | NotedStep] | None = None  # since the last `news`; None before the first
        self._trace: Trace | None = None  # as last asked for, while nothing has happened since

    # --- requests ---

    def arrive(self, request: Request, next_step: int) -> None:
        """A request has come; it can take part from step `next_step` on."""
        caller_id = request.request_id
        request_id = self._free_id(caller_id)
        if request_id != caller_id:
            lives = [life for life in self._lives.get(caller_id, [(-1, caller_id)]) if life[0] != next_step]
            self._lives[caller_id] = [*lives[-MOST_IN_FLIGHT:], (next_step, request_id)]
        named = None if request_id == caller_id else caller_id
        record = RequestRecord(request_id, request.arrival_time, request.num_prompt_tokens, caller_id=named)
        self._records[request_id] = record
        self._trace = None
        if self._news is not None:
            self._news.append(record)

    def _free_id(self, caller_id: str) -> str:
        """The caller's id, or "id#n" for its n-th life."""
        lives = self._lives.get(caller_id)
        if lives is None and caller_id not in self._records:
            return caller_id
        number = 1 if lives is None else int(lives[-1][1].removeprefix(f"{caller_id}#"))
        while (request_id := f"{caller_id}#{number + 1}") in self._records:
            number += 1
        return request_id

    def name(self, caller_id: str, step: int | None = None) -> str:
        """The trace's id of the request that had this id when `step` was planned; by default the one that has it."""
        lives = self._lives.get(caller_id)
        if lives is None:
            return caller_id
        return next((name for first, name in reversed(lives) if step is None or step >= first), lives[0][1])

    def end(self, caller_id: str, ran: bool) -> None:
        """The request has ended, and leaves; `ran`: it has taken part in a step."""
        if self._steps.maxlen is None:
            return  # everything is kept
        request_id = self.name(caller_id)
        if ran:
            self._ended.append((self._num_steps + MOST_IN_FLIGHT, request_id))
        else:
            self._never_ran.append(request_id)
        self._drop_records()

    def _drop_records(self) -> None:
        """Drop requests that ended in steps no longer kept, or long ago without a step."""
        while self._ended and self._ended[0][0] <= self._num_steps - len(self._steps):
            self._drop_record(self._ended.popleft()[1])
        while len(self._never_ran) > (self._steps.maxlen or 0):
            self._drop_record(self._never_ran.popleft())

    def _drop_record(self, request_id: str) -> None:
        record = self._records.pop(request_id)
        self._num_dropped_requests += 1
        lives = self._lives.get(record.caller_id)
        if lives is not None and lives[-1][1] == request_id:
            del self._lives[record.caller_id]
        self._trace = None

    # --- steps ---

    def note(self, plan: SchedulerOutput, discarded: Collection[str], finished: Sequence[str], fields: Mapping) -> None:
        """Keep what the trace will say of a step.

        The parts of `discarded` requests were wasted. `fields` are those of `StepEvent` that the plan does not hold.
        """
        names = {}
        if self._lives:
            involved = {*plan.decodes, *(part.request_id for part in plan.others), *plan.padding_rows, *finished}
            names = {each: self.name(each, plan.step) for each in involved & self._lives.keys()}
        noted = NotedStep(plan, discarded, finished, fields, names)
        last = self._steps[-1] if self._steps else None
        if isinstance(last, NotedStep) and last.request_ids == noted.request_ids:
            noted.request_ids = last.request_ids  # the same object for many steps
        self._steps.append(noted)
        if self._news is not None:
            self._news.append(noted)
        self._num_steps += 1
        self._drop_records()
        self._trace = None

    def end_late(self, caller_id: str) -> None:
        """A request has ended by the text of its last token: it left with the step that computed that."""
        if self._steps:
            last = self._steps[-1]
            finished = (*last.finished, self.name(caller_id))
            if isinstance(last, NotedStep):
                last.finished = finished
            else:
                self._steps[-1] = replace(last, finished=finished)
            self._trace = None

    def news(self) -> list["RequestRecord | NotedStep"]:
        """What has come since the last call, in order; it is kept until fetched."""
        news, self._news = self._news or [], []
        return news

    def snapshot(self, num_steps: int | None = None) -> Callable[[], Trace]:
        """Returns a function that makes the trace of this moment, on any thread, while the run goes on.

        With `num_steps`: only of the last ones, and of the requests that are in progress or named there.
        """
        noted, records = list(self._steps), list(self._records.values())
        noted = noted[-num_steps:] if num_steps else noted
        ended = {each for _, each in self._ended}.union(self._never_ran)
        num_steps_before = self._num_steps - len(noted)
        num_requests = self._num_dropped_requests + len(records)

        def make() -> Trace:
            steps = [each.write() if isinstance(each, NotedStep) else each for each in noted]
            named = {part.request_id for step in steps for part in (*step.scheduled, *step.preempted)}
            named.update(each for step in steps for each in step.finished)
            over = ended - named if num_steps else ()
            kept = [record for record in records if record.request_id not in over]
            return Trace(kept, steps, num_steps_before, num_requests - len(kept))

        return make

    @property
    def trace(self) -> Trace:
        """All that is kept so far. It does not change; ask again for what comes later."""
        if self._trace is None:
            written = (each.write() if isinstance(each, NotedStep) else each for each in self._steps)
            self._steps = deque(written, self._steps.maxlen)
            num_dropped = self._num_steps - len(self._steps)
            self._trace = Trace(
                list(self._records.values()), list(self._steps), num_dropped, self._num_dropped_requests
            )
        return self._trace


class NotedStep:
    """What is kept of a step: ids and positions of its requests, and more of those that do not just decode."""

    __slots__ = (
        "step",
        "request_ids",
        "starts",
        "others",
        "row_length",
        "padding_rows",
        "discarded",
        "finished",
        "more",
    )

    def __init__(
        self,
        plan: SchedulerOutput,
        discarded: Collection[str],
        finished: Sequence[str],
        more: Mapping,
        names: Mapping[str, str],
    ):
        self.step = plan.step
        self.request_ids = (*plan.decodes, *[part.request_id for part in plan.others])
        self.starts = array("I", [*plan.decodes.values(), *[part.start for part in plan.others]])
        self.others = dict(enumerate(plan.others, start=len(plan.decodes)))
        self.row_length = plan.row_length
        self.padding_rows = tuple(plan.padding_rows)
        self.discarded = [row for row, each in enumerate(self.request_ids) if each in discarded] if discarded else ()
        self.finished = tuple(finished)
        self.more = more
        if names:
            for field in ("request_ids", "padding_rows", "finished"):
                setattr(self, field, tuple([names.get(each, each) for each in getattr(self, field)]))

    @property
    def num_tokens(self) -> int:
        """Tokens pushed through the model, without padding."""
        return len(self.request_ids) - len(self.others) + sum(part.num_tokens for part in self.others.values())

    def computed(self) -> Iterator[tuple[str, int, bool]]:
        """The requests that took part, by the trace's ids: each one's first position, and whether it got a token."""
        for row, (request_id, start) in enumerate(zip(self.request_ids, self.starts, strict=True)):
            if row not in self.discarded:
                yield request_id, start, row not in self.others or self.others[row].samples

    def write(self) -> StepEvent:
        """The step as the trace has it."""
        return StepEvent(step=self.step, scheduled=tuple(self._parts()), finished=self.finished, **self.more)

    def _parts(self) -> Iterator[ScheduledTokens]:
        """What was computed, padding and recomputed tokens included.

        What was computed for requests that had already ended counts as padding.
        """
        for row, (request_id, start) in enumerate(zip(self.request_ids, self.starts, strict=True)):
            part = self.others.get(row) or ScheduledRequest(request_id, start, 1, True, "decode")
            num_tokens, why, again, sampled = part.num_tokens, part.why, part.num_recomputed, int(part.samples)
            table = {"first_block": part.first_block, "block_ids": tuple(part.block_ids)}
            if row in self.discarded:
                yield ScheduledTokens(request_id, start, num_tokens, "padding", 0, **table)
                continue
            if 0 < again < num_tokens:
                yield ScheduledTokens(request_id, start, again, "recompute", 0, **table)
                yield ScheduledTokens(request_id, start + again, num_tokens - again, why, sampled)
            else:
                yield ScheduledTokens(request_id, start, num_tokens, "recompute" if again else why, sampled, **table)
            if self.row_length is not None and self.row_length > num_tokens:
                yield ScheduledTokens(request_id, start, self.row_length - num_tokens, "padding")
        for request_id in self.padding_rows:
            yield ScheduledTokens(request_id, 0, self.row_length, "padding")
