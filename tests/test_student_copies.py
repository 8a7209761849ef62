"""The reader's copies run from the first cell to the last, whatever is unsolved: checks report, other cells go on.

Two scopes, for two processes: each executes all chapters.
"""

import re
from itertools import cycle
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from minillm.course import notebooks, student
from test_notebooks_hygiene import CHAPTERS, check_of, exercises

STUB = re.compile(r"raise NotImplementedError\(.write \w+.\)")
each_chapter = pytest.mark.parametrize(
    "path", [path for path in CHAPTERS if path.stem[:2].isdigit()], ids=lambda p: p.stem
)
WRONG = cycle(["return None", "raise ValueError('wrong')"])


def copy_of(path: Path) -> NotebookNode:
    return student.student_copy(nbformat.read(path, as_version=4))


def run(copy: NotebookNode, path: Path) -> dict[str, NotebookNode]:
    """Execute a copy as "Run all" does, which stops at an error in a cell without its tag; the errors, by cell."""
    cells = notebooks.code_cells(notebooks.execute(copy, path.parent))
    return {cell.id: output for cell in cells for output in cell.outputs if output.output_type == "error"}


def check_cells(path: Path) -> set[str]:
    """The cells that judge the exercises of a chapter, and compare its guesses."""
    cells = notebooks.code_cells(nbformat.read(path, as_version=4))
    return {cells[check_of(exercise, cells)].id for exercise in exercises(cells)}


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


class TestNothingIsSolved:
    @each_chapter
    def test_the_copy_runs_to_its_end(self, path):
        copy = copy_of(path)
        errors = run(copy, path)
        assert {error.ename for error in errors.values()} <= {"NotWrittenYet"}
        assert errors.keys() == check_cells(path)
        for error in errors.values():
            assert re.search("not written yet|write your guess first", error.evalue)
            assert error.traceback == [error.evalue]  # one sentence
        for cell in notebooks.code_cells(copy):
            for names in re.findall(r"^checks\.needs\((.*?)\)", cell.source, re.MULTILINE | re.DOTALL):
                for name in re.findall(r"\w+", names):
                    assert f"↷ {name} is not written yet" in printed(cell), cell.id


class TestEverythingIsWrong:
    @each_chapter
    def test_the_copy_runs_to_its_end(self, path):
        """The answers return nothing and raise by turns; the guesses are made."""
        copy, num_wrong = copy_of(path), 0
        for cell, solved in zip(copy.cells, nbformat.read(path, as_version=4).cells, strict=True):
            source, num_stubs = STUB.subn(lambda _: next(WRONG), cell.source)
            cell.source = source if num_stubs else solved.source
            num_wrong += num_stubs > 0
        errors = run(copy, path)
        assert {error.ename for error in errors.values()} <= {"CheckFailed"}
        assert len(errors) >= num_wrong - unchecked(copy)
        assert all(error.traceback == [error.evalue] and "hint" in error.evalue for error in errors.values())


def unchecked(copy: NotebookNode) -> int:
    """Checks that have said that they check nothing here, where there is no Triton."""
    return sum("nothing was checked" in printed(cell) for cell in notebooks.code_cells(copy))
