"""The one task: `outbox.receive`."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from celery import Task
from celery.exceptions import Reject

from outbox.celery.wire import read_body
from outbox.crash_points import crash_point
from outbox.errors import ConfigurationError, MalformedMessage
from outbox.receive import NotSettled, Receipt

if TYPE_CHECKING:
    from outbox.receive import Receiver

log = logging.getLogger(__name__)

TASK_NAME: Final = "outbox.receive"
_PAUSE: Final = 1.0


class ReceiveTask(Task):  # type: ignore[type-arg]
    """Hands a message's bytes to the receiver. Returns once all of it is settled."""

    name = TASK_NAME
    Strategy = "outbox.celery.strategy:strategy"
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
    allow_eager = False

    def run(
        self,
        body: bytes | str,
        handler: str | None = None,
        key_seq: int | None = None,
        wire: dict[str, Any] | None = None,
    ) -> str:
        """*body*: a message's raw body, with *wire* saying how it came; else an envelope's text."""
        try:
            receipt = self._receive(body, handler, key_seq, wire)
        except NotSettled as error:
            log.warning("message given back to its queue: %s", error)
            raise Reject(str(error), requeue=True) from error
        except ConfigurationError:
            raise
        except Exception as error:
            # Acknowledging it would lose it, whatever this is. The pause is for the broker's sake,
            # which hands it out again at once.
            log.exception("message given back to its queue")
            time.sleep(_PAUSE)
            raise Reject(repr(error), requeue=True) from error
        crash_point("receive.before_ack")
        return str(receipt)

    def _receive(
        self,
        body: bytes | str,
        handler: str | None,
        key_seq: int | None,
        wire: dict[str, Any] | None,
    ) -> Receipt:
        if wire is None:
            return self._receive_eagerly(body, handler, key_seq)
        raw = body.encode() if isinstance(body, str) else body
        if wire["refused"] is not None:
            return self.receiving.quarantine(raw, wire["refused"], wire["headers"])
        limits = self.receiving.settings.limits
        try:
            read = read_body(raw, wire["content_type"], limits)
        except MalformedMessage as error:
            return self.receiving.quarantine(raw, str(error), wire["headers"])
        return self.receiving.receive(
            read.envelope,
            handler=read.handler,
            key_seq=read.key_seq,
            redelivered=bool((self.request.delivery_info or {}).get("redelivered")),
            headers=wire["headers"],
        )

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
