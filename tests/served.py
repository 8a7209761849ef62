"""An app on a real server, on a free port of this machine, for as long as a test needs it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

PATIENCE = 30.0  # seconds until something that should happen soon is called a failure


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app's address, http://127.0.0.1:PORT."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        soon(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def soon(happened, within: float = PATIENCE) -> None:
    """Wait until `happened()`; fails if it takes too long."""
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.002)
