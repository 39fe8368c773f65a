"""What the bus on Kafka must do: on a broker, and on librdkafka's mock, which can refuse what it is told to."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator
from uuid import uuid4

import pytest

from outbox.buses import Bus, OutgoingMessage, Topology, open_bus
from outbox.buses.kafka import KafkaBus
from outbox.buses.kafka_topics import topics_of
from outbox.errors import BusError, ConfigurationError
from tests.kafka_brokers import Kafka, LocalKafka, records
from tests.mock_kafka import PRODUCE, MockKafka

NOT_LEADER, TOO_LARGE, NOT_ALLOWED, OUT_OF_ORDER = 6, 10, 29, 45


def message(
    event_type: str = "order.created", body: bytes = b'{"a":1}', **options: object
) -> OutgoingMessage:
    options.setdefault("key", None)
    return OutgoingMessage(
        id=str(uuid4()), type=event_type, body=body, lane=0, position=1, **options
    )  # type: ignore[arg-type]


@pytest.fixture
def bus(kafka: Kafka, unique_name: str) -> Iterator[Bus]:
    """Its topics begin with `unique_name`."""
    yield from opened(kafka.url, unique_name)


@pytest.fixture
def mock_bus(mock_kafka: MockKafka) -> Iterator[Bus]:
    yield from opened(mock_kafka.url)


def opened(url: str, exchange: str = "events") -> Iterator[Bus]:
    bus = open_bus(url, exchange)
    yield bus
    bus.close()


def test_an_event_arrives_byte_for_byte_as_a_cloudevent(
    kafka: Kafka, bus: Bus, unique_name: str
) -> None:
    sent = message(body=b'{"a": "\\"b\\\\ \xc3\xa4"}', key="42")
    bus.send([sent]).wait()
    (found,) = records(kafka.servers, f"{unique_name}.order", 1)
    assert (found.key(), found.value()) == (b"42", sent.body)
    assert dict(found.headers()) == {
        "content-type": b"application/cloudevents+json; charset=UTF-8",
        "ce_type": b"order.created",
        "ce_id": sent.id.encode(),
    }


def test_what_happened_to_one_key_is_in_one_partition_in_its_order(
    kafka: Kafka, bus: Bus, unique_name: str
) -> None:
    sent = [
        message(("order.created", "order.paid")[number % 2], b"%d" % number, key=f"k{number % 7}")
        for number in range(3_000)
    ]
    for confirmation in [bus.send(sent[start : start + 500]) for start in range(0, 3_000, 500)]:
        confirmation.wait()
    by_key = defaultdict(list)
    for one in records(kafka.servers, f"{unique_name}.order", 3_000):
        by_key[one.key().decode(), one.partition()].append(one.value())
    assert len(by_key) == 7
    for (key, _), bodies in by_key.items():
        assert bodies == [one.body for one in sent if one.key == key]


def test_an_event_without_a_key_goes_by_its_id(kafka: Kafka, bus: Bus, unique_name: str) -> None:
    sent = message()
    bus.send([sent, sent]).wait()
    one, two = records(kafka.servers, f"{unique_name}.order", 2)
    assert one.key() == two.key() == sent.id.encode()


def test_what_is_for_one_service_goes_to_its_own_topic(
    kafka: Kafka, bus: Bus, unique_name: str
) -> None:
    queue = f"{unique_name}.events"
    bus.send([message(queue=queue, handler="billing.pay", key_seq=7)]).wait()
    (found,) = records(kafka.servers, queue, 1)
    assert dict(found.headers())["outbox"] == b'{"handler": "billing.pay", "key_seq": 7}'


def test_a_service_reads_its_own_topic_and_those_of_its_types() -> None:
    bindings = ("order.cancelled", "order.created", "stock.item.moved")
    topology = Topology("billing.events", bindings, "shop")
    assert topics_of(topology) == ["billing.events", "shop.order", "shop.stock.item"]
    assert topics_of(Topology("all", ("#",), "shop")) == ["all", r"^shop\..*$"]
    with pytest.raises(ConfigurationError, match="'bill ing' can be no topic on Kafka"):
        topics_of(Topology("bill ing", ()))


def test_a_refusal_that_passes_is_waited_out(mock_kafka: MockKafka, mock_bus: Bus) -> None:
    mock_bus.send([message(body=b"first")]).wait()
    mock_kafka.refuse(PRODUCE, NOT_LEADER, NOT_LEADER)
    mock_bus.send([message(body=b"second")]).wait()
    assert {one.value() for one in records(mock_kafka.servers, "events.order", 2)} == {
        b"first",
        b"second",
    }


def test_a_refused_record_fails_its_batch_and_every_later_one(mock_kafka: MockKafka) -> None:
    bus = open_bus(f"{mock_kafka.url}&linger.ms=200")  # so that both batches are in one request
    mock_kafka.create_topic("events.order", 1)
    before = bus.send([message(body=b"before")])
    before.wait()
    mock_kafka.refuse(PRODUCE, NOT_ALLOWED)
    refused, later = bus.send([message()]), bus.send([message()])
    for _ in range(2):
        with pytest.raises(
            BusError, match=r"'events.order'.*allow this user to write to the topic"
        ):
            refused.wait()
    with pytest.raises(BusError):
        later.wait()
    before.wait()
    bus.send([message(body=b"again")]).wait()
    bus.close()
    found = [one.value() for one in records(mock_kafka.servers, "events.order", 2)]
    assert found == [b"before", b"again"]


def test_a_record_too_large_for_the_topic_says_what_to_raise(
    mock_kafka: MockKafka, mock_bus: Bus
) -> None:
    mock_kafka.refuse(PRODUCE, TOO_LARGE)
    with pytest.raises(BusError, match=r"raise max\.message\.bytes of the topic"):
        mock_bus.send([message()]).wait()


def test_a_record_too_large_for_the_client_is_named(kafka: Kafka, unique_name: str) -> None:
    bus = open_bus(f"{kafka.url}&message.max.bytes=10000", unique_name)
    large = message(body=b"x" * 20_000)
    with pytest.raises(BusError, match=f"event {large.id}: "):
        bus.send([message(), large])
    bus.send([message()]).wait()
    bus.close()


def test_a_producer_that_ended_for_good_is_made_anew(mock_kafka: MockKafka, mock_bus: Bus) -> None:
    mock_bus.send([message()]).wait()
    mock_kafka.refuse(PRODUCE, OUT_OF_ORDER)
    with pytest.raises(BusError):
        mock_bus.send([message(body=b"x") for _ in range(10)]).wait()
    mock_bus.send([message("stock.reserved")]).wait()
    assert records(mock_kafka.servers, "events.stock", 1)


@pytest.mark.parametrize("which", ["mock_kafka", "private_kafka"])
def test_a_broker_that_is_away_for_a_while_loses_nothing(
    request: pytest.FixtureRequest, which: str
) -> None:
    kafka: MockKafka | LocalKafka = request.getfixturevalue(which)
    bus = open_bus(kafka.url)
    bus.send([message(body=b"0", key="k")]).wait()
    with kafka.down():
        sent = [bus.send([message(body=b"%d" % number, key="k")]) for number in range(1, 50)]
    for confirmation in sent:
        confirmation.wait()
    found = [one.value() for one in records(kafka.servers, "events.order", 50)]
    assert found == [b"%d" % number for number in range(50)]
    bus.close()


def test_a_broker_that_forgot_its_producers_costs_one_batch_its_time(
    private_kafka: LocalKafka,
) -> None:
    """To Tansu an unknown producer stays one, and the library would go on trying for ever."""
    bus = KafkaBus(private_kafka.url, timeout=3)
    bus.send([message(body=b"lost", key="k") for _ in range(10)]).wait()
    private_kafka.kill()
    private_kafka.start()
    with pytest.raises(BusError, match="1 records not confirmed in time"):
        bus.send([message(body=b"0", key="k")]).wait()
    for number in range(10):
        bus.send([message(body=b"%d" % number, key="k")]).wait()
    found = [one.value() for one in records(private_kafka.servers, "events.order", 10)]
    assert found == [b"%d" % number for number in range(10)]
    bus.close()


def test_a_broker_that_stays_away_is_said_and_what_was_queued_is_never_sent(
    mock_kafka: MockKafka,
) -> None:
    bus = KafkaBus(mock_kafka.url, timeout=4)
    bus.send([message(body=b"first", key="k")]).wait()
    with mock_kafka.down():
        lost = bus.send([message(body=b"late", key="k")] * 100)
        with pytest.raises(
            BusError, match=rf"{mock_kafka.servers}: 100 records not confirmed in time"
        ):
            lost.wait()
    patient = KafkaBus(mock_kafka.url)
    patient.send([message(body=b"second", key="k")]).wait()
    assert [one.value() for one in records(mock_kafka.servers, "events.order", 2)] == [
        b"first",
        b"second",
    ]
    for one in (bus, patient):
        one.close()


def test_a_full_queue_is_waited_for(kafka: Kafka, unique_name: str) -> None:
    bus = open_bus(f"{kafka.url}&queue.buffering.max.messages=100", unique_name)
    bus.send([message() for _ in range(1_000)]).wait()
    assert len(records(kafka.servers, f"{unique_name}.order", 1_000)) == 1_000
    bus.close()


def test_a_queue_that_stays_full_is_said(mock_kafka: MockKafka) -> None:
    bus = KafkaBus(f"{mock_kafka.url}&queue.buffering.max.messages=100", timeout=0.5)
    with mock_kafka.down(), pytest.raises(BusError, match="its queue stayed full"):
        bus.send([message() for _ in range(1_000)])
    bus.close()


def test_nothing_of_a_batch_is_sent_before_all_its_topics_are_there(
    mock_kafka: MockKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def create_missing(client: object, settings: object, names: set[str], timeout: float) -> None:
        asked.append(names)
        if "events.stock" in names:
            raise BusError("topic 'events.stock' is not there and could not be made")

    monkeypatch.setattr("outbox.buses.kafka.create_missing", create_missing)
    bus = open_bus(f"kafka://{mock_kafka.servers}")
    batch = [message(body=b"early"), message("stock.reserved"), message(queue="billing.events")]
    for _ in range(2):
        with pytest.raises(BusError, match=r"'events\.stock' is not there"):
            bus.send(batch)
    assert asked == [{"events.order", "events.stock", "billing.events"}] * 2
    for _ in range(2):
        bus.send([message(body=b"alone")]).wait()
    assert asked[2:] == [{"events.order"}]
    found = [one.value() for one in records(mock_kafka.servers, "events.order", 2)]
    assert found == [b"alone", b"alone"]
    bus.close()


def test_a_bus_that_nobody_closed_goes_with_the_last_reference_to_it(mock_kafka: MockKafka) -> None:
    gc.disable()  # in a cycle it would go on holding threads and connections until a collection
    try:
        bus = KafkaBus(mock_kafka.url)
        bus.send([message()]).wait()
        left = weakref.ref(bus)
        del bus
        assert left() is None
    finally:
        gc.enable()


def test_no_broker_at_all_is_an_error_that_names_the_place() -> None:
    bus = KafkaBus("kafka://127.0.0.1:1", timeout=0.5)
    with pytest.raises(BusError, match=r"Kafka at 127\.0\.0\.1:1: "):
        bus.send([message()])
    with pytest.raises(BusError):
        bus.declare(Topology("billing.events", ("order.created",)))
    bus.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("kafka://h/?acks=1", "sets acks: that is not yours to set"),
        ("kafka://h/?no.such=1", 'No such configuration property: "no.such"'),
        ("kafka://h/database", "no databases or virtual hosts"),
        ("kafka://h/?partitions=0", "partitions=0: expected a number from 1"),
        ("kafka://h/?create_topics=perhaps", "create_topics=perhaps: expected true or false"),
        ("kafka://h:x", "cannot be read"),
    ],
    ids=["ours", "unknown", "path", "partitions", "truth", "port"],
)
def test_a_mistake_in_the_url_is_said_when_it_is_opened(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        open_bus(url)


def test_an_exchange_that_no_topic_can_be_named_after_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="can be no topic on Kafka"):
        open_bus("kafka://h", "our events")


def test_without_the_client_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("outbox.buses.kafka")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'outbox-saga\[kafka\]'"):
        open_bus("kafka://h")
