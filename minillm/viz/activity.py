"""What each request does in each step, read from a Trace: the boxes and letters of timelines."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from minillm.trace import ScheduledTokens, Trace
from minillm.viz.base import PictureError, number
from minillm.viz.palette import STATES, WAITING

UNITS = ("s", "steps", "tokens")
MOST_COLUMNS = 100  # of a text timeline

SHORTEST_WAIT = 0.002  # share of the whole run; a shorter wait is only the overhead of calling the model

# A request that does several things in one step shows the first of these.
PRECEDENCE = ("recompute", "prefill", "decode", "padding")


@dataclass(frozen=True)
class Box:
    """What one request does without a break: consecutive steps `first_step`..`last_step` in one state."""

    request_id: str
    state: str  # a key of palette.STATES
    start: float  # seconds since the trace began, steps, or computed tokens
    end: float
    first_step: int
    last_step: int
    num_tokens: int = 0  # computed for it, padding included
    num_padding: int = 0  # those of them that are padding
    padding_share: float = 0.0  # of the box: the mean over its steps, weighted by width

    @property
    def width(self) -> float:
        return self.end - self.start

    @property
    def partly_padding(self) -> bool:
        """Whether real tokens and padding share the row."""
        return 0 < self.num_padding < self.num_tokens

    @property
    def letter(self) -> str:
        """The state's letter; in lower case if the row also has padding."""
        letter = STATES[self.state].letter
        return letter.lower() if self.partly_padding else letter


class Activity:
    """The boxes of a run in one unit: "s" is to scale, "steps" are equally wide, "tokens" counts computed tokens.

    Computed tokens include padding. Raises PictureError for an unknown unit, and
        for a trace without steps or requests.
    """

    def __init__(self, trace: Trace, unit: str = "s"):
        if unit not in UNITS:
            raise PictureError(f"unit is {unit!r}; use one of {UNITS}")
        if not trace.steps or not trace.requests:
            raise PictureError("the trace is empty: a timeline needs at least one request and one step")
        self.trace = trace
        self.unit = unit
        self.num_steps = len(trace.steps)
        self.request_ids = [record.request_id for record in trace.requests]
        first_start = trace.steps[0].start_time
        arrivals = [] if trace.dropped_steps else [record.arrival_time for record in trace.requests]
        self.begin = min([first_start, *arrivals])
        self._records = {record.request_id: record for record in trace.requests}
        self._began_before = {  # what they did until then is not known
            record.request_id for record in trace.requests if trace.dropped_steps and record.arrival_time < first_start
        }
        self._parts = parts_by_request(trace)
        self._preempted = preemptions_by_request(trace)
        self._finish = {request_id: index for index, step in enumerate(trace.steps) for request_id in step.finished}
        self._spans = self._find_spans()
        self._boxes: dict[str, list[Box]] = {}

    def _find_spans(self) -> list[tuple[float, float]]:
        """Where each step begins and ends, in the unit."""
        if self.unit == "s":
            return [(step.start_time - self.begin, step.end_time - self.begin) for step in self.trace.steps]
        widths = [1 if self.unit == "steps" else step.num_tokens for step in self.trace.steps]
        return [(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]

    def end(self) -> float:
        """Where the last step ends, in the unit: the makespan."""
        return self._spans[-1][1]

    def states(self, request_id: str) -> list[str | None]:
        """The state of a request in each step: a key of palette.STATES, or None before it arrives."""
        arrival = self._records[request_id].arrival_time
        parts, preempted, waiting = self._parts[request_id], self._preempted.get(request_id, {}), "waiting"
        finish = self._finish.get(request_id, self.num_steps)
        states: list[str | None] = []
        for index, step in enumerate(self.trace.steps):
            waiting = preempted.get(index, waiting)
            if index in parts:
                waiting = "waiting"
                states.append(next(why for why in PRECEDENCE if any(part.why == why for part in parts[index])))
            elif index > finish:
                states.append("finished")
            else:
                states.append(waiting if arrival <= step.start_time else None)
        return states

    def boxes(self, request_id: str) -> list[Box]:
        """The states of a request as boxes in this unit: one per step, and one per stretch of waiting."""
        if request_id not in self._boxes:
            self._boxes[request_id] = self._find_boxes(request_id)
        return self._boxes[request_id]

    def _find_boxes(self, request_id: str) -> list[Box]:
        boxes: list[Box] = []
        for index, state in enumerate(self.states(request_id)):
            if state in (None, "finished"):
                continue
            parts = self._parts[request_id].get(index, ())
            tokens = sum(part.num_tokens for part in parts)
            padding = sum(part.num_tokens for part in parts if part.why == "padding")
            share = padding / tokens if tokens else 0.0
            box = Box(request_id, state, *self._spans[index], index, index, tokens, padding, share)
            if state in WAITING and boxes and boxes[-1].state == state:
                boxes[-1] = joined(boxes[-1], box)
            else:
                boxes.append(box)
        return self._true_to_time(request_id, boxes) if self.unit == "s" else boxes

    def _true_to_time(self, request_id: str, boxes: list[Box]) -> list[Box]:
        """Waiting lasts from the arrival, or the end of the previous step, to the start of the next step."""
        computing = [box for box in boxes if box.state not in WAITING]
        states = self.states(request_id)
        stretched: list[Box] = []
        shortest = SHORTEST_WAIT * self.end()
        now = max(0.0, self._records[request_id].arrival_time - self.begin)
        for box in computing:
            before = stretched[-1].last_step if stretched else None
            if box.start - now > shortest and (before is None or box.first_step > before + 1):
                first = 0 if before is None else before + 1
                kind = (states[box.first_step - 1] if box.first_step else None) or "waiting"
                stretched.append(Box(request_id, kind, now, box.start, first, box.first_step - 1))
            stretched.append(box)
            now = box.end
        if boxes and boxes[-1].state in WAITING:  # the trace ends while it still waits
            stretched.append(replace(boxes[-1], start=now))
        return stretched

    # --- latencies ---

    def ttft(self, request_id: str) -> float | None:
        """Time to first token in this unit; None if the request got none, or its first step was dropped."""
        sampled = self._sampling_steps(request_id)
        if not sampled:
            return None
        record = self._records[request_id]
        first = next(part for part in self._parts[request_id][sampled[0]] if part.num_sampled)
        if not self.trace.knows_first_token(record, first):
            return None
        arrival = record.arrival_time - self.begin
        if self.unit != "s":
            if request_id in self._began_before:
                return None
            arrival = self._spans[next(index for index, state in enumerate(self.states(request_id)) if state)][0]
        return self._spans[sampled[0]][1] - arrival

    def mean_itl(self, request_id: str) -> float | None:
        """Mean time between tokens in this unit, or None for fewer than two tokens."""
        ends = [self._spans[index][1] for index in self._sampling_steps(request_id)]
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None

    def _sampling_steps(self, request_id: str) -> list[int]:
        """The step of each output token."""
        return [
            index for index, parts in self._parts[request_id].items() for part in parts for _ in range(part.num_sampled)
        ]

    # --- words and letters ---

    def amount(self, value: float | None) -> str:
        """A length on this unit's axis, in words: "12.5 ms", "3 steps"."""
        if value is None:
            return "–"
        if self.unit != "s":
            return f"{number(value)} {self.unit.removesuffix('s')}" + ("" if value == 1 else "s")
        milliseconds = 1000 * value
        return f"{value:.2f} s" if value >= 1 else f"{milliseconds:.{0 if milliseconds >= 99.95 else 1}f} ms"

    def letters(self, request_id: str, column: float, num_columns: int) -> str:
        """One letter for each stretch of `column` units: the state that takes most of it, or else waiting.

        Blank before the arrival; a point once it has finished.
        """
        shares: list[Counter[str]] = [Counter() for _ in range(num_columns)]
        for box in self.boxes(request_id):
            for index in range(int(box.start / column), min(num_columns, math.ceil(box.end / column))):
                share = min(box.end, (index + 1) * column) - max(box.start, index * column)
                if share > 1e-6 * column:
                    shares[index][box.letter] += share
        finish = self._finish.get(request_id)
        finished = math.inf if finish is None else self._spans[finish][1] - 1e-6 * column
        waiting = [STATES[state].letter for state in WAITING]
        line = ""
        for index, found in enumerate(shares):
            computing = [letter for letter in found if letter not in waiting]
            if found:
                line += max(computing or found, key=found.__getitem__)
            else:
                line += STATES["finished"].letter if index * column >= finished else " "
        return line.rstrip()

    def boxes_of_all(self) -> list[Box]:
        """The boxes of every request."""
        return [box for request_id in self.request_ids for box in self.boxes(request_id)]

    def states_used(self) -> set[str]:
        """The keys of palette.STATES that occur."""
        boxes = self.boxes_of_all()
        used = {box.state for box in boxes}
        if any(box.partly_padding for box in boxes):
            used.add("padding")
        if any(self._finish.get(request_id, self.num_steps) < self.num_steps - 1 for request_id in self.request_ids):
            used.add("finished")
        return used


def legend(activities: Sequence[Activity]) -> str:
    """The letters that occur in any of the timelines, with their names."""
    used = set().union(*(activity.states_used() for activity in activities))
    names = [f"{state.letter} {state.name}" for key, state in STATES.items() if key in used]
    boxes = [box for activity in activities for box in activity.boxes_of_all()]
    lower = sorted({box.letter for box in boxes if box.partly_padding}, key="rpd".index)
    return "   ".join(names + ([f"{' '.join(lower)} the same, filled up with padding"] if lower else []))


def parts_by_request(trace: Trace) -> dict[str, dict[int, list[ScheduledTokens]]]:
    """For each request: the index of each step it took part in, with its part of that step."""
    found: dict[str, dict[int, list[ScheduledTokens]]] = defaultdict(dict)
    for index, step in enumerate(trace.steps):
        for part in step.scheduled:
            found[part.request_id].setdefault(index, []).append(part)
    return found


def preemptions_by_request(trace: Trace) -> dict[str, dict[int, str]]:
    """For each preempted request: the index of the step before which it happened, and the state it waits in."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for index, step in enumerate(trace.steps):
        for each in step.preempted:
            found[each.request_id][index] = "swapped" if each.mode == "swap" else "preempted"
    return found


def joined(first: Box, second: Box) -> Box:
    """Both boxes as one, from the start of the first to the end of the second."""
    width = first.width + second.width
    share = (first.width * first.padding_share + second.width * second.padding_share) / width if width else 0.0
    tokens, padding = first.num_tokens + second.num_tokens, first.num_padding + second.num_padding
    place = first.start, second.end, first.first_step, second.last_step
    return Box(first.request_id, first.state, *place, tokens, padding, share)


def runs(boxes: list[Box]) -> list[Box]:
    """Boxes of one state in consecutive steps as one box."""
    found: list[Box] = []
    for box in boxes:
        if found and found[-1].state == box.state and found[-1].last_step + 1 == box.first_step:
            found[-1] = joined(found[-1], box)
        else:
            found.append(box)
    return found


def columns_of(end: float, most: int = MOST_COLUMNS, *, whole: bool) -> tuple[float, int]:
    """Width and number of the columns a text axis up to `end` gets: a round width (1, 2, 5, 10, ...), at most `most`.

    `whole`: no narrower than 1.
    """
    power = math.floor(math.log10(end / most)) if end > 0 else 0
    widths = [digit * 10.0**exponent for exponent in (power, power + 1) for digit in (1, 2, 5)]
    width = next(width for width in widths if end <= most * width * (1 + 1e-9))
    width = max(1.0, width) if whole else width
    return width, max(1, math.ceil(end / width - 1e-6))
