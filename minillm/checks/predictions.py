"""The reader's guess and the measured answer, on one line."""

import math

from minillm.checks.base import CheckFailed, NotWrittenYet, describe, number_of


def prediction(question: str, guess: float | None, measured: float, unit: str = "", *, found: str = "measured") -> None:
    """Print the guess beside the answer and how far apart they are. Both are in `unit`.

    `found` says how the answer was found: "measured", "counted" or "computed".

    Raises NotWrittenYet while the guess is None, so that the answer is not shown before, and CheckFailed for a guess
    that is not a number.
    """
    if guess is None:
        raise NotWrittenYet(f"✗ {question}: write your guess first, then run this cell.")
    number = number_of(guess)
    if number is None or math.isnan(number):
        raise CheckFailed(f"✗ {question}: your guess is {describe(guess)}; write it as a number, such as 57 or 0.5.")
    guess, measured = number, number_of(measured)
    unit = unit and f" {unit}"
    print(f"{question}: you guessed {_number(guess)}{unit}, {found} {_number(measured)}{unit}")
    print(f"→ {_verdict(guess, measured)}")


def _number(value: float) -> str:
    """Whole numbers with thousands separators, others to three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _verdict(guess: float, measured: float) -> str:
    """How good the guess was, as a factor."""
    if guess == measured:
        return "exactly"
    if guess <= 0 or measured <= 0:
        return f"off by {_number(abs(guess - measured))}"
    factor = max(guess, measured) / min(guess, measured)
    if factor < 1.005:
        return "within 1 %"
    if factor < 1.1:
        direction = "more" if measured > guess else "less"
        return f"within 10 %: {factor - 1:.0%} {direction}"
    return f"{factor:.1f} times your guess" if measured > guess else f"your guess is {factor:.1f} times as much"
