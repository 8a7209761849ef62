"""The rooms of the package: who may import whom, and by which door."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minillm"
# From top to bottom: a room may import those below it.
ROOMS = [
    "cli",
    "bench",
    "checks",
    "viz",
    "course",
    "serving",
    "player",
    "simulation",
    "ladder",
    "engine",
    "runtime",
    "kernels",
    "costs",
    "model",
    "sampling",
    "attention",
    "trace",
    "storyteller",
]  # noqa: E501
FOR_CHAPTERS = {"minillm"} | {f"minillm.{room}" for room in ROOMS}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import of this package, those inside functions too; `from minillm import x` is minillm.x
    if that is a room.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name.split(".")[0] == "minillm")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minillm":
            yield node.lineno, node.module
            if node.module == "minillm":
                yield from ((node.lineno, f"minillm.{each.name}") for each in node.names if each.name in ROOMS)


def arrows() -> Iterator[tuple[str, str, str, str]]:
    """(room, room that it imports, module, place) of every import from one room by another."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room, *rest = path.relative_to(PACKAGE).parts
        for line, module in imports(path.read_text(encoding="utf-8")) if rest else ():
            target = module.split(".")[1] if module.count(".") else None
            if target not in (None, "errors", room):
                yield room, target, module, f"{path.relative_to(ROOT)}:{line}"


def test_nothing_but_the_rooms_and_the_errors_lies_in_the_package():
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found - {"__init__.py", "errors.py", "README.md"} <= set(ROOMS)


def test_arrows_run_down():
    drawn = list(arrows())
    assert len({(room, target) for room, target, *_ in drawn}) > 40  # the graph has been found
    up = [(place, f"{room} imports {target}") for room, target, _, place in drawn if rank(target) <= rank(room)]
    assert up == []


def test_others_come_in_by_the_front_door():
    assert [(place, module) for *_, module, place in arrows() if module.count(".") > 1] == []


def test_an_arrow_that_runs_up_is_seen():
    (line, module), *_ = imports("def f():\n    from minillm.engine import LLM\n")
    assert (line, module) == (2, "minillm.engine")
    assert rank("engine") < rank("kernels")


def rank(room: str) -> int:
    """0 is the top."""
    return ROOMS.index(room)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("serving", "storyteller")])
def test_a_room_says_what_it_may_import(room):
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert re.search(r"[Mm]ay import|[Ii]mports nothing", docstring), room


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_chapters_come_in_by_the_front_door(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    modules = {module for source in sources if "minillm" in source for _, module in imports(source)}
    assert modules - FOR_CHAPTERS - {"minillm.errors"} == set()
