"""Layer 1: the engine behind an event loop, and the HTTP server for its clients. Needs `pip install minillm[serve]`;
several engines, `minillm[cluster]`.

May import `player`, `engine` and the rooms below; FastAPI, uvicorn, pydantic and prometheus-client are imported here
alone, Ray in `cluster` alone. `async_engine`, `child` and `options` need none of them.
"""

from minillm import hand_on
from minillm.errors import ConfigError

EXTRA = {  # module -> the extra that has it
    **dict.fromkeys(("fastapi", "httptools", "prometheus_client", "pydantic", "pydantic_core"), "serve"),
    **dict.fromkeys(("starlette", "typing_extensions", "uvicorn"), "serve"),
    "ray": "cluster",
}

_look_up, __dir__, __all__ = hand_on(
    __name__,
    {
        "api_server": "create_app",
        "async_engine": "AsyncEngine DrainingError QueueFullError SlowReaderError StepFailedError retry_after",
        "child": "ServerProcess",
        "cluster": "serve_replicas",
        "cluster_engine": "About ClusterEngine",
        "metrics": "Metrics",
        "options": "ClusterOptions KEY_VARIABLE ServerOptions",
        "served_engine": "ServedEngine",
        "server": "serve",
        "streams": "DONE event",
    },
)


def __getattr__(name: str):
    try:
        return _look_up(name)
    except ModuleNotFoundError as missing:
        extra = EXTRA.get((missing.name or "").partition(".")[0])
        if extra is None:
            raise
        wanted = f"serving needs {missing.name}, which is not installed: pip install 'minillm[{extra}]'"
        raise ConfigError(wanted) from missing
