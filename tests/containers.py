"""The same servers through testcontainers, from images that are already on the Docker daemon.

Kafka's is pulled, and so only where OUTBOX_TEST_KAFKA_IMAGE names one (`confluentinc/cp-kafka:7.6.0`, say).
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

LABEL = "outbox-tests"
IMAGES = {
    "postgres": os.environ.get("OUTBOX_TEST_POSTGRES_IMAGE", "outbox-test-postgres"),
    "rabbitmq": os.environ.get("OUTBOX_TEST_RABBITMQ_IMAGE", "outbox-test-rabbitmq"),
    "redis": os.environ.get("OUTBOX_TEST_REDIS_IMAGE", "outbox-test-redis"),
    "kafka": os.environ.get("OUTBOX_TEST_KAFKA_IMAGE", ""),
}
MADE_HERE = ("postgres", "rabbitmq", "redis")
"""`tools/test-images` makes their images."""


def why_not(kind: str) -> str | None:
    """The reason why this server cannot run in a container here, or None if it can."""
    import docker

    without_docker = _why_no_docker()
    if without_docker is not None:
        return without_docker
    if kind not in MADE_HERE:
        return None if IMAGES[kind] else "OUTBOX_TEST_KAFKA_IMAGE is not set"
    client = docker.from_env(timeout=10)
    try:
        client.images.get(IMAGES[kind])
    except docker.errors.ImageNotFound:
        return f"Docker has no image {IMAGES[kind]} (tools/test-images makes it)"
    finally:
        client.close()
    return None


@cache
def _why_no_docker() -> str | None:
    import docker

    try:
        client = docker.from_env(timeout=10)
        client.ping()
        client.close()
    except (docker.errors.DockerException, OSError):
        return "no Docker daemon answers"
    return None


def start(kind: str, session: str) -> str:
    """Starts a labelled container and returns its URL once it answers; `remove` takes it down."""
    from testcontainers.core.config import testcontainers_config

    testcontainers_config.ryuk_disabled = True  # its image would have to be pulled
    options = {"labels": {LABEL: session}}
    return _STARTS[kind](options)


def _postgres(options: dict[str, Any]) -> str:
    from testcontainers.community.postgres import PostgresContainer

    container = PostgresContainer(IMAGES["postgres"], driver="psycopg", **options)
    container.with_command("postgres -c max_connections=300")
    container.start()
    address = _address(container, container.port)
    account = f"{container.username}:{container.password}"
    return f"postgresql+psycopg://{account}@{address}/{container.dbname}"


def _rabbitmq(options: dict[str, Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own wait strategy
        from testcontainers.community.rabbitmq import RabbitMqContainer

    container = RabbitMqContainer(IMAGES["rabbitmq"], port=5672, **options)
    container.start()
    address = _address(container, container.port)
    return f"amqp://{container.username}:{container.password}@{address}//"


def _redis(options: dict[str, Any]) -> str:
    from testcontainers.community.redis import RedisContainer

    container = RedisContainer(IMAGES["redis"], **options)
    container.start()
    return f"redis://{_address(container, container.port)}/0"


def _kafka(options: dict[str, Any]) -> str:
    from testcontainers.community.kafka import KafkaContainer

    container = KafkaContainer(IMAGES["kafka"], **options)
    container.start()
    return f"kafka://{container.get_bootstrap_server()}"


_STARTS = {"postgres": _postgres, "rabbitmq": _rabbitmq, "redis": _redis, "kafka": _kafka}


def _address(container: Any, port: int) -> str:
    host = container.get_container_host_ip().replace("localhost", "127.0.0.1")
    return f"{host}:{container.get_exposed_port(port)}"


def remove(session: str) -> None:
    """Removes whatever this session left on the daemon."""
    import docker

    if _why_no_docker() is not None:
        return
    client = docker.from_env(timeout=60)
    for container in client.containers.list(all=True, filters={"label": f"{LABEL}={session}"}):
        try:
            container.remove(force=True, v=True)
        except docker.errors.NotFound:
            continue
    client.close()
