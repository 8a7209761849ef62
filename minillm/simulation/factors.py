"""A slowdown taken apart into its causes: what each is worth, whatever the order in which they are removed.

What one cause costs depends on the others: waiting for the longest request costs more in a large batch. So no single
order of removal is right. The Shapley value (Shapley 1953) is the mean over all orders; beside it are the least and the
most over all of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from minillm.errors import ConfigError, check_number, checked

MOST_CAUSES = 12  # 4,096 coalitions
Coalition = frozenset[str]  # the causes that are there


@dataclass(frozen=True)
class Factor:
    """How many times as long it takes because of one cause; 1 is no effect, below 1 it helps."""

    name: str
    shapley: float  # geometric mean over all orders
    low: float  # least over all orders
    high: float
    first: float  # when added to a run without any cause
    last: float  # when removed from a run with all


@dataclass(frozen=True)
class Decomposition:
    """Seconds of every coalition of causes, and the factors that follow. `of` makes one."""

    causes: tuple[str, ...]
    seconds: Mapping[Coalition, float]

    def __post_init__(self):
        check_causes(self.causes)
        for coalition in coalitions(self.causes):
            if coalition not in self.seconds:
                raise ConfigError(f"the seconds of {sorted(coalition)} are missing; all coalitions are needed")
            check_number("seconds", self.seconds[coalition], "a positive number", lambda s: s > 0)

    @classmethod
    @checked
    def of(cls, causes: Sequence[str], seconds: Callable[[Coalition], float]) -> "Decomposition":
        """Call `seconds(coalition)` for every set of causes, from none to all of them."""
        check_causes(causes)
        return cls(causes, {coalition: seconds(coalition) for coalition in coalitions(causes)})

    @property
    def total(self) -> float:
        """How many times as long it takes with all causes as without any."""
        return self.ratio(self.causes)

    def ratio(self, present: Iterable[str]) -> float:
        """The same with only some of the causes. Raises ConfigError for an unknown one."""
        return self.seconds[self._known(present)] / self.seconds[frozenset()]

    def effect(self, cause: str, others: Iterable[str]) -> float:
        """How many times as long a run with the `others` takes with `cause` added."""
        others = self._known(others) - self._known([cause])
        return self.seconds[others | {cause}] / self.seconds[others]

    def factor(self, cause: str) -> Factor:
        """What a cause is worth, over all orders."""
        rest = [other for other in self.causes if other != cause]
        effects = {others: self.effect(cause, others) for others in coalitions(rest)}
        # This share of all orders has exactly these others before the cause.
        shares = {others: 1 / (len(self.causes) * math.comb(len(rest), len(others))) for others in effects}
        logarithm = math.fsum(shares[others] * math.log(effect) for others, effect in effects.items())
        every = effects.values()
        return Factor(
            cause, math.exp(logarithm), min(every), max(every), effects[frozenset()], effects[frozenset(rest)]
        )

    @property
    def factors(self) -> list[Factor]:
        """One per cause, in the order of `causes`; the product of their Shapley values is `total`."""
        return [self.factor(cause) for cause in self.causes]

    def share(self, causes: Iterable[str]) -> float:
        """The share of these causes in the total, by Shapley values and in logarithms; all together are 1.

        Raises ConfigError if the causes slow nothing down: then there is nothing to share.
        """
        known = self._known(causes)
        if math.log(self.total) <= 0:
            raise ConfigError(f"the causes make it {self.total:.3g} times as slow; there is nothing to share")
        return math.fsum(math.log(self.factor(cause).shapley) for cause in known) / math.log(self.total)

    @checked
    def removed(self, order: Sequence[str]) -> list[tuple[str, float]]:
        """The factors in one order of removing the causes from a run with all; their product is `total`."""
        if sorted(order) != sorted(self.causes):
            raise ConfigError(f"the order is {list(order)}; it must name each of {list(self.causes)} once")
        left, factors = frozenset(self.causes), []
        for cause in order:
            factors.append((cause, self.effect(cause, left)))
            left -= {cause}
        return factors

    def _known(self, causes: Iterable[str]) -> Coalition:
        found = frozenset(causes)
        if unknown := found - set(self.causes):
            raise ConfigError(f"{sorted(unknown)} are not causes; there are {list(self.causes)}")
        return found


def check_causes(causes: Sequence[str]) -> None:
    """Raises ConfigError unless they are different, and few enough to go through all coalitions."""
    if not 1 <= len(set(causes)) == len(causes) <= MOST_CAUSES:
        raise ConfigError(f"causes are {list(causes)}; give 1 to {MOST_CAUSES} different names")


def coalitions(causes: Iterable[str]) -> list[Coalition]:
    """All sets of causes, the smallest first."""
    causes = tuple(causes)
    return [frozenset(some) for size in range(len(causes) + 1) for some in combinations(causes, size)]
