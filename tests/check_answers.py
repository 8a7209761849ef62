"""How the tests of exercises pass an answer to a check and read its message."""

import pytest

from minillm.checks.base import CheckFailed


def passes(check, function, capsys) -> bool:
    """Whether the check accepts the function and says so by its name."""
    check(function)
    return capsys.readouterr().out.startswith(f"✓ {check.__name__}: ")


def message(check, function) -> str:
    """The message for a wrong answer: the call, the result, the expected result, one hint, and no stack trace."""
    with pytest.raises(CheckFailed) as failure:
        check(function)
    text = str(failure.value)
    lines = [line.split()[0] for line in text.splitlines()[1:] if line[2] != " "]  # further in: the rows of masks
    assert lines in (["call", "got", "expected", "hint"], ["call", "raised", "expected", "hint"])
    assert text.startswith(f"✗ {check.__name__}")
    assert text.splitlines()[1].removeprefix("  call").strip()  # the call itself, or what the puzzle was
    assert failure.value._render_traceback_() == [text]
    return text
