"""Which of several replicas of an engine gets a request: round robin, power of two choices, or where its prefix lies.

A router is told how many requests each replica has, and keeps what it needs besides: it asks no replica anything. So
the same rules drive the simulator and a cluster. No torch, no numpy.

Power of two choices: Mitzenmacher 2001, "The Power of Two Choices in Randomized Load Balancing". Prefix-aware routing
with a bound on the load: as in SGLang's router (Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language
Model Programs") and Ray Serve's `PrefixCacheAffinityRouter`; here the prefixes are those of the engine, full blocks.
"""

import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache

from minillm.engine.block_manager import hash_block
from minillm.errors import ConfigError, Count, Positive, check_choice, checked

BLOCK_SIZE = 16
MOST_AHEAD = 8  # requests by which the replica with the prefix may be ahead of the least loaded one
MOST_REMEMBERED = 1 << 16  # blocks of each replica; a router forgets those that were sent there longest ago

Loads = Mapping[Hashable, int]  # replica -> requests that it has, running or waiting


class Router(ABC):
    """Chooses a replica for each request. Replicas may come and go from call to call."""

    def choose(self, loads: Loads, token_ids: Sequence[int], salt: str = "") -> Hashable:
        """The replica that gets a request with this prompt. Raises ConfigError if there is none."""
        if not loads:
            raise ConfigError("there is no replica to send a request to; start one")
        return self._choose(loads, token_ids, salt)

    @abstractmethod
    def _choose(self, loads: Loads, token_ids: Sequence[int], salt: str) -> Hashable: ...


class RoundRobin(Router):
    """One after the other."""

    def __init__(self):
        self._num_chosen = 0

    def _choose(self, loads: Loads, token_ids: Sequence[int], salt: str) -> Hashable:
        chosen = list(loads)[self._num_chosen % len(loads)]
        self._num_chosen += 1
        return chosen


class PowerOfTwo(Router):
    """The less loaded of two drawn at random."""

    @checked
    def __init__(self, seed: int = 0):
        self._rng = random.Random(f"power of two {seed}")

    def _choose(self, loads: Loads, token_ids: Sequence[int], salt: str) -> Hashable:
        drawn = self._rng.sample(list(loads), min(2, len(loads)))
        return min(drawn, key=loads.__getitem__)


def block_keys(
    token_ids: Sequence[int],
    block_size: int = BLOCK_SIZE,
    salt: str = "",
    key_of: Callable[[bytes, tuple[int, ...]], bytes] = hash_block,
) -> list[bytes]:
    """The keys of a prompt's full blocks, as the block manager has them: each stands for all tokens up to its end."""
    keys, key = [], salt.encode("utf-8", "surrogatepass")
    for end in range(block_size, len(token_ids) + 1, block_size):
        key = key_of(key, tuple(token_ids[end - block_size : end]))
        keys.append(key)
    return keys


class PrefixAware(Router):
    """The replica that was sent most of the prompt's blocks, unless it has many more requests than the least loaded.

    With two or more that were sent as much, the less loaded one. Where no replica has the first block, or the one that
    has it is ahead by more than `most_ahead` requests, power of two choices decides; the prefix is then there as well.
    """

    @checked
    def __init__(
        self,
        block_size: Positive = BLOCK_SIZE,
        *,
        most_ahead: Count = MOST_AHEAD,
        most_remembered: Positive = MOST_REMEMBERED,
        seed: int = 0,
    ):
        """`block_size`: of the engines. `most_remembered`: blocks of each replica, about as many as its pool has."""
        self.block_size, self.most_ahead, self.most_remembered = block_size, most_ahead, most_remembered
        self._otherwise = PowerOfTwo(seed)
        self._hash_block = lru_cache(most_remembered)(hash_block)  # what many prompts begin with is hashed once
        self._sent: dict[Hashable, OrderedDict[bytes, None]] = {}  # to each replica, longest ago first
        self._holders: dict[bytes, set[Hashable]] = {}  # the same, by block

    def _choose(self, loads: Loads, token_ids: Sequence[int], salt: str) -> Hashable:
        for gone in self._sent.keys() - loads.keys():
            self._forget(gone)
        keys = block_keys(token_ids, self.block_size, salt, self._hash_block)
        holders = self._longest(keys)
        chosen = min(holders, key=lambda replica: (loads[replica], str(replica)), default=None)
        if chosen is None or loads[chosen] > min(loads.values()) + self.most_ahead:
            chosen = self._otherwise.choose(loads, token_ids, salt)
        self._note(chosen, keys)
        return chosen

    def _longest(self, keys: Sequence[bytes]) -> set[Hashable]:
        """The replicas that were sent the most of these blocks from the first one on; none without the first."""
        found: set[Hashable] = set()
        for number, key in enumerate(keys):
            holders = self._holders.get(key, set())
            still = holders & found if number else holders
            if not still:
                break
            found = still
        return found

    def _note(self, replica: Hashable, keys: Sequence[bytes]) -> None:
        sent = self._sent.setdefault(replica, OrderedDict())
        for key in reversed(keys):  # of a prompt the first block is forgotten last: without it the others are no use
            sent[key] = None
            sent.move_to_end(key)
            self._holders.setdefault(key, set()).add(replica)
        while len(sent) > self.most_remembered:
            self._drop(replica, sent.popitem(last=False)[0])

    def _forget(self, replica: Hashable) -> None:
        """A replica is gone, and its cache with it."""
        for key in self._sent.pop(replica):
            self._drop(replica, key)

    def _drop(self, replica: Hashable, key: bytes) -> None:
        holders = self._holders[key]
        holders.discard(replica)
        if not holders:
            del self._holders[key]


ROUTERS: Mapping[str, type[Router]] = {
    "round-robin": RoundRobin,
    "power-of-two": PowerOfTwo,
    "prefix-aware": PrefixAware,
}


def make_router(name: str, block_size: int = BLOCK_SIZE, most_remembered: int = MOST_REMEMBERED) -> Router:
    """A router by its name, for engines with blocks of this size. Raises ConfigError for an unknown one.

    `most_remembered`: blocks of each replica that a prefix-aware router remembers.
    """
    check_choice("router", name, tuple(ROUTERS))
    options = {"block_size": block_size, "most_remembered": most_remembered}
    return ROUTERS[name](**options if name == "prefix-aware" else {})
