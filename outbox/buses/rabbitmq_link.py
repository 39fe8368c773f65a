"""One connection to RabbitMQ, with its channel and its confirms; thrown away whole after any doubt.

Handshake, heartbeats and reading are py-amqp's. Writing is ours: many frames at a time, and while the broker does not
take them, what it says is read, so that neither side waits for the other. Nothing here waits without a limit.
"""

from __future__ import annotations

import logging
import select
import ssl
import time
from typing import Any, Final

import amqp
from amqp.exceptions import AccessRefused, AMQPError, PreconditionFailed
from amqp.transport import SSLTransport

from outbox.buses.confirms import Confirms
from outbox.buses.frames import FrameEncoder
from outbox.buses.urls import BrokerURL, tls_context
from outbox.errors import BusError, ConfigurationError

log = logging.getLogger(__name__)

_HEARTBEAT: Final = 30
_LOOK_EVERY: Final = 1.0
_REST_OF_FRAME: Final = 0.05
_FAREWELL: Final = 2.0
_WRITE_AT_ONCE: Final = 128 * 1024
_DEFAULT_PORTS: Final = {"amqp": 5672, "pyamqp": 5672, "amqps": 5671}
_TCP_USER_TIMEOUT: Final = 18
_NO_DATA: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def connect(url: BrokerURL, *, timeout: float, tls: ssl.SSLContext | None = None) -> Any:
    """An open `amqp.Connection`, whose waits end after *timeout* seconds with `TimeoutError`."""
    if url.scheme == "amqps":
        tls = tls or tls_context(url)
    port = url.port or _DEFAULT_PORTS[url.scheme]
    # py-amqp's own 1 s would cut a connection whose broker takes nothing for the moment.
    patience: Any = {_TCP_USER_TIMEOUT: int(timeout * 1000)}
    connection: Any = _Connection(
        host=f"{url.host}:{port}",
        userid=url.user or "guest",
        password=url.password or "guest",
        virtual_host=url.path or "/",
        connect_timeout=timeout,
        heartbeat=_HEARTBEAT,
        socket_settings=patience,
    )
    connection.tls = tls
    connection.server_name = url.host
    try:
        connection.connect()
        connection.transport.sock.settimeout(timeout)
    except BaseException:
        abandon(connection)
        raise
    return connection


def abandon(connection: Any) -> None:
    """Close the socket without a word: a farewell could wait for a peer that is not there."""
    try:
        transport = connection._transport
        if transport is not None and transport.sock is not None:
            transport.sock.close()
            transport.sock = None
        connection.collect()
    except Exception as error:
        log.debug("dropping the connection: %r", error)


class Link:
    """An open connection and its publishing channel. Raises whatever py-amqp and the socket raise."""

    def __init__(
        self,
        url: BrokerURL,
        exchange: str,
        *,
        mandatory: bool,
        timeout: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.place = url.place
        self.confirms = Confirms()
        self.returned: dict[str, int] = {}
        """How many messages of each type came back, as no queue is bound to it."""
        self.is_blocked = False
        """Whether the broker has stopped to take messages, for want of memory or disk."""
        self._connection = connect(url, timeout=timeout, tls=tls)
        try:
            self._connection.on_blocked = self._on_blocked
            self._connection.on_unblocked = self._on_unblocked
            channel = self._connection.channel()
            _declare_exchange(channel, exchange)
            channel.confirm_select()
            channel.events["basic_ack"].add(self.confirms.acked)
            channel.events["basic_nack"].add(self.confirms.nacked)
            channel.events["basic_return"].add(self._on_return)
        except BaseException:
            self.drop()
            raise
        self._socket: Any = self._connection.transport.sock
        self._poll = select.poll()
        self.encoder = FrameEncoder(
            channel.channel_id, self._connection.frame_max, mandatory=mandatory
        )

    def write(self, frames: bytes, deadline: float) -> None:
        """Write all of *frames*, reading meanwhile. Raises `TimeoutError` at *deadline* (monotonic)."""
        rest = memoryview(frames)
        while rest:
            events = self._await_socket(select.POLLIN | select.POLLOUT, deadline)
            if events & ~select.POLLOUT:
                self.read_available()
            if events & select.POLLOUT:
                rest = rest[self._write_some(rest[:_WRITE_AT_ONCE]) :]
        self._connection.bytes_sent += 1  # its heartbeats look at this

    def await_taken(self, tag: int, deadline: float) -> None:
        """Return once the broker has everything up to *tag*. Raises `TimeoutError` at *deadline* (monotonic)."""
        while not self.confirms.has_taken(tag):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.confirms.given - self.confirms.taken} not confirmed")
            try:
                self._connection.blocking_read(min(left, _LOOK_EVERY))
            except TimeoutError:
                self.tick()

    def await_unblocked(self, deadline: float) -> None:
        """Return once the broker takes messages. Raises `TimeoutError` at *deadline* (monotonic)."""
        while self.is_blocked:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("it blocks publishers")
            try:
                self._connection.blocking_read(min(left, _LOOK_EVERY))
            except TimeoutError:
                self.tick()

    def read_available(self) -> None:
        """Read what the broker has said; does not wait for more."""
        while self._has_something_to_read():
            try:
                self._connection.blocking_read(_REST_OF_FRAME)
            except TimeoutError:
                return

    def tick(self) -> None:
        """Send a heartbeat if one is due. Raises when the broker's have not come."""
        self._poll.register(self._socket, select.POLLOUT)
        if self._poll.poll(0):  # otherwise it would wait, and might be cut in the middle
            self._connection.heartbeat_tick()

    def drop(self) -> None:
        """Close without a word."""
        self.confirms.fail("the connection was dropped before the confirm came")
        abandon(self._connection)

    def close(self) -> None:
        """Say goodbye, for two seconds at most."""
        try:
            self._socket.settimeout(_FAREWELL)
            self._connection.close()
        except Exception as error:
            log.debug("closing the connection: %r", error)
        self.drop()

    def _await_socket(self, events: int, deadline: float) -> int:
        self._poll.register(self._socket, events)
        ready = self._poll.poll(max(deadline - time.monotonic(), 0) * 1000)
        if not ready:
            raise TimeoutError("the broker reads nothing")
        return ready[0][1]

    def _has_something_to_read(self) -> bool:
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        self._poll.register(self._socket, select.POLLIN)
        return bool(self._poll.poll(0))

    def _write_some(self, data: memoryview) -> int:
        timeout = self._socket.gettimeout()
        self._socket.settimeout(0)
        try:
            written: int = self._socket.send(data)
        except _NO_DATA:
            return 0
        finally:
            self._socket.settimeout(timeout)
        return written

    def _on_return(self, error: AMQPError, exchange: str, routing_key: str, _message: Any) -> None:
        if exchange:
            self.returned[routing_key] = self.returned.get(routing_key, 0) + 1
        else:
            self.confirms.fail(f"there is no queue {routing_key!r} ({error.reply_text})")

    def _on_blocked(self, _reason: str) -> None:
        self.is_blocked = True
        log.warning("RabbitMQ at %s blocks publishers: it is short of memory or disk", self.place)

    def _on_unblocked(self) -> None:
        self.is_blocked = False
        log.info("RabbitMQ at %s takes messages again", self.place)


class _Connection(amqp.Connection):
    """py-amqp's, with a TLS context of ours: its own options cannot take one."""

    tls: ssl.SSLContext | None = None
    server_name = ""

    def Transport(  # noqa: N802
        self, host: str, connect_timeout: float | None, *args: Any, **options: Any
    ) -> Any:
        if self.tls is None:
            return super().Transport(host, connect_timeout, *args, **options)
        return _TLSTransport(self.tls, self.server_name, host, connect_timeout, **options)


class _TLSTransport(SSLTransport):
    def __init__(
        self,
        context: ssl.SSLContext,
        server_name: str,
        host: str,
        timeout: float | None,
        **options: Any,
    ) -> None:
        self._context = context
        self._server_name = server_name
        super().__init__(host, timeout, **options)

    def _wrap_socket(self, plain: Any, *_args: Any, **_options: Any) -> Any:
        return self._context.wrap_socket(
            plain, server_hostname=self._server_name, do_handshake_on_connect=False
        )


def _declare_exchange(channel: Any, exchange: str) -> None:
    try:
        channel.exchange_declare(exchange, "topic", durable=True, auto_delete=False)
    except PreconditionFailed as error:
        raise ConfigurationError(
            f"exchange {exchange!r} is there and no durable topic exchange: {error.reply_text}"
        ) from error
    except AccessRefused:
        # One that may only publish can do so where the exchange is there already.
        try:
            channel.exchange_declare(exchange, "topic", passive=True)
        except AMQPError as error:
            raise BusError(
                f"exchange {exchange!r} is not there, and this user may not make it"
            ) from error
