"""How checks compare, count and explain: right answers in any layout pass, wrong ones get four useful lines."""

import pytest
import torch

from minillm import checks
from minillm.checks.base import Case, CheckFailed, NotWrittenYet, run_check, same_value

CASES = [Case((2,), 4, "multiply by itself"), Case((3,), 9, "multiply by itself")]


def test_a_right_answer_prints_its_number_of_cases(capsys):
    run_check("square", lambda x: x * x, CASES)
    assert capsys.readouterr().out == "✓ square: 2 cases\n"


def test_a_wrong_answer_shows_call_answer_expectation_and_hint():
    with pytest.raises(CheckFailed) as failure:
        run_check("square", lambda x: x + x, CASES)
    assert failure.value._render_traceback_() == [
        "✗ square\n  call      square(3)\n  got       6\n  expected  9\n  hint      multiply by itself"
    ]


def test_advice_on_an_answer_stands_in_place_of_the_hint():
    def advise(got, case):
        return f"{got} is half of it" if 2 * got == case.expected else None

    with pytest.raises(CheckFailed, match="hint      2 is half of it"):
        run_check("square", lambda x: x, CASES, advise=advise)
    with pytest.raises(CheckFailed, match="hint      multiply by itself"):
        run_check("square", lambda x: -1, CASES, advise=advise)


def test_an_exception_in_the_answer_is_a_failure_that_names_it():
    with pytest.raises(CheckFailed, match="raised    ZeroDivisionError"):
        run_check("square", lambda x: x / 0, CASES)


def test_a_stub_is_not_written_yet_rather_than_wrong():
    def stub(x):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet"):
        run_check("square", stub, CASES)


def test_a_function_is_written_once_its_stub_is_gone():
    def stub(x):
        """What it should do."""
        raise NotImplementedError("write it")

    def refuses(x):
        if x < 0:
            return NotImplementedError
        return x

    class Kernel:  # as `@triton.jit` makes it
        fn = staticmethod(stub)

    assert [checks.is_written(each) for each in (stub, Kernel(), refuses, abs)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ((1, 2), [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(3), 3),
        (3.0, 3),
        ([[True, False]], torch.tensor([[True, False]])),
        ({"a": 1.0}, {"a": 1}),
    ],
)
def test_the_same_numbers_in_another_container_are_the_same(got, expected):
    assert same_value(got, expected)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([1, 2, 3], [1, 2]),
        (True, 1),
        (1, True),
        (None, 0),
        (torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])),
        (torch.zeros(2, 1), torch.zeros(1, 2)),
        (torch.tensor([float("nan")]), torch.zeros(1)),
        ("3", 3),
    ],
)
def test_other_values_types_and_shapes_are_not_the_same(got, expected):
    assert not same_value(got, expected)


def test_a_prediction_stands_beside_its_measurement(capsys):
    checks.prediction("passes", 10, 20, "passes")
    checks.prediction("share", 0.95, 1.0)
    checks.prediction("tokens", 1234, 1234)
    checks.prediction("at most", 1000, 1004, found="computed")
    assert capsys.readouterr().out.splitlines() == [
        "passes: you guessed 10 passes, measured 20 passes",
        "→ 2.0 times more than you guessed",
        "share: you guessed 0.95, measured 1",
        "→ within 10 %: 5% more",
        "tokens: you guessed 1,234, measured 1,234",
        "→ exactly",
        "at most: you guessed 1,000, computed 1,004",
        "→ within 1 %",
    ]


def test_there_is_no_measurement_before_a_guess():
    with pytest.raises(NotWrittenYet, match="write your guess first"):
        checks.prediction("passes", None, 20)


EXERCISES = [
    check
    for check in (getattr(checks, name) for name in checks.__all__)
    if check.__module__.startswith("minillm.checks.chapter_")
]


@pytest.mark.parametrize("check", EXERCISES, ids=lambda check: check.__name__)
def test_every_exercise_tells_a_stub_from_a_wrong_answer(check):
    def stub(*arguments):
        raise NotImplementedError("write it")

    with pytest.raises(NotWrittenYet, match=f"{check.__name__}: not written yet"):
        check(stub)
