"""The committed chapters are canonical, and their exercises can wait: what is unsolved is told in a sentence."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from minillm.checks import NotWrittenYet
from minillm.course import notebooks, student
from unsolved import Chapter, Unsolved

CHAPTERS = notebooks.chapters([])
CHECK = re.compile(r"\bchecks\.(?!(?:beside|key_reads|needs|is_written)\b)\w+\(")  # those draw, or ask
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def check_of(exercise: int, cells: list[NotebookNode]) -> int | None:
    """The position of the first check below an exercise and above the next one; a guess is compared later."""
    guesses = guesses_in(cells[exercise])
    for position in range(exercise + 1, len(cells)):
        if guesses:
            if any(re.search(rf"prediction\(.*?\b{name}\b", cells[position].source, re.DOTALL) for name in guesses):
                return position
            continue
        if CHECK.search(cells[position].source):
            return position
        if student.has_solution(cells[position].source):
            break
    return None


def guesses_in(cell: NotebookNode) -> list[str]:
    """The names that the reader's copy sets to None."""
    return re.findall(r"^(\w+) = None", student.without_solutions(cell.source), re.MULTILINE)


def exercises(cells: list[NotebookNode]) -> list[int]:
    return [position for position, cell in enumerate(cells) if student.has_solution(cell.source)]


def test_there_are_chapters():
    assert [path.name[:3] for path in CHAPTERS][:3] == ["01_", "02_", "03_"]


@each_chapter
def test_a_chapter_is_canonical(path: Path):
    assert notebooks.check(path) == []


@each_chapter
def test_each_exercise_has_a_check(path: Path):
    cells = notebooks.code_cells(nbformat.read(path, as_version=4))
    assert [cells[position].id for position in exercises(cells) if check_of(position, cells) is None] == []


# Unsolved exercises -------------------------------------------------------------------------------


@each_chapter
def test_what_is_unsolved_is_told_in_a_sentence_by_its_check_and_where_it_is_needed(path: Path, tmp_path):
    """Each exercise alone, and all of them: no other cell fails, and none with a bare error."""
    chapter = Chapter(path, tmp_path)
    solved = notebooks.code_cells(nbformat.read(path, as_version=4))
    for unsolved in [[exercise] for exercise in chapter.exercises()] + [chapter.exercises()]:
        run = Unsolved(chapter, unsolved)
        names = {name for exercise in unsolved for name in chapter.cells[exercise].binds}
        for cell, error in run.errors.items():
            named = "write your guess first" in str(error) or any(name in str(error) for name in names)
            assert isinstance(error, NotWrittenYet) and named, (cell, error)
        checks = {solved[check_of(exercise, solved)].id for exercise in unsolved}
        assert checks <= run.errors.keys()
        assert not run.errors.keys() & {solved[exercise].id for exercise in unsolved}
        assert run.in_vain == []


SMALL = {
    "imports": "from minillm import checks\nseen = []",
    "dear": "unused = sum(range(10**9))",
    "asked-for": "used = len(seen)",
    "exercise": "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION",
    "unguarded": "four = double(used)",
    "consequence": "print(four)",
    "guarded": "checks.needs(double)\nsix = double(3)",
    "helper": "def quadruple(x):\n    return double(double(x))",
    "caller": "checks.needs(double)\nprint(quadruple(1))",
    "in-vain": "checks.needs(double)\nprint(used)",
    "rebound": "four = 4",
    "fine": "assert four == 4",
    "own": "if checks.is_written(double):\n    assert double(1) == 2",
}


@pytest.fixture
def small(tmp_path):
    cells = [new_code_cell(source, id=name) for name, source in SMALL.items()]
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return Chapter(path, tmp_path)


def test_cells_that_fail_for_want_of_an_exercise_are_found(small):
    run = Unsolved(small, small.exercises())
    assert {name: type(error).__name__ for name, error in run.errors.items()} == {
        "unguarded": "NotImplementedError",
        "consequence": "NameError",
        "guarded": "NotWrittenYet",
        "caller": "NotWrittenYet",
        "in-vain": "NotWrittenYet",
    }
    assert run.in_vain == ["in-vain"]


def test_cells_that_are_not_asked_for_are_not_run(small):
    Unsolved(small, small.exercises())
    assert {small.cells[place].name for place in small.spaces} == {"imports", "asked-for"}


def test_solved_nothing_fails(small):
    assert Unsolved(small, []).errors == {}


def test_a_reader_sees_one_line_where_an_answer_is_missing(tmp_path):
    stub = new_code_cell('def double(x):\n    raise NotImplementedError("write double")')
    cells = [new_code_cell("from minillm import checks"), stub, new_code_cell("checks.needs(double)\ndouble(1)")]
    notebook = notebooks.execute(new_notebook(cells=cells), tmp_path, allow_errors=True)
    assert notebook.cells[2].outputs[0].traceback == [
        "✗ this cell needs double: not written yet. Solve that exercise first."
    ]
