"""RabbitMQ: persistent messages, publisher confirms awaited for whole batches, everything else resent.

Publishing writes our own frames (`frames.py`), some 100 kB at a time, over a connection of py-amqp's
(`rabbitmq_link.py`). A nack, a lost channel or connection and a broker that does not answer in time all end alike: the
connection is dropped and `BusError` raised, and the relay sends everything again that was not confirmed.

The one exception is a broker that blocks publishers for want of memory or disk. Its connection is kept, and nothing
more is written to it: each new one would leave another copy of the batch in a socket, and the broker reads them all
once it has recovered. That is safe, as tags are never given twice.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from amqp.exceptions import PreconditionFailed

from outbox.buses.base import Confirmation, OutgoingMessage
from outbox.buses.frames import LONGEST_NAME, Unroutable
from outbox.buses.rabbitmq_link import Link, abandon, connect
from outbox.buses.topology import DEFAULT_EXCHANGE, Topology, queue_arguments
from outbox.buses.unrouted import Unrouted
from outbox.buses.urls import BrokerURL, read_url, split_urls
from outbox.errors import BusError, ConfigurationError, told

log = logging.getLogger(__name__)

Opened = TypeVar("Opened")

_CHUNK: Final = 128 * 1024
_PATIENCE_WHILE_BLOCKED: Final = 1.0
_SCHEMES: Final = {"amqp", "amqps", "pyamqp"}


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that was written, and the last tag of it."""

    bus: RabbitMQBus
    link: Link
    last_tag: int

    def wait(self) -> None:
        self.bus.await_confirms(self.link, self.last_tag)


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
        """*mandatory*: ask the broker for events that no queue is bound to, and count them in `unrouted`; each such
        event travels back. *timeout*: seconds for connecting, for writing a batch, and for its confirms. *tls*: for
        `amqps://`, in the place of what the URL says (`outbox.buses.urls.tls_context`).

        Raises `ConfigurationError` for a URL that cannot be read and for an exchange that cannot be.
        """
        self._urls = [_amqp_url(one) for one in split_urls(url)]
        if not 0 < len(exchange.encode()) <= LONGEST_NAME:
            raise ConfigurationError(f"the exchange's name {exchange!r} has 1 to 255 bytes")
        self._exchange = exchange
        self._options: dict[str, Any] = {"timeout": timeout, "tls": tls}
        self._mandatory = mandatory
        self._timeout = timeout
        self._link: Link | None = None
        self.unrouted = Unrouted(exchange)
        """Events by type that no queue was bound to. Told only with *mandatory*."""

    def declare(self, topology: Topology) -> None:
        connection = self._first_that_answers(lambda url: connect(url, **self._options))
        try:
            channel = connection.channel()
            channel.exchange_declare(topology.exchange, "topic", durable=True, auto_delete=False)
            channel.queue_declare(
                topology.queue,
                durable=True,
                auto_delete=False,
                arguments=queue_arguments(topology),
            )
            for event_type in topology.bindings:
                channel.queue_bind(topology.queue, topology.exchange, event_type)
            connection.close()
        except PreconditionFailed as error:
            raise ConfigurationError(
                f"queue {topology.queue!r} or its exchange is there already, of another kind: {error.reply_text}"
            ) from error
        except Exception as error:
            raise BusError(
                f"could not declare queue {topology.queue!r} on RabbitMQ: {told(error)}"
            ) from error
        finally:
            abandon(connection)

    def send(self, batch: Sequence[OutgoingMessage]) -> Confirmation:
        link = self._ready()
        deadline = time.monotonic() + self._timeout
        try:
            for frames, count in self._chunks(link, batch):
                if link.is_blocked:
                    break
                link.confirms.give(count)
                link.write(frames, deadline)
            else:
                return _Batch(self, link, link.confirms.given)
        except Exception as error:
            raise self._failed(link, f"could not write {len(batch)} messages", error) from error
        raise BusError(f"RabbitMQ at {link.place} blocks publishers")

    def await_confirms(self, link: Link, tag: int) -> None:
        """Return once everything up to *tag* is confirmed on *link*."""
        try:
            link.await_taken(tag, time.monotonic() + self._timeout)
        except TimeoutError as error:
            if link.is_blocked:
                raise BusError(f"RabbitMQ at {link.place} blocks publishers: {error}") from error
            raise self._failed(link, "no confirms in time", error) from error
        except Exception as error:
            raise self._failed(link, "no confirms", error) from error
        self._note_returned(link)

    def keep_alive(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            link.read_available()
            link.tick()
        except Exception as error:
            log.info("%s", self._failed(link, "the idle connection is gone", error))

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _chunks(self, link: Link, batch: Sequence[OutgoingMessage]) -> Iterator[tuple[bytes, int]]:
        """The batch's frames, some at a time, each with the number of its messages."""
        chunk: list[bytes] = []
        size = 0
        for message in batch:
            exchange, key = (
                (self._exchange, message.type) if message.queue is None else ("", message.queue)
            )
            try:
                frames = link.encoder.encode(message, exchange, key)
            except Unroutable as error:
                if message.queue is not None:
                    raise
                # Nobody can be bound to it: it is where the broker would have put it, nowhere.
                self.unrouted.note(message.type, 1, str(error))
                continue
            chunk.append(frames)
            size += len(frames)
            if size >= _CHUNK:
                yield b"".join(chunk), len(chunk)
                chunk, size = [], 0
        if chunk:
            yield b"".join(chunk), len(chunk)

    def _ready(self) -> Link:
        if self._link is None:
            self._link = self._first_that_answers(
                lambda url: Link(url, self._exchange, mandatory=self._mandatory, **self._options)
            )
        link = self._link
        try:
            link.await_unblocked(time.monotonic() + _PATIENCE_WHILE_BLOCKED)
        except TimeoutError as error:
            raise BusError(f"RabbitMQ at {link.place} takes nothing now: {error}") from error
        except Exception as error:
            raise self._failed(link, "lost while it was blocked", error) from error
        return link

    def _first_that_answers(self, open_one: Callable[[BrokerURL], Opened]) -> Opened:
        refusals = []
        for _ in range(len(self._urls)):
            try:
                opened = open_one(self._urls[0])
            except ConfigurationError:
                raise
            except Exception as error:
                refusals.append(f"{self._urls[0].place}: {told(error)}")
                self._urls.append(self._urls.pop(0))
            else:
                if refusals:
                    log.warning(
                        "RabbitMQ: using %s, as %s", self._urls[0].place, "; ".join(refusals)
                    )
                return opened
        raise BusError(f"RabbitMQ could not be reached: {'; '.join(refusals)}")

    def _failed(self, link: Link, what: str, error: Exception) -> BusError:
        if link is self._link:
            self._link = None
        link.drop()
        return BusError(f"RabbitMQ at {link.place}: {what}: {told(error)}")

    def _note_returned(self, link: Link) -> None:
        for event_type, count in link.returned.items():
            self.unrouted.note(event_type, count)
        link.returned.clear()


def _amqp_url(text: str) -> BrokerURL:
    url = read_url(text)
    if url.scheme not in _SCHEMES:
        raise ConfigurationError(f"{url.scheme}:// stands among RabbitMQ's URLs")
    return url
