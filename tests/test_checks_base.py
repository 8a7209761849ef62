"""How checks compare, count and explain: right answers in any layout pass, wrong ones get four useful lines."""

import inspect
import itertools
from decimal import Decimal
from fractions import Fraction

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from minillm import checks
from minillm.checks.base import Case, CheckFailed, NotWrittenYet, describe, run_check, same_value
from minillm.checks.unsolved import judged
from minillm.course import student

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

    with pytest.raises(NotWrittenYet, match="square: not written yet"):
        run_check("square", stub, CASES)
    with pytest.raises(NotWrittenYet, match="square: not written yet"):
        run_check("square", lambda_of_a_generator, CASES)


def lambda_of_a_generator(x):
    raise NotImplementedError("write lambda_of_a_generator")
    yield x


def helper(x):
    raise NotImplementedError("write helper")


def test_a_missing_helper_is_named_rather_than_the_function_that_calls_it():
    with pytest.raises(NotWrittenYet, match="square: it calls helper, which is not written yet"):
        run_check("square", lambda x: helper(x) + 1, CASES)


def test_what_torch_or_a_library_has_not_implemented_is_no_stub():
    def on_meta(x):
        return torch.ones(x, device="meta").sum().item() + torch.sparse_coo_tensor(size=(2, 2)).storage()

    def abstract(x):
        raise NotImplementedError("there is no such device")

    for function in (on_meta, lambda x: abstract(x)):
        with pytest.raises(CheckFailed, match="raised    (NotImplementedError|RuntimeError)"):
            run_check("square", function, CASES)


def test_arguments_are_copied_for_every_call_each_on_its_own():
    shared = [3, 1, 2]
    cases = [Case((shared, shared, torch.ones(2)), 9, "")] * 2

    def uses_up(one, other, ones):
        one.sort()
        assert other == [3, 1, 2], "the second argument is another list"
        ones *= 2
        return one.pop() + other.pop() + int(ones.sum())

    run_check("uses_up", uses_up, cases)
    assert shared == [3, 1, 2] and cases[0].args[2].tolist() == [1, 1]


def test_a_generator_is_run_so_that_its_error_is_told_and_its_answer_shown():
    def broken(x):
        yield x
        raise ValueError("in the middle\nof it")

    def endless(x):
        return itertools.count(x)

    with pytest.raises(CheckFailed, match=r"raised    ValueError: in the middle\n  expected"):
        run_check("numbers", broken, [Case((1,), [1, 2], "")])
    with pytest.raises(CheckFailed, match=r"got       \[1, 2, 3"):
        run_check("numbers", endless, [Case((1,), [1, 2], "")])


def test_of_a_large_tensor_the_first_row_that_differs_is_shown():
    got, expected = torch.zeros(4, 9), torch.zeros(4, 9)
    got[2, 8], expected[3, 0] = 5, 1
    for answer in (got, got.numpy(), got.tolist()):
        with pytest.raises(CheckFailed) as failure:
            run_check("table", lambda _, answer=answer: answer, [Case((0,), expected, "")])
        lines = str(failure.value).splitlines()
        assert lines[2] == "  got       row 2: tensor (9,) [0, 0, 0, 0, 0, 0, 0, 0, 5]"
        assert lines[3] == "  expected  row 2: tensor (9,) [0, 0, 0, 0, 0, 0, 0, 0, 0]"


def test_no_answer_at_all_is_told_so_where_one_is_wanted():
    with pytest.raises(CheckFailed, match="got       None\n  expected  4\n  hint      Your function returned nothing"):
        run_check("square", lambda x: None, CASES)
    run_check("nothing", lambda x: None, [Case((1,), None, "")])
    with pytest.raises(CheckFailed, match="expected  None\n  hint      say nothing"):
        run_check("nothing", lambda x: 5, [Case((1,), None, "say nothing")])


def test_a_row_of_a_tensor_of_three_dimensions_is_a_table():
    expected = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 2)
    with pytest.raises(CheckFailed, match=r"got       row 1: tensor \(2, 2\) \[0, 0, 0, 0\]"):
        run_check("table", lambda _: torch.zeros(2, 2, 2), [Case((0,), expected, "")])


def test_a_large_mask_is_drawn_beside_the_expected_one():
    expected = torch.ones(17, 17, dtype=torch.bool).tril()
    got = expected.clone()
    got[16, 0] = False
    for answer in (got, got.tolist(), got.numpy()):
        with pytest.raises(CheckFailed) as failure:
            run_check("mask", lambda _, answer=answer: answer, [Case((0,), expected, "")])
        lines = str(failure.value).splitlines()
        assert lines[2:5] == [
            "  got       mask (17, 17)",
            "  expected  mask (17, 17)",
            f"{'':12}yours{'':12}  expected",
        ]
        assert lines[5] == f"{'':12}#{'.' * 16}  #{'.' * 16}"
        assert lines[21] == f"{'':12}.{'#' * 16}  {'#' * 17}  ←"
        assert lines[22:] == ["  hint      "]


def test_a_small_mask_stays_on_one_line_in_any_container():
    for answer in (torch.eye(2).bool(), [[True, False], [False, True]], np.eye(2, dtype=bool)):
        with pytest.raises(
            CheckFailed, match=r"got       mask \(2, 2\) #./.#\n  expected  mask \(2, 2\) ##/##\n  hint"
        ):
            run_check("mask", lambda _, answer=answer: answer, [Case((0,), torch.ones(2, 2).bool(), "")])


def test_a_message_has_one_line_for_what_prints_on_several():
    with pytest.raises(CheckFailed) as failure:
        run_check("mask", lambda _: np.zeros((3, 3)), [Case((0,), 1, "")])
    assert "got       array (3, 3) [0, 0, 0" in str(failure.value)


@pytest.mark.parametrize("answer", ["wrong", None, [[0.0], [0.0, 0.0]], torch.zeros(2), torch.zeros(3, 2), object])
def test_an_answer_of_another_shape_is_shown_whole(answer):
    case = Case((0,), torch.ones(2, 2), "")
    with pytest.raises(CheckFailed) as failure:
        run_check("table", lambda _: answer, [case])
    assert str(failure.value).splitlines()[2:4] == [
        f"  got       {describe(answer)}",
        "  expected  tensor (2, 2) [1, 1, 1, 1]",
    ]


def test_beside_a_large_mask_an_answer_of_another_shape_leaves_its_side_empty():
    expected = torch.ones(9, 2, dtype=torch.bool)
    for answer in ([1, 2], torch.ones(9, 2), torch.ones(3, 2, dtype=torch.bool)):
        with pytest.raises(CheckFailed) as failure:
            run_check("mask", lambda _, answer=answer: answer, [Case((0,), expected, "")])
        lines = str(failure.value).splitlines()
        assert (lines[4], lines[13]) == (f"{'':12}yours  expected", f"{'':12}{'':5}  ##  ←")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.arange(12), "tensor (12,) [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]"),
        (torch.arange(13), "tensor (13,) [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …]"),
        (np.array([[0.123456, 2]]), "array (1, 2) [0.1235, 2]"),
        (np.float32(0.5), "0.5"),
        (torch.eye(3).bool(), "mask (3, 3) #../.#./..#"),
        (torch.ones(8, 1).bool(), "mask (8, 1) #/#/#/#/#/#/#/#"),
        (torch.ones(9, 1).bool(), "mask (9, 1)"),
        (torch.ones(1, 400).bool(), "mask (1, 400) " + "#" * 400),
        (torch.ones(1, 401).bool(), "tensor (1, 401) [" + "True, " * 12 + "…]"),
        (torch.ones(2).bool(), "tensor (2,) [True, True]"),
        ([[True, False]], "mask (1, 2) #."),
        ([(np.bool_(True), np.bool_(False))], "mask (1, 2) #."),
        ([[True], [True, False]], "[[True], [True, False]]"),
        ([[1, 0]], "[[1, 0]]"),
        ([[]], "[[]]"),
        ([], "[]"),
        (len, "len"),
        ("a" * 198, "'" + "a" * 198 + "'"),
        ("a" * 199, "'" + "a" * 196 + "…"),
    ],
)
def test_how_a_value_is_shown(value, text):
    assert describe(value).strip() == text


def test_a_cell_that_needs_a_stub_without_a_solution_is_stopped():
    def solved(x):
        return x

    checks.needs()
    checks.needs(solved, abs)
    with pytest.raises(NotWrittenYet, match="this cell needs helper: not written yet") as told:
        checks.needs(solved, helper)
    assert told.value._render_traceback_() == [str(told.value)]


SOLVED = """\
import math


def root(x):
    ### BEGIN SOLUTION
    return math.sqrt(square(x))
    ### END SOLUTION


class Counter:
    def add(self):
        ### BEGIN SOLUTION
        self.total = square(3)
        ### END SOLUTION


def square(x):
    ### BEGIN SOLUTION
    return x * x
    ### END SOLUTION"""
STUBS = student.without_solutions(SOLVED)


class Reader:
    """A reader's notebook: cells that are executed one after the other."""

    def __init__(self, folder):
        self.folder, self.space = folder, {"checks": checks, "check_square": judged(check_square)}

    def run(self, source):
        path = self.folder / f"cell_{len(list(self.folder.iterdir()))}.py"
        path.write_text(source)  # for `inspect`
        exec(compile(source, str(path), "exec"), self.space)


def check_square(function):
    run_check("square", function, CASES)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    chapters = tmp_path / "chapters"
    chapters.mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell(SOLVED, id="both")]), chapters / "01_roots.ipynb")
    monkeypatch.setattr(student, "source_folder", lambda: chapters)
    (tmp_path / "cells").mkdir()
    return Reader(tmp_path / "cells")


INSTEAD = "the course's version runs in its place\n"


def test_where_an_exercise_is_unsolved_the_courses_version_runs(reader, capsys):
    """With what it calls; classes too; and whoever is asked for its source, as Triton asks, finds it."""
    reader.run(STUBS)
    reader.run("checks.needs(root, Counter)\nassert root(-3) == 3")
    told = capsys.readouterr().out
    assert told == "".join(f"↷ {name} is not written yet: {INSTEAD}" for name in ("root", "Counter", "square"))
    reader.run("checks.needs(Counter)\ncounter = Counter()\ncounter.add()\nassert counter.total == 9")
    assert capsys.readouterr().out == f"↷ Counter is not written yet: {INSTEAD}↷ square is not written yet: {INSTEAD}"
    assert inspect.getsource(reader.space["root"]).startswith("def root(x):\n    ### BEGIN SOLUTION\n")


def test_a_check_never_takes_the_courses_version_for_the_readers(reader):
    reader.run(STUBS)
    reader.run("checks.needs(square)")
    assert not checks.is_written(reader.space["square"])
    with pytest.raises(NotWrittenYet, match="square: not written yet"):
        reader.run("check_square(square)")
    assert reader.space["square"](3) == 9


def test_the_readers_own_definition_wins(reader, capsys):
    reader.run(STUBS)
    reader.run("checks.needs(square)")
    reader.run("def square(x):\n    return x * x * 1.0")
    capsys.readouterr()
    reader.run("checks.needs(square)\nassert isinstance(square(3), float)\ncheck_square(square)")
    assert capsys.readouterr().out == "✓ square: 2 cases\n"


@pytest.mark.parametrize("wrong", ["square = 7", "square = lambda x: x", "def square(x):\n    raise ValueError"])
def test_the_courses_version_runs_where_an_answer_has_failed_its_check(reader, capsys, wrong):
    reader.run(wrong + "\nseven = 7")
    with pytest.raises(CheckFailed):
        reader.run("check_square(square)")
    reader.run("checks.needs(square)\nassert (square(3), seven) == (9, 7)")
    assert capsys.readouterr().out == f"↷ square has not passed its check: {INSTEAD}"
    with pytest.raises(CheckFailed):
        reader.run("check_square(square)")


def test_an_answer_that_failed_for_want_of_another_comes_back_with_its_check(reader, capsys):
    reader.run("def square(x):\n    return times(x, x)\ndef times(x, y):\n    raise NotImplementedError('write times')")
    mine = reader.space["square"]
    with pytest.raises(NotWrittenYet, match="it calls times"):
        reader.run("check_square(square)")
    reader.run("checks.needs(square)\nassert square(2) == 4")
    assert reader.space["square"] is not mine
    reader.run("def times(x, y):\n    return x * y\ncheck_square(square)")
    assert reader.space["square"] is mine
    capsys.readouterr()
    reader.run("checks.needs(square)")
    assert capsys.readouterr().out == ""


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
    assert checks.is_written(refuses, abs) and not checks.is_written(refuses, stub)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ((1, 2), [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(3), 3),
        (3.0, 3),
        ([[True, False]], torch.tensor([[True, False]])),
        ({"a": 1.0}, {"a": 1}),
        (np.float32(0.1), 0.1),
        (np.array([3]), 3),
        (torch.tensor([3.0], dtype=torch.bfloat16), 3),
        (torch.ones(1, requires_grad=True), 1.0),
        (Fraction(1, 3), 1 / 3),
        (Decimal("0.25"), 0.25),
        (2180.0000000000005, 2180),
        (np.bool_(True), True),
        (torch.tensor(False), False),
        (range(3), [0, 1, 2]),
        ({3: "c", 1: "a"}.keys(), [3, 1]),
        ({3: "c", 1: "a"}.values(), ["c", "a"]),
        (map(Fraction, [1, 2]), [1, 2]),
        (np.array([[1, 2]]), [(1, 2)]),
        (zip([1, 2], np.array([3, 4]), strict=True), [(1, 3), (2, 4)]),
        ([torch.tensor([4]), np.int8(5), 6], [4, 5, 6]),
        (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])),
        ([Fraction(1, 2), torch.tensor(0.25)], torch.tensor([0.5, 0.25])),
        (np.tri(3, dtype=bool), torch.ones(3, 3, dtype=torch.bool).tril()),
        (((np.bool_(True), torch.tensor(False)),), torch.tensor([[True, False]])),
        ([], []),
        (torch.zeros(0), []),
        (1 + 5e-7, 1.0),
        (5e-10, 0),
        (np.array([1 + 5e-6]), torch.ones(1)),
        (torch.tensor([9e-7]), torch.zeros(1)),
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
        (np.bool_(True), 1),
        (torch.tensor([True]), 1),
        (torch.zeros(0), True),
        (torch.zeros(0), 0),
        (1 + 1e-5, 1.0),
        (2180.001, 2180),
        (1 + 1e-7, 1),
        (1 + 2e-6, 1.0),
        (1e-8, 0),
        (torch.tensor([1 + 3e-5]), torch.ones(1)),
        (3 + 0j, 3),
        (10**400, 3),
        (float("nan"), 0.0),
        (float("inf"), 1e300),
        ([3], 3),
        ("123", [1, 2, 3]),
        (b"ab", [97, 98]),
        ({1, 2}, [1, 2]),
        ({1: 0, 2: 0}, [1, 2]),
        ([2, 1], [1, 2]),
        ([[1], [2]], [1, 2]),
        (np.tri(2), torch.ones(2, 2, dtype=torch.bool).tril()),
        (np.tri(2, dtype=bool), torch.ones(2, 2).tril()),
        ([[True], [True, True]], torch.ones(2, 2, dtype=torch.bool)),
        ("ab", torch.zeros(2)),
        (None, torch.zeros(2)),
        (torch.Tensor, torch.zeros(2)),
        (torch.zeros(2), torch.tensor([0.0, 2e-6])),
    ],
)
def test_other_values_types_and_shapes_are_not_the_same(got, expected):
    assert not same_value(got, expected)


def test_a_prediction_stands_beside_its_measurement(capsys):
    checks.prediction("passes", 10, 20, "passes")
    checks.prediction("steps", 30, 20)
    checks.prediction("share", 0.95, 1.0)
    checks.prediction("tokens", 1234, 1234)
    checks.prediction("at most", 1000, 1004, found="computed")
    assert capsys.readouterr().out.splitlines() == [
        "passes: you guessed 10 passes, measured 20 passes",
        "→ 2.0 times your guess",
        "steps: you guessed 30, measured 20",
        "→ your guess is 1.5 times as much",
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


@pytest.mark.parametrize("guess", ["57%", "57", float("nan"), True, [57], (50, 60), object])
def test_a_guess_that_is_no_number_gets_a_sentence(guess):
    with pytest.raises(CheckFailed, match="share: your guess is .*; write it as a number, such as 57 or 0.5"):
        checks.prediction("share", guess, 41.2, "%")


@pytest.mark.parametrize("guess", [np.int64(10), torch.tensor(10), Fraction(10), Decimal(10), 10.0])
def test_a_guess_may_be_any_kind_of_number(guess, capsys):
    checks.prediction("share", guess, np.int64(20), "%")
    assert capsys.readouterr().out == "share: you guessed 10 %, measured 20 %\n→ 2.0 times your guess\n"


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
