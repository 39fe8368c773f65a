"""Receiving when things end in the middle: deadlocks, lost connections, commits without an answer.

Whatever ends where, the effect is there once and no committed delivery is called a failure.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.orm import Session

from outbox.receive import Outcome, ReceiveSettings
from outbox.service import Delivery, RetryPolicy
from outbox.work import TransactionLimits
from tests.receiving import NotSettled, Placed, Subscriber

BILL = "billing.bill"
IMPATIENT = ReceiveSettings(patience=timedelta(seconds=0.3))


class Interrupted(Exception):
    """Raised from outside, as a soft time limit is."""


@pytest.fixture
def billing(migrated_engine: Engine) -> Subscriber:
    return Subscriber(migrated_engine)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def once(action: Callable[..., Any]) -> Callable[..., Any]:
    """*action* the first time, nothing after it."""
    left = [action]

    def first_time(*args: Any) -> None:
        if left:
            left.pop()(*args)

    return first_time


def end_connection(session: Session, by: Subscriber) -> None:
    pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    by.run("SELECT pg_terminate_backend(:pid)", pid=pid)


# ---- conflicts between transactions ----


def test_a_deadlock_is_tried_again_until_both_have_their_effect(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    billing.run("CREATE TABLE account (name text PRIMARY KEY, sum int)")
    billing.run("INSERT INTO account VALUES ('a', 0), ('b', 0)")
    both_hold_one = threading.Barrier(2)
    meet = {"a": once(lambda: both_hold_one.wait(10)), "b": once(lambda: both_hold_one.wait(10))}

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        first, second = event.order, {"a": "b", "b": "a"}[event.order]
        for name in (first, second):
            session.execute(
                text("UPDATE account SET sum = sum + 1 WHERE name = :name"), {"name": name}
            )
            if name == first:
                meet[first]()

    receipts = list(pool.map(billing.receive, [billing.placed("a"), billing.placed("b")]))

    assert [receipt.outcomes for receipt in receipts] == [{BILL: Outcome.HANDLED}] * 2
    assert {row.sum for row in billing.rows("SELECT sum FROM account")} == {2}
    assert billing.owed == []


def test_a_serialization_failure_is_tried_again(
    billing: Subscriber, make_engine: Callable[..., Engine]
) -> None:
    billing.run("CREATE TABLE account (sum int)")
    billing.run("INSERT INTO account VALUES (0)")
    strict = make_engine(
        billing.engine.url.render_as_string(hide_password=False),
        isolation_level="REPEATABLE READ",
    )
    interfere = once(lambda: billing.run("UPDATE account SET sum = sum + 10"))

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        session.execute(text("SELECT sum FROM account"))
        interfere()
        session.execute(text("UPDATE account SET sum = sum + 1"))

    receipt = billing.receiver(engine=strict).receive(billing.placed().body)

    assert receipt.outcomes == {BILL: Outcome.HANDLED}
    assert billing.rows("SELECT sum FROM account")[0].sum == 11


def test_a_deadlock_wrapped_by_the_handler_is_still_one(billing: Subscriber) -> None:
    from sqlalchemy.exc import OperationalError

    class Deadlock(Exception):
        sqlstate = "40P01"

    def deadlock() -> None:
        raise RuntimeError("could not book") from OperationalError("", None, Deadlock())

    fail = once(deadlock)

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        fail()
        billing.effect(session, "billed")

    assert billing.receive(billing.placed()).outcomes == {BILL: Outcome.HANDLED}
    assert billing.effects == ["billed"]


def test_a_conflict_that_does_not_pass_counts_as_a_failure(billing: Subscriber) -> None:
    runs: list[int] = []

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        runs.append(1)
        session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    assert billing.receive(billing.placed()).outcomes == {BILL: Outcome.RETRY}
    assert len(runs) == ReceiveSettings().tries


# ---- two workers at one delivery ----


def test_a_copy_waits_for_the_one_that_is_running_and_is_then_a_duplicate(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    running, go_on = threading.Event(), threading.Event()

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        running.set()
        go_on.wait(10)
        billing.effect(session, "billed")

    envelope = billing.placed()
    first = pool.submit(billing.receive, envelope)
    assert running.wait(10)
    second = pool.submit(billing.receive, envelope)
    _until_somebody_waits_for_a_lock(billing)
    go_on.set()

    assert first.result().outcomes == {BILL: Outcome.HANDLED}
    assert second.result().outcomes == {BILL: Outcome.DUPLICATE}
    assert billing.effects == ["billed"]


def test_a_copy_runs_when_the_one_before_it_is_rolled_back(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    running, go_on = threading.Event(), threading.Event()

    def fail_late() -> None:
        running.set()
        go_on.wait(10)
        raise SystemExit  # as in a cold shutdown

    fail = once(fail_late)

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        fail()
        billing.effect(session, "billed")

    envelope = billing.placed()
    first = pool.submit(billing.receive, envelope)
    assert running.wait(10)
    second = pool.submit(billing.receive, envelope)
    _until_somebody_waits_for_a_lock(billing)
    go_on.set()

    assert isinstance(first.exception(), SystemExit)
    assert second.result().outcomes == {BILL: Outcome.HANDLED}
    assert billing.effects == ["billed"]


def test_a_copy_does_not_wait_long_but_comes_back_later(billing: Subscriber) -> None:
    limits = TransactionLimits(lock=timedelta(milliseconds=50))
    billing.settings = ReceiveSettings(transaction=limits)
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()
    with Session(billing.engine) as paused, paused.begin():
        paused.execute(
            text("INSERT INTO outbox.inbox (event_id, handler, digest) VALUES (:id, :h, :d)"),
            {"id": envelope.id, "h": BILL, "d": envelope.digest},
        )
        assert billing.receive(envelope).outcomes == {BILL: Outcome.BUSY}
        assert billing.receive(envelope, handler=BILL).outcomes == {BILL: Outcome.BUSY}

    assert [owed.attempts for owed in billing.owed] == [0]
    assert billing.receive(envelope, handler=BILL).outcomes == {BILL: Outcome.DUPLICATE}
    assert billing.owed == []


def test_a_paused_worker_is_ended_and_has_no_effect_when_it_wakes_up(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    limits = TransactionLimits(lock=timedelta(seconds=10), idle=timedelta(milliseconds=200))
    billing.settings = ReceiveSettings(transaction=limits)
    paused, wake_up = threading.Event(), threading.Event()

    def pause() -> None:
        paused.set()
        wake_up.wait(10)

    pause_first = once(pause)
    seen: list[int] = []

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        seen.append(1)
        pause_first()
        billing.effect(session, "billed")

    envelope = billing.placed()
    zombie = pool.submit(billing.receive, envelope)
    assert paused.wait(10)
    assert billing.receive(envelope).outcomes == {BILL: Outcome.HANDLED}
    wake_up.set()

    assert zombie.result().outcomes == {BILL: Outcome.DUPLICATE}
    assert (billing.effects, billing.owed, len(seen)) == (["billed"], [], 2)


def test_a_handler_that_is_always_too_slow_is_parked_and_not_run_for_ever(
    billing: Subscriber,
) -> None:
    limits = TransactionLimits(idle=timedelta(milliseconds=50))
    billing.settings = ReceiveSettings(transaction=limits)
    runs: list[int] = []

    @billing.service.on(Placed, retry=RetryPolicy(attempts=1))
    def bill(event: Placed, session: Session) -> None:
        runs.append(1)
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        _until_gone(billing, pid)
        session.execute(text("SELECT 1"))

    assert billing.receive(billing.placed()).outcomes == {BILL: Outcome.PARKED}
    assert "idle-in-transaction timeout" in billing.dead[0].error
    assert len(runs) == 1


# ---- lost connections ----


def test_a_connection_lost_in_the_handler_is_made_anew(billing: Subscriber) -> None:
    lose = once(lambda session: end_connection(session, billing))

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        billing.effect(session, "billed")
        lose(session)
        session.execute(text("SELECT 1"))

    assert billing.receive(billing.placed()).outcomes == {BILL: Outcome.HANDLED}
    assert billing.effects == ["billed"]


def test_a_connection_lost_while_idle_in_the_pool_is_not_noticed_by_anyone(
    billing: Subscriber,
) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    billing.receive(billing.placed())
    billing.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    assert billing.receive(billing.placed("o2")).outcomes == {BILL: Outcome.HANDLED}
    assert billing.effects == ["billed", "billed"]


# ---- commits that say nothing ----


class Lost(Exception):
    """Stands for what ends the commit on the client's side."""


@pytest.fixture(params=["before the commit", "after the commit"])
def lose_answer(
    request: pytest.FixtureRequest, billing: Subscriber
) -> Callable[[type[BaseException]], None]:
    """Makes the next COMMIT raise, either before the server had it or after it was done."""
    is_done = request.param == "after the commit"

    def arm(error: type[BaseException]) -> None:
        def commit(connection: Any) -> None:
            if is_done:
                connection.commit()
            raise error

        lose = once(commit)
        dialect = billing.engine.dialect
        original = dialect.do_commit

        def do_commit(connection: Any) -> None:
            lose(connection)
            original(connection)

        dialect.do_commit = do_commit  # type: ignore[method-assign]
        request.addfinalizer(lambda: setattr(dialect, "do_commit", original))

    return arm


@pytest.mark.parametrize("error", [Interrupted, SystemExit])
def test_an_interrupted_commit_has_one_effect_and_is_no_failure(
    billing: Subscriber,
    lose_answer: Callable[[type[BaseException]], None],
    error: type[BaseException],
    request: pytest.FixtureRequest,
) -> None:
    hooked: list[Delivery] = []
    billing.service.on(
        Placed,
        name=BILL,
        retry=RetryPolicy(attempts=2, first=timedelta(0), cap=timedelta(0)),
        exhausted=lambda delivery, session, error: hooked.append(delivery),
    )(billing.write("billed"))
    envelope = billing.placed()
    receiver = billing.receiver(interrupts=(Interrupted,))
    lose_answer(error)

    try:
        receiver.receive(envelope.body)
    except SystemExit:
        receiver.receive(envelope.body, redelivered=True)
    if billing.owed:
        receiver.receive(envelope.body, handler=BILL)

    assert billing.effects == ["billed"]
    assert (billing.dead, billing.owed, hooked) == ([], [], [])


def test_a_committed_delivery_is_not_parked_because_its_commit_raised(
    billing: Subscriber, lose_answer: Callable[[type[BaseException]], None]
) -> None:
    """With one attempt only, the failure path would park at once."""
    hooked: list[Delivery] = []
    billing.service.on(
        Placed,
        name=BILL,
        retry=RetryPolicy(attempts=1),
        exhausted=lambda delivery, session, error: hooked.append(delivery),
    )(billing.write("billed"))
    lose_answer(Interrupted)

    receipt = billing.receiver(interrupts=(Interrupted,)).receive(billing.placed().body)

    committed = billing.effects == ["billed"]
    assert receipt.outcomes == {BILL: Outcome.DUPLICATE if committed else Outcome.PARKED}
    assert len(billing.dead) == len(hooked) == (0 if committed else 1)


def test_a_commit_whose_answer_is_cut_off_has_one_effect(
    billing: Subscriber, make_engine: Callable[..., Engine]
) -> None:
    """A proxy drops the connection once the server has the COMMIT; nobody knows what became of it."""
    billing.service.on(Placed)(billing.write("billed"))
    with CuttingProxy(billing.engine) as proxy:
        receiver = billing.receiver(engine=make_engine(proxy.url))
        proxy.cut_at_commit = True

        receipt = receiver.receive(billing.placed().body)

    assert proxy.has_cut
    assert set(receipt.outcomes.values()) <= {Outcome.DUPLICATE, Outcome.HANDLED}
    assert (billing.effects, billing.owed, billing.dead) == (["billed"], [], [])


# ---- interruptions ----


def test_a_soft_time_limit_in_the_handler_is_a_failure_on_a_connection_not_used_again(
    billing: Subscriber,
) -> None:
    pids: list[int] = []
    interrupt = [True, False]

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        pids.append(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
        if interrupt.pop(0):
            raise Interrupted

    receiver = billing.receiver(interrupts=(Interrupted,))
    envelope = billing.placed()

    assert receiver.receive(envelope.body).outcomes == {BILL: Outcome.RETRY}
    assert receiver.receive(envelope.body, handler=BILL).outcomes == {BILL: Outcome.HANDLED}
    assert pids[0] != pids[1]


def test_an_ordinary_failure_keeps_its_connection(billing: Subscriber) -> None:
    closed: list[object] = []
    event.listen(billing.engine, "close", lambda dbapi, record: closed.append(dbapi))

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        raise ValueError

    billing.receive(billing.placed())

    assert closed == []


# ---- no database ----


def test_a_message_is_given_back_when_the_database_stays_away(
    billing: Subscriber, make_engine: Callable[..., Engine]
) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    nowhere = make_engine(f"postgresql+psycopg://nobody@127.0.0.1:{_free_port()}/none")
    receiver = billing.receiver(engine=nowhere, settings=IMPATIENT)

    for body in (billing.placed().body, b"garbage"):
        with pytest.raises(NotSettled, match="the database could not be had"):
            receiver.receive(body)


def test_a_message_waits_for_a_database_that_comes_back(
    billing: Subscriber, make_engine: Callable[..., Engine]
) -> None:
    billing.service.on(Placed, retry=RetryPolicy(attempts=1))(billing.write("billed"))
    with CuttingProxy(billing.engine) as proxy:
        proxy.refuse_next = 3
        receiver = billing.receiver(engine=make_engine(proxy.url))

        receipt = receiver.receive(billing.placed().body)

    assert receipt.outcomes == {"billing.bill": Outcome.HANDLED}
    assert proxy.refuse_next == 0


def test_a_schema_that_is_not_there_gives_the_message_back(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    billing.run("ALTER SCHEMA outbox RENAME TO elsewhere")

    with pytest.raises(NotSettled, match="pending_delivery"):
        billing.receiver(settings=IMPATIENT).receive(billing.placed().body)


# ---- tools ----


def _until_somebody_waits_for_a_lock(billing: Subscriber) -> None:
    for _ in range(1_000):
        waiting = billing.rows(
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
            "AND datname = current_database()"
        )
        if waiting:
            return
        threading.Event().wait(0.005)
    raise AssertionError("nobody waits for a lock")


def _until_gone(billing: Subscriber, pid: int) -> None:
    for _ in range(1_000):
        if not billing.rows("SELECT 1 FROM pg_stat_activity WHERE pid = :pid", pid=pid):
            return
        threading.Event().wait(0.005)
    raise AssertionError("its transaction was not ended")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class CuttingProxy:
    """Stands between client and server; cuts the line when told to."""

    cut_at_commit = False
    has_cut = False
    refuse_next = 0

    def __init__(self, engine: Engine) -> None:
        url = make_url(engine.url)
        if url.host is None or url.host.startswith("/") or "host" in url.query:
            pytest.skip("PostgreSQL is reached through a socket here")
        self._server = (url.host, url.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = url.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse_next:
                self.refuse_next -= 1
                client.close()
                continue
            server = socket.create_connection(self._server)
            for source, target in ((client, server), (server, client)):
                is_from_client = source is client
                threading.Thread(
                    target=self._pump, args=(source, target, is_from_client), daemon=True
                ).start()

    def _pump(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        try:
            while data := source.recv(65_536):
                if from_client and self.cut_at_commit and b"COMMIT" in data:
                    self.cut_at_commit = False
                    self.has_cut = True
                    target.sendall(data)
                    source.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(data)
        except OSError:
            pass
        finally:
            if not self.has_cut or not from_client:
                for end in (source, target):
                    end.close()
