"""Layer 1: the engine behind an event loop, and the HTTP server for its clients. Needs `pip install minillm[serve]`.

May import `player`, `engine` and the rooms below; FastAPI, uvicorn, pydantic and prometheus-client are imported here
alone. `async_engine`, `child` and `options` need none of them.
"""

from minillm import hand_on
from minillm.errors import ConfigError

EXTRA = (
    "fastapi",
    "httptools",
    "prometheus_client",
    "pydantic",
    "pydantic_core",
    "starlette",
    "typing_extensions",
    "uvicorn",
)

_look_up, __dir__, __all__ = hand_on(
    __name__,
    {
        "api_server": "create_app",
        "async_engine": "AsyncEngine DrainingError QueueFullError SlowReaderError StepFailedError retry_after",
        "child": "ServerProcess",
        "cluster_engine": "About ClusterEngine",
        "metrics": "Metrics",
        "options": "ServerOptions",
        "served_engine": "ServedEngine",
        "server": "serve",
        "streams": "DONE event",
    },
)


def __getattr__(name: str):
    try:
        return _look_up(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in EXTRA:
            raise
        wanted = f"serving needs {missing.name}, which is not installed: pip install 'minillm[serve]'"
        raise ConfigError(wanted) from missing
