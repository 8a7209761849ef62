"""The typed errors of minillm.

Every error a user can cause is a `MiniLLMError`. Its message names the value that was given, the limit it broke
and what to change. Each is raised before anything is allocated or computed.

Below the errors stand the checks of arguments that raise them: each takes the name and the value of an argument and
returns the value in plain Python types, so that numpy's numbers and one-time iterables are gone afterwards.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from reprlib import Repr


class MiniLLMError(ValueError):
    """Base of all errors that are the caller's to fix."""


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
    """Weights, activations and a usable cache do not fit in the memory there is."""


class WorkerDiedError(RuntimeError):
    """The process that computes has ended; every request of its engine has failed."""


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
        return _shorten.repr(value)
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


def check_choice(name: str, value: object, known: Sequence, *, error: type[MiniLLMError] = ConfigError):
    """One of `known`, by value and type: 1 equals True and is not meant."""
    for each in known:
        if type(value) is type(each) and value == each:
            return each
    raise error(f"{name} {shown(value)} is not one of {', '.join(map(str, known))}")


def check_flag(name: str, value: object, *, error: type[MiniLLMError] = ConfigError) -> bool:
    """True or False, numpy's included, as a bool; 1 equals True and is not meant."""
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
