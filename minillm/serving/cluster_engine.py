"""Several replicas of an engine as one: a router chooses which of them gets a request.

A replica is whatever has the methods of `ServedEngine`: here nothing is known of processes, machines or Ray. When one
is lost, its requests that have begun end with an error; those that have not are sent to another one, once.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minillm.engine import EngineConfig, OutputKind, Prompt, RequestOutput, Router
from minillm.errors import ConfigError, WorkerDiedError, check_choice
from minillm.model import ModelConfig, Tokenizer
from minillm.sampling import SamplingParams
from minillm.serving.async_engine import LOOK_EVERY, DrainingError
from minillm.serving.live import merge_feeds
from minillm.serving.metrics import together
from minillm.serving.served_engine import ServedEngine
from minillm.trace import Trace

routers: dict[tuple[str, str], Any] = {}  # (application, deployment) -> this process's router of Ray Serve
NO_REPLICA = "no replica is left; a new one may be starting: try again"


@dataclass(frozen=True)
class About:
    """What all replicas have in common."""

    model_name: str
    max_queue: int  # requests that may wait, of each
    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, engine: ServedEngine) -> "About":
        """Read it from one of them."""
        return cls(engine.model_name, engine.max_queue, engine.config, engine.model_config, engine.tokenizer)


class ClusterEngine:
    """A `ServedEngine` whose requests are computed by its replicas. Belongs to one event loop."""

    def __init__(self, about: About, replicas: Callable[[], Mapping[str, ServedEngine]], router: Router):
        """`replicas` gives those of now by their names, and is asked for each request. A name is never used again."""
        self.model_name, self.max_queue = about.model_name, about.max_queue
        self.tokenizer, self.config, self.model_config = about.tokenizer, about.config, about.model_config
        self._all_replicas, self._router = replicas, router
        self._lost: set[str] = set()  # names of replicas that take nothing more and are still listed
        self._loads: Counter[str] = Counter()  # replica -> outputs in progress
        self._places: dict[str, str] = {}  # request in progress -> its replica
        self._begun: set[str] = set()  # those of them that have had an output
        self._draining = False

    @property
    def num_running(self) -> int:
        """Requests that have had an output and have not ended."""
        return len(self._begun)

    @property
    def num_waiting(self) -> int:
        """Requests that have had no output."""
        return len(self._places) - len(self._begun)

    def replicas(self) -> dict[str, ServedEngine]:
        """Those that take requests, by name."""
        listed = self._all_replicas()
        self._lost &= listed.keys()
        return {name: replica for name, replica in listed.items() if name not in self._lost}

    # --- requests ---

    async def generate_together(
        self, requests: Sequence[tuple[str, Prompt, SamplingParams | None, int]], output_kind: OutputKind = "delta"
    ) -> AsyncIterator[list[RequestOutput]]:
        """As `AsyncEngine.generate_together`; the requests of one call go to one replica, chosen by the first prompt.

        WorkerDiedError if that replica is lost after the first output, or two are lost before it.
        """
        request_ids = {request_id for request_id, *_ in requests}
        weight = sum(1 if params is None else params.n for _, _, params, _ in requests)
        has_died = False
        while True:
            name, replica = self._choose(requests[0][1])
            self._loads[name] += weight
            self._places |= dict.fromkeys(request_ids, name)
            try:
                async with aclosing(replica.generate_together(requests, output_kind)) as batches:
                    async for outputs in batches:
                        self._begun |= request_ids
                        yield outputs
                return
            except (DrainingError, WorkerDiedError) as error:
                self._lost.add(name)
                if request_ids & self._begun or (has_died and isinstance(error, WorkerDiedError)):
                    raise
                has_died = has_died or isinstance(error, WorkerDiedError)
            finally:
                self._loads[name] -= weight
                self._begun -= request_ids
                for request_id in request_ids:
                    self._places.pop(request_id, None)

    async def encode(self, prompt: Prompt) -> Tensor:
        """One vector, computed by the replica with the fewest requests."""
        replicas = self._open()
        name = min(replicas, key=self._loads.__getitem__)
        self._loads[name] += 1
        try:
            return await replicas[name].encode(prompt)
        finally:
            self._loads[name] -= 1

    async def abort(self, request_id: str) -> bool:
        """End a request where it is; its reader gets its end from there."""
        replica = self.replicas().get(self._places.get(request_id))
        return replica is not None and await replica.abort(request_id)

    async def check_health(self) -> None:
        """Raises WorkerDiedError if no replica is left, DrainingError if nothing new is taken."""
        self._open()

    def _open(self) -> dict[str, ServedEngine]:
        if self._draining:
            raise DrainingError("the server is shutting down and takes no new requests; send this one elsewhere")
        replicas = self.replicas()
        if not replicas:
            raise WorkerDiedError(NO_REPLICA)
        return replicas

    def _choose(self, prompt: Prompt) -> tuple[str, ServedEngine]:
        """A prompt that is text has no blocks yet: it is routed by the loads alone."""
        replicas = self._open()
        for gone in self._loads.keys() - replicas.keys():
            if not self._loads[gone]:
                del self._loads[gone]
        known = prompt if isinstance(prompt, Mapping) else {}
        loads = {name: self._loads[name] for name in replicas}
        chosen = self._router.choose(loads, known.get("prompt_token_ids", ()), known.get("cache_salt") or "")
        return chosen, replicas[chosen]

    # --- all replicas at once ---

    async def control(self, **changes) -> dict:
        """Change the settings of all replicas; returns those of the first. A later replica has those of the start."""
        answers = await self._ask_all(lambda replica: replica.control(**changes))
        return next(iter(answers.values()))

    async def trace(self, replica: str | None = None) -> Trace:
        """What this replica has recorded; without a name, the only one. Raises ConfigError if it is not there."""
        replicas = self.replicas()
        if replica is None and len(replicas) != 1:
            raise ConfigError(f"each replica has a trace of its own; name one: replica={' or '.join(replicas)}")
        name = check_choice("replica", replica or next(iter(replicas)), tuple(replicas))
        return await replicas[name].trace()

    def follow(self) -> AsyncIterator[list[dict]]:
        """The feeds of all replicas as one, see `merge_feeds`."""
        return merge_feeds(self.replicas)

    async def exposition(self) -> tuple[bytes, str] | None:
        """The figures of all replicas; each has the label `replica`."""
        answers = await self._ask_all(lambda replica: replica.exposition())
        texts = {name: answer[0] for name, answer in answers.items() if answer is not None}
        return together(texts) if texts else None

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and return when all requests have ended; those that have not in time are aborted."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._places and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY)
        await asyncio.gather(*map(self.abort, list(self._places)), return_exceptions=True)

    async def _ask_all(self, ask: Callable[[ServedEngine], Awaitable]) -> dict[str, Any]:
        """Name -> answer, of those that are not lost meanwhile. Raises what one of them raises, and WorkerDiedError."""
        replicas = self.replicas()
        answers = await asyncio.gather(*map(ask, replicas.values()), return_exceptions=True)
        found = {}
        for name, answer in zip(replicas, answers, strict=True):
            if isinstance(answer, WorkerDiedError):
                self._lost.add(name)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[name] = answer
        if not found:
            raise WorkerDiedError(NO_REPLICA)
        return found
