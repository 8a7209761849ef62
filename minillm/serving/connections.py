"""One client's connection, with a limit to everything that a client may leave undone: uvicorn limits little of it.

head not sent in time, or too long ......... closed
more sent before the answer has ended ...... discarded, and closed after the answer
answer not read ............................ cut off: to close it would wait for the client
body not sent when the server ends ......... closed
"""

import asyncio
import math

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0  # in which the first line and the headers of a request must have arrived
MOST_HEAD_BYTES = 64 * 1024  # of a head, of a chunk's frame, or of what follows the last chunk
TURN_SECONDS = 0.01  # in which a loop that was busy gets to read what has arrived
WRITE_SECONDS = 30.0  # for which a client may read nothing of its answer


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with time limits. All limits are checked where bytes arrive or leave."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _overhead = 0  # bytes since the request began, or since the last byte of body

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    # --- what arrives ---

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        super().data_received(data)
        if self._overhead > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request must not have more than {MOST_HEAD_BYTES} bytes.")
        self._watch_head()

    def on_message_begin(self) -> None:
        if not self._is_idle:  # uvicorn would queue it, and then not notice that the client has gone
            raise ValueError("a request before the last one has been answered")
        self._overhead = 0
        if not self.flow.write_paused:
            self._stop_watching_writes()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_idle:  # else it comes after the body, and is not read
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What arrives is not HTTP. An answer that has begun, or will, is not mixed with this one."""
        if self._is_idle or (self.cycle.more_body and not self.cycle.response_started):
            super().send_400_response(msg)
        else:
            self.cycle.keep_alive = False

    # --- time ---

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        self._stop_watching_writes()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_writes()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_watching_head()
        self._stop_watching_writes()
        super().connection_lost(error)

    def shutdown(self) -> None:
        """The server ends: an idle connection is closed, an answer goes on, a body that is still to come does not."""
        super().shutdown()
        if not self._is_idle and self.cycle.more_body and not self.cycle.response_started:
            self.transport.close()

    def _watch_head(self) -> None:
        """From the first byte of a head, or the connection's beginning, to its end."""
        if not self._is_idle:
            self._stop_watching_head()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """The time is up. But if the event loop was busy for long, the head may have arrived: it is read first."""
        self._head_timer = self.loop.call_later(TURN_SECONDS, self.transport.close)

    def _stop_watching_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_writes(self, before: float = math.inf) -> None:
        """Until the buffer is read. Nothing is added meanwhile: if it does not shrink, the client does not read."""
        self._stop_watching_writes()
        unread = self.transport.get_write_buffer_size()
        if unread >= before:
            self.transport.abort()
        elif unread:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self._watch_writes, unread)

    def _stop_watching_writes(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
