"""Redis, through the same virtual topic exchange that kombu's transport uses, but a whole batch at a time.

kombu keeps the bindings of an exchange in a set and a queue in a list; it looks the set up for each message and pushes
each copy by itself. Here the set is kept in memory, and a batch becomes one write with one LPUSH per queue. What a
Celery worker finds in its queue is the same. That the pushes have been answered is the broker's confirmation; how
durable they are then, Redis's own persistence decides (`outbox doctor` looks at it), or `fsync=True`.

Every batch asks, behind its pushes, how many bindings there are. If they are not as many as it was sent by, it counts
as not confirmed and is sent again: so an event that was committed after a queue was bound reaches that queue.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from outbox.buses.base import Confirmation, OutgoingMessage
from outbox.buses.message import message_body
from outbox.buses.redis_bindings import Bindings, members_of, permanent_key, table_key
from outbox.buses.redis_wire import EntryEncoder, command, push
from outbox.buses.topology import DEFAULT_EXCHANGE, Topology
from outbox.buses.unrouted import Unrouted
from outbox.buses.urls import BrokerURL, read_url, split_urls
from outbox.errors import BusError, ConfigurationError, told

log = logging.getLogger(__name__)

_REFRESH_AFTER: Final = 1.0
_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True, slots=True)
class _Batch:
    bus: RedisBus
    link: _Link
    last: int

    def wait(self) -> None:
        self.bus.await_answers(self.link, self.last)


class RedisBus:
    """A connection to Redis. Made when it is first used, and again after an error."""

    def __init__(
        self,
        url: str,
        exchange: str = DEFAULT_EXCHANGE,
        *,
        timeout: float = 10.0,
        fsync: bool = False,
        global_keyprefix: str = "",
    ) -> None:
        """*timeout*: seconds for connecting and for each answer. *fsync*: a batch counts as confirmed when Redis has
        it on disk (`WAITAOF`: Redis 7.2, `appendonly yes`). *global_keyprefix*: as in the workers'
        `broker_transport_options`.

        TLS (`rediss://`) verifies the server unless the URL's `ssl_cert_reqs` says otherwise; `ssl_ca_certs`,
        `ssl_certfile`, `ssl_keyfile` and `ssl_check_hostname` are read too. Raises `ConfigurationError` for a URL that
        cannot be read.
        """
        if len(split_urls(url)) != 1:
            raise ConfigurationError("Redis has one URL: only RabbitMQ's may be several")
        self._url = read_url(url)
        self._connection_class, self._parameters = _connection_parameters(self._url, timeout)
        self._exchange = exchange
        self._prefix = global_keyprefix
        self._timeout = timeout
        self._fsync = fsync
        self._table_key = global_keyprefix + table_key(exchange)
        self._encoder = EntryEncoder()
        self._bindings = Bindings()
        self._read_at = float("-inf")
        self._link: _Link | None = None
        self._housekeeping: redis.Redis | None = None
        self.unrouted = Unrouted(exchange)
        """Events by type that no queue was bound to."""

    def declare(self, topology: Topology) -> None:
        members = members_of(topology)
        if not members:
            return
        try:
            with self._client().pipeline() as pipeline:
                pipeline.sadd(self._prefix + table_key(topology.exchange), *members)
                pipeline.sadd(self._prefix + permanent_key(topology.exchange), *members)
                pipeline.execute()
        except redis.RedisError as error:
            raise BusError(
                f"could not declare queue {topology.queue!r} on Redis: {told(error)}"
            ) from error
        self._read_at = float("-inf")

    def send(self, batch: Sequence[OutgoingMessage]) -> Confirmation:
        link = self._ready()
        try:
            pushes, routed = self._pushes(batch)
            for one in pushes:
                link.send(one)
            if routed:
                link.send(command(b"SCARD", self._table_key.encode()), self._check_bindings)
            if pushes and self._fsync:
                milliseconds = b"%d" % int(self._timeout * 1000 * 0.9)
                link.send(command(b"WAITAOF", b"1", b"0", milliseconds), _check_on_disk)
            link.flush()
        except (redis.RedisError, OSError) as error:
            raise self._failed(link, f"{len(batch)} messages not sent", error) from error
        return _Batch(self, link, link.sent)

    def await_answers(self, link: _Link, last: int) -> None:
        """Return once *link* has the answer to its command number *last*, and all went well."""
        try:
            link.await_answer(last)
        except ConfigurationError:
            self._forget(link)
            raise
        except (redis.RedisError, OSError, BusError) as error:
            raise self._failed(link, "not confirmed", error) from error

    def keep_alive(self) -> None:
        link = self._link
        if link is not None and link.is_stale():
            self._forget(link)

    def close(self) -> None:
        if self._link is not None:
            self._forget(self._link)
        if self._housekeeping is not None:
            self._housekeeping.close()
            self._housekeeping = None

    def _pushes(self, batch: Sequence[OutgoingMessage]) -> tuple[list[bytes], bool]:
        """One command per queue, and whether the bindings decided on any of them."""
        entries: dict[str, list[bytes]] = {}
        routed = False
        for message in batch:
            body = message_body(message)
            if message.queue is not None:
                queues: tuple[str, ...] = (message.queue,)
            else:
                if not routed:
                    self._refresh()
                    routed = True
                queues = self._bindings.queues(message.type)
                if not queues:
                    self.unrouted.note(message.type, 1)
            for queue in queues:
                entry = self._encoder.encode(message, body, queue)
                entries.setdefault(queue, []).append(entry)
        return [push(self._prefix + queue, values) for queue, values in entries.items()], routed

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read_at < _REFRESH_AFTER:
            return
        members: Any = self._client().smembers(self._table_key)
        bindings = Bindings(members)
        if self._bindings.count and not bindings.count:
            raise redis.RedisError(
                f"all bindings of exchange {self._exchange!r} are gone (a flushed database, an eviction?), and events "
                "would go nowhere: start a subscriber, which binds its queue; if this is meant, restart the relay"
            )
        if not bindings.count and not self.unrouted:
            log.warning(
                "no queue at all is bound to exchange %r on Redis: events go nowhere until a subscriber has started",
                self._exchange,
            )
        self._bindings, self._read_at = bindings, now

    def _check_bindings(self, count: Any) -> None:
        if count != self._bindings.count:
            self._read_at = float("-inf")
            raise BusError("bindings were added or removed meanwhile")

    def _ready(self) -> _Link:
        if self._link is not None and self._link.is_stale():
            self._forget(self._link)
        if self._link is None:
            try:
                self._link = _Link(self._connection_class(**self._parameters))
            except (redis.RedisError, OSError) as error:
                raise BusError(
                    f"Redis at {self._url.place} could not be reached: {told(error)}"
                ) from error
        return self._link

    def _client(self) -> redis.Redis:
        if self._housekeeping is None:
            pool = redis.ConnectionPool(self._connection_class, **self._parameters)
            self._housekeeping = redis.Redis(connection_pool=pool)
        return self._housekeeping

    def _failed(self, link: _Link, what: str, error: Exception) -> BusError:
        self._forget(link)
        return BusError(f"Redis at {self._url.place}: {what}: {told(error)}")

    def _forget(self, link: _Link) -> None:
        if link is self._link:
            self._link = None
        link.drop()


class _Link:
    """One connection, and which of its commands have been answered. Answers come in the order of the commands."""

    def __init__(self, connection: Any) -> None:
        self.sent = 0
        self._connection = connection
        self._answered = 0
        self._unwritten: list[bytes] = []
        self._checks: deque[Any] = deque()
        self._dropped = False
        connection.connect()

    def send(self, one: bytes, check: Any = None) -> None:
        """Queue a command up; *check* is called with its answer, and raises if it is not as it should be."""
        self._unwritten.append(one)
        self._checks.append(check)
        self.sent += 1

    def flush(self) -> None:
        """Write what was queued up."""
        if self._unwritten:
            self._connection.send_packed_command(self._unwritten, check_health=False)
            self._unwritten = []

    def await_answer(self, number: int) -> None:
        while self._answered < number:
            if self._dropped:
                raise BusError("the connection was dropped before the answer came")
            answer = self._connection.read_response()
            check = self._checks.popleft()
            if check is not None:
                check(answer)
            self._answered += 1

    def is_stale(self) -> bool:
        """Whether the server has closed the connection while nothing was under way."""
        if self._answered < self.sent:
            return False
        try:
            return bool(self._connection.can_read(0))
        except (redis.RedisError, OSError):
            return True

    def drop(self) -> None:
        self._dropped = True
        self._connection.disconnect()


def _check_on_disk(answer: Any) -> None:
    if not isinstance(answer, list) or answer[0] < 1:
        raise BusError("it was not on disk in time")


def _connection_parameters(url: BrokerURL, timeout: float) -> tuple[Any, dict[str, Any]]:
    try:
        database = int(url.path or 0)
    except ValueError:
        raise ConfigurationError(
            f"the URL of Redis at {url.place} ends with the number of a database, not {url.path!r}"
        ) from None
    parameters: dict[str, Any] = {
        "host": url.host,
        "port": url.port or 6379,
        "db": database,
        "username": url.user or None,
        "password": url.password,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
    }
    if url.scheme != "rediss":
        return redis.Connection, parameters
    verify = url.query.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    by_name = url.query.get("ssl_check_hostname", "true").lower() in {"true", "1"}
    parameters |= {name: url.query[name] for name in _TLS_OPTIONS if name in url.query}
    parameters |= {"ssl_cert_reqs": verify, "ssl_check_hostname": by_name and verify == "required"}
    return redis.SSLConnection, parameters
