"""What every bus must do, on real brokers, read back by kombu as a Celery worker would."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from uuid import uuid4

import kombu
import pytest

from outbox.buses import Bus, OutgoingMessage, Topology, masked, open_bus
from outbox.buses.rabbitmq import RabbitMQBus
from outbox.buses.topology import kombu_queue
from outbox.errors import BusError, ConfigurationError


def message(
    event_type: str = "order.created",
    body: bytes = b'{"a": "\\"b\\\\ \xc3\xa4"}',
    **options: object,
) -> OutgoingMessage:
    return OutgoingMessage(
        id=str(uuid4()), type=event_type, key=None, body=body, lane=0, position=1, **options
    )  # type: ignore[arg-type]


def lose(connected: socket.socket) -> None:
    """The connection is gone, and with it what had come in but was not read yet."""
    ours, theirs = socket.socketpair()
    theirs.close()
    os.dup2(ours.fileno(), connected.fileno())
    ours.close()


def received(url: str, queue: str, count: int, timeout: float = 10) -> list[kombu.Message]:
    """*count* messages from a queue, acked."""
    found: list[kombu.Message] = []
    with kombu.Connection(url) as connection:
        channel = connection.default_channel

        def take(one: kombu.Message) -> None:
            found.append(one)
            one.ack()

        with kombu.Consumer(
            channel, [kombu.Queue(queue, no_declare=True)], on_message=take, accept=["json"]
        ):
            while len(found) < count:
                connection.drain_events(timeout=timeout)
    return found


def envelope(one: kombu.Message) -> bytes:
    (text,), keywords, _ = json.loads(one.body)
    assert isinstance(keywords, dict)
    return text.encode()


@pytest.fixture
def bus(bus_url: str, unique_name: str) -> Iterator[Bus]:
    opened = open_bus(bus_url, unique_name)
    yield opened
    opened.close()


@pytest.fixture
def declare(bus: Bus, unique_name: str) -> Callable[..., str]:
    def declare(suffix: str, *types: str, queue_type: str = "quorum") -> str:
        queue = f"{unique_name}.{suffix}"
        bus.declare(Topology(queue, types, unique_name, queue_type))  # type: ignore[arg-type]
        return queue

    return declare


def test_an_event_reaches_every_queue_bound_to_its_type_byte_for_byte(
    bus: Bus, bus_url: str, declare: Callable[..., str]
) -> None:
    one, two, other = (
        declare("one", "order.created"),
        declare("two", "order.created", "order.paid"),
        declare("other", "order.paid"),
    )
    sent = message()
    bus.send([sent, message("order.paid", b'{"paid":1}')]).wait()
    (first,) = received(bus_url, one, 1)
    assert envelope(first) == sent.body
    assert first.headers["task"] == "outbox.receive"
    assert first.headers["shadow"] == "order.created"
    assert first.headers["id"] == sent.id
    assert [envelope(found) for found in received(bus_url, two, 2)] == [sent.body, b'{"paid":1}']
    assert [envelope(found) for found in received(bus_url, other, 1)] == [b'{"paid":1}']


def test_a_large_batch_arrives_whole_and_in_order(
    bus: Bus, bus_url: str, declare: Callable[..., str]
) -> None:
    queue = declare("large", "order.created")
    bodies = [b'{"number":%d}' % number for number in range(3000)]
    bus.send([message(body=body) for body in bodies]).wait()
    assert [envelope(found) for found in received(bus_url, queue, 3000)] == bodies


def test_batches_can_be_sent_before_earlier_ones_are_confirmed(
    bus: Bus, bus_url: str, declare: Callable[..., str]
) -> None:
    queue = declare("pipelined", "order.created")
    confirmations = [bus.send([message(body=b'{"n":%d}' % number)]) for number in range(20)]
    for confirmation in reversed(confirmations):
        confirmation.wait()
    assert [envelope(found) for found in received(bus_url, queue, 20)] == [
        b'{"n":%d}' % number for number in range(20)
    ]


def test_a_message_can_go_to_one_queue_and_name_its_handler(
    bus: Bus, bus_url: str, declare: Callable[..., str]
) -> None:
    queue = declare("own", "order.created")
    bus.send([message("order.paid", b"{}", queue=queue, handler="billing.pay", key_seq=7)]).wait()
    (found,) = received(bus_url, queue, 1)
    assert json.loads(found.body) == [["{}"], {"handler": "billing.pay", "key_seq": 7}, {}]


def test_a_body_larger_than_a_frame_arrives(
    bus: Bus, bus_url: str, declare: Callable[..., str]
) -> None:
    queue = declare("big", "order.created")
    body = b'{"x":"' + b"y" * 700_000 + b'"}'
    bus.send([message(body=body)]).wait()
    assert envelope(received(bus_url, queue, 1)[0]) == body


def test_an_event_that_nobody_takes_is_no_error(bus: Bus, declare: Callable[..., str]) -> None:
    declare("some", "order.created")
    bus.send([message("nobody.cares")]).wait()


def test_a_queue_declared_here_is_the_one_that_a_worker_declares(
    bus_url: str, unique_name: str, declare: Callable[..., str]
) -> None:
    queue = declare("same", "order.created")
    with kombu.Connection(bus_url) as connection:
        kombu_queue(Topology(queue, ("order.created",), unique_name))(
            connection.default_channel
        ).declare()


def test_a_body_that_is_no_text_does_not_stop_the_relay(
    bus: Bus, bus_url: str, declare: Callable[..., str]
) -> None:
    queue = declare("rubbish", "order.created")
    bus.send([message(body=b"\xff\xfe\x00rubbish"), message(body=b"{}")]).wait()
    assert envelope(received(bus_url, queue, 2)[1]) == b"{}"


def test_rabbitmq_that_refuses_a_message_is_an_error(rabbitmq_url: str, unique_name: str) -> None:
    import amqp
    from kombu.utils.url import url_to_parts

    _, host, port, user, password, vhost, _ = url_to_parts(rabbitmq_url)
    bus = RabbitMQBus(rabbitmq_url, unique_name)
    with amqp.Connection(f"{host}:{port}", user, password, virtual_host=vhost or "/") as connection:
        channel = connection.channel()
        channel.exchange_declare(unique_name, "topic", durable=True, auto_delete=False)
        limited = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare(
            f"{unique_name}.full", durable=True, auto_delete=False, arguments=limited
        )
        channel.queue_bind(f"{unique_name}.full", unique_name, "order.created")
        with pytest.raises(BusError, match="refused"):
            bus.send([message() for _ in range(3)]).wait()
    bus.close()


def test_rabbitmq_confirms_after_the_connection_was_lost_do_not_count(
    rabbitmq_url: str, unique_name: str
) -> None:
    bus = RabbitMQBus(rabbitmq_url, unique_name)
    confirmation = bus.send([message()])
    assert bus._link is not None
    lose(bus._link._connection.transport.sock)
    with pytest.raises(BusError):
        confirmation.wait()
    bus.send([message()]).wait()  # connects again
    bus.close()


def test_rabbitmq_counts_events_that_no_queue_is_bound_to_when_asked(
    rabbitmq_url: str, unique_name: str
) -> None:
    bus = RabbitMQBus(rabbitmq_url, unique_name, mandatory=True)
    bus.send([message("nobody.cares"), message("nobody.cares")]).wait()
    assert bus.unrouted == {"nobody.cares": 2}
    bus.close()


def test_rabbitmq_is_tried_at_the_next_url_when_the_first_does_not_answer(
    rabbitmq_url: str, unique_name: str
) -> None:
    bus = open_bus(f"amqp://guest:secret@localhost:1/;{rabbitmq_url}", unique_name)
    bus.send([message()]).wait()
    bus.close()


@pytest.mark.parametrize("url", ["amqp://u:secret@localhost:1//", "redis://:secret@localhost:1/0"])
def test_a_broker_that_is_not_there_is_a_bus_error_without_the_password(url: str) -> None:
    with pytest.raises(BusError) as caught:
        open_bus(url).send([message()]).wait()
    assert "secret" not in str(caught.value)


def test_a_url_of_no_known_broker_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="names no broker"):
        open_bus("sqs://somewhere")
    assert masked("amqp://user:secret@host:5672/v") == "amqp://user:***@host:5672/v"
