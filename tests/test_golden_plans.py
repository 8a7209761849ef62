"""Today's schedulers decide what the recorded ones decided, step by step; and the recording holds what it claims to."""

from collections import Counter

import pytest

import golden_plans
from golden_plans import WORKLOADS, plans_of

RECORDED = golden_plans.recorded()


@pytest.mark.parametrize("name", WORKLOADS)
def test_decides_what_was_recorded(name):
    difference = first_difference(RECORDED[name], plans_of(WORKLOADS[name]))
    assert difference is None, difference


def test_every_recorded_workload_is_compared():
    assert list(RECORDED) == list(WORKLOADS)
    assert len(WORKLOADS) == 20


def first_difference(recorded: list, now: list) -> str | None:
    """Where two logs differ first, in words; None if they are equal."""
    step = 0
    for i in range(max(len(recorded), len(now))):
        was, is_now = (log[i] if i < len(log) else ["nothing"] for log in (recorded, now))
        step = was[1] if was[0] == "plan" else step
        if was != is_now:
            return (
                f"entry {i}, at step {step}: {was[0]} and {is_now[0]} differ\n  recorded: {was}\n  now:      {is_now}"
            )
    return None


@pytest.mark.parametrize("name", ["forks", "tight swap"])
def test_a_difference_is_told_with_its_step(name):
    changed = [list(entry) for entry in RECORDED[name]]
    place, entry = next((i, entry) for i, entry in enumerate(changed) if entry[0] == "plan" and entry[1] == 7)
    entry[-1] += 1
    assert "at step 7: plan and plan differ" in first_difference(RECORDED[name], changed)
    assert f"entry {place}, at step" in first_difference(RECORDED[name], changed[:place])
    assert first_difference(RECORDED[name], RECORDED[name]) is None


# --- what occurs in the recording ------------------------------------------------------------------------------------


class Seen:
    """Counts what occurs in a workload, from its log alone."""

    def __init__(self, log: list):
        self.counts = Counter()
        self.states: dict[str, str] = {}  # of requests that have not ended
        self.parents: dict[str, str] = {}
        self.ended_by_token: set[str] = set()
        self.in_flight: list[tuple[list, list]] = []  # parts and moves of plans
        for kind, *entry in log:
            getattr(self, kind)(*entry)

    def add(self, request_ids):
        self.counts["id of a discarded part in use again"] += request_ids[0] in self.computing()
        self.states.update(dict.fromkeys(request_ids, "unborn"))
        self.states[request_ids[0]] = "waiting"
        self.parents.update(dict.fromkeys(request_ids[1:], request_ids[0]))
        self.counts["late"] += bool(self.in_flight)

    def plan(self, step, parts, new, finished, preempted, moves, num_tokens):
        assert num_tokens == sum(part[2] for part in parts) > 0
        self.counts["launched with one unread"] += bool(self.in_flight)
        for kind, sources, _ in moves:
            self.counts[kind] += len(sources)
        for request_id in preempted:
            self.counts["preempted"] += 1
            self.counts["preempted to recompute"] += not any(kind == "swap_out" for kind, *_ in moves)
            if request_id in self.states:
                self.states[request_id] = "preempted"
        for request_id, _, _, samples, why, _, _, num_recomputed in parts:
            self.counts["chunk"] += why == "prefill" and not samples
            self.counts["resumed"] += self.states[request_id] == "preempted"
            self.counts["recomputed"] += num_recomputed > 0
            self.counts["forked"] += self.states[request_id] == "forked"
            self.states[request_id] = "running"
        self.in_flight.append((parts, moves))

    def read(self, step, updates):
        brought = {request_id for request_id, *_ in updates}
        parts, _ = self.in_flight.pop(0)
        discarded = {request_id for request_id, _, _, samples, *_ in parts if samples} - brought
        self.counts["discarded"] += len(discarded)
        self.counts["discarded after eos"] += len(discarded & self.ended_by_token)
        for request_id, token_id, finish_reason in updates:
            self.counts["token after preemption"] += self.states[request_id] == "preempted"
            self.counts["eos ignored"] += token_id == golden_plans.EOS and finish_reason is None
            for child, parent in self.parents.items():
                if parent == request_id and self.states.get(child) == "unborn":
                    self.states[child] = "forked" if token_id is not None and finish_reason is None else "waiting"
            if finish_reason is not None:
                self.counts[f"ended by {finish_reason}"] += 1
                del self.states[request_id]
                self.ended_by_token |= {request_id} if finish_reason == "stop" else set()

    def end(self, request_id, reason, ended):
        if not ended:
            self.counts["end without effect"] += 1
            return
        self.counts[f"{reason} of {self.states[request_id]}"] += 1
        self.counts[f"{reason} in flight"] += request_id in self.computing()
        for each in [request_id, *(child for child, parent in self.parents.items() if parent == request_id)]:
            if each == request_id or reason == "abort":
                self.states.pop(each, None)

    def computing(self):
        return {request_id for parts, _ in self.in_flight for request_id, *_ in parts}

    def retract(self, step):
        moved = {kind for _, moves in self.in_flight for kind, *_ in moves}
        self.counts["retracted with swap_out"] += "swap_out" in moved
        self.counts["retracted with swap_in"] += "swap_in" in moved
        self.counts["retracted"] += 1
        self.counts["retracted with another"] += len(self.in_flight) > 1
        self.in_flight.clear()

    def outcome(self, blocks, requests):
        assert not self.states
        assert not blocks or blocks[0] == 0
        for _, _, _, num_preemptions, num_cached_tokens in requests:
            self.counts["prefix hit"] += num_cached_tokens > 0
            self.counts["preempted twice"] += num_preemptions > 1


FEATURES = {  # occurs at least so often at this depth
    0: {"chunk": 5, "abort of waiting": 1, "abort of running": 1, "ended by error": 1, "ended by stop": 1},
    1: {
        "preempted": 20,
        "preempted to recompute": 10,
        "preempted twice": 3,
        "recomputed": 10,
        "swap_out": 5,
        "swap_in": 5,
        "copy": 5,
        "forked": 5,
        "prefix hit": 5,
        "chunk": 10,
        "eos ignored": 3,
        "abort of waiting": 1,
        "abort of running": 1,
        "abort of preempted": 1,
        "abort in flight": 1,
        "ended by error": 1,
        "ended by length": 10,
        "ended by stop": 5,
        "retracted": 3,
    },
    2: {
        "launched with one unread": 50,
        "discarded": 10,
        "discarded after eos": 3,
        "token after preemption": 3,
        "preempted": 20,
        "preempted to recompute": 5,
        "swap_out": 5,
        "swap_in": 5,
        "copy": 5,
        "forked": 5,
        "prefix hit": 5,
        "late": 5,
        "id of a discarded part in use again": 1,
        "abort of waiting": 1,
        "abort of running": 1,
        "abort of preempted": 1,
        "abort of unborn": 1,
        "abort of forked": 1,
        "abort in flight": 2,
        "end without effect": 1,
        "stop of running": 1,
        "ended by error": 3,
        "retracted": 4,
        "retracted with another": 2,
        "retracted with swap_out": 1,
        "retracted with swap_in": 1,
    },
}


@pytest.mark.parametrize("depth", FEATURES)
def test_the_recording_holds_what_it_claims_to(depth):
    counts = Counter()
    for name, workload in WORKLOADS.items():
        if workload.depth == depth:
            counts += Seen(RECORDED[name]).counts
    missing = {feature: counts[feature] for feature, least in FEATURES[depth].items() if counts[feature] < least}
    assert not missing, f"too rare at depth {depth}: {missing}"
