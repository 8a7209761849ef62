"""How a check runs: call the reader's function on each case, compare, and explain the first failure in four lines.

The reader's function never gets the check's own data: `call` passes copies. All checks use one comparison,
`same_value`, so that they agree on what counts as a number, a list or a mask.
"""

import copy
import dis
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice, zip_longest
from numbers import Integral, Real
from types import TracebackType
from typing import Any

import numpy as np
import torch

MOST_ITEMS = 100_000  # taken from a generator, which may be endless
DRAWN_CELLS, ROWS_IN_LINE = 400, 8  # the largest mask that is drawn; the most rows on one line
ARRAYS = (torch.Tensor, np.ndarray, np.generic)  # with numpy's scalars


@dataclass(frozen=True)
class Case:
    """One call and its expected result."""

    args: tuple
    expected: Any
    hint: str  # one sentence, shown if this case fails


class CheckFailed(AssertionError):
    """A reader's function gave a wrong answer. Jupyter shows only the message, without a stack trace."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class NotWrittenYet(NotImplementedError):
    """The exercise still holds its stub."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def run_check(
    name: str,
    function: Callable,
    cases: Iterable[Case],
    *,
    same: Callable[[Any, Any], bool] | None = None,
    show: Callable[[Any], str] | None = None,
    advise: Callable[[Any, Case], str | None] | None = None,
) -> None:
    """Call `function` on every case and print `✓ name: N cases`.

    `same(got, expected)` decides whether an answer is right (default: `same_value`), `show` how it is printed.
    `advise(got, case)` may recognise a mistake: its hint then replaces the case's.
    Raises NotWrittenYet for a stub and CheckFailed for the first wrong case.
    """
    same, show = same or same_value, show or describe
    cases = list(cases)
    for case in cases:
        got = call(name, function, case, show)
        if not same(got, case.expected):
            case = replace(case, hint=(advise and advise(got, case)) or case.hint)
            raise CheckFailed(wrong_answer(name, case, got, show))
    print(f"✓ {name}: {len(cases)} cases")


# --- the reader's function -------------------------------------------------------------------------------------------


STAND_INS: dict[int, tuple[Any, Any]] = {}  # id -> (the course's version, what the reader wrote)


def own(answer: Any) -> Any:
    """The reader's answer, also if the course's version has replaced it."""
    return STAND_INS.get(id(answer), (answer, answer))[1]


def plain(function: Any) -> Any:
    """The Python function of a kernel; anything else unchanged."""
    return getattr(function, "fn", function)


def is_written(*functions: Callable) -> bool:
    """Whether all these functions, kernels and classes are more than stubs, read from their sources.

    For cells that use an answer later, and for kernels: in code that Triton compiles, a `raise` never runs.
    """
    return not any(map(is_stub, functions))


def is_stub(function: Callable) -> bool:
    """Whether a definition is a stub; a class is one if a method is."""
    function = plain(own(function))
    if inspect.isclass(function):
        return any(is_stub(method) for method in vars(function).values() if inspect.isfunction(method))
    try:
        lines = inspect.getsource(function).splitlines()
    except (OSError, TypeError):
        return False
    return any(line.strip().startswith("raise NotImplementedError") for line in lines)


def call(name: str, function: Callable, case: Case, show: Callable[[Any], str]) -> Any:
    """The reader's answer for one case. An exception in it, or no answer, becomes a failure that names it.

    The function gets a copy of each argument: it may pop, sort and scale them.
    """
    try:
        got = realised(function(*map(copy.deepcopy, case.args)))
    except Exception as error:
        stub = unwritten(error)
        if stub is None:
            reason = f"raised    {type(error).__name__}: {error}".splitlines()[0]
            raise CheckFailed(failure(name, case, reason, show(case.expected))) from error
        missing = f"it calls {stub}, which is not written yet" if stub else "not written yet"
        raise NotWrittenYet(f"✗ {name}: {missing}. Replace the `raise NotImplementedError` above.") from None
    if got is None and case.expected is not None:
        case = replace(case, hint="Your function returned nothing: does it end with `return`?")
        raise CheckFailed(failure(name, case, "got       None", show(case.expected)))
    return got


def unwritten(error: Exception) -> str | None:
    """The stub that raised the error: "" for the called function, else the name of a helper; None if no stub did.

    PyTorch also raises NotImplementedError, for unsupported devices and types; the reader must see that error.
    """
    frames = list(readers_frames(error.__traceback__))
    if not isinstance(error, NotImplementedError) or not frames:
        return None
    last = frames[-1]
    code = last.tb_frame.f_code
    if code.co_code[last.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return None
    if code is frames[0].tb_frame.f_code:
        return ""
    return code.co_name if str(error).startswith("write ") else None


def readers_frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    """The frames of a traceback that are not the checks' own."""
    while traceback is not None:
        if not traceback.tb_frame.f_globals.get("__name__", "").startswith("minillm.checks"):
            yield traceback
        traceback = traceback.tb_next


def realised(value: Any) -> Any:
    """The answer with generators run to lists, so that their errors are caught and their items can be read twice."""
    if isinstance(value, Iterator):
        return list(islice(value, MOST_ITEMS))
    return type(value)(map(realised, value)) if type(value) in (list, tuple) else value


# --- the comparison --------------------------------------------------------------------------------------------------


def same_value(got: Any, expected: Any) -> bool:
    """Equal up to types, containers and rounding.

    A number may be Python's, numpy's, a Fraction, a Decimal or a tensor of one element; a whole number may be a float.
    For a list, any iterable in the same order is accepted; for a tensor, also nested lists with its values. But True is
    not a number, a number is not a bool, and a text is neither.
    """
    if isinstance(expected, torch.Tensor):
        return same_tensor(got, expected)
    if isinstance(expected, (list, tuple)):
        got = as_list(got)
        if not isinstance(got, list) or len(got) != len(expected):
            return False
        return all(same_value(one, other) for one, other in zip(got, expected, strict=True))
    if is_number(expected):
        return same_number(number_of(got), number_of(expected))
    got = got.item() if isinstance(got, ARRAYS) and size_of(got) == 1 else got
    return type(got) is type(expected) and got == expected


def same_number(got: float | None, expected: float) -> bool:
    """Whether numbers agree: whole ones to nine digits, others to six, which float32 can hold."""
    try:
        return got is not None and math.isclose(
            got, expected, rel_tol=1e-9 if isinstance(expected, int) else 1e-6, abs_tol=1e-9
        )
    except OverflowError:  # an int too large for a float
        return False


def same_tensor(got: Any, expected: torch.Tensor) -> bool:
    """Whether shape and values agree; numbers are not accepted for a mask."""
    got = to_tensor(got)
    if got is None or got.shape != expected.shape or (got.dtype == torch.bool) != (expected.dtype == torch.bool):
        return False
    if expected.dtype == torch.bool:
        return torch.equal(got, expected)
    return torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


def is_number(value: Any) -> bool:
    return number_of(value) is not None


def number_of(value: Any) -> float | None:
    """A single number as Python's int or float; None for anything else, including bools."""
    if isinstance(value, ARRAYS):
        value = value.item() if size_of(value) == 1 else None
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, (Real, Decimal)) else None


def as_list(value: Any) -> Any:
    """A tensor, an array or another iterable as a list; numbers, texts, sets and dicts unchanged."""
    if isinstance(value, ARRAYS):
        return value.tolist() if value.ndim else value
    if isinstance(value, (str, bytes, Set, Mapping)) and not hasattr(value, "mapping"):  # views of a dict are ordered
        return value
    return list(value) if isinstance(value, Iterable) else value


def nested(value: Any) -> Any:
    """Nested lists of Python's own numbers and bools."""
    items = as_list(value)
    if isinstance(items, list):
        return list(map(nested, items))
    number = number_of(value)
    if number is not None:
        return number
    return value.item() if isinstance(value, ARRAYS) else value


def to_tensor(value: Any) -> torch.Tensor | None:
    """A tensor on the CPU from a tensor or nested lists; None if that is impossible."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    try:
        return torch.tensor(nested(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def size_of(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else value.size


# --- the message -----------------------------------------------------------------------------------------------------


def failure(name: str, case: Case, came: str, expected: str) -> str:
    """The message of a failed check: the call, the result, the expected result, one hint."""
    arguments = ", ".join(describe(argument) for argument in case.args)
    return f"✗ {name}\n  call      {name}({arguments})\n  {came}\n  expected  {expected}\n  hint      {case.hint}"


def wrong_answer(name: str, case: Case, got: Any, show: Callable[[Any], str]) -> str:
    """The message for a wrong answer: large masks side by side, or the first row in which a large tensor differs."""
    came, expected = show(got), show(case.expected)
    if show is describe and isinstance(case.expected, torch.Tensor):
        wanted = case.expected
        if is_mask(wanted) and len(wanted) > ROWS_IN_LINE:
            expected += beside(to_tensor(got), wanted)
        elif (row := different_row(to_tensor(got), wanted)) is not None:
            came, expected = (f"row {row}: {describe(to_tensor(each)[row])}" for each in (got, wanted))
    return failure(name, case, f"got       {came}", expected)


def different_row(got: torch.Tensor | None, expected: torch.Tensor) -> int | None:
    """The first row of numbers that differs; None if a message has room for all rows, or none differs."""
    if got is None or got.shape != expected.shape or got.ndim < 2 or is_mask(expected):
        return None
    rows = (row for row in range(len(got)) if not same_tensor(got[row], expected[row]))
    return next(rows, None)


def beside(got: torch.Tensor | None, expected: torch.Tensor) -> str:
    """Two masks side by side, one line per row; rows that differ are marked."""
    left = mask_rows(got) if got is not None and is_mask(got) else []
    width = max([len("yours"), *map(len, left)])
    lines = [f"{'yours':{width}}  expected"]
    for mine, wanted in zip_longest(left, mask_rows(expected), fillvalue=""):
        lines.append(f"{mine:{width}}  {wanted}{'' if mine == wanted else '  ←'}")
    return "".join(f"\n            {line}" for line in lines)


def is_mask(value: torch.Tensor) -> bool:
    return value.dtype == torch.bool and value.ndim == 2 and value.numel() <= DRAWN_CELLS


def mask_rows(mask: torch.Tensor) -> list[str]:
    return ["".join("#" if cell else "." for cell in row) for row in mask.tolist()]


def describe(value: Any) -> str:
    """A short form on one line: tensors with shape, small masks as rows of # and ., long values cut."""
    if isinstance(value, np.generic):
        return describe(value.item())
    if isinstance(value, ARRAYS):
        return describe_array("array" if isinstance(value, np.ndarray) else "tensor", torch.as_tensor(value))
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if isinstance(value, list) and value and isinstance(value[0], (list, tuple)) and value[0]:
        table = to_tensor(value) if isinstance(value[0][0], (bool, np.bool_)) else None
        if table is not None and is_mask(table):
            return describe_array("", table)
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= 200 else text[:197] + "…"


def describe_array(kind: str, value: torch.Tensor) -> str:
    shape = tuple(value.shape)
    if is_mask(value):
        return f"mask {shape}" + (" " + "/".join(mask_rows(value)) if len(value) <= ROWS_IN_LINE else "")
    numbers = value.flatten()[:12].tolist()
    listed = ", ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in numbers)
    return f"{kind} {shape} [{listed}{', …' if value.numel() > 12 else ''}]"
