"""What every HTTP request passes first: it gets an id and a line in the log, and must bring the API key."""

import hashlib
import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minillm.serving.http_errors import APIError

log = logging.getLogger("minillm.serving")

ID = re.compile(r"[A-Za-z0-9_.:=/+-]{1,128}")  # of a request, as a client may give it: it appears in logs and traces
OPEN = ("/", "/health", "/metrics", "/version", "/openapi.json")  # answered without a key
OPEN_FOLDER = "/player/"  # the page's files
LONGEST_PATH = 200  # characters of it in the log


class Gate:
    """ASGI middleware. It wraps neither body nor answer, so that it costs a stream nothing."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app = app
        self._digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, start, status = Headers(scope=scope), time.perf_counter(), 0
        request_id = headers.get("x-request-id", "")
        if not ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            await send(message)

        try:
            if self._digest is None or is_open(scope["path"]) or self._has_key(headers):
                await self.app(scope, receive, send_with_id)
            else:
                refused = APIError(401, "the API key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})
                await refused.response()(scope, receive, send_with_id)
        finally:
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:LONGEST_PATH]
            seconds = time.perf_counter() - start
            log.info('%s "%s %s" %s %.3f s', state["request_id"], scope["method"], path, status or "-", seconds)

    def _has_key(self, headers: Headers) -> bool:
        """The time this takes says nothing about the key: digests are compared, all of them to the end."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(_digest(key.strip().encode("utf-8", "surrogateescape")), self._digest)
        return same and kind.lower() == "bearer"


def is_open(path: str) -> bool:
    """Whether a path is answered without a key."""
    return path in OPEN or path.startswith(OPEN_FOLDER)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
