"""Collecting messages into batches, each of which is one run of a task in the pool.

A batch is handed to the pool when it is full, or when a process is free and its first message has
waited for 5 ms: the busier the worker is, the more it handles at once. To Celery it is one message:
it is acknowledged after the task has settled all of it, and given back when its process died. Then
each of its messages is handed out again as redelivered, and what is redelivered runs alone: so of a
batch that kills its process only the culprit does it again.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from outbox.celery.acking import ack_together
from outbox.celery.raw import RawBatch, RawMessage
from outbox.celery.task import BATCH_TASK_NAME, TASK_NAME

if TYPE_CHECKING:
    from kombu import Message

Settle = Callable[..., Any]
"""Acknowledges or rejects a message, by way of the thread that owns its connection."""

WAIT: Final = 0.005
"""Seconds that a batch waits for more messages, while a process is free."""
LONGEST_WAIT: Final = 0.1
"""Seconds that it waits in any case."""


class _Held(NamedTuple):
    message: Message
    ack: Settle
    reject: Settle


class Collector:
    """Collects the messages of one connection. A timer's thread may share it."""

    def __init__(
        self,
        size: int,
        processes: int,
        timer: Any,
        service: str,
        *,
        call_soon: Callable[..., Any],
        hand_over: Callable[..., None],
        hand_over_batch: Callable[..., None],
    ) -> None:
        """*hand_over*, *hand_over_batch*: Celery's strategies for the task that takes one message,
        and for the one that takes several. *call_soon*: runs something in the thread that owns the
        connection."""
        self._call_soon = call_soon
        self._size = size
        self._processes = processes
        self._timer = timer
        self._service = service
        self._hand_over = hand_over
        self._hand_over_batch = hand_over_batch
        self._lock = Lock()
        self._held: list[_Held] = []
        self._at_work = 0
        self._callbacks: Any = ()

    def take_in(
        self, message: Message, _: object, ack: Settle, reject: Settle, callbacks: Any
    ) -> None:
        """What Celery's consumer calls with each message."""
        with self._lock:
            self._callbacks = callbacks
            self._held.append(_Held(message, ack, reject))
            count = len(self._held)
        if count >= self._size:
            self._flush()
        elif count == 1:
            self._timer.call_after(WAIT, self._flush_if_one_is_free)
            self._timer.call_after(LONGEST_WAIT, self._flush)

    def _flush_if_one_is_free(self) -> None:
        if self._at_work < self._processes:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            held, self._held = self._held, []
            if not held:
                return
            self._at_work += 1

        def ack_all(logger: Any, errors: tuple[type[BaseException], ...]) -> None:
            *others, last = held
            self._call_soon(ack_together, [one.message for one in others], errors)
            last.ack(logger, errors)  # by Celery's own way, which also looks after its prefetch
            self._ended()

        def reject_all(*arguments: Any) -> None:
            for one in held:
                one.reject(*arguments)
            self._ended()

        if len(held) == 1:
            raw: RawMessage | RawBatch = RawMessage(held[0].message, TASK_NAME, self._service)
            hand_over = self._hand_over
        else:
            raw = RawBatch([one.message for one in held], BATCH_TASK_NAME, self._service)
            hand_over = self._hand_over_batch
        hand_over(raw, None, ack_all, reject_all, self._callbacks)

    def _ended(self) -> None:
        with self._lock:
            self._at_work -= 1
        # Not from within the acknowledgement, which the next batch could make fail, and not any more
        # in a shutdown, when results still come and timers do not.
        self._timer.call_after(0, self._flush_if_one_is_free)
