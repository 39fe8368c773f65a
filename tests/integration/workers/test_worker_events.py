"""Real Celery workers on real brokers: events in, effects out, and nothing lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workers import Billing, Worker, eventually


@pytest.fixture(scope="module")
def worker(billing: Billing) -> Worker:
    """One worker with two processes for all tests of this file."""
    return billing.worker()


def test_an_event_from_the_exchange_is_handled(billing: Billing, worker: Worker) -> None:
    billing.send(billing.placed("plain"))

    eventually(lambda: billing.effects_of("plain"), explain=lambda: worker.log)


def test_an_event_sent_twice_has_one_effect(billing: Billing, worker: Worker) -> None:
    envelope = billing.placed("twice")
    for _ in range(3):
        billing.send(envelope)
    billing.send(billing.placed("after"))

    eventually(lambda: billing.effects_of("after"), explain=lambda: worker.log)
    eventually(lambda: billing.queued() == 0)
    assert billing.effects_of("twice") == ["twice"]


def test_a_failing_event_is_tried_again_and_parked(billing: Billing, worker: Worker) -> None:
    billing.send(billing.placed("broken", do="fail"))

    eventually(lambda: _dead(billing, "broken"), explain=lambda: worker.log)
    (letter,) = _dead(billing, "broken")
    assert letter.attempts == 3
    assert "told to fail" in letter.traceback
    assert billing.effects_of("broken") == []


def test_an_event_that_kills_its_process_once_is_handled_once(
    billing: Billing, worker: Worker
) -> None:
    billing.send(billing.placed("once", do="kill once"))

    eventually(lambda: billing.effects_of("once"), explain=lambda: worker.log)
    assert worker.is_alive


def test_an_event_that_always_kills_its_process_is_parked(billing: Billing, worker: Worker) -> None:
    billing.send(billing.placed("deadly", do="kill"))

    eventually(lambda: _dead(billing, "deadly"), 40, explain=lambda: worker.log)
    billing.send(billing.placed("survivor"))
    eventually(lambda: billing.effects_of("survivor"), explain=lambda: worker.log)
    assert worker.is_alive
    assert billing.effects_of("deadly") == []


def test_what_a_handler_schedules_for_now_happens_soon(billing: Billing, worker: Worker) -> None:
    billing.send(billing.placed("scheduling", do="later"))

    eventually(
        lambda: billing.effects_of("scheduling") == ["scheduling", "scheduling reminded"],
        explain=lambda: worker.log,
    )
    eventually(lambda: billing.rows("SELECT 1 FROM outbox.pending_delivery") == [])


def test_the_apps_own_tasks_still_run(billing: Billing, worker: Worker) -> None:
    with billing.connection.Producer(auto_declare=False) as producer:
        producer.publish(
            [["o1"], {}, {}],
            serializer="json",
            exchange="",
            routing_key=f"{billing.name}.tasks",
            headers={"task": "billing.other", "id": f"other-{billing.name}", "argsrepr": "()"},
        )

    eventually(lambda: f"other-{billing.name}] succeeded" in worker.log, explain=lambda: worker.log)


def test_logs_name_the_service_and_the_type_and_show_no_payload(
    billing: Billing, worker: Worker
) -> None:
    billing.send(billing.placed("secret"))

    eventually(lambda: billing.effects_of("secret"))
    assert f"{billing.name}:order.placed[" in worker.log
    assert "secret" not in worker.log


def _dead(billing: Billing, order: str) -> list[Any]:
    return billing.rows("SELECT * FROM outbox.dead_letter WHERE key = :order", order=order)
