"""The chapters as files: executing them in canonical form, and copies for readers.

May import the rooms below; `cli` imports it, and `checks` for the solutions.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, {"ranks": "RankError names_in on_ranks", "student": "solution"})
