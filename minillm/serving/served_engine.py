"""What the server asks of an engine. `AsyncEngine` is one, `ClusterEngine` is several behind a router."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from torch import Tensor

from minillm.engine import EngineConfig, OutputKind, Prompt, RequestOutput
from minillm.model import ModelConfig, Tokenizer
from minillm.sampling import SamplingParams
from minillm.trace import Trace


class ServedEngine(Protocol):
    """An engine for coroutines. What each method takes and raises: as `AsyncEngine` says."""

    model_name: str
    max_queue: int  # requests that may wait; of several replicas, for each

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with `skip_tokenizer_init`."""

    @property
    def config(self) -> EngineConfig:
        """The configuration at the start; of several replicas, that of each."""

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def num_running(self) -> int:
        """Requests in progress that compute."""

    @property
    def num_waiting(self) -> int:
        """Requests in progress that wait."""

    def generate_together(
        self, requests: Sequence[tuple[str, Prompt, SamplingParams | None, int]], output_kind: OutputKind = "delta"
    ) -> AsyncIterator[list[RequestOutput]]:
        """Yields the outputs of requests (id, prompt, params, priority); closing the iterator ends them."""

    async def encode(self, prompt: Prompt) -> Tensor:
        """One vector for a prompt."""

    async def abort(self, request_id: str) -> bool:
        """End a request; False if there is none of this id."""

    async def check_health(self) -> None:
        """Raises WorkerDiedError or DrainingError if no request can be taken."""

    async def control(self, **changes) -> dict:
        """Change settings; returns them all."""

    async def trace(self, replica: str | None = None) -> Trace:
        """What is recorded so far; where there are several replicas, by the one of this name."""

    def follow(self) -> AsyncIterator[list[dict]]:
        """Yields the lines of the trace as they are written; of several replicas, each says whose it is."""

    async def exposition(self) -> tuple[bytes, str] | None:
        """Prometheus' text and its content type; None without metrics."""

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and return when all has ended; what has not after `timeout_s` is aborted."""
