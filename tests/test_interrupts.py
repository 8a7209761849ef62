"""Ctrl-C at any moment: whatever was changing is whole afterwards, and no output is lost."""

import os
import signal
import threading
from functools import wraps

import pytest

from minillm import SamplingParams
from minillm.engine.llm_engine import HeldInterrupts
from test_llm_engine import PROMPT, TEN, alone, assert_idle, make_engine
from tiny_models import random_token_ids

KIND = "llama"
OTHER = random_token_ids(9, seed=2)
pytestmark = pytest.mark.usefixtures("default_handler")
SIX = SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        ctrl_c()
        done.append("the rest")
    assert done == ["the rest"]


def test_where_it_is_let_through_it_comes_at_once_and_once():
    done = []
    with HeldInterrupts() as interrupts:
        ctrl_c()
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            done.append("too late")
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            ctrl_c()
            done.append("too late")
        ctrl_c()
        done.append("held again")
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            done.append("too late")
    assert done == ["held again"]


def test_the_programs_own_handler_stays():
    heard = []
    own = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    with HeldInterrupts():
        ctrl_c()
        assert heard == [1]
    signal.signal(signal.SIGINT, own)


def test_other_threads_hold_nothing():
    def work():
        with HeldInterrupts():
            held.append(signal.getsignal(signal.SIGINT))

    held = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert held == [signal.default_int_handler]


def interrupted(function, at: int, when: str):
    """The function, with Ctrl-C before or after its call number `at`."""
    calls = []

    @wraps(function)
    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == at and when == "before":
            ctrl_c()
        result = function(*arguments, **options)
        if len(calls) == at and when == "after":
            ctrl_c()
        return result

    return call


def places(engine) -> dict:
    """Name -> (object, method): where an interrupt could fall into the middle of a step."""
    scheduler = engine.scheduler
    return {
        "planning": (scheduler, "_add"),
        "asking for a block": (scheduler.block_manager, "grow"),
        "launching": (engine.executor, "launch"),
        "taking in tokens": (scheduler, "_note_step"),
        "registering blocks": (scheduler.block_manager, "commit"),
        "making outputs": (engine, "_changed"),
    }


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "place",
    ["planning", "asking for a block", "launching", "taking in tokens", "registering blocks", "making outputs"],
)
def test_after_an_interrupt_the_engine_goes_on_and_tells_everything(checkpoint, is_async, when, place):
    """At each of the first calls in turn, in the middle of a step and between its parts."""
    engine = make_engine(checkpoint(KIND), async_scheduling=is_async)
    expected = {"a": alone(engine, PROMPT, TEN), "b": alone(engine, OTHER, SIX)}
    holder, method = places(engine)[place]
    right, num_interrupts = getattr(holder, method), 0
    for at in (1, 2, 3, 5):
        setattr(holder, method, interrupted(right, at, when))
        engine.add_request("a", PROMPT, TEN, output_kind="final_only")
        engine.add_request("b", OTHER, SIX, output_kind="final_only")
        told = {}
        while engine.has_unfinished_requests():
            try:
                told |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
            except KeyboardInterrupt:
                num_interrupts += 1
        setattr(holder, method, right)
        assert told == expected
        assert_idle(engine)
    assert num_interrupts >= 2


def test_a_request_is_added_whole(checkpoint):
    engine = make_engine(checkpoint(KIND))
    engine.scheduler.add_request = interrupted(engine.scheduler.add_request, 1, "after")
    with pytest.raises(KeyboardInterrupt):
        engine.add_request("a", PROMPT, TEN, output_kind="final_only")
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.outputs[0].token_ids for output in outputs] == [alone(engine, PROMPT, TEN)]


def test_what_a_cut_call_did_not_tell_of_an_aborted_request_is_dropped(checkpoint):
    engine = make_engine(checkpoint(KIND))
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1), output_kind="final_only")
    engine._changed = interrupted(engine._changed, 1, "after")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.has_unfinished_requests()
    engine.abort_request("a")
    assert not engine.has_unfinished_requests() and engine.step() == []
    assert_idle(engine)
