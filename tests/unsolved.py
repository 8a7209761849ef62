"""Chapters in which exercises are unsolved, run without a kernel and only where that makes a difference.

A cell is touched by an exercise if it uses a name that the exercise defines, or one that a touched cell defines.
Touched cells are run, statement by statement, up to their first error. All others do what they do in the solved
chapter: they are run only when a touched cell asks for a name of theirs, and once for all exercises.
"""

import ast
import contextlib
import io
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat

from minillm.course import notebooks, student


@dataclass
class Statement:
    """One statement of a cell, and the names of the chapter that it reads."""

    node: ast.stmt
    reads: set[str]


@dataclass
class Cell:
    """The source of a code cell, and what can be said of its names without running it."""

    name: str
    source: str
    has_solution: bool = False
    borrowed: dict[str, set[str]] = field(default_factory=dict)  # functions of cells above -> what they change

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def statements(self) -> list[Statement]:
        return [Statement(node, reads(node)) for node in self.tree.body]

    @cached_property
    def reads(self) -> set[str]:
        """Names that it reads before it binds them."""
        found, bound = set(), set()
        for statement in self.statements:
            found |= statement.reads - bound
            bound |= binds(statement.node)
        return found

    @cached_property
    def binds(self) -> set[str]:
        return binds(self.tree)

    @cached_property
    def imports(self) -> set[str]:
        symbols = symtable.symtable(self.source, self.name, "exec").get_symbols()
        return {symbol.get_name() for symbol in symbols if symbol.is_imported()}

    @cached_property
    def changes(self) -> set[str]:
        """Names whose objects the cell changes, itself or by a function defined above it."""
        return changed(self.tree).union(*(names for name, names in self.borrowed.items() if name in self.reads))

    @cached_property
    def functions(self) -> dict[str, set[str]]:
        """Functions that it defines -> names of the chapter whose objects they change."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                own = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and stored(name)}
                own |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
                found[node.name] = changed(node) - own
        return found


def binds(tree: ast.AST) -> set[str]:
    symbols = symtable.symtable(ast.unparse(tree), "cell", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def reads(statement: ast.stmt) -> set[str]:
    """Names that a statement takes from outside, in its functions too."""
    table = symtable.symtable(ast.unparse(statement), "statement", "exec")
    own = {symbol.get_name() for symbol in table.get_symbols()}  # without the names of comprehensions
    found, bound = set(), set()
    for name in in_order(statement):
        if stored(name):
            bound.add(name.id)
        elif name.id not in bound:
            found.add(name.id)
    return found & own | reads_inside(table) - binds(statement)


def in_order(node: ast.AST) -> Iterator[ast.Name]:
    """The names of a statement in the order in which they are read and bound."""
    if isinstance(node, ast.Name):
        yield node
    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, (ast.Assign, ast.AnnAssign)):  # the value comes before its names
        parts.reverse()
    elif isinstance(node, ast.For):
        parts = [node.iter, node.target, *node.body, *node.orelse]
    for part in parts:
        yield from in_order(part)


def reads_inside(table: symtable.SymbolTable) -> set[str]:
    found = set()
    for child in table.get_children():
        found |= {symbol.get_name() for symbol in child.get_symbols() if symbol.is_global()} | reads_inside(child)
    return found


def changed(tree: ast.AST) -> set[str]:
    """Names `x` of statements like `x[...] = 1`, `x.y = 1` and `x.append(1)`."""
    targets = [node for node in ast.walk(tree) if isinstance(node, (ast.Subscript, ast.Attribute)) and stored(node)]
    calls = [
        node.value.func for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    return {root.id for root in map(root_of, targets + calls) if root is not None}


def stored(node: ast.AST) -> bool:
    return isinstance(node.ctx, ast.Store)


def root_of(node: ast.AST) -> ast.Name | None:
    """`x` of `x.y[0].z`; None if that is no name or nothing stands behind it."""
    inner = node
    while isinstance(inner, (ast.Subscript, ast.Attribute)):
        inner = inner.value
    return inner if isinstance(inner, ast.Name) and inner is not node else None


class Chapter:
    """The solved chapter, run as far as somebody asks for a name."""

    def __init__(self, path: Path, folder: Path):
        self.folder = folder  # for the sources, which `inspect` and Triton read again
        self.cells = []
        functions, imports = {}, set()
        for cell in notebooks.code_cells(nbformat.read(path, as_version=4)):
            made = Cell(cell.id, cell.source, student.has_solution(cell.source), dict(functions))
            functions |= made.functions
            imports |= made.imports
            made.changes -= imports  # `torch.manual_seed(0)` changes nothing that is ours
            self.cells.append(made)
        self.spaces: dict[int, dict[str, Any]] = {}
        self.asked: set[int] = set()  # cells whose late names are being looked for

    def exercises(self) -> list[int]:
        return [place for place, cell in enumerate(self.cells) if cell.has_solution]

    def definers(self, name: str, before: int) -> list[int]:
        """The cells that bind or change a name, the last one first."""
        cells = self.cells[:before]
        return [i for i in reversed(range(len(cells))) if name in cells[i].binds or name in cells[i].changes]

    def space(self, place: int) -> dict[str, Any]:
        """What a cell of the solved chapter leaves behind."""
        if place not in self.spaces:
            cell, space = self.cells[place], new_space()
            for name in cell.reads:
                self.give(space, name, place)
            for statement in cell.statements:
                execute(statement.node, self.written(place, cell.source), space)
            self.spaces[place] = space
        return self.spaces[place]

    def give(self, space: dict[str, Any], name: str, before: int) -> None:
        for place in self.definers(name, before)[:1]:
            self.take(space, name, place, before)

    def take(self, space: dict[str, Any], name: str, place: int, before: int) -> None:
        """Put a name of a cell into another space, and give its functions what was defined only after them."""
        theirs = self.space(place)
        if place not in self.asked:
            self.asked.add(place)
            for late in self.cells[place].reads - theirs.keys():
                self.give(theirs, late, before)
            self.asked.remove(place)
        if name in theirs:
            space[name] = theirs[name]

    def written(self, place: int, source: str, suffix: str = "") -> str:
        path = self.folder / f"cell_{place}{suffix}.py"
        path.write_text(source, encoding="utf-8")
        return str(path)


class Unsolved:
    """The chapter with some of its exercises unsolved: `errors` of the cells that fail, by cell."""

    def __init__(self, chapter: Chapter, exercises: list[int]):
        self.chapter, self.exercises = chapter, exercises
        self.spaces: dict[int, dict[str, Any]] = {}
        self.errors: dict[str, Exception] = {}
        self.in_vain: list[str] = []  # cells that ask for an exercise which they do not use
        self.touched = set()  # names that have another value than in the solved chapter, or none
        for place, cell in enumerate(chapter.cells):
            if place in exercises:
                stub = Cell(cell.name, student.without_solutions(cell.source))
                self.run(place, stub, f"_without_{place}")
            elif cell.reads & self.touched:
                self.run(place, cell)
            else:
                self.touched -= cell.binds

    def run(self, place: int, cell: Cell, suffix: str = "") -> None:
        self.spaces[place] = space = new_space()
        path = self.chapter.written(place, cell.source, suffix)
        for statement in cell.statements:
            for name in statement.reads - space.keys():
                self.give(space, name, place)
            try:
                execute(statement.node, path, space)
            except Exception as error:
                self.errors[cell.name] = error
                if is_guard(statement.node) and not read_beside(cell, statement) & self.touched:
                    self.in_vain.append(cell.name)
                break
        self.touched |= cell.binds | cell.changes

    def give(self, space: dict[str, Any], name: str, before: int) -> None:
        for place in self.chapter.definers(name, before):
            if place not in self.spaces:
                return self.chapter.take(space, name, place, before)
            if name in self.spaces[place]:
                space[name] = self.spaces[place][name]
                return None
        return None


def is_guard(node: ast.stmt) -> bool:
    return ast.unparse(node).startswith("checks.needs(")


def read_beside(cell: Cell, guard: Statement) -> set[str]:
    """Names that the other statements of a cell read."""
    return set().union(*(statement.reads for statement in cell.statements if statement is not guard))


def new_space() -> dict[str, Any]:
    return {"__name__": "__main__", "display": lambda *pictures: None}


def execute(node: ast.stmt, path: str, space: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(ast.Module([node], type_ignores=[]), path, "exec"), space)
