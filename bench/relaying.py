"""From the log to the broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

import amqp
import psycopg
from celery import Celery
from sqlalchemy import URL

from bench.figures import Figure, Timer
from bench.publishing import conninfo, fill
from outbox.buses import Bus, QueueType, Topology, open_bus
from outbox.buses.base import Confirmation, OutgoingMessage
from outbox.buses.frames import message_properties
from outbox.buses.message import celery_message
from outbox.cli.process import collect_garbage_seldom
from outbox.relay import Relay

EVENTS = 50_000
BODY = b'{"id":1,"x":"' + b"y" * 260 + b'"}'


def to_redis(database: URL, redis_url: str) -> Iterator[Figure]:
    yield Figure(
        "relay to Redis",
        "events/s",
        relaying(database, redis_url),
        _send_task(redis_url),
        "celery send_task",
        floor=10,
        reach=40,
    )


def to_rabbitmq(database: URL, rabbitmq_url: str) -> Iterator[Figure]:
    compared: list[tuple[QueueType, bool, float, float]] = [
        ("quorum", False, 0.95, 2.0),
        ("classic", False, 0.95, 2.0),
        ("quorum", True, 7, 16),
    ]
    for kind, awaited, floor, reach in compared:
        how = "each awaited" if awaited else "pipelined"
        exchange = "bench" if kind == "quorum" else f"bench.{kind}"
        yield Figure(
            f"relay to RabbitMQ, {kind} queue ({how})", "events/s",
            relaying(database, rabbitmq_url, kind=kind, exchange=exchange),
            _py_amqp(rabbitmq_url, exchange, awaited), f"py-amqp, {how}", floor, reach=reach,
        )  # fmt: skip


def relaying(
    database: URL,
    broker_url: str,
    events: int = EVENTS,
    *,
    kind: QueueType = "quorum",
    exchange: str = "bench",
) -> Any:
    collect_garbage_seldom()  # as the relay's own process; the controls have nothing that it would look at
    bus = open_bus(broker_url, exchange)
    bus.declare(Topology(f"{exchange}.events", ("order.created",), exchange, queue_type=kind))

    def relay(timer: Timer) -> None:
        with psycopg.connect(conninfo(database), autocommit=True) as connection:
            fill(connection, events)
        relay = Relay(database, _Counting(bus, events))
        relay._bus.relay = relay  # type: ignore[attr-defined]
        with timer.counting(events):
            relay.run()

    return relay


class _Counting:
    """Stops the relay once so many events were confirmed, and stays open for the next round."""

    def __init__(self, bus: Bus, until: int) -> None:
        self._bus, self._until, self._confirmed = bus, until, 0
        self.relay: Relay | None = None
        self.unrouted: Mapping[str, int] = {}

    def declare(self, topology: Topology) -> None: ...

    def send(self, batch: Any) -> Any:
        return _Counted(self._bus.send(batch), len(batch), self)

    def confirmed(self, events: int) -> None:
        """The broker has taken so many more."""
        self._confirmed += events
        if self._confirmed >= self._until and self.relay is not None:
            self.relay.stop()

    def keep_alive(self) -> None:
        self._bus.keep_alive()

    def close(self) -> None: ...


class _Counted:
    """One batch under way. (A class for each would be a cycle that keeps its events until garbage is collected.)"""

    __slots__ = ("_confirmation", "_counting", "_events")

    def __init__(self, confirmation: Confirmation, events: int, counting: _Counting) -> None:
        self._confirmation, self._events, self._counting = confirmation, events, counting

    def wait(self) -> None:
        self._confirmation.wait()
        self._counting.confirmed(self._events)


def _send_task(redis_url: str) -> Any:
    app = Celery("bench", broker=redis_url)

    def send(timer: Timer) -> None:
        with timer.counting(500):
            for _ in range(500):
                app.send_task(
                    "outbox.receive",
                    args=[BODY.decode()],
                    queue="bench.control",
                    ignore_result=True,
                )

    return send


def _py_amqp(url: str, exchange: str, awaited: bool) -> Any:
    from kombu.utils.url import url_to_parts

    _, host, port, user, password, vhost, _ = url_to_parts(url)
    connection = amqp.Connection(
        f"{host}:{port}",
        user or "guest",
        password or "guest",
        virtual_host=vhost or "/",
        confirm_publish=awaited,
    )
    connection.connect()
    channel: Any = connection.channel()
    channel.confirm_select()
    acked = threading.local()
    acked.upto = 0

    def on_ack(tag: int, _multiple: bool) -> None:
        acked.upto = max(acked.upto, tag)

    channel.events["basic_ack"].add(on_ack)
    count = 500 if awaited else EVENTS
    sent = 0

    def publish(timer: Timer) -> None:
        nonlocal sent
        message = OutgoingMessage(str(uuid4()), "order.created", None, BODY, 0, 0)
        body = celery_message(message).body
        with timer.counting(count):
            for _ in range(count):
                content = amqp.Message(body, **message_properties("order.created", str(uuid4())))
                channel.basic_publish(content, exchange, "order.created")
            sent += count
            while not awaited and acked.upto < sent:
                connection.drain_events(timeout=30)

    return publish
