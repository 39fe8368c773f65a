"""librdkafka's own mock of a Kafka cluster: brokers on ports of this process, and faults on demand.

It has topics (made when first asked for, with four partitions), groups, offsets and idempotent producers. It has no
admin requests, so topics cannot be made through it, and nothing of it outlives `close`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import confluent_kafka

PRODUCE = 0
"""The number of the request in Kafka's protocol."""


@cache
def _library() -> ctypes.CDLL:
    """The librdkafka that the Python client brings with it."""
    package = Path(confluent_kafka.__file__).parent
    found = [
        *package.parent.glob("confluent_kafka.libs/librdkafka*"),
        *package.glob(".dylibs/librdkafka*"),
    ]
    library = ctypes.CDLL(str(found[0]))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, arguments in (
        ("conf_new", pointer, []),
        ("conf_set", number, [pointer, text, text, text, ctypes.c_size_t]),
        ("new", pointer, [number, pointer, text, ctypes.c_size_t]),
        ("destroy", None, [pointer]),
        ("mock_cluster_new", pointer, [pointer, number]),
        ("mock_cluster_destroy", None, [pointer]),
        ("mock_cluster_bootstraps", text, [pointer]),
        ("mock_topic_create", number, [pointer, text, number, number]),
        ("mock_push_request_errors_array", None, [pointer, ctypes.c_int16, ctypes.c_size_t, pointer]),
        ("mock_broker_set_down", number, [pointer, ctypes.c_int32]),
        ("mock_broker_set_up", number, [pointer, ctypes.c_int32]),
        ("mock_group_initial_rebalance_delay_ms", None, [pointer, ctypes.c_int32]),
    ):  # fmt: skip
        function = getattr(library, f"rd_kafka_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class MockKafka:
    """A cluster. Its numbers of errors are Kafka's own."""

    def __init__(self, brokers: int = 1) -> None:
        self._call = _library()
        said = ctypes.create_string_buffer(512)
        settings = self._call.rd_kafka_conf_new()
        self._call.rd_kafka_conf_set(settings, b"log_level", b"2", said, len(said))
        self._client = self._call.rd_kafka_new(0, settings, said, len(said))
        assert self._client, said.value
        self._cluster = self._call.rd_kafka_mock_cluster_new(self._client, brokers)
        self._call.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 100)
        self._brokers = range(1, brokers + 1)
        self.servers: str = self._call.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    @property
    def url(self) -> str:
        return f"kafka://{self.servers}/?create_topics=false"

    def close(self) -> None:
        self._call.rd_kafka_mock_cluster_destroy(self._cluster)
        self._call.rd_kafka_destroy(self._client)

    def create_topic(self, name: str, partitions: int) -> None:
        assert (
            self._call.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1) == 0
        )

    def refuse(self, request: int, *errors: int) -> None:
        """Answer the next requests of that kind with these errors, one each."""
        array = (ctypes.c_int * len(errors))(*errors)
        self._call.rd_kafka_mock_push_request_errors_array(
            self._cluster, request, len(errors), array
        )

    @contextmanager
    def down(self) -> Iterator[None]:
        """No broker can be reached."""
        for broker in self._brokers:
            assert self._call.rd_kafka_mock_broker_set_down(self._cluster, broker) == 0
        yield
        for broker in self._brokers:
            assert self._call.rd_kafka_mock_broker_set_up(self._cluster, broker) == 0
