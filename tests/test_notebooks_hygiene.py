"""The committed chapters are canonical, and each exercise has its check."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from minillm.course import notebooks, student

CHAPTERS = notebooks.chapters([])
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def check_of(exercise: int, cells: list[NotebookNode]) -> int | None:
    """The position of the first check below an exercise and above the next one; a guess is compared later."""
    guesses = guesses_in(cells[exercise])
    for position in range(exercise + 1, len(cells)):
        if guesses:
            if any(re.search(rf"prediction\(.*?\b{name}\b", cells[position].source, re.DOTALL) for name in guesses):
                return position
            continue
        if student.CHECK.search(cells[position].source):
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


def test_an_exercise_has_a_name_of_its_own_in_the_whole_course():
    """By its name the course's version is found."""
    cells = [cell for path in CHAPTERS for cell in notebooks.code_cells(nbformat.read(path, as_version=4))]
    names = [
        name for cell in cells if student.has_solution(cell.source) for name, _ in student.definitions(cell.source)
    ]
    assert len(names) > 20
    assert [name for name in names if names.count(name) > 1] == []
