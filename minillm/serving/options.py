"""The options of a server, apart from those of its engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from minillm.engine import ROUTERS
from minillm.errors import ConfigError, Positive, check_choice, check_fields, check_number

KEY_VARIABLE = "MINILLM_API_KEY"  # of the environment


@dataclass(frozen=True)
class ServerOptions:
    """How a server answers. Raises ConfigError for values out of range."""

    host: str = "127.0.0.1"  # only this machine; 0.0.0.0 = every machine that reaches it: then set a key
    port: Annotated[int, 0] = 8000  # 0 = any that is free
    api_key: str | None = None  # clients must send it as "Authorization: Bearer KEY"; None = MINILLM_API_KEY
    served_model_name: str | None = None  # what clients call the model; None = the name it was loaded by
    max_queue: Positive = 256  # requests that may wait; beyond it the answer is 429
    page: bool = True  # the page at /, on which batching is watched and the engine controlled
    metrics_prefix: str = "minillm"  # of the names at /metrics; "vllm" for existing dashboards
    drain_timeout: float = 30.0  # seconds that requests have to end after SIGTERM
    max_body_mib: Positive = 4  # of a request; beyond it the answer is 413
    body_timeout: float = 30.0  # seconds in which a request's body must have arrived

    def __post_init__(self):
        check_fields(self)
        if self.port > 65535:
            raise ConfigError(f"port is {self.port}; it must be a whole number from 0 to 65535")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("the API key must be printable ASCII, at least one character")  # the key is not shown
        if not self.metrics_prefix.isidentifier():
            raise ConfigError(f"metrics_prefix is {self.metrics_prefix!r}; it must be a name of letters, digits and _")
        if self.served_model_name == "":
            raise ConfigError("served_model_name is empty; give a name, or leave it out")
        for name in ("drain_timeout", "body_timeout"):
            check_number(name, getattr(self, name), "seconds, above 0", lambda seconds: 0 < seconds <= 1e6)


def name_of(model: str, options: ServerOptions) -> str:
    """What clients call a model, loaded by this name."""
    return options.served_model_name or Path(model).name


@dataclass(frozen=True)
class ClusterOptions:
    """How many engines serve, and which of them gets a request. Raises ConfigError for values out of range."""

    replicas: Annotated[int, 0] = 0  # engines behind one address, each in a process of its own; 0 = one, without Ray
    max_replicas: Positive | None = None  # up to which more are started under load; None = always `replicas`
    target_requests: float = 16.0  # running and waiting for each replica; above it another is started
    router: str = "prefix-aware"  # chooses a replica: prefix-aware, power-of-two or round-robin
    cpus_per_replica: float = 1.0  # that Ray keeps free for each; may be a fraction
    gpus_per_replica: float | None = None  # the same; None = one for each rank on a GPU, else 0

    def __post_init__(self):
        check_fields(self)
        check_choice("router", self.router, tuple(ROUTERS))
        if self.max_replicas is not None and not 1 <= self.replicas <= self.max_replicas:
            raise ConfigError(
                f"max_replicas is {self.max_replicas} and replicas {self.replicas}; give 1 <= replicas <= max_replicas"
            )
        check_number("target_requests", self.target_requests, "a number above 0", lambda number: number > 0)
        for name in ("cpus_per_replica", "gpus_per_replica"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "a number from 0 to 1024", lambda number: 0 <= number <= 1024)
