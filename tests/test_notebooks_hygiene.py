"""The committed chapters are canonical, and their student copies are exercises: definitions run, checks wait."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from minillm.course import notebooks, student

CHAPTERS = notebooks.chapters([])
CHECK = re.compile(r"\bchecks\.(?!beside\b)\w+\(")  # `beside` draws, also what is not written yet
WAITING = {"NotImplementedError", "NotWrittenYet"}  # the stub's own error, or the check's shorter one
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def check_of(exercise: int, cells: list[NotebookNode]) -> int | None:
    """The position of the first check below an exercise and above the next one."""
    for position in range(exercise + 1, len(cells)):
        if CHECK.search(cells[position].source):
            return position
        if student.has_solution(cells[position].source):
            break
    return None


def exercises(cells: list[NotebookNode]) -> list[int]:
    return [position for position, cell in enumerate(cells) if student.has_solution(cell.source)]


def errors(cell: NotebookNode) -> set[str]:
    return {output.ename for output in cell.outputs if output.output_type == "error"}


def test_there_are_chapters():
    assert [path.name[:3] for path in CHAPTERS][:3] == ["01_", "02_", "03_"]


@each_chapter
def test_a_chapter_is_canonical(path: Path):
    assert notebooks.check(path) == []


@each_chapter
def test_each_exercise_has_a_check(path: Path):
    cells = notebooks.code_cells(nbformat.read(path, as_version=4))
    assert [cells[position].id for position in exercises(cells) if check_of(position, cells) is None] == []


@each_chapter
def test_the_student_copy_defines_its_stubs_and_every_check_waits_for_the_reader(path: Path):
    chapter = nbformat.read(path, as_version=4)
    solved = notebooks.code_cells(chapter)
    checks = {position: check_of(position, solved) for position in exercises(solved)}
    copy = student.student_copy(chapter)
    copy.cells = notebooks.code_cells(copy)[: max(checks.values(), default=-1) + 1]  # nothing waits below
    notebooks.execute(copy, path.parent, allow_errors=True)
    for position, check in checks.items():
        assert errors(copy.cells[position]) == set(), copy.cells[position].source
        assert errors(copy.cells[check]) and errors(copy.cells[check]) <= WAITING, copy.cells[check].source
