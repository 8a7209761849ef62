"""For exercises that are not solved: the course's version runs in their place, and a line says so.

The reader's definition has priority: it is used again when its cell runs, or as soon as it passes its check.
"""

import functools
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from typing import Any

from minillm.checks.base import STAND_INS, CheckFailed, NotWrittenYet, is_stub, own, plain
from minillm.course import names_in, solution

FAILED: dict[int, Any] = {}  # id -> a function that failed its last check


def judged(check: Callable) -> Callable:
    """A check that records its result; it judges the reader's answer, never the course's version."""

    @functools.wraps(check)
    def judge(*answers: Any, **options: Any) -> None:
        mine = [own(answer) for answer in answers]
        try:
            check(*mine, **options)
        except (CheckFailed, NotWrittenYet):
            FAILED.update((id(answer), answer) for answer in mine)
            raise
        space = sys._getframe(1).f_globals
        for answer, written in zip(answers, mine, strict=True):
            FAILED.pop(id(written), None)
            if answer is not written:
                space.update(dict.fromkeys(names_of(answer, space), written))

    return judge


def needs(*functions: Callable) -> None:
    """Call at the start of a cell that uses answers to exercises; replaces unusable ones by the course's versions.

    Unusable are stubs, answers that failed their last check, and the answers that either of them calls. Prints a line
    for each. Raises NotWrittenYet for a stub without a solution in any chapter.
    """
    space = sys._getframe(1).f_globals
    waiting, told = list(functions), set()
    while waiting:
        function = waiting.pop(0)
        if id(function) in told:
            continue
        told.add(id(function))
        if is_stub(function) or id(function) in FAILED:
            function = replace(function, space)
            told.add(id(function))
        waiting += [space[name] for name in global_names(function) if name in space and is_unsolved(space[name])]


def is_unsolved(value: Any) -> bool:
    return callable(value) and (id(value) in FAILED or is_stub(value))


def replace(function: Callable, space: dict[str, Any]) -> Callable:
    """Put the course's version in place of an answer in the reader's notebook, and return it."""
    written, names = own(function), names_of(function, space)
    name, found = next(((name, found) for name in names if (found := solution(name))), (None, None))
    if found is None and is_stub(function):
        name = getattr(plain(function), "__name__", "an exercise")
        raise NotWrittenYet(f"✗ this cell needs {name}: not written yet. Solve that exercise first.")
    if found is None:
        return function
    why = "is not written yet" if is_stub(written) else "has not passed its check"
    print(f"↷ {name} {why}: the course's version runs in its place")
    if function is not written:  # it is there already
        return function
    run(found.source, f"<the course's {name}, in {found.place}>", space)
    made = space[name]
    STAND_INS[id(made)] = made, written
    if callable(function):  # also under other names
        space.update(dict.fromkeys(names, made))
    return made


def run(source: str, file: str, space: dict[str, Any]) -> None:
    """Execute a definition so that `inspect` finds its source, which Triton needs."""
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), space)


def names_of(value: Any, space: dict[str, Any]) -> list[str]:
    return [name for name, held in space.items() if held is value]


def global_names(function: Callable) -> Iterator[str]:
    """Names that a function, or the methods of a class, may look up in the notebook."""
    function = plain(function)
    for each in vars(function).values() if inspect.isclass(function) else [function]:
        code = getattr(each, "__code__", None)
        yield from names_in(code) if code else ()
