"""Layer 1: the engine behind an event loop, and what speaks HTTP with its clients. Wants `pip install minillm[serve]`.

May import `player`, `engine` and the rooms below; FastAPI, uvicorn, pydantic and prometheus-client are imported here
alone. `async_engine` needs none of them.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "async_engine": "AsyncEngine DrainingError QueueFullError SlowReaderError StepFailedError",
    },
)
