"""The reader's guess and the measured answer, on one line."""

from minillm.checks.base import NotWrittenYet


def prediction(question: str, guess: float | None, measured: float, unit: str = "", *, found: str = "measured") -> None:
    """Print the guess beside the answer and how far apart they are. Both are in `unit`.

    `found` says how the answer was found: a number can be measured, counted or computed.

    Raises NotWrittenYet while the guess is still None: look only after you have guessed.
    """
    if guess is None:
        raise NotWrittenYet(f"✗ {question}: write your guess first, then run this cell.")
    unit = unit and f" {unit}"
    print(f"{question}: you guessed {_number(guess)}{unit}, {found} {_number(measured)}{unit}")
    print(f"→ {_verdict(guess, measured)}")


def _number(value: float) -> str:
    """Whole numbers with thousands separators, others to three figures."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _verdict(guess: float, measured: float) -> str:
    """How good the guess was, as a factor."""
    if guess == measured:
        return "exactly"
    if guess <= 0 or measured <= 0:
        return f"off by {_number(abs(guess - measured))}"
    factor = max(guess, measured) / min(guess, measured)
    direction = "more" if measured > guess else "less"
    if factor < 1.005:
        return "within 1 %"
    if factor < 1.1:
        return f"within 10 %: {factor - 1:.0%} {direction}"
    return f"{factor:.1f} times {direction} than you guessed"
