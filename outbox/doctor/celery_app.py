"""Is this Celery app set up so that no event is lost or taken twice behind our back?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from outbox.doctor.finding import Answer, Check, Finding, fail, ok, run, warn

if TYPE_CHECKING:
    from celery import Celery

RECEIVE: Final = "outbox.receive"
_JSON: Final = {"json", "application/json"}
_SETUP: Final = "call outbox.celery.setup(app, service, ...) where the app is made"
_MUCH_PREFETCH: Final = 16


def examine_app(app: Celery) -> Iterator[Finding]:
    """Make all checks on *app*'s settings; nothing is sent and no connection is opened."""
    app.loader.import_default_modules()
    app.finalize()
    return run(CHECKS, app)


def receive_task(app: Any) -> Answer:
    task = app.tasks.get(RECEIVE)
    if task is None:
        return fail(f"the app has no task {RECEIVE!r}: events would be discarded", _SETUP)
    if not task.acks_late:
        return fail(
            "acks_late is off: an event is taken off the queue before it is handled",
            f"set acks_late on {RECEIVE!r}; {_SETUP}",
        )
    if not task.reject_on_worker_lost:
        return fail(
            "reject_on_worker_lost is off: an event whose worker is killed is gone",
            f"set reject_on_worker_lost on {RECEIVE!r}; {_SETUP}",
        )
    if task.acks_on_failure_or_timeout:
        return fail(
            "acks_on_failure_or_timeout is on: an event that runs into its time limit is gone",
            f"turn it off on {RECEIVE!r}; {_SETUP}",
        )
    return ok("acks_late, reject_on_worker_lost, no ack on failure or timeout")


def consumer(app: Any) -> Answer:
    from celery.worker.consumer import Consumer
    from kombu.utils.imports import symbol_by_name

    used = symbol_by_name(app.conf.worker_consumer or "celery.worker.consumer:Consumer")
    if used is Consumer:
        return fail(
            "worker_consumer is Celery's own, which discards what it cannot read",
            f"leave worker_consumer as it is set up; {_SETUP}",
        )
    return ok(f"{used.__module__}.{used.__name__}")


def accepted_content(app: Any) -> Answer:
    accepted = {str(each) for each in app.conf.accept_content or ()}
    if accepted - _JSON:
        return fail(
            f"accept_content lets in {', '.join(sorted(accepted - _JSON))}: "
            "whoever can write to the queue could run code",
            'app.conf.accept_content = ["json"]',
        )
    return ok("json only")


def serializers(app: Any) -> Answer:
    other = [
        f"{name}={value}"
        for name in ("task_serializer", "result_serializer", "event_serializer")
        if (value := getattr(app.conf, name)) not in _JSON
    ]
    if other:
        return fail(", ".join(other), "set them to json: no other service could read the rest")
    return ok("json")


def eager_mode(app: Any) -> Answer:
    if app.conf.task_always_eager:
        return fail("task_always_eager is on: nothing reaches a queue", "turn it off outside tests")
    return ok("off")


def durable_queues(app: Any) -> Answer:
    queues = [each for each in (app.conf.task_queues or ()) if hasattr(each, "durable")]
    passing = [each.name for each in queues if not each.durable or each.auto_delete]
    if passing:
        return fail(f"gone after a restart: {', '.join(passing)}", "declare them durable")
    return ok(", ".join(each.name for each in queues) or "the default queue")


def prefetch(app: Any) -> Answer:
    multiplier = app.conf.worker_prefetch_multiplier
    if multiplier == 0:
        return fail(
            "worker_prefetch_multiplier is 0: one worker takes the whole queue into its memory",
            "set it to 1",
        )
    if multiplier > _MUCH_PREFETCH:
        return warn(
            f"worker_prefetch_multiplier is {multiplier}: slow events keep others waiting",
            "set it to 1 to 4",
        )
    return ok(str(multiplier))


def visibility(app: Any) -> Answer:
    url = str(app.conf.broker_url or "")
    if not url.startswith(("redis", "rediss")):
        return ok("only a matter for Redis")
    timeout = (app.conf.broker_transport_options or {}).get("visibility_timeout", 3600)
    limit = app.conf.task_time_limit
    if limit is None:
        return warn(
            f"no task_time_limit: a handler that runs over {timeout} s is delivered again",
            "set task_time_limit well below the visibility_timeout",
        )
    if limit >= timeout:
        return fail(
            f"task_time_limit {limit} s is not below visibility_timeout {timeout} s",
            "raise the one or lower the other: a running event is given to a second worker",
        )
    return ok(f"task_time_limit {limit} s, visibility_timeout {timeout} s")


CHECKS: Final[tuple[Check[Any], ...]] = (
    ("celery: receive task", receive_task),
    ("celery: consumer", consumer),
    ("celery: accepted content", accepted_content),
    ("celery: serializers", serializers),
    ("celery: eager mode", eager_mode),
    ("celery: durable queues", durable_queues),
    ("celery: prefetch", prefetch),
    ("celery: visibility timeout", visibility),
)
