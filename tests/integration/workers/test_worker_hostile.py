"""Anything may stand in the queue: it is kept for a person, and the worker lives on."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import celery_message
from outbox.ids import new_id
from tests.workers import Billing, Worker, eventually

RECEIVE = {"task": "outbox.receive", "id": "0191d1a6-5c37-7c1f-9f5e-3f6a1f0c8a55"}


@pytest.fixture(scope="module")
def worker(billing: Billing) -> Worker:
    return billing.worker()


class Bomb:
    """Unpickled, it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("open('/tmp/outbox-was-unpickled', 'w')",))


@dataclass
class Hostile:
    body: bytes
    reason: str
    headers: dict[str, Any] = field(default_factory=lambda: dict(RECEIVE))
    content_type: str = "application/json"
    content_encoding: str = "utf-8"


def event_with(**changes: Any) -> bytes:
    """The body of a well-formed message whose envelope is not what it should be."""
    envelope = {
        "specversion": "1.0",
        "id": str(new_id()),
        "source": "orders",
        "type": "order.placed",
        "eventversion": 1,
        "time": "2026-01-01T00:00:00Z",
        "data": {"order": "hostile"},
    }
    return json.dumps([[json.dumps(envelope | changes)], {}, {}]).encode()


HOSTILE = {
    "empty": Hostile(b"", "no JSON"),
    "not JSON": Hostile(b"garbage", "no JSON"),
    "cut off": Hostile(b'[["{\\"spec', "no JSON"),
    "no UTF-8": Hostile(b'[["\xff\xfe"], {}, {}]', "no JSON"),
    "half a surrogate": Hostile(rb'[["\ud800"], {}, {}]', "no JSON"),
    "wrong shape": Hostile(b'{"args": [], "kwargs": {}}', "not [[envelope]"),
    "wrong argument": Hostile(b"[[5], {}, {}]", "not [[envelope]"),
    "wrong keyword": Hostile(b'[["{}"], {"handler": 5}, {}]', "of another type"),
    "no event": Hostile(b'[["{}"], {}, {}]', "specversion"),
    "NUL": Hostile(event_with(data={"order": "a\x00b"}), "NUL"),
    "deep": Hostile(json.dumps([["[" * 100_000], {}, {}]).encode(), "nests"),
    "huge number": Hostile(event_with(data={"order": 10**1_000}), "number of"),
    "unknown type": Hostile(event_with(type="order.stolen"), "no handler"),
    "unknown version": Hostile(event_with(eventversion=99), "version 99"),
    "wrong payload": Hostile(event_with(data={"order": []}), "order: Input should be"),
    "huge": Hostile(json.dumps([["x" * 3_000_000], {}, {}]).encode(), "the limit is 1,048,576"),
    "a pickle": Hostile(pickle.dumps(Bomb()), "no JSON"),
    "a pickle that says so": Hostile(
        pickle.dumps([[Bomb()], {}, {}]),
        "only JSON is read",
        content_type="application/x-python-serialize",
        content_encoding="binary",
    ),
    "YAML": Hostile(b"!!python/object:x {}", "only JSON", content_type="application/x-yaml"),
    "no headers": Hostile(event_with(data={"order": "no headers"}), "names no task", headers={}),
    "unknown task": Hostile(
        event_with(data={"order": "unknown task"}),
        "names the task 'os.system'",
        headers={"task": "os.system", "id": "1"},
    ),
    "a task that is no text": Hostile(
        event_with(data={"order": "no text"}), "names no task", headers={"task": ["a"], "id": {}}
    ),
    "a known task without an id": Hostile(
        event_with(data={"order": "no id"}),
        "Celery could not take it in",
        headers={"task": "billing.other"},
    ),
    "an old Celery message": Hostile(
        json.dumps({"task": "billing.bill", "id": "1", "args": [], "kwargs": {}}).encode(),
        "names no task",
        headers={},
    ),
    "a compression bomb": Hostile(
        zlib.compress(bytes(200_000_000)),
        "unpacks to more than 67,108,864 bytes",
        headers={**RECEIVE, "compression": "application/x-gzip"},
    ),
    "not what it is compressed as": Hostile(
        b"no gzip", "could not be decoded", headers={**RECEIVE, "compression": "application/x-gzip"}
    ),
}


@pytest.fixture(scope="module")
def flooded(billing: Billing, worker: Worker) -> Worker:
    """The worker after all of it, each hostile message between two good ones."""
    for name, hostile in HOSTILE.items():
        billing.send(billing.placed(f"before-{name}"))
        billing.publish(
            hostile.body,
            headers=hostile.headers,
            content_type=hostile.content_type,
            content_encoding=hostile.content_encoding,
        )
        billing.send(billing.placed(f"after-{name}"))
    return worker


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_quarantined_between_two_good_ones(
    billing: Billing, flooded: Worker, name: str
) -> None:
    good = {f"before-{name}", f"after-{name}"}
    eventually(lambda: good <= set(billing.effects), explain=lambda: flooded.log[-4_000:])
    eventually(lambda: quarantined(billing, HOSTILE[name]), explain=lambda: flooded.log[-4_000:])
    assert flooded.is_alive


# ---- what would be acted upon, if Celery read it ----


@pytest.mark.parametrize(
    "headers",
    [
        {"eta": "2099-01-01T00:00:00+00:00"},
        {"eta": {"no": "time"}},
        {"expires": "2001-01-01T00:00:00+00:00"},
        {"timelimit": [0.001, 0.001]},
        {"id": None},
        {"id": "not\nan id\x1b[31m"},
        {"shadow": "forged\nlog line"},
        {"group": [1], "retries": "many", "stamped_headers": 5, "chord": {"task": "x"}},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_headers_that_celery_would_act_upon_are_passed_over(
    billing: Billing, worker: Worker, headers: dict[str, Any]
) -> None:
    envelope = billing.placed(f"headers-{json.dumps(headers)}")
    order = json.loads(envelope.body)["data"]["order"]
    message = _message(envelope)
    billing.publish(message.body, headers={**message.headers, **headers})

    eventually(lambda: order in billing.effects, explain=lambda: worker.log[-4_000:])
    assert "\nforged" not in worker.log
    assert "\nlog line" not in worker.log


def test_callbacks_in_a_message_are_not_run(billing: Billing, worker: Worker) -> None:
    envelope = billing.placed("with callbacks")
    other = {"task": "billing.other", "args": ["x"], "kwargs": {}, "options": {"task_id": "evil"}}
    embed = {"callbacks": [other], "errbacks": [other], "chain": [other], "chord": other}
    billing.publish(
        json.dumps([[envelope.body.decode()], {}, embed]), headers=_message(envelope).headers
    )
    billing.send(billing.placed("after callbacks"))

    eventually(lambda: {"with callbacks", "after callbacks"} <= set(billing.effects))
    assert "billing.other[evil]" not in worker.log


# ---- Redis alone: what is no message at all ----

RAW: dict[str, Callable[[], bytes]] = {
    "garbage": lambda: b"\x00\xff garbage",
    "JSON that is no message": lambda: b'{"hello": "world"}',
    "a number": lambda: b"5",
    "deep": lambda: b"[" * 100_000,
    "without properties": lambda: json.dumps({"body": "e30=", "headers": {}}).encode(),
    "headers that are a list": lambda: _raw(headers=[]),
    "a body that is no base64": lambda: _raw(body="!"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_message_in_a_redis_list_is_quarantined(
    billing: Billing, worker: Worker, broker_url: str, name: str
) -> None:
    if not broker_url.startswith("redis"):
        pytest.skip("only Redis keeps whatever is pushed")
    raw = RAW[name]()
    with redis.Redis.from_url(broker_url) as client:
        client.lpush(billing.queue, raw)
    billing.send(billing.placed(f"after raw {name}"))

    eventually(lambda: f"after raw {name}" in billing.effects, explain=lambda: worker.log[-4_000:])
    eventually(lambda: _is_quarantined(billing, raw))
    assert worker.is_alive


def test_after_all_of_it_nothing_is_left_in_the_queue_and_nothing_was_run(
    billing: Billing, worker: Worker
) -> None:
    eventually(lambda: billing.queued() == 0)
    assert "hostile" not in billing.effects
    assert worker.terminate() == 0
    assert billing.queued() == 0


def quarantined(billing: Billing, hostile: Hostile) -> list[Any]:
    return billing.rows(
        "SELECT 1 FROM outbox.quarantine WHERE reason LIKE :reason", reason=f"%{hostile.reason}%"
    )


def _is_quarantined(billing: Billing, raw: bytes) -> list[Any]:
    return billing.rows("SELECT 1 FROM outbox.quarantine WHERE body = :raw", raw=raw)


def _message(envelope: Any) -> Any:
    return celery_message(
        OutgoingMessage(str(envelope.id), envelope.type, envelope.key, envelope.body, 0, 0)
    )


def _raw(**changes: Any) -> bytes:
    message = {
        "body": base64.b64encode(event_with(data={"order": "raw"})).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": RECEIVE,
        "properties": {
            "delivery_tag": "1",
            "delivery_info": {"exchange": "", "routing_key": ""},
            "body_encoding": "base64",
        },
    }
    return json.dumps(message | changes).encode()
