"""`minillm serve` in a process of its own, for programs that need a server for as long as they run."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence

from minillm.errors import ConfigError

START_SECONDS = 120.0  # in which the server must be ready
END_SECONDS = 30.0  # in which it must have ended
READY = re.compile(r"ready on (http://([\d.]+):(\d+))")

# The child's standard input is a pipe that ends when its parent does, however it ends.
CODE = """
import os, signal, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from minillm.cli.main import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


class ServerProcess:
    """A server on a free port of this machine. It ends with `close`, at the end of `with`, or with this process.

    `log` are the lines it has written so far, `address` is http://HOST:PORT, `pid` the process. It needs no API key.
    """

    def __init__(self, model: str = "storyteller", options: Sequence[str] = (), *, environment: dict | None = None):
        """`options` follow `minillm serve MODEL`, `environment` is added to this process's own.

        Returns when it is ready. Raises ConfigError if it does not start.
        """
        self.log: list[str] = []
        self.address, self.host, self.port = "", "", 0
        command = [sys.executable, "-c", CODE, model, "--port", "0", *options]
        environment = {**os.environ, **(environment or {})}
        environment.pop("MINILLM_API_KEY", None)
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.pid, self._ready = self._child.pid, threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_SECONDS) or not self.address:
            self.close()
            raise ConfigError(f"the server did not start: {self.log[-1] if self.log else 'it wrote nothing'}")

    def _read(self) -> None:
        for line in self._child.stderr:  # to its end, or the server would wait until it is read
            self.log.append(line.rstrip("\n"))
            if found := READY.search(line):
                self.address, self.host, self.port = found[1], found[2], int(found[3])
                self._ready.set()
        self._ready.set()

    def close(self) -> int:
        """End it, as SIGTERM does: requests may finish. Returns its exit code; a second call has no effect."""
        self._child.terminate()
        try:
            self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join()
        self._child.stdin.close()
        self._child.stderr.close()
        return self._child.returncode

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
