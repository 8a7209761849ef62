"""How a check runs: call the reader's function on each case, compare, and explain the first failure in four lines."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call and what must come back."""

    args: tuple
    expected: Any
    hint: str  # one sentence, shown if this case fails


class CheckFailed(AssertionError):
    """A reader's function gave a wrong answer. Jupyter shows the message alone, without a stack trace."""

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
    show: Callable[[Any], str] = None,
    advise: Callable[[Any, Case], str | None] | None = None,
) -> None:
    """Call `function` on every case and print `✓ name: N cases`.

    `same(got, expected)` decides whether an answer is right (default: `same_value`), `show` how it is printed.
    `advise(got, case)` may know what has gone wrong: its hint then stands in place of the case's.
    Raises NotWrittenYet for a stub and CheckFailed for the first wrong case.
    """
    same, show = same or same_value, show or describe
    cases = list(cases)
    for case in cases:
        got = call(name, function, case, show)
        if not same(got, case.expected):
            case = replace(case, hint=(advise and advise(got, case)) or case.hint)
            raise CheckFailed(failure(name, case, f"got       {show(got)}", show))
    print(f"✓ {name}: {len(cases)} cases")


def is_written(function: Callable) -> bool:
    """Whether a function or kernel is more than a stub, read from its source.

    For cells that use an answer further down, and for kernels: where Triton compiles, a `raise` never gets to raise.
    """
    try:
        lines = inspect.getsource(getattr(function, "fn", function)).splitlines()
    except (OSError, TypeError):
        return True
    return not any(line.strip().startswith("raise NotImplementedError") for line in lines)


def call(name: str, function: Callable, case: Case, show: Callable[[Any], str]) -> Any:
    """The reader's answer for one case; an exception in it, or no answer at all, becomes a failure that names it."""
    try:
        got = function(*case.args)
    except NotImplementedError:
        raise NotWrittenYet(f"✗ {name}: not written yet. Replace the `raise NotImplementedError` above.") from None
    except Exception as error:
        raise CheckFailed(failure(name, case, f"raised    {type(error).__name__}: {error}", show)) from error
    if got is None and case.expected is not None:
        case = replace(case, hint="Your function returned nothing: does it end with `return`?")
        raise CheckFailed(failure(name, case, "got       None", show))
    return got


def failure(name: str, case: Case, came: str, show: Callable[[Any], str]) -> str:
    """The message of a failed check: the call, what came, what was expected, one hint."""
    arguments = ", ".join(describe(argument) for argument in case.args)
    expected = show(case.expected)
    return f"✗ {name}\n  call      {name}({arguments})\n  {came}\n  expected  {expected}\n  hint      {case.hint}"


def same_value(got: Any, expected: Any) -> bool:
    """Equal up to the container and float rounding: a list, a tuple and a tensor of the same numbers are the same."""
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(got) is type(expected) and got == expected
    if isinstance(expected, torch.Tensor):
        return same_tensor(got, expected)
    if isinstance(expected, (list, tuple)):
        got = got.tolist() if isinstance(got, torch.Tensor) else got
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return False
        return all(same_value(one, other) for one, other in zip(got, expected, strict=True))
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and got.keys() == expected.keys()
            and all(same_value(got[key], value) for key, value in expected.items())
        )
    if isinstance(expected, (int, float)):
        return is_number(got) and math.isclose(float(got), float(expected), rel_tol=1e-6, abs_tol=1e-9)
    return bool(got == expected)


def same_tensor(got: Any, expected: torch.Tensor) -> bool:
    """Same shape and values; a nested list counts as the tensor it spells, but a float mask is not a bool mask."""
    if not isinstance(got, torch.Tensor):
        try:
            got = torch.tensor(got)
        except (TypeError, ValueError, RuntimeError):
            return False
    if got.shape != expected.shape or (got.dtype == torch.bool) != (expected.dtype == torch.bool):
        return False
    if expected.dtype == torch.bool:
        return torch.equal(got, expected)
    return torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


def is_number(value: Any) -> bool:
    """A plain number or a tensor that holds a single one; bools do not count."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def describe(value: Any) -> str:
    """A short form for messages: tensors with shape, masks as rows of # and ., long things cut."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.ndim == 2 and value.numel() <= 400:
        rows = "/".join("".join("#" if cell else "." for cell in row) for row in value.tolist())
        return f"mask {tuple(value.shape)} {rows}"
    if isinstance(value, torch.Tensor):
        numbers = value.flatten()[:12].tolist()
        listed = ", ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in numbers)
        return f"tensor {tuple(value.shape)} [{listed}{', …' if value.numel() > 12 else ''}]"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "…"
