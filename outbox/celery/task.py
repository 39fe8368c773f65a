"""The tasks of a worker: `outbox.receive`, and `outbox.receive_batch` for several messages at once."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from celery import Task
from celery.exceptions import Reject

from outbox.celery.wire import read_body
from outbox.crash_points import crash_point
from outbox.errors import ConfigurationError, MalformedMessage
from outbox.intake import Incoming
from outbox.receive import NotSettled, Receipt

if TYPE_CHECKING:
    from outbox.receive import Receiver

log = logging.getLogger(__name__)

TASK_NAME: Final = "outbox.receive"
BATCH_TASK_NAME: Final = "outbox.receive_batch"
_PAUSE: Final = 1.0


class _SettlingTask(Task):  # type: ignore[type-arg]
    """A task that returns once all it was given is settled; only then is that acknowledged."""

    Request = "outbox.celery.strategy:EventRequest"
    acks_late = True
    reject_on_worker_lost = True
    acks_on_failure_or_timeout = False
    acks_on_failure = False
    acks_on_timeout = False
    ignore_result = True
    store_errors_even_if_ignored = False
    track_started = False
    serializer = "json"
    max_retries = 0
    typing = False

    receiving: Receiver


class ReceiveTask(_SettlingTask):
    """Hands a message's bytes to the receiver."""

    name = TASK_NAME
    Strategy = "outbox.celery.strategy:strategy"

    allow_eager = False

    def run(
        self,
        body: bytes | str,
        handler: str | None = None,
        key_seq: int | None = None,
        wire: dict[str, Any] | None = None,
    ) -> str:
        """*body*: a message's raw body, with *wire* saying how it came; else an envelope's text."""
        with _given_back_unless_settled():
            if wire is None:
                receipt = self._receive_eagerly(body, handler, key_seq)
            else:
                message = _read_or_quarantine(self.receiving, body, wire)
                receipt = (
                    message if isinstance(message, Receipt) else self.receiving.take_in(message)
                )
        crash_point("receive.before_ack")
        return str(receipt)

    def _receive_eagerly(
        self, body: bytes | str, handler: str | None, key_seq: int | None
    ) -> Receipt:
        if not self.allow_eager:
            raise ConfigurationError(
                "outbox.receive was called without a worker (task_always_eager?): that takes away "
                "redelivery and hides failures; only tests may, with setup(..., allow_eager=True)"
            )
        envelope = body.encode() if isinstance(body, str) else body
        return self.receiving.receive(envelope, handler=handler, key_seq=key_seq)


class ReceiveBatchTask(_SettlingTask):
    """Hands the bytes of several messages to the receiver (see `outbox.celery.batching`)."""

    name = BATCH_TASK_NAME

    def run(self, messages: list[tuple[bytes, dict[str, Any]]]) -> str:
        """*messages*: raw bodies, each with how it came."""
        with _given_back_unless_settled():
            read = [_read_or_quarantine(self.receiving, body, wire) for body, wire in messages]
            incoming = [one for one in read if isinstance(one, Incoming)]
            receipts = self.receiving.take_in_batch(incoming)
        crash_point("receive.before_ack")
        counts = Counter(str(receipt) for receipt in receipts)
        return "; ".join(f"{count} x {receipt}" for receipt, count in counts.most_common())


def _read_or_quarantine(
    receiver: Receiver, body: bytes | str, wire: dict[str, Any]
) -> Incoming | Receipt:
    raw = body.encode() if isinstance(body, str) else body
    if wire["refused"] is not None:
        return receiver.quarantine(raw, wire["refused"], wire["headers"])
    try:
        read = read_body(raw, wire["content_type"], receiver.settings.limits)
    except MalformedMessage as error:
        return receiver.quarantine(raw, str(error), wire["headers"])
    return Incoming(read.envelope, read.handler, read.key_seq, wire["redelivered"], wire["headers"])


@contextmanager
def _given_back_unless_settled() -> Iterator[None]:
    try:
        yield
    except NotSettled as error:
        log.warning("given back to its queue: %s", error)
        raise Reject(str(error), requeue=True) from error
    except ConfigurationError:
        raise
    except Exception as error:
        # Acknowledging it would lose it, whatever this is. The pause is for the broker's sake,
        # which hands it out again at once.
        log.exception("given back to its queue")
        time.sleep(_PAUSE)
        raise Reject(repr(error), requeue=True) from error
