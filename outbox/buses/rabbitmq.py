"""RabbitMQ: persistent messages, publisher confirms awaited for whole batches, everything else resent.

Handshake, TLS, heartbeats and reading are py-amqp's; publishing writes our own frames (`frames.py`), some 100 kB at a
time. A nack, a lost channel or connection, a broker that blocks publishers and one that does not answer in time all end
alike: the connection is dropped and `BusError` raised, and the relay sends everything again that was not confirmed.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

import amqp
from amqp.exceptions import AMQPError

from outbox.buses.base import Confirmation, OutgoingMessage
from outbox.buses.confirms import Confirms
from outbox.buses.frames import FrameEncoder
from outbox.buses.topology import DEFAULT_EXCHANGE, Topology, declare
from outbox.errors import BusError

log = logging.getLogger(__name__)

_CHUNK: Final = 128 * 1024
_CHANNEL: Final = 1
_HEARTBEAT: Final = 30
_DEFAULT_PORTS: Final = {"amqp": 5672, "pyamqp": 5672, "amqps": 5671}


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that was written, and the last tag of it."""

    bus: RabbitMQBus
    link: _Link
    last_tag: int

    def wait(self) -> None:
        self.bus.await_confirms(self.link, self.last_tag)


class _Link:
    """One connection with its channel; thrown away whole after any doubt."""

    def __init__(
        self,
        url: str,
        exchange: str,
        *,
        mandatory: bool,
        timeout: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        self.confirms = Confirms()
        self.returned: dict[str, int] = {}
        self.blocked: str | None = None
        secure = parts.scheme == "amqps"
        connection = amqp.Connection(
            host=f"{parts.hostname or 'localhost'}:{port}",
            userid=unquote(parts.username or "guest"),
            password=unquote(parts.password or "guest"),
            virtual_host=unquote(parts.path[1:]) or "/",
            ssl={"context": tls or ssl.create_default_context(), "server_hostname": parts.hostname}
            if secure
            else False,
            connect_timeout=timeout,
            read_timeout=timeout,
            write_timeout=timeout,
            heartbeat=_HEARTBEAT,
            on_blocked=self._on_blocked,
            on_unblocked=self._on_unblocked,
        )
        connection.connect()
        self.connection = cast("Any", connection)
        self.channel = self.connection.channel(_CHANNEL)
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self.confirms.acked)
        self.channel.events["basic_return"].add(self._on_return)
        self.channel.events["basic_nack"].add(self.confirms.nacked)
        self.channel.exchange_declare(exchange, "topic", durable=True, auto_delete=False)
        self.encoder = FrameEncoder(
            self.channel.channel_id, self.connection.frame_max, mandatory=mandatory
        )

    def write(self, frames: bytes) -> None:
        self.connection.transport.write(frames)
        self.connection.bytes_sent += len(frames)

    def read(self, timeout: float) -> None:
        """Read one answer of the broker. Raises `TimeoutError` where none comes."""
        self.connection.drain_events(timeout=timeout)

    def drop(self) -> None:
        try:
            self.connection.collect()
        except Exception as error:
            log.debug("dropping the connection: %r", error)

    def _on_return(
        self, _error: Exception, _exchange: str, routing_key: str, _message: object
    ) -> None:
        self.returned[routing_key] = self.returned.get(routing_key, 0) + 1

    def _on_blocked(self, reason: str) -> None:
        self.blocked = reason or "no reason given"
        log.warning("RabbitMQ blocks publishers: %s", self.blocked)

    def _on_unblocked(self) -> None:
        self.blocked = None
        log.info("RabbitMQ takes messages again")


class RabbitMQBus:
    """A connection to RabbitMQ. Made when it is first used, and again after any doubt; *url* may be several, by `;`."""

    def __init__(
        self,
        url: str,
        exchange: str = DEFAULT_EXCHANGE,
        *,
        mandatory: bool = False,
        timeout: float = 15.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """*mandatory*: count in `unrouted` the events that no queue is bound to. *timeout*: seconds for connecting,
        for writing, and for the confirms of a batch. *tls*: for `amqps://`; by default the system's certificates."""
        self._urls = [one.strip() for one in url.split(";") if one.strip()]
        self._exchange = exchange
        self._options: dict[str, Any] = {"mandatory": mandatory, "timeout": timeout, "tls": tls}
        self._timeout = timeout
        self._link: _Link | None = None
        self.unrouted: dict[str, int] = {}
        """Events by type that came back because no queue was bound to them (with *mandatory*)."""

    def declare(self, topology: Topology) -> None:
        try:
            declare(self._urls[0], topology)
        except Exception as error:
            raise BusError(
                f"could not declare queue {topology.queue!r} on RabbitMQ: {error}"
            ) from error

    def send(self, batch: Sequence[OutgoingMessage]) -> Confirmation:
        link = self._connected()
        try:
            for chunk in self._chunks(link, batch):
                link.write(chunk)
        except Exception as error:
            raise self._failed(link, f"could not write {len(batch)} messages", error) from error
        link.confirms.given += len(batch)
        return _Batch(self, link, link.confirms.given)

    def await_confirms(self, link: _Link, tag: int) -> None:
        """Return once everything up to *tag* is confirmed on *link*."""
        deadline = time.monotonic() + self._timeout
        try:
            while link.confirms.taken < tag:
                if link.confirms.failure is not None:
                    raise BusError(link.confirms.failure)
                if link is not self._link:
                    raise BusError("the connection was dropped before the confirm came")
                link.read(max(deadline - time.monotonic(), 0.001))
        except Exception as error:
            why = f" (it blocks publishers: {link.blocked})" if link.blocked else ""
            raise self._failed(link, f"no confirm of message {tag}{why}", error) from error
        if link.returned:
            self._note_returned(link)

    def keep_alive(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            link.connection.heartbeat_tick()
            link.read(0.001)
        except TimeoutError:
            pass
        except (AMQPError, OSError) as error:
            self._failed(link, "the idle connection is gone", error)

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            try:
                link.connection.close()
            except Exception as error:
                log.debug("closing the connection: %r", error)
                link.drop()

    def _chunks(self, link: _Link, batch: Sequence[OutgoingMessage]) -> Iterator[bytes]:
        chunk: list[bytes] = []
        size = 0
        for message in batch:
            exchange, key = (
                (self._exchange, message.type) if message.queue is None else ("", message.queue)
            )
            frames = link.encoder.encode(message, exchange, key)
            chunk.append(frames)
            size += len(frames)
            if size >= _CHUNK:
                yield b"".join(chunk)
                chunk, size = [], 0
        if chunk:
            yield b"".join(chunk)

    def _connected(self) -> _Link:
        if self._link is None:
            errors = []
            for url in list(self._urls):
                try:
                    self._link = _Link(url, self._exchange, **self._options)
                    break
                except Exception as error:
                    errors.append(f"{urlsplit(url).hostname}: {error}")
                    # The next attempt begins with the next one.
                    self._urls.append(self._urls.pop(0))
            else:
                raise BusError(f"RabbitMQ could not be reached: {'; '.join(errors)}")
        return self._link

    def _failed(self, link: _Link, what: str, error: Exception) -> BusError:
        if link is self._link:
            self._link = None
        link.drop()
        return BusError(f"RabbitMQ: {what}: {error or type(error).__name__}")

    def _note_returned(self, link: _Link) -> None:
        for event_type, count in link.returned.items():
            if event_type not in self.unrouted:
                log.warning(
                    "no queue is bound to %s on exchange %r; such events go nowhere",
                    event_type,
                    self._exchange,
                )
            self.unrouted[event_type] = self.unrouted.get(event_type, 0) + count
        link.returned.clear()
