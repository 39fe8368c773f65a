"""`outbox consume` on a broker and on librdkafka's mock: whatever dies or is taken away, one effect each, no loss."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from sqlalchemy.orm import Session

import outbox
from outbox.relay import Relay
from tests.apps.billing import Placed, registry
from tests.kafka_brokers import Kafka
from tests.kafka_consumers import BillingOnKafka
from tests.mock_kafka import PRODUCE, MockKafka
from tests.relaying import relaying
from tests.steps import STEPS, Steps
from tests.workers import eventually

NOT_ALLOWED = 29


@pytest.fixture
def billing(migrated_database_url: str, kafka: Kafka, tmp_path: Path) -> Iterator[BillingOnKafka]:
    made = BillingOnKafka(migrated_database_url, kafka, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("kafka", ["mock"], indirect=True)
def test_what_is_committed_is_handled_once_though_the_broker_refuses_and_the_consumer_dies(
    billing: BillingOnKafka, mock_kafka: MockKafka
) -> None:
    orders = [f"o{number:03}" for number in range(300)]
    relay = Relay(billing.engine.url, billing.bus)
    relaying = threading.Thread(target=relay.run)
    doomed = billing.consumer(OUTBOX_CRASH_AT="receive.before_ack:150")
    relaying.start()
    try:
        for start in range(0, 300, 50):
            mock_kafka.refuse(PRODUCE, NOT_ALLOWED)
            with Session(billing.engine) as session, session.begin():
                events = [Placed(order=order) for order in orders[start : start + 50]]
                outbox.publish_all(session, events, source="orders", registry=registry)
        doomed.await_death()
        with mock_kafka.down():
            billing.consumer(ready=False)
        billing.await_effects(*orders)
    finally:
        relay.stop()
        relaying.join(30)
    assert relay.stats.failures
    assert billing.count("quarantine") == billing.count("dead_letter") == 0


@pytest.mark.parametrize("kafka", ["broker"], indirect=True)
@pytest.mark.parametrize("batch", [(), ("--batch", "20")], ids=["alone", "in batches"])
def test_each_key_is_in_order_though_handlers_fail_and_a_consumer_is_killed(
    billing: BillingOnKafka, batch: tuple[str, ...]
) -> None:
    steps = Steps(billing.engine, billing.directory, "order", seed=len(batch))
    options = ("--concurrency", "4", *batch)
    with relaying(billing.engine, billing.bus):
        doomed = billing.consumer(*options)
        steps.publish(until=STEPS // 2)
        steps.until_one_hangs()
        doomed.kill()
        assert 0 < steps.count() < len(steps.keys) * STEPS // 2
        billing.consumer(*options, ready=False)
        steps.publish(until=STEPS)
        steps.until_all_are_taken()
        eventually(lambda: billing.count("pending_delivery") == 0, explain=billing.logs)
    steps.assert_in_order()


def test_what_a_consumer_settled_comes_to_no_other_one(billing: BillingOnKafka) -> None:
    orders = [f"o{number:03}" for number in range(100)]
    first = billing.consumer()
    billing.send(*map(billing.placed, orders))
    billing.await_effects(*orders)
    assert first.terminate() == {"received": 100, "passed_over": 0}
    second = billing.consumer()
    billing.send(billing.placed("after"))
    billing.await_effects(*orders, "after")
    assert second.terminate() == {"received": 1, "passed_over": 0}


@pytest.mark.parametrize("point", ["receive.handled", "receive.committed", "receive.before_ack"])
def test_a_consumer_killed_on_the_way_loses_nothing_and_repeats_nothing(
    billing: BillingOnKafka, point: str
) -> None:
    orders = [f"o{number}" for number in range(20)]
    doomed = billing.consumer(OUTBOX_CRASH_AT=f"{point}:7", ready=False)
    billing.send(*map(billing.placed, orders))
    doomed.await_death()
    assert len(billing.effects) == (6 if point == "receive.handled" else 7)
    billing.consumer()
    billing.await_effects(*orders)


def test_a_consumer_killed_after_a_batch_was_committed_repeats_nothing(
    billing: BillingOnKafka,
) -> None:
    orders = [f"o{number:03}" for number in range(300)]
    doomed = billing.consumer(
        "--batch", "20", OUTBOX_CRASH_AT="receive.batch_committed:2", ready=False
    )
    billing.send(*map(billing.placed, orders))
    doomed.await_death()
    assert 40 < len(billing.effects) < 300
    billing.consumer("--batch", "20")
    billing.await_effects(*orders)


def test_an_event_that_kills_each_consumer_is_parked_and_what_is_behind_it_handled(
    billing: BillingOnKafka,
) -> None:
    before, behind = [f"a{n}" for n in range(5)], [f"b{n}" for n in range(5)]
    billing.send(*map(billing.placed, before), billing.placed("poison", "kill"))
    billing.send(*map(billing.placed, behind))
    deaths = 0
    while not billing.count("dead_letter"):
        consumer = billing.consumer("--batch", "2", ready=False)
        eventually(
            lambda one=consumer: not one.is_alive or billing.count("dead_letter"), 30, billing.logs
        )
        deaths += not consumer.is_alive
        assert deaths <= 6, billing.logs()
    assert deaths >= 2
    billing.await_effects(*before, *behind)


def test_a_failing_event_is_tried_again_through_the_services_own_topic(
    billing: BillingOnKafka,
) -> None:
    billing.consumer()
    billing.send(billing.placed("bad", "fail"), billing.placed("good"))
    eventually(lambda: billing.count("dead_letter"), 30, billing.logs)
    billing.await_effects("good")
    assert billing.count("pending_delivery") == 0


def test_what_a_handler_schedules_is_delivered(billing: BillingOnKafka) -> None:
    billing.consumer()
    billing.send(billing.placed("o1", "later"))
    billing.await_effects("o1", "o1 reminded")


def test_what_cannot_be_read_is_quarantined_and_what_is_for_others_passed_over(
    billing: BillingOnKafka,
) -> None:
    consumer = billing.consumer()
    producer = Producer({"bootstrap.servers": billing.kafka.servers})
    cancelled = billing.placed("o0").body.replace(b"order.placed", b"order.cancelled")
    for value, headers in (
        (b"no envelope", []),
        (None, []),
        (billing.placed("o1").body, [("outbox", b"[1]")]),
        (billing.placed("o2").body, [("outbox", b"no json")]),
        (billing.placed("o3").body, [("outbox", None), ("x", b"\xff")]),
        (cancelled, []),
        (b"anything", [("ce_type", b"order.cancelled")]),
        (billing.placed("fine").body, []),
    ):
        producer.produce(billing.topic, value, headers=headers)
    assert producer.flush(10) == 0
    billing.await_effects("fine")
    eventually(lambda: billing.count("quarantine") == 5, 10, billing.logs)
    reasons = [row.reason for row in billing.rows("SELECT reason FROM outbox.quarantine")]
    assert sum("header 'outbox'" in reason for reason in reasons) == 3
    assert consumer.terminate() == {"received": 8, "passed_over": 2}


def test_members_that_come_go_and_die_share_the_partitions_and_repeat_nothing(
    billing: BillingOnKafka,
) -> None:
    orders = [f"o{number:03}" for number in range(400)]
    first = billing.consumer()
    billing.send(*(billing.placed(order, "sleep 0.01") for order in orders[:200]))
    second = billing.consumer("--concurrency", "3", "--batch", "10")
    billing.send(*(billing.placed(order, "sleep 0.01") for order in orders[200:]))
    first.kill()
    third = billing.consumer(ready=False)
    billing.await_effects(*orders, seconds=60)
    second.terminate()
    third.terminate()
    assert billing.count("pending_delivery") == billing.count("dead_letter") == 0


def test_the_event_in_hand_is_finished_before_a_consumer_ends(billing: BillingOnKafka) -> None:
    consumer = billing.consumer()
    billing.send(billing.placed("slow", "sleep 2"))
    eventually(
        lambda: billing.rows(
            "SELECT 1 FROM pg_stat_activity WHERE state = 'idle in transaction'"
            " AND datname = current_database() AND query LIKE 'INSERT INTO effect%'"
        ),
        10,
        billing.logs,
    )
    consumer.terminate()
    assert billing.effects == ["slow"]
    again = billing.consumer()
    assert again.terminate()["received"] == 0


def test_a_consumer_that_was_paused_past_its_session_repeats_nothing(
    billing: BillingOnKafka,
) -> None:
    paused = billing.consumer()
    billing.send(*(billing.placed(f"o{number:02}", "sleep 0.05") for number in range(40)))
    eventually(lambda: len(billing.effects) > 3, 10, billing.logs)
    paused.process.send_signal(signal.SIGSTOP)
    billing.consumer(ready=False)
    eventually(lambda: len(billing.effects) > 30, 30, billing.logs)
    paused.process.send_signal(signal.SIGCONT)
    billing.await_effects(*(f"o{number:02}" for number in range(40)), seconds=60)
    paused.terminate()
