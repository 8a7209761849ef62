"""The typed errors of minillm.

Every error a user can cause is a `MiniLLMError`. Its message names the value that was given, the limit it broke
and what to change. Each is raised before anything is allocated or computed.

Below the errors are the checks of arguments that raise them. Each takes the name and the value of an argument and
returns the value in plain Python types: numbers of numpy and one-time iterables are converted. `checked` and
`check_fields` check all arguments of a function, or all fields of a dataclass, by their annotations.
"""

import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    import torch


class MiniLLMError(ValueError):
    """Base of all errors that the caller can fix."""


class ConfigError(MiniLLMError):
    """A configuration value is impossible, or two of them contradict each other."""


class SamplingParamsError(MiniLLMError):
    """A field of `SamplingParams` is outside its range."""


class PromptError(MiniLLMError):
    """A prompt is empty, too long, not encodable, or holds a token id the model does not know."""


class ModelNotFoundError(MiniLLMError):
    """No model of that name, folder or hub id could be found."""


class UnsupportedModelError(MiniLLMError):
    """The checkpoint is of an architecture, or has an option, that minillm does not implement."""


class CheckpointError(MiniLLMError):
    """The checkpoint's files do not match its own configuration, or are of a format we refuse to read."""


class CacheFullError(MiniLLMError):
    """More tokens were appended to a key-value cache than it has room for."""


class OutOfMemoryError(MiniLLMError):
    """Weights, activations and a usable cache do not fit in the available memory."""


class WorkerDiedError(RuntimeError):
    """The process that computes has ended; every request of its engine has failed."""


class PeerError(MiniLLMError):
    """Another engine, in a process of its own beside ours, has failed or ended."""


class MaskError(MiniLLMError):
    """The lengths, window or padding asked of a mask are impossible."""


class KernelError(MiniLLMError):
    """A kernel does not take tensors of this dtype, shape or device, or cannot run here."""


# --- checks of arguments ---------------------------------------------------------------------------------------------

_shorten = Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 60


def shown(value: object) -> str:
    """`repr` of a value, cut to a length that a message can hold; for an object without a usable one, its type."""
    try:
        return " ".join(_shorten.repr(value).split())  # that of a tensor has several lines
    except Exception:  # a repr is the caller's own code
        return f"<{type(value).__name__}>"


def check_whole(
    name: str,
    value: object,
    least: int,
    most: int | None = None,
    *,
    hint: str = "",
    error: type[MiniLLMError] = ConfigError,
) -> int:
    """A whole number from `least` to `most` as an int; Python's and numpy's count, a bool does not.

    `hint` ends the error's message, as in "or None for no limit".
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        wrong = True
    else:
        value = operator.index(value)
        wrong = value < least or (most is not None and value > most)
    if wrong:
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise error(f"{name} is {shown(value)}; it must be a whole number, {limits}{hint and f', {hint}'}")
    return value


def check_number(name: str, value: object, wanted: str, accepts, *, error: type[MiniLLMError] = ConfigError) -> float:
    """A finite number for which `accepts(number)` holds, as a float; `wanted` says which, as in "a number above 0"."""
    if isinstance(value, bool) or not isinstance(value, Real):
        number = math.nan
    else:
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond floats
            number = math.inf
    if not (math.isfinite(number) and accepts(number)):
        raise error(f"{name} is {shown(value)}; it must be {wanted}")
    return number


MOST_SECONDS = 1e10  # 300 years: beyond, a moment as a float is coarser than the steps between moments


def check_seconds(name: str, value: object, least: float = -MOST_SECONDS) -> float:
    """A moment on a run's clock, or a duration, in seconds."""
    limits = f"seconds, from {least:g} to {MOST_SECONDS:g}"
    return check_number(name, value, limits, lambda seconds: least <= seconds <= MOST_SECONDS)


def check_choice(name: str, value: object, known: Sequence, *, error: type[MiniLLMError] = ConfigError):
    """One of `known`, by value and type: 1 equals True but does not pass for it."""
    for each in known:
        if type(value) is type(each) and value == each:
            return each
    raise error(f"{name} {shown(value)} is not one of {', '.join(map(str, known))}")


def check_flag(name: str, value: object, *, error: type[MiniLLMError] = ConfigError) -> bool:
    """True or False, numpy's included, as a bool; 1 equals True but does not pass."""
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return check_choice(name, value, (False, True), error=error)


def check_text(name: str, value: object, *, hint: str = "", error: type[MiniLLMError] = ConfigError) -> str:
    """A str, as it is. `hint` ends the error's message."""
    if not isinstance(value, str):
        raise error(f"{name} is {shown(value)}; it must be a str{hint and f'; {hint}'}")
    return value


def check_items(name: str, value: object, wanted: str, *, error: type[MiniLLMError] = ConfigError) -> tuple:
    """Any iterable but a str, bytes or mapping as a tuple, read once; `wanted` says what it should be a list of."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise error(f"{name} is {shown(value)}; it must be a list of {wanted}")
    return tuple(value)


def check_prompt_ids(value: object) -> list[int]:
    """A prompt as a list of ints, read once. Raises PromptError unless it is a sequence of whole numbers."""
    if isinstance(value, str):
        raise PromptError(f"the prompt is the text {shown(value[:20])}, not token ids; encode it first")
    if isinstance(value, bytes | bytearray) or not isinstance(value, Sequence):
        raise PromptError(
            f"a prompt must be a str, a list of token ids or a dict, got {type(value).__name__}; "
            "an array becomes a list with .tolist()"
        )
    if set(map(type, value)) <= {int}:  # so that a long prompt costs little
        return list(value)
    return [check_token_id(token_id, position) for position, token_id in enumerate(value)]


def check_token_id(value: object, position: int) -> int:
    """One id of a prompt as an int: whatever counts as a whole number, a tensor of one element included."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError, ValueError):  # an array has `__index__` too, and may raise anything
        raise PromptError(f"token id {shown(value)} at position {position} is no whole number") from None


# --- all arguments at once -------------------------------------------------------------------------------------------

MOST = 2**63 - 1  # of any number: what fits a tensor; a product of several still has room in a float
Count = Annotated[int, 0]  # a whole number, at least 0
Positive = Annotated[int, 1]  # at least 1
_REFUSED = object()


def checked(
    function: Callable | None = None, *, error: type[MiniLLMError] = ConfigError, skip: Sequence[str] = ()
) -> Callable:
    """The function, with every argument checked against its annotation before it runs.

    `int` is a whole number of 64 bits, `Count` and `Positive` one that is at least 0 or 1, `float` a finite number,
    `Sequence[X]` any iterable of X (it arrives as a tuple), a class its instances, and so on in unions and Literals.
    Arguments without an annotation, and those to `skip`, are not checked.
    """
    if function is None:
        return functools.partial(checked, error=error, skip=skip)
    names = list(inspect.signature(function).parameters)
    kinds = {name: kind for name, kind in function.__annotations__.items() if name in names and name not in skip}

    # Quick where only a class or nothing is required: some functions run in every layer of every step.
    optional = {name for name, kind in kinds.items() if NoneType in get_args(kind)}
    classes = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and kind not in (int, float)}

    def check(name: str, value: object):
        if name not in kinds or (name in classes and isinstance(value, classes[name])):
            return value
        if value is None and name in optional:
            return None
        return check_kind(name, value, kinds[name], error=error)

    @functools.wraps(function)
    def with_checks(*args, **named):
        known = [check(name, value) for name, value in zip(names, args, strict=False)]
        named = {name: check(name, value) for name, value in named.items()}
        return function(*known, *args[len(names) :], **named)

    return with_checks


def check_fields(instance: object, *, error: type[MiniLLMError] = ConfigError) -> None:
    """The same for all fields of a dataclass; the first line of its `__post_init__`."""
    for field in fields(instance):
        value = check_kind(field.name, getattr(instance, field.name), field.type, error=error)
        object.__setattr__(instance, field.name, value)  # a frozen instance can only be changed here, while it is made


def check_kind(name: str, value: object, kind: object, *, error: type[MiniLLMError] = ConfigError):
    """A value that fits an annotation, in plain Python types."""
    found = _converted(value, kind)
    if found is _REFUSED:
        raise error(f"{name} is {shown(value)}; it must be {_described(kind)}")
    return found


def _converted(value: object, kind: object):
    """The value converted to the annotation, or _REFUSED."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return next((found for part in parts if (found := _converted(value, part)) is not _REFUSED), _REFUSED)
    if origin is Annotated:
        number = value if type(value) is int and value <= MOST else _converted_number(value, int)
        return number if number is not _REFUSED and number >= parts[1] else _REFUSED
    if origin is Literal:
        return next((each for each in parts if type(value) is type(each) and value == each), _REFUSED)
    if origin is Callable or kind is Callable:
        return value if callable(value) else _REFUSED
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return _converted_items(value, origin, parts)
    if kind in (int, float):
        return _converted_number(value, kind)
    if kind is None:
        kind = NoneType
    return value if not isinstance(kind, type) or isinstance(value, kind) else _REFUSED


def _converted_number(value: object, kind: type):
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return _REFUSED
    try:
        number = kind(value)
    except OverflowError:  # a whole number beyond floats
        return _REFUSED
    if kind is int:
        return number if abs(number) <= MOST else _REFUSED
    return number if math.isfinite(number) else _REFUSED


def _converted_items(value: object, origin: type, parts: tuple):
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        return _REFUSED
    items = tuple(value)
    if origin is tuple and parts[-1] is not Ellipsis:
        if len(items) != len(parts):
            return _REFUSED
        items = tuple(map(_converted, items, parts))
    else:
        items = tuple(_converted(item, parts[0]) for item in items)
    return _REFUSED if any(item is _REFUSED for item in items) else items


def _described(kind: object) -> str:
    """The words of an error for what an annotation requires."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, parts))
    if origin is Annotated:
        return f"a whole number of 64 bits, at least {parts[1]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is Callable or kind is Callable:
        return "a function"
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"a list of {len(parts)}: {' and '.join(map(_described, parts))}"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list, each item {_described(parts[0])}"
    names = {
        int: "a whole number of 64 bits",
        float: "a finite number",
        bool: "True or False",
        None: "None",
        NoneType: "None",
    }
    return names.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def check_device(name: str, value: object) -> "torch.device":
    """An existing torch device, from itself or its name; for callers that have loaded torch."""
    import torch

    try:
        found = torch.device(value)
    except (RuntimeError, TypeError, ValueError) as wrong:
        raise ConfigError(f"{name} {shown(value)} is not a device; use 'cpu', 'cuda' or 'cuda:N'") from wrong
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (found.index or 0) >= there.get(found.type, 0):
        raise ConfigError(
            f"{name} {shown(value)} is not there: torch sees {there['cuda']} CUDA devices; use 'cpu' or another"
        )
    return found


def check_options(options: object, at_least_one: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """Options of a command, by the names of their attributes: numbers from 1 to a million, and files to be written."""

    def said(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    for name in at_least_one:
        if getattr(options, name) is not None:
            check_whole(said(name), getattr(options, name), 1, 10**6)
    for name in files:
        check_output_file(said(name), getattr(options, name))


# --- files -----------------------------------------------------------------------------------------------------------


def read_text(path: str | Path, what: str, *, error: type[MiniLLMError] = ConfigError) -> str:
    """The text of a file in UTF-8; `what` names it in the error, as in "the requests in"."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as wrong:
        raise error(f"cannot read {what} {path}: it is not text in UTF-8") from wrong
    except (OSError, ValueError, TypeError) as wrong:  # ValueError: a zero byte in its name; TypeError: not a path
        raise error(f"cannot read {what} {shown(path)}: {getattr(wrong, 'strerror', None) or wrong}") from wrong


def write_text(path: str | Path, text: str, *, error: type[MiniLLMError] = ConfigError) -> Path:
    """Write a file in UTF-8; returns its path."""
    try:
        path = Path(path)
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError, TypeError) as wrong:
        raise error(f"cannot write {shown(path)}: {getattr(wrong, 'strerror', None) or wrong}") from wrong
    return path


def check_output_file(name: str, path: str | Path | None, *, error: type[MiniLLMError] = ConfigError) -> None:
    """Raises unless a file can be written there, before the work that fills it; None, no file, passes."""
    reason = None if path is None else _why_not_writable(Path(path))
    if reason is not None:
        raise error(f"{name} {shown(str(path))} cannot be written: {reason}")


def _why_not_writable(path: Path) -> str | None:
    try:
        os.stat(path)
        target = path
    except FileNotFoundError:
        target = path.parent
    except (OSError, ValueError) as wrong:  # ValueError: a zero byte in its name
        return getattr(wrong, "strerror", None) or str(wrong)
    if path.is_dir():
        return "it is a folder"
    if not target.exists():
        return f"there is no folder {target}"
    return None if os.access(target, os.W_OK) else f"{target} is not writable"
