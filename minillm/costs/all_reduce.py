"""An all-reduce as a plan: which card sends which pieces of its vector to which other, round by round.

Every card begins with a vector of its own, cut into as many pieces as there are cards. At the end each has the sum of
all vectors. A receiver adds a piece to its own, or takes it in place of its own if that is part of it already.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minillm.costs.links import Link
from minillm.errors import ConfigError, Count, Positive, checked

Holdings = tuple[tuple[frozenset[int], ...], ...]  # of each rank, of each piece: whose terms are in its sum


class Message(NamedTuple):
    """Pieces that one rank sends to another in a round."""

    sender: int
    receiver: int
    pieces: Sequence[int]


@checked
def ring_plan(num_ranks: Positive) -> list[list[Message]]:
    """Each sends to its neighbour: n - 1 rounds in which sums grow, then n - 1 in which whole sums go round.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return [
        [Message(rank, (rank + 1) % num_ranks, [(rank - number) % num_ranks]) for rank in range(num_ranks)]
        for number in range(num_ranks - 1)
    ] + [
        [Message(rank, (rank + 1) % num_ranks, [(rank + 1 - number) % num_ranks]) for rank in range(num_ranks)]
        for number in range(num_ranks - 1)
    ]


def follow_plan(plan: Iterable[Iterable[Sequence]], num_ranks: int) -> list[Holdings]:
    """What each rank holds at the beginning and after each round. All messages of a round leave at the same time.

    Raises ConfigError for a rank or a piece that there is not, for a rank that sends or receives twice in a round, and
    for a piece that would count a term twice.
    """
    held: Holdings = tuple(tuple(frozenset([rank]) for _ in range(num_ranks)) for rank in range(num_ranks))
    states = [held]
    for number, messages in enumerate(plan, 1):
        where, messages = f"round {number}", [Message(*message) for message in messages]
        _check_messages(where, messages, num_ranks)
        after = [list(pieces) for pieces in held]
        for sender, receiver, pieces in messages:
            for piece in pieces:
                theirs, own = held[sender][piece], held[receiver][piece]
                if theirs & own and not theirs > own:
                    raise ConfigError(
                        f"{where}: rank {receiver} has piece {piece} as a sum over ranks {sorted(own)}, and rank "
                        f"{sender} sends one over {sorted(theirs)}; adding them would count a term twice"
                    )
                after[receiver][piece] = theirs | own
        held = tuple(map(tuple, after))
        states.append(held)
    return states


def _check_messages(where: str, messages: Sequence[Message], num_ranks: int) -> None:
    for what in ("sender", "receiver"):
        ranks = [getattr(message, what) for message in messages]
        if unknown := [rank for rank in ranks if rank not in range(num_ranks)]:
            raise ConfigError(f"{where}: {what} {unknown[0]!r}; the ranks are 0 to {num_ranks - 1}")
        if twice := [rank for rank in ranks if ranks.count(rank) > 1]:
            raise ConfigError(f"{where}: rank {twice[0]} is the {what} of two messages; one each way is the most")
    for sender, receiver, pieces in messages:
        if sender == receiver:
            raise ConfigError(f"{where}: rank {sender} sends to itself")
        if unknown := [piece for piece in pieces if piece not in range(num_ranks)]:
            raise ConfigError(f"{where}: piece {unknown[0]!r}; the pieces are 0 to {num_ranks - 1}")


def is_complete(held: Holdings) -> bool:
    """Whether every rank has every piece of the whole sum."""
    return all(len(terms) == len(held) for pieces in held for terms in pieces)


@checked
def plan_seconds(plan: Sequence, num_ranks: Positive, num_bytes: Count, link: Link) -> float:
    """Seconds of all rounds: the latency, then the longest message. `num_bytes`: of a whole vector."""
    longest = [max((len(Message(*message).pieces) for message in messages), default=0) for messages in plan]
    return sum(link.latency + pieces * num_bytes / num_ranks / link.bandwidth for pieces in longest)
