"""The partitions that this process has at the moment: who works on them, and which offsets are committed.

A commit never says more than `Partition.settled` does. It may say less: a second's worth of records, and those that
were settled while a partition was taken away, come again elsewhere, and the inbox drops them. One that comes late
does not move another member's offset, as the group's coordinator refuses those of an older generation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any, Final

from confluent_kafka import KafkaException, TopicPartition

from outbox.buses.kafka_topics import told
from outbox.kafka.partition import Partition, Receive, wait_for_all

log = logging.getLogger(__name__)

_ENOUGH: Final = 200
"""A partition of which so many records wait is paused, until half of them are settled."""


class Assignment:
    """Partitions by topic and number. For one thread, beside those that it starts to work on them."""

    def __init__(self, receive: Receive, concurrency: int, batch: int) -> None:
        self._receive = receive
        self._batch = batch
        self._partitions: dict[tuple[str, int], Partition] = {}
        self._ready: SimpleQueue[Partition | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"outbox-consumer-{number}", daemon=True)
            for number in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (partition := self._ready.get()) is not None:
            if partition.work():
                self._ready.put(partition)

    def close(self) -> None:
        """Let the threads end, once they are through with what they have in hand."""
        for _ in self._threads:
            self._ready.put(None)

    # ---- what comes and goes ----

    def add(self, assigned: Iterable[TopicPartition]) -> None:
        for one in assigned:
            partition = Partition(one.topic, one.partition, self._receive, self._batch)
            self._partitions[one.topic, one.partition] = partition
            log.info("%s is read here", partition)

    def remove(self, client: Any, revoked: Iterable[TopicPartition], patience: float) -> None:
        """Finish what is in hand of *revoked*, for *patience* seconds at most, and commit that."""
        gone = self._take_out(revoked)
        busy = wait_for_all(gone, patience)
        if busy:
            log.warning("given up in the middle of a record: %s", ", ".join(map(str, busy)))
        self._commit(client, gone, asynchronous=False)

    def forget(self, lost: Iterable[TopicPartition]) -> None:
        """Somebody else has them already: commit nothing of them."""
        for one in self._take_out(lost):
            log.warning("%s was lost to the group's other members", one)

    def _take_out(self, gone: Iterable[TopicPartition]) -> list[Partition]:
        found = [self._partitions.pop((one.topic, one.partition), None) for one in gone]
        partitions = [one for one in found if one is not None]
        for one in partitions:
            one.take_away()
        return partitions

    @property
    def everything(self) -> list[TopicPartition]:
        return [TopicPartition(*at) for at in self._partitions]

    # ---- what is in them ----

    def take(self, record: Any) -> None:
        """Have *record* settled after those of its partition that came before it."""
        partition = self._partitions.get((record.topic(), record.partition()))
        # None: it was taken away between the library and here.
        if partition is not None and partition.add(record):
            self._ready.put(partition)

    def pause_and_resume(self, client: Any) -> None:
        """Let the library hold back what would only wait here."""
        for one in self._partitions.values():
            is_full = len(one) >= (_ENOUGH // 2 if one.is_paused else _ENOUGH)
            if is_full != one.is_paused:
                change = client.pause if is_full else client.resume
                change([TopicPartition(one.topic, one.number)])
                one.is_paused = is_full

    def commit(self, client: Any) -> None:
        """Commit what is settled by now, without waiting for the answer."""
        self._commit(client, self._partitions.values(), asynchronous=True)

    def _commit(self, client: Any, partitions: Iterable[Partition], *, asynchronous: bool) -> None:
        moved = [(one, one.settled) for one in partitions if one.settled != one.committed]
        offsets = [TopicPartition(one.topic, one.number, at) for one, at in moved if at is not None]
        if not offsets:
            return
        try:
            client.commit(offsets=offsets, asynchronous=asynchronous)
        except KafkaException as error:
            log.warning("offsets not committed, these records come again: %s", told(error))
            return
        for one, at in moved:
            one.committed = at
