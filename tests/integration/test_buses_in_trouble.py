"""What a bus does when its broker refuses, blocks, hangs, dies or comes back: an error, and the next try gets through.

Nothing that a broker did not take may count as confirmed; what it took twice is the inbox's to forget.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import amqp
import kombu
import pytest
import redis

from outbox.buses import Bus, OutgoingMessage, QueueType, Topology, open_bus
from outbox.buses.rabbitmq import RabbitMQBus
from outbox.buses.redis import RedisBus
from outbox.buses.topology import declare
from outbox.errors import BusError, OutboxError
from tests.local_servers import Certificate, LocalRabbitMQ, LocalRedis
from tests.workers import eventually

TYPE = "order.created"


def batch(count: int, size: int = 0) -> list[OutgoingMessage]:
    body = json.dumps({"x": "y" * size}).encode()
    return [OutgoingMessage(str(uuid4()), TYPE, None, body, 0, 1) for _ in range(count)]


def ids(messages: Sequence[OutgoingMessage]) -> set[UUID]:
    return {UUID(message.id) for message in messages}


def deliver(bus: Bus, messages: Sequence[OutgoingMessage]) -> None:
    """Send until it is confirmed, as a relay would."""

    refusals: list[str] = []

    def confirmed() -> bool:
        try:
            bus.send(messages).wait()
        except BusError as error:
            refusals.append(str(error))
            return False
        return True

    eventually(confirmed, 30, lambda: "\n".join(refusals[-5:]))


def in_queue(url: str, queue: str) -> list[UUID]:
    """The ids of everything that is in *queue*."""
    found = []
    with kombu.Connection(url) as connection:
        simple = connection.SimpleQueue(kombu.Queue(queue, no_declare=True), no_ack=True)
        while True:
            try:
                found.append(UUID(simple.get(timeout=0.5).headers["id"]))
            except simple.Empty:
                return found


@contextmanager
def opened(
    url: str, exchange: str, queue_type: QueueType = "quorum", **options: Any
) -> Iterator[tuple[Any, str]]:
    """A bus, and the queue that takes everything that is sent."""
    bus = open_bus(url, exchange, **options)
    queue = f"{exchange}.queue"
    bus.declare(Topology(queue, (TYPE,), exchange, queue_type))
    yield bus, queue
    bus.close()


@contextmanager
def amqp_channel(url: str) -> Iterator[amqp.Channel]:
    with kombu.Connection(url) as connection:
        yield connection.default_channel


# ---- RabbitMQ ----


def test_a_full_queue_refuses_and_takes_the_rest_once_there_is_room(
    rabbitmq_url: str, unique_name: str
) -> None:
    bus, queue, messages = RabbitMQBus(rabbitmq_url, unique_name), f"{unique_name}.full", batch(3)
    with amqp_channel(rabbitmq_url) as channel:
        channel.exchange_declare(unique_name, "topic", durable=True, auto_delete=False)
        limit = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=limit)
        channel.queue_bind(queue, unique_name, TYPE)
        with pytest.raises(BusError, match="refused message"):
            bus.send(messages).wait()
        channel.queue_purge(queue)
        bus.send(messages[:1]).wait()
    assert in_queue(rabbitmq_url, queue) == [UUID(messages[0].id)]
    bus.close()


def test_a_message_for_a_queue_that_is_not_there_is_an_error_and_not_lost_in_silence(
    rabbitmq_url: str, unique_name: str
) -> None:
    bus = RabbitMQBus(rabbitmq_url, unique_name)
    (one,) = batch(1)
    to_one_queue = OutgoingMessage(one.id, TYPE, None, b"{}", 0, 1, queue=f"{unique_name}.no")
    with pytest.raises(BusError, match="there is no queue"):
        bus.send([to_one_queue]).wait()
    bus.send([one]).wait()
    bus.close()


def test_a_channel_that_the_broker_closed_in_mid_batch_confirms_nothing(
    rabbitmq_url: str, unique_name: str
) -> None:
    with opened(rabbitmq_url, unique_name) as (bus, queue):
        bus.send(batch(1)).wait()
        with amqp_channel(rabbitmq_url) as channel:
            channel.exchange_delete(unique_name)
        with pytest.raises(BusError, match="no exchange"):
            bus.send(batch(100)).wait()
        bus.declare(Topology(queue, (TYPE,), unique_name))
        messages = batch(1)
        bus.send(messages).wait()
        assert UUID(messages[0].id) in in_queue(rabbitmq_url, queue)


def test_a_connection_that_breaks_within_a_message_confirms_nothing(
    rabbitmq_url: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(rabbitmq_url, unique_name) as (bus, queue):
        first, second = batch(5), batch(50, 1_000)
        before = bus.send(first)
        link = bus._link
        write_some = link._write_some

        def write_half_and_break(data: memoryview) -> int:
            written: int = write_some(data[: len(data) // 2 + 7])
            link._socket.shutdown(socket.SHUT_RDWR)
            return written

        monkeypatch.setattr(link, "_write_some", write_half_and_break)
        with pytest.raises(BusError):
            bus.send(second)
        # Those before it may have been confirmed by then.
        with contextlib.suppress(BusError):
            before.wait()
        deliver(bus, first + second)
        assert set(in_queue(rabbitmq_url, queue)) == ids(first + second)


@pytest.mark.parametrize(("end", "queue_type"), [("kill", "classic"), ("stop", "quorum")])
def test_rabbitmq_that_went_keeps_what_it_confirmed_and_takes_the_rest_when_it_is_back(
    private_rabbitmq: LocalRabbitMQ, unique_name: str, end: str, queue_type: QueueType
) -> None:
    # Seen with 3.10: a quorum queue whose only node is killed soon after it was made takes nothing any more.
    with opened(private_rabbitmq.url, unique_name, queue_type, timeout=5) as (bus, queue):
        confirmed, late = batch(50), batch(50)
        bus.send(confirmed).wait()
        getattr(private_rabbitmq, end)()
        with pytest.raises(BusError):
            bus.send(late).wait()
        with pytest.raises(BusError, match="could not be reached"):
            bus.send(late).wait()
        private_rabbitmq.start()
        deliver(bus, late)
        assert set(in_queue(private_rabbitmq.url, queue)) == ids(confirmed + late)


def test_rabbitmq_short_of_memory_blocks_and_is_not_flooded_with_copies(
    private_rabbitmq: LocalRabbitMQ, unique_name: str
) -> None:
    with opened(private_rabbitmq.url, unique_name, timeout=2) as (bus, queue):
        bus.send(batch(1)).wait()
        link, messages = bus._link, batch(20, 1_000)
        private_rabbitmq.control("set_vm_memory_high_watermark", "0")
        with pytest.raises(BusError, match="blocks publishers"):
            bus.send(messages).wait()
        given = link.confirms.given
        for _ in range(2):
            with pytest.raises(BusError, match="blocks publishers"):
                bus.send(messages)
        assert bus._link is link
        assert link.confirms.given == given
        private_rabbitmq.control("set_vm_memory_high_watermark", "0.4")
        deliver(bus, messages)
        assert bus._link is link
        found = in_queue(private_rabbitmq.url, queue)
        assert set(found) >= ids(messages)
        assert len(found) <= 1 + 2 * len(messages)


def test_rabbitmq_that_hangs_is_an_error_within_the_timeout(
    private_rabbitmq: LocalRabbitMQ, unique_name: str
) -> None:
    with opened(private_rabbitmq.url, unique_name, timeout=1) as (bus, queue):
        messages = batch(20, 1_000_000)
        private_rabbitmq.pause()
        with pytest.raises(BusError):  # more than the sockets hold
            bus.send(messages).wait()
        with pytest.raises(BusError, match="could not be reached"):
            bus.send(messages[:1])
        private_rabbitmq.resume()
        deliver(bus, messages[:3])
        assert set(in_queue(private_rabbitmq.url, queue)) >= ids(messages[:3])


def test_when_one_rabbitmq_dies_the_next_url_is_used(
    private_rabbitmq: LocalRabbitMQ, rabbitmq_url: str, unique_name: str
) -> None:
    with opened(rabbitmq_url, unique_name):
        pass
    with opened(f"{private_rabbitmq.url};{rabbitmq_url}", unique_name, timeout=5) as (bus, queue):
        bus.send(batch(1)).wait()
        private_rabbitmq.kill()
        messages = batch(3)
        with pytest.raises(BusError):
            bus.send(messages).wait()
        bus.send(messages).wait()
        assert in_queue(rabbitmq_url, queue) == [UUID(message.id) for message in messages]


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate.make(tmp_path)


@pytest.fixture
def rabbitmq_with_tls(tmp_path: Path, certificate: Certificate) -> Iterator[LocalRabbitMQ]:
    if LocalRabbitMQ.program() is None:
        pytest.skip("no server: rabbitmq-server is not installed")
    for file in (certificate.file, certificate.key):
        file.chmod(0o644)
    server = LocalRabbitMQ(tmp_path / "rabbitmq", certificate=certificate).start()
    yield server
    server.discard()


def test_rabbitmq_over_tls_takes_a_batch_and_is_refused_without_its_authority(
    rabbitmq_with_tls: LocalRabbitMQ, certificate: Certificate, unique_name: str
) -> None:
    url = rabbitmq_with_tls.tls_url
    with opened(f"{url}?ssl_ca_certs={certificate.file}", unique_name) as (bus, queue):
        messages = batch(300, 10_000)
        confirmations = [bus.send(messages[:150]), bus.send(messages[150:])]
        for confirmation in confirmations:
            confirmation.wait()
        bus.keep_alive()
        found = in_queue(rabbitmq_with_tls.url, queue)
    assert found == [UUID(message.id) for message in messages]
    with pytest.raises(BusError, match="certificate verify failed"):
        open_bus(url, unique_name).send(batch(1))
    with opened(f"{url}?ssl_cert_reqs=none", f"{unique_name}.unverified") as (bus, queue):
        bus.send(batch(1)).wait()


# ---- Redis ----


def test_redis_that_is_killed_keeps_what_it_confirmed_and_takes_the_rest_when_it_is_back(
    private_redis: LocalRedis, unique_name: str
) -> None:
    with opened(private_redis.url, unique_name, timeout=5) as (bus, queue):
        confirmed, late = batch(50), batch(50)
        bus.send(confirmed).wait()
        private_redis.kill()
        with pytest.raises(BusError):
            bus.send(late).wait()
        with pytest.raises(BusError):
            bus.send(late).wait()
        private_redis.start()
        deliver(bus, late)
        assert in_queue(private_redis.url, queue) == [UUID(one.id) for one in confirmed + late]


def test_redis_that_closed_an_idle_connection_is_connected_to_again_without_an_error(
    redis_url: str, unique_name: str
) -> None:
    with opened(redis_url, unique_name) as (bus, queue):
        bus.send(batch(1)).wait()
        with redis.Redis.from_url(redis_url) as client:
            mine = bus._link._connection._sock.getsockname()
            client.client_kill(f"{mine[0]}:{mine[1]}")
        bus.keep_alive()
        bus.send(batch(1)).wait()
        assert len(in_queue(redis_url, queue)) == 2


def test_redis_out_of_memory_confirms_nothing(private_redis: LocalRedis, unique_name: str) -> None:
    with opened(private_redis.url, unique_name) as (bus, queue):
        bus.send(batch(1)).wait()
        with redis.Redis.from_url(private_redis.url) as client:
            client.config_set("maxmemory", "1")
            with pytest.raises(BusError, match="maxmemory"):
                bus.send(batch(3)).wait()
            client.config_set("maxmemory", "0")
        messages = batch(1)
        bus.send(messages).wait()
        assert UUID(messages[0].id) in in_queue(private_redis.url, queue)


def test_an_event_after_a_queue_was_bound_reaches_it_although_the_bindings_are_remembered(
    redis_url: str, unique_name: str
) -> None:
    with opened(redis_url, unique_name) as (bus, first):
        bus.send(batch(1)).wait()
        second = f"{unique_name}.second"
        declare(redis_url, Topology(second, (TYPE,), unique_name))
        messages = batch(2)
        with pytest.raises(BusError, match="bindings were added or removed"):
            bus.send(messages).wait()
        bus.send(messages).wait()
        assert in_queue(redis_url, second) == [UUID(message.id) for message in messages]
        assert ids(messages) <= set(in_queue(redis_url, first))


def test_redis_whose_bindings_are_gone_takes_nothing_until_they_are_back(
    redis_url: str, unique_name: str
) -> None:
    with opened(redis_url, unique_name) as (bus, queue):
        bus.send(batch(1)).wait()
        with redis.Redis.from_url(redis_url) as client:
            client.flushdb()
        messages = batch(1)
        for _ in range(2):
            with pytest.raises(BusError, match="bindings"):
                bus.send(messages).wait()
        bus.declare(Topology(queue, (TYPE,), unique_name))
        bus.send(messages).wait()
        assert set(in_queue(redis_url, queue)) == ids(messages)


@pytest.fixture
def redis_with_tls(tmp_path: Path, certificate: Certificate) -> Iterator[LocalRedis]:
    if shutil.which("redis-server") is None:
        pytest.skip("no server: no redis-server with TLS is installed")
    server = LocalRedis(tmp_path / "redis", certificate=certificate).start()
    yield server
    server.discard()


def test_redis_over_tls_takes_a_batch_and_is_refused_without_its_authority(
    redis_with_tls: LocalRedis, unique_name: str
) -> None:
    with opened(redis_with_tls.url, unique_name) as (bus, queue):
        assert isinstance(bus, RedisBus)
        bus.send(batch(300, 10_000)).wait()
        with redis.Redis.from_url(redis_with_tls.url) as client:
            assert client.llen(queue) == 300
    with pytest.raises(BusError, match="certificate verify failed"):
        open_bus(redis_with_tls.url.partition("?")[0], unique_name).send(batch(1))


# ---- both ----


@pytest.mark.parametrize("options", ["ssl_cert_reqs=perhaps", "ssl_ca_certs=/nowhere.pem"])
@pytest.mark.parametrize("scheme", ["amqps", "rediss"])
def test_tls_options_that_cannot_be_are_errors_without_the_password(
    scheme: str, options: str
) -> None:
    url = f"{scheme}://u:secret@localhost:1/0?{options}"
    with pytest.raises(OutboxError) as caught:
        open_bus(url).send(batch(1))
    assert "secret" not in str(caught.value)
