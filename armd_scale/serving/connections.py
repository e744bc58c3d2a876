"""Connections of the server: clients that do not send or read in time are disconnected.

- the head of a request must arrive within ``patience`` seconds after the connection, or after the previous answer;
- its body has as long; the application answers 408, and the connection is closed after that;
- an answer that the client does not read is given up after ``patience`` seconds;
- at most ``most`` connections wait for a request: one more closes the connection that has waited longest. Clients that
  connect and send nothing never keep others out.
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 30.0
"""Seconds in which the head of a request, and its body, must arrive."""
_ANSWER = 5.0  # seconds for the answer 408


def protocol(patience: float = PATIENCE, most: int = 1000) -> type[asyncio.Protocol]:
    """The protocol of a server's connections, for ``uvicorn.Config(http=...)``."""
    waiting: dict[Any, None] = {}  # in the order in which they began to wait

    class Connection(H11Protocol):
        """A connection, which either waits for a request or answers one."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._awaited: Any = None
            self._reading: asyncio.TimerHandle | None = None
            self._writing: asyncio.TimerHandle | None = None
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._await(None)
            self.resume_writing()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(patience, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing:
                self._writing.cancel()
            self._writing = None

        def _watch(self) -> None:
            state = self.conn.their_state
            self._await(state if state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing() else None)

        def _await(self, part: Any) -> None:
            """Wait for the head (``h11.IDLE``) or the body (``h11.SEND_BODY``) of a request; None: for neither."""
            if part is self._awaited:
                return
            self._awaited = part
            if self._reading:
                self._reading.cancel()
            if part is None:
                self._reading = None
                waiting.pop(self, None)
                return
            seconds = patience if part is h11.IDLE else patience + _ANSWER
            self._reading = self.loop.call_later(seconds, self.transport.abort)
            waiting.setdefault(self)
            if len(waiting) > most:
                longest = next(iter(waiting))
                longest._await(None)
                longest.transport.abort()

    return Connection


def raise_limit() -> int:
    """Allow as many open files as the system does; returns their number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
