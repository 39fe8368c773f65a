"""One partition: offsets move only past what is settled, in order, whatever is thrown in between."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from outbox.kafka import partition as module
from outbox.kafka.partition import Partition
from outbox.receive import NotSettled, Outcome, Receipt


@dataclass
class Record:
    number: int

    def offset(self) -> int:
        return self.number


@dataclass
class Receiver:
    """Answers each record as told, else with *outcome*, and remembers what it was given."""

    outcome: Outcome = Outcome.HANDLED
    answers: dict[int, list[Any]] = field(default_factory=dict)
    given: list[tuple[int, bool]] = field(default_factory=list)

    def __call__(self, records: list[Record], *, redelivered: bool) -> list[Receipt | None]:
        return [self._answer(one, redelivered) for one in records]

    def _answer(self, record: Record, redelivered: bool) -> Receipt | None:
        self.given.append((record.number, redelivered))
        waiting = self.answers.get(record.number)
        answer = waiting.pop(0) if waiting else self.outcome
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer()
            answer = self.outcome
        return Receipt(outcomes={"h": answer}) if isinstance(answer, Outcome) else answer


def partition_of(receiver: Receiver, *numbers: int, batch: int = 1) -> Partition:
    made = Partition("events.order", 0, receiver, batch)
    for number in numbers:
        made.add(Record(number))
    return made


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)


def test_settled_follows_the_records_one_by_one() -> None:
    partition: Partition
    seen: list[int | None] = []
    receiver = Receiver(answers={n: [lambda: seen.append(partition.settled)] for n in (3, 4, 7)})
    partition = partition_of(receiver, 3, 4, 7)
    assert partition.settled is None
    assert not partition.work()
    assert (seen, partition.settled) == ([None, 4, 5], 8)


@pytest.mark.parametrize(
    "error", [NotSettled("away"), RuntimeError("a bug"), SystemExit(1)], ids=repr
)
def test_what_cannot_be_settled_is_tried_again_and_not_passed(error: BaseException) -> None:
    receiver = Receiver(answers={4: [error, error]})
    partition = partition_of(receiver, 3, 4, 5)
    partition.work()
    assert [number for number, _ in receiver.given] == [3, 4, 4, 4, 5]
    assert partition.settled == 6


def test_a_partition_taken_away_leaves_the_unsettled_record_to_the_next_owner() -> None:
    partition: Partition
    receiver = Receiver(answers={4: [NotSettled("away"), NotSettled("away")]})
    partition = partition_of(receiver, 3, 4, 5)
    receiver.answers[4].insert(0, lambda: partition.take_away() or pytest.fail("not settled"))
    partition.work()
    assert partition.settled == 4
    assert partition.await_rest(0)
    assert not partition.work()
    assert receiver.given[-1][0] == 4


def test_the_record_in_hand_is_waited_for_when_a_partition_is_taken_away() -> None:
    inside, go_on = threading.Event(), threading.Event()
    partition = partition_of(Receiver(answers={3: [lambda: (inside.set(), go_on.wait(10))]}), 3, 4)
    thread = threading.Thread(target=partition.work)
    thread.start()
    assert inside.wait(10)
    partition.take_away()
    assert not partition.await_rest(0)
    go_on.set()
    assert partition.await_rest(10)
    thread.join()
    assert partition.settled == 4


def test_records_count_as_handed_out_before_until_one_was_acted_on() -> None:
    duplicate: list[Any] = [Outcome.DUPLICATE]
    receiver = Receiver(
        answers={1: duplicate, 2: [Receipt(refused="?")], 3: [None], 4: [Outcome.OWED]}
    )
    partition_of(receiver, 1, 2, 3, 4, 5, 6).work()
    assert receiver.given == [(n, True) for n in (1, 2, 3, 4, 5)] + [(6, False)]


def test_a_record_that_raised_counts_as_handed_out_before() -> None:
    receiver = Receiver(answers={2: [RuntimeError("a bug")]})
    partition_of(receiver, 1, 2, 3).work()
    assert receiver.given == [(1, True), (2, False), (2, True), (3, False)]


def test_records_are_taken_together_once_none_of_them_may_have_killed_a_worker() -> None:
    sizes: list[int] = []
    receiver = Receiver(answers={1: [Outcome.DUPLICATE], 5: [RuntimeError("a bug")]})

    def receive(records: list[Record], *, redelivered: bool) -> list[Receipt | None]:
        sizes.append(len(records))
        assert not (redelivered and len(records) > 1)
        return receiver(records, redelivered=redelivered)

    partition = Partition("events.order", 0, receive, batch=3)
    for number in range(1, 10):
        partition.add(Record(number))
    partition.work()
    # 1 was settled before; 2 to 4 may have been a dead worker's batch; the next one fails at 5
    assert sizes == [1, 1, 1, 1, 3, 1, 1, 1, 2]
    assert partition.settled == 10


def test_one_thread_at_a_time_is_in_a_partition() -> None:
    """A thread is found for it exactly when nobody is in it, and no record is left without one."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        receiver = Receiver()
        partition = Partition("events.order", 0, receiver)

        def work() -> None:
            while partition.work():
                pass

        threads: list[threading.Thread] = []
        for number in range(2_000):
            if partition.add(Record(number)):
                threads.append(threading.Thread(target=work))
                threads[-1].start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert [number for number, _ in receiver.given] == list(range(2_000))
    assert partition.settled == 2_000
    assert len(partition) == 0
