"""Wiring a service into a Celery app: what it sets, and what it refuses."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from pydantic import BaseModel
from sqlalchemy import create_engine

from outbox.celery import installed, setup
from outbox.celery.engines import ForkSafeEngine, with_psycopg
from outbox.errors import ConfigurationError
from outbox.events import Registry
from outbox.service import Service

URL = "postgresql://nobody@127.0.0.1:1/none"


class Placed(BaseModel):
    order: str


@pytest.fixture
def billing() -> Service:
    registry = Registry()
    registry.event("order.placed")(Placed)
    service = Service("billing", registry=registry)
    service.on(Placed, name="billing.bill")(lambda event, session: None)
    return service


@pytest.fixture
def app() -> Celery:
    return Celery("billing", broker="memory://", set_as_current=False)


def worker_starts(app: Celery) -> None:
    """As far as a worker gets before it connects."""
    app.WorkController(hostname="test@localhost", pool="solo")


def test_the_worker_consumes_the_services_queue_and_the_apps_own(
    app: Celery, billing: Service
) -> None:
    setup(app, billing, database_url=URL)

    assert set(app.amqp.queues.consume_from) == {"celery", "billing.events"}


def test_the_queue_is_bound_to_the_events_exchange_alone(app: Celery, billing: Service) -> None:
    setup(app, billing, database_url=URL)
    worker_starts(app)

    queue = app.amqp.queues.consume_from["billing.events"]

    assert {queue.exchange.name, *(bound.exchange.name for bound in queue.bindings)} == {"events"}
    assert {queue.routing_key, *_bound(app)} == {"order.placed"}


def test_a_worker_may_consume_events_only(app: Celery, billing: Service) -> None:
    setup(app, billing, database_url=URL, events_only=True)

    assert set(app.amqp.queues.consume_from) == {"billing.events"}


@pytest.mark.parametrize("is_configured_first", [True, False])
def test_queues_that_the_app_has_are_kept(
    app: Celery, billing: Service, is_configured_first: bool
) -> None:
    from kombu import Queue

    app.config_from_object(SimpleNamespace(task_queues=[Queue("reports")]))
    if is_configured_first:
        assert len(app.conf.task_queues) == 1
    setup(app, billing, database_url=URL)

    assert set(app.amqp.queues.consume_from) == {"reports", "billing.events"}


@pytest.mark.parametrize("pickle", [["pickle"], ["json", "pickle"], ["json", "yaml"]])
def test_only_json_is_accepted_whatever_the_configuration_says(
    app: Celery, billing: Service, pickle: list[str]
) -> None:
    app.config_from_object(SimpleNamespace(accept_content=pickle))
    setup(app, billing, database_url=URL)

    assert app.conf.accept_content == ["json"]


def test_handlers_registered_after_setup_are_bound_when_the_worker_starts(
    app: Celery, billing: Service
) -> None:
    class Paid(BaseModel):
        order: str

    billing.registry.event("order.paid")(Paid)
    setup(app, billing, database_url=URL)
    assert _bound(app) == {"order.placed"}
    billing.on(Paid, name="billing.paid")(lambda event, session: None)

    worker_starts(app)

    assert _bound(app) == {"order.placed", "order.paid"}


def test_the_task_is_never_acknowledged_early_nor_retried(app: Celery, billing: Service) -> None:
    task = setup(app, billing, database_url=URL)

    assert app.tasks["outbox.receive"] is task
    assert (task.acks_late, task.reject_on_worker_lost, task.ignore_result) == (True, True, True)
    assert task.max_retries == 0


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("task_always_eager", True, "nothing would reach a queue"),
        ("accept_content", ["json", "pickle"], "only JSON is accepted"),
        ("worker_consumer", "celery.worker.consumer:Consumer", "discards what it cannot read"),
    ],
)
def test_a_worker_whose_settings_would_lose_events_does_not_start(
    app: Celery, billing: Service, setting: str, value: Any, reason: str
) -> None:
    setup(app, billing, database_url=URL)
    app.conf[setting] = value

    with pytest.raises(ConfigurationError, match=reason):
        worker_starts(app)


def test_eager_mode_is_refused_outside_of_tests(app: Celery, billing: Service) -> None:
    task = setup(app, billing, database_url=URL)

    with pytest.raises(ConfigurationError, match="only tests may"):
        task.apply(args=["{}"], throw=True)


def test_an_app_serves_one_service(app: Celery, billing: Service) -> None:
    setup(app, billing, database_url=URL)

    with pytest.raises(ConfigurationError, match="one service per app"):
        setup(app, billing, database_url=URL)


@pytest.mark.parametrize("both", [True, False])
def test_one_database_must_be_given(app: Celery, billing: Service, both: bool) -> None:
    given: dict[str, Any] = {"database_url": URL, "engine": create_engine(URL)} if both else {}

    with pytest.raises(ConfigurationError, match="either database_url or engine"):
        setup(app, billing, **given)


def test_an_app_without_a_service_says_what_to_do(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match=r"call outbox\.celery\.setup"):
        installed(app)


def test_two_apps_do_not_know_of_each_other(app: Celery, billing: Service) -> None:
    other = Celery("other", broker="memory://", set_as_current=False)
    setup(app, billing, database_url=URL)
    setup(other, Service("other", registry=billing.registry), database_url=URL)

    assert installed(app).service is billing
    assert installed(other).service.name == "other"


# ---- engines ----


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_database_url_without_a_driver_means_psycopg(scheme: str) -> None:
    assert with_psycopg(f"{scheme}://h/d").drivername == "postgresql+psycopg"


def test_an_engine_is_made_once_per_process() -> None:
    engines = ForkSafeEngine(URL, name="test")

    assert engines() is engines()


def test_a_forked_process_has_an_engine_of_its_own() -> None:
    engines = ForkSafeEngine(URL, name="test")
    parents = engines()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if engines() is not parents else 1)

    assert os.waitpid(pid, 0)[1] == 0
    assert engines() is parents


def _bound(app: Celery) -> set[str]:
    (queue,) = (q for q in app.amqp.queues.consume_from.values() if q.name == "billing.events")
    return {bound.routing_key for bound in queue.bindings}
