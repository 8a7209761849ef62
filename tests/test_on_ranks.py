"""A function in several processes: what comes back, what is sent with it, and how it ends."""

import functools
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from minillm.course import RankError, on_ranks
from minillm.course.ranks import made_of, sent_form
from minillm.errors import ConfigError

OFFSET = 10.0


def plus_offset(x, times=2):
    return times * x + OFFSET


def total(rank, size, x):
    mine = plus_offset(x) * (rank + 1)
    dist.all_reduce(mine)
    return rank, size, os.getpid(), mine


def test_ranks_are_processes_that_add_up_and_nothing_is_left():
    answers = on_ranks(2, total, torch.tensor([1.0, 2.0]))
    assert [answer[:2] for answer in answers] == [(0, 2), (1, 2)]
    assert len({os.getpid(), *(answer[2] for answer in answers)}) == 3
    assert all(torch.equal(answer[3], 3 * torch.tensor([12.0, 14.0])) for answer in answers)
    for _, _, process, _ in answers:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def fails_on_one(rank, size):
    if rank == 1:
        raise ValueError("not today")
    dist.barrier()


def never_comes(rank, size):
    if rank == 0:
        dist.recv(torch.zeros(1), 1)
    else:
        time.sleep(60)


def test_a_rank_that_fails_ends_all_and_says_why():
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1: ValueError: not today"):
        on_ranks(2, fails_on_one)
    assert time.monotonic() - began < 50
    with pytest.raises(RankError, match="not done after 0.5 s"):
        on_ranks(2, never_comes, seconds=0.5)


# a function as data -------------------------------------------------------------------------------


def recursive(n):
    return 1 if n < 2 else n * recursive(n - 1)


def uses_a_lambda(n):
    return sum(sorted(range(n), key=lambda each: -plus_offset(each))) + n * OFFSET


def of_a_keyword(n, *, more=5):
    return n + more


@pytest.mark.parametrize(("function", "value"), [(recursive, 24), (uses_a_lambda, 46.0), (of_a_keyword, 9)])
def test_a_function_is_made_again_from_its_form(function, value):
    made = made_of(sent_form(function))
    assert made is not function and made(4) == value == function(4)


def closure():
    local = 3

    def inner(rank, size):
        return local

    return inner


LOCK = threading.Lock()
other_name = recursive


def needs_a_lock(rank, size):
    with LOCK:
        return rank


def by_another_name(rank, size):
    return other_name(rank)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (closure(), "inner uses variables of the function around it"),
        (print, "no function written in Python"),
        (functools.partial(recursive, 3), "no function written in Python"),
        (needs_a_lock, "LOCK cannot be sent to another process"),
        (by_another_name, "other_name is another name of recursive"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_a_process_starts(function, told):
    with pytest.raises(ConfigError, match=told):
        on_ranks(2, function)


def test_a_wrong_size_is_refused():
    with pytest.raises(ConfigError, match="size"):
        on_ranks(0, total)
