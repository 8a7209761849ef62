"""One check function for each exercise: `checks.name(your_function)` prints `✓ name: N cases` or says what is wrong.

Lives here: the cases, the comparison and the messages. May import all of minillm; nothing but the notebooks imports it.
"""

from minillm.checks.base import CheckFailed, NotWrittenYet
from minillm.checks.predictions import prediction

__all__ = ["CheckFailed", "NotWrittenYet", "prediction"]
