"""Every check of a broker or a Celery app says OK on a healthy one, and finds its own illness."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from click.testing import CliRunner
from kombu import Connection, Exchange, Queue

from outbox.buses import Topology
from outbox.buses.topology import declare, queue_arguments
from outbox.celery import setup
from outbox.cli import main
from outbox.doctor import Finding, Level, broker, examine_app, examine_broker
from outbox.service import Service
from tests.kafka_brokers import KafkaBroker, LocalKafka
from tests.local_servers import LocalRedis


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {each.check: each for each in findings}


def ill(findings: dict[str, Finding]) -> dict[str, str]:
    return {each.check: each.found for each in findings.values() if each.level > Level.OK}


@pytest.fixture
def topology(unique_name: str) -> Topology:
    return Topology(f"{unique_name}.events", ("order.placed",), exchange=unique_name)


# ---- RabbitMQ ----


def test_a_healthy_rabbitmq_passes(rabbitmq_url: str, topology: Topology) -> None:
    declare(rabbitmq_url, topology)
    findings = by_name(
        examine_broker(
            rabbitmq_url,
            exchange=topology.exchange,
            queues={topology.queue: queue_arguments(topology)},
        )
    )
    assert set(findings) == {"broker reachable", *(name for name, _ in broker.RABBITMQ_CHECKS)}
    assert "RabbitMQ" in findings["broker reachable"].found
    assert ill(findings).keys() <= {"broker encryption"}


def test_an_exchange_and_a_queue_that_are_not_there_are_found_and_not_made(
    rabbitmq_url: str, topology: Topology
) -> None:
    for _ in range(2):
        findings = by_name(
            examine_broker(rabbitmq_url, exchange=topology.exchange, queues=[topology.queue])
        )
        assert findings["exchange"].level is Level.WARN
        assert findings["queues"].level is Level.FAIL
        assert "is not there" in findings["queues"].found


def test_a_queue_or_exchange_that_does_not_outlive_a_restart_is_found(
    rabbitmq_url: str, topology: Topology
) -> None:
    with Connection(rabbitmq_url) as connection:
        passing = Exchange(topology.exchange, type="topic", durable=False)
        Queue(topology.queue, passing, durable=False, auto_delete=True)(
            connection.default_channel
        ).declare()
    findings = by_name(
        examine_broker(rabbitmq_url, exchange=topology.exchange, queues=[topology.queue])
    )
    assert findings["exchange"].level is Level.FAIL
    assert "no durable topic exchange" in findings["exchange"].found
    assert findings["queues"].level is Level.FAIL
    assert "does not outlive a restart" in findings["queues"].found


def test_an_exchange_of_another_type_is_found(rabbitmq_url: str, topology: Topology) -> None:
    with Connection(rabbitmq_url) as connection:
        Exchange(topology.exchange, type="direct", durable=True)(
            connection.default_channel
        ).declare()
    findings = by_name(examine_broker(rabbitmq_url, exchange=topology.exchange))
    assert findings["exchange"].level is Level.FAIL


def test_a_queue_of_another_kind_than_the_worker_declares_is_found(
    rabbitmq_url: str, topology: Topology
) -> None:
    classic = Topology(topology.queue, (), topology.exchange, queue_type="classic")
    declare(rabbitmq_url, classic)
    unknown = by_name(
        examine_broker(rabbitmq_url, exchange=topology.exchange, queues=[topology.queue])
    )
    assert unknown["queues"].level is Level.OK
    known = by_name(
        examine_broker(
            rabbitmq_url,
            exchange=topology.exchange,
            queues={topology.queue: queue_arguments(topology)},
        )
    )
    assert known["queues"].level is Level.FAIL
    assert "is another kind" in known["queues"].found


@pytest.mark.parametrize(
    "url",
    ["amqp://me:sesame@127.0.0.1:1//", "redis://:sesame@127.0.0.1:1/0", "gopher://x", "nothing"],
)
def test_a_broker_that_does_not_answer_is_one_finding(url: str) -> None:
    (finding,) = examine_broker(url)
    assert (finding.check, finding.level) == ("broker reachable", Level.FAIL)
    result = CliRunner().invoke(main, ["doctor", "--broker-url", url])
    assert result.exit_code == 1
    assert "sesame" not in result.output


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("amqp://me@localhost//", Level.OK),
        ("amqps://me@broker.example//", Level.OK),
        ("amqp://me@broker.example//", Level.WARN),
        ("amqps://a.example;amqp://b.example", Level.WARN),
        ("rediss://broker.example", Level.OK),
    ],
)
def test_a_connection_in_the_clear_over_a_network_is_found(url: str, level: Level) -> None:
    assert broker.encryption(broker.Redis(None, url, "events", {}))[0] is level


@pytest.mark.parametrize("which", ["mock_kafka", "private_kafka"])
def test_kafka_is_looked_at_by_its_metadata(request: pytest.FixtureRequest, which: str) -> None:
    found = request.getfixturevalue(which)
    kafka = KafkaBroker(found.url) if isinstance(found, LocalKafka) else found
    kafka.create_topic("events.order", 4)
    kafka.create_topic("billing.events", 2)
    for _ in range(2):  # it makes nothing that is missing, either
        reachable, billing, gone, copies = examine_broker(
            kafka.url, queues=["billing.events", "gone.events"]
        )
    assert (reachable.level, reachable.found) == (Level.OK, "Kafka, 1 broker")
    assert (billing.level, billing.found) == (Level.OK, "2 partitions")
    assert (gone.level, gone.found) == (Level.WARN, "it is not there")
    assert (copies.level, copies.found) == (
        Level.WARN,
        "some of 2 topics have 1 copy of a record",
    )


def test_a_kafka_that_does_not_answer_is_one_finding() -> None:
    (finding,) = examine_broker("kafka://127.0.0.1:1")
    assert (finding.check, finding.level) == ("broker reachable", Level.FAIL)


# ---- Redis ----


def test_a_healthy_redis_passes(private_redis: LocalRedis, topology: Topology) -> None:
    with redis.Redis.from_url(private_redis.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
    declare(private_redis.url, topology)
    findings = by_name(
        examine_broker(private_redis.url, exchange=topology.exchange, queues=[topology.queue])
    )
    assert set(findings) == {"broker reachable", *(name for name, _ in broker.REDIS_CHECKS)}
    assert ill(findings) == {}


def test_a_redis_that_evicts_or_keeps_nothing_is_found(private_redis: LocalRedis) -> None:
    with redis.Redis.from_url(private_redis.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
    findings = by_name(examine_broker(private_redis.url))
    assert findings["eviction"].level is Level.FAIL
    assert findings["append-only file"].level is Level.WARN


def test_a_redis_that_does_not_tell_its_settings_is_a_warning(private_redis: LocalRedis) -> None:
    with redis.Redis.from_url(private_redis.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-config")
    findings = by_name(examine_broker(private_redis.url))
    assert findings["eviction"].level is Level.WARN
    assert "noeviction" in findings["eviction"].fix


def test_an_unbound_queue_on_redis_is_found(redis_url: str, topology: Topology) -> None:
    nobody = by_name(examine_broker(redis_url, exchange=topology.exchange))
    assert nobody["exchange"].level is Level.WARN
    assert "without a taker is gone" in nobody["exchange"].found
    declare(redis_url, topology)
    findings = by_name(
        examine_broker(redis_url, exchange=topology.exchange, queues=[topology.queue, "other"])
    )
    assert findings["exchange"].level is Level.OK
    assert findings["queues"].level is Level.FAIL
    assert "other" in findings["queues"].found
    assert topology.queue not in findings["queues"].found


# ---- a Celery app ----


def make_app(**settings: Any) -> Celery:
    app = Celery("billing", broker="amqp://localhost//", set_as_current=False)
    app.conf.update(worker_prefetch_multiplier=1)
    service = Service("billing")
    setup(app, service, database_url="postgresql://localhost/never_connected")
    app.conf.update(settings)
    return app


def test_an_app_that_was_set_up_passes() -> None:
    assert ill(by_name(examine_app(make_app()))) == {}


def test_an_app_that_was_not_set_up_fails() -> None:
    findings = by_name(examine_app(Celery("bare", set_as_current=False)))
    assert findings["celery: receive task"].level is Level.FAIL
    assert findings["celery: consumer"].level is Level.FAIL
    assert "outbox.celery.setup" in findings["celery: receive task"].fix


@pytest.mark.parametrize("option", ["acks_late", "reject_on_worker_lost"])
def test_a_receive_task_that_acks_too_early_is_found(option: str) -> None:
    app = make_app()
    setattr(app.tasks["outbox.receive"], option, False)
    finding = by_name(examine_app(app))["celery: receive task"]
    assert finding.level is Level.FAIL
    assert option in finding.found


def test_a_receive_task_that_acks_what_timed_out_is_found() -> None:
    app = make_app()
    app.tasks["outbox.receive"].acks_on_failure_or_timeout = True
    finding = by_name(examine_app(app))["celery: receive task"]
    assert finding.level is Level.FAIL
    assert "time limit" in finding.found


@pytest.mark.parametrize(
    ("check", "settings", "level"),
    [
        ("accepted content", {"accept_content": ["json", "pickle"]}, Level.FAIL),
        ("serializers", {"task_serializer": "pickle"}, Level.FAIL),
        ("serializers", {"result_serializer": "yaml"}, Level.FAIL),
        ("eager mode", {"task_always_eager": True}, Level.FAIL),
        ("consumer", {"worker_consumer": "celery.worker.consumer:Consumer"}, Level.FAIL),
        ("durable queues", {"task_queues": [Queue("q", durable=False)]}, Level.FAIL),
        ("prefetch", {"worker_prefetch_multiplier": 0}, Level.FAIL),
        ("prefetch", {"worker_prefetch_multiplier": 100}, Level.WARN),
        ("visibility timeout", {"broker_url": "redis://localhost"}, Level.WARN),
        (
            "visibility timeout",
            {"broker_url": "redis://localhost", "task_time_limit": 7200},
            Level.FAIL,
        ),
        (
            "visibility timeout",
            {"broker_url": "redis://localhost", "task_time_limit": 60},
            Level.OK,
        ),
    ],
)
def test_a_setting_that_breaks_a_promise_is_found(
    check: str, settings: dict[str, Any], level: Level
) -> None:
    finding = by_name(examine_app(make_app(**settings)))[f"celery: {check}"]
    assert finding.level is level


# ---- the command ----


def test_the_command_looks_at_the_apps_queue_on_the_broker(
    rabbitmq_url: str, unique_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{unique_name}_app.py").write_text(
        "from celery import Celery\n"
        "from outbox.celery import setup\n"
        "from outbox.service import Service\n"
        f"app = Celery('billing', broker={rabbitmq_url!r}, set_as_current=False)\n"
        f"setup(app, Service('billing', queue='{unique_name}.q', exchange='{unique_name}'),"
        " database_url='postgresql://localhost/never_connected')\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["-A", f"{unique_name}_app", "--broker-url", rabbitmq_url, "--json"]
    result = CliRunner().invoke(main, ["doctor", *arguments, "--exchange", unique_name])
    findings = {each["check"]: each for each in json.loads(result.stdout)["findings"]}
    assert f"'{unique_name}.q' is not there" in findings["queues"]["found"]
    assert findings["celery: receive task"]["level"] == "OK"
    assert result.exit_code == 1


def test_an_app_that_cannot_be_loaded_exits_1() -> None:
    result = CliRunner().invoke(main, ["doctor", "-A", "no_such_module"])
    assert result.exit_code == 1
    assert "no_such_module" in result.output
    assert "Traceback" not in result.output
