"""Many sagas in one transaction: what is read and written for all of them at once must be what each
would have read and written by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox.intake import Incoming
from outbox.receive import Receiver
from saga import Participant
from saga.testing.choreography import Message
from tests.overlapping import StoppingParticipant, overlap
from tests.sagas import BRANCHES, OrderCreated, Shop, check_whole

LOG = "outbox.receive"


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture(scope="module")
def shop_of_module(engine: Engine) -> Shop:
    return Shop(engine)


@pytest.fixture
def shop(shop_of_module: Shop) -> Shop:
    shop_of_module.run("DELETE FROM outbox.pending_delivery")
    shop_of_module.failures.clear()
    shop_of_module.reset()
    return shop_of_module


@pytest.fixture
def no_rollback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The batches of the test are committed as batches; else they would prove nothing."""
    with caplog.at_level("INFO", LOG):
        yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert not [one for one in said if "rolled back" in one]


def take_in(shop: Shop, messages: Sequence[Message]) -> list[str]:
    """Give *messages*, all of one service, to it as one batch."""
    for message in messages:
        if message in shop.play.waiting:
            shop.play.waiting.remove(message)
            shop.play.delivered.append(message)
    receiver = shop.play.receivers[messages[0].service]
    batch = [Incoming(message.body, handler=message.handler) for message in messages]
    return [str(receipt) for receipt in receiver.take_in_batch(batch)]


def waiting_for(shop: Shop, service: str) -> list[Message]:
    return [one for one in shop.play.collect() if one.service == service]


def settle(shop: Shop) -> None:
    """Give each service all that waits for it, in one batch each, until nothing waits."""
    while waiting := shop.play.collect():
        take_in(shop, waiting_for(shop, waiting[0].service))


@pytest.mark.usefixtures("no_rollback")
def test_sagas_in_batches_all_end_as_they_should(shop: Shop) -> None:
    sagas = {shop.start(*BRANCHES[:count]): bool(count) for count in (0, 1, 0, 2, 0)}
    settle(shop)
    for saga_id, is_rejected in sagas.items():
        assert check_whole(shop, saga_id) == ("compensated" if is_rejected else "completed")
        assert shop.published(saga_id)["order.confirmed"] == (not is_rejected)


@pytest.mark.usefixtures("no_rollback")
@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_batches_copies_and_lapses_of_the_inbox_leaves_every_saga_whole(
    shop: Shop, seed: int
) -> None:
    random = Random(seed)
    rejecting = [random.sample(BRANCHES, random.choice((0, 0, 1, 2))) for _ in range(4)]
    sagas = [shop.start(*names) for names in rejecting]
    lapses, copies = 2, 8
    while waiting := shop.play.collect():
        if lapses and random.random() < 0.1:
            lapses -= 1
            shop.run("DELETE FROM outbox.inbox")
        service = random.choice(sorted({one.service for one in waiting}))
        batch = [one for one in waiting_for(shop, service) if random.random() < 0.7]
        old = [one for one in shop.play.delivered if one.service == service]
        if copies and old and random.random() < 0.3:
            copies -= 1
            batch.append(random.choice(old))
        random.shuffle(batch)
        if batch:
            take_in(shop, batch)
    ends = {check_whole(shop, saga_id) for saga_id in sagas}
    assert ends <= {"completed", "compensated"}


@pytest.mark.usefixtures("no_rollback")
def test_steps_of_many_sagas_cost_one_look_and_one_write_of_the_journal(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        shop.start()
    batch = waiting_for(shop, "inventory")
    sent: list[str] = []
    real = psycopg.Cursor.execute

    def execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        sent.append(query.decode() if isinstance(query, bytes) else str(query))
        return real(self, query, *args, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", execute)
    assert take_in(shop, batch) == ["inventory.act handled"] * 10
    journal = [one for one in sent if "outbox.saga" in one]
    assert [("INSERT INTO outbox.saga (" in one, "saga_step" in one) for one in journal] == [
        (True, False), (False, True),
    ]  # fmt: skip


@pytest.mark.usefixtures("no_rollback")
def test_an_abort_in_the_batch_of_a_step_undoes_that_step(shop: Shop) -> None:
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    batch = waiting_for(shop, "inventory")
    assert [one.type for one in batch][:2] == ["order.created", "saga.aborted"]
    take_in(shop, batch)
    assert shop.steps(saga_id)["inventory.act"] in ("done", "compensating")
    settle(shop)
    assert check_whole(shop, saga_id) == "compensated"
    assert "inventory.undo" in shop.effects(saga_id)


@pytest.mark.usefixtures("no_rollback")
def test_a_step_in_the_batch_of_an_earlier_abort_does_not_run(shop: Shop) -> None:
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    take_in(shop, waiting_for(shop, "inventory")[::-1])
    settle(shop)
    assert check_whole(shop, saga_id) == "compensated"
    assert "inventory.do" not in shop.effects(saga_id)


@pytest.mark.usefixtures("no_rollback")
def test_a_rejection_takes_back_its_own_writes_and_no_other_runs(shop: Shop) -> None:
    sagas = [shop.start(*names) for names in ((), ("inventory",), ())]
    take_in(shop, waiting_for(shop, "inventory"))
    steps = [shop.steps(saga_id)["inventory.act"] for saga_id in sagas]
    assert steps == ["done", "rejected", "done"]
    effects = [shop.effects(saga_id) for saga_id in sagas]
    assert effects == [["order.do", "inventory.do"], ["order.do"], ["order.do", "inventory.do"]]


def test_one_that_fails_is_tried_alone_and_hurts_no_other(shop: Shop) -> None:
    sagas = [shop.start() for _ in range(3)]
    shop.failures["inventory.do"] = 1
    take_in(shop, waiting_for(shop, "inventory"))
    assert [shop.steps(saga_id)["inventory.act"] for saga_id in sagas] == ["done"] * 3
    settle(shop)
    assert [check_whole(shop, saga_id) for saga_id in sagas] == ["completed"] * 3


@pytest.mark.usefixtures("no_rollback")
def test_a_batch_that_waited_for_a_join_to_fire_elsewhere_does_not_fire_it_again(
    shop: Shop, engine: Engine
) -> None:
    saga_id, other = shop.start(), shop.start()
    take_in(shop, waiting_for(shop, "inventory"))
    take_in(shop, waiting_for(shop, "users"))
    of_saga, of_other = str(saga_id).encode(), str(other).encode()
    answers = [one for one in waiting_for(shop, "order") if one.handler is None]
    stock, points = (
        next(one for one in answers if one.type == type and of_saga in one.body)
        for type in ("stock.reserved", "points.added")
    )
    take_in(shop, [stock])
    # Only the journal can tell then that this arrival was there.
    shop.run("DELETE FROM outbox.inbox")
    batch = [stock, *(one for one in answers if of_other in one.body)]
    stopping = Shop(engine, StoppingParticipant).play.receivers["order"]
    assert overlap(
        engine,
        lambda: stopping.receive(points.body),
        lambda: take_in(shop, batch),
        after="record",
    )
    shop.play.waiting.remove(points)
    assert shop.effects(saga_id).count("prepare.do") == 1
    assert shop.effects(other).count("prepare.do") == 1
    settle(shop)
    assert {check_whole(shop, one) for one in (saga_id, other)} == {"completed"}


@pytest.mark.usefixtures("no_rollback")
@pytest.mark.parametrize("first", ["the abort", "the step"])
def test_an_abort_and_a_batch_that_has_its_step_are_one_after_the_other(
    shop: Shop, engine: Engine, first: str
) -> None:
    saga_id = shop.start("users")
    other = shop.start()
    shop.play.deliver(shop.message("order.created", "users"))
    step, another, abort = (
        one
        for one in waiting_for(shop, "inventory")
        if one.type in ("order.created", "saga.aborted")
    )
    stopping = Shop(engine, StoppingParticipant).play.receivers["inventory"]
    alone, batch = (abort, [step, another]) if first == "the abort" else (step, [abort, another])
    assert overlap(
        engine,
        lambda: stopping.receive(alone.body),
        lambda: take_in(shop, batch),
        after="move" if first == "the abort" else "record",
    )
    shop.play.waiting.remove(alone)
    settle(shop)
    assert check_whole(shop, saga_id) == "compensated"
    assert ("inventory.undo" in shop.effects(saga_id)) == (first == "the step")
    assert check_whole(shop, other) == "completed"


@pytest.mark.usefixtures("no_rollback")
def test_an_event_that_no_step_takes_leaves_no_saga_behind(shop: Shop, engine: Engine) -> None:
    watch = Participant("watch", registry=shop.registry)
    seen: list[str] = []

    @watch.on(OrderCreated)
    def note(created: OrderCreated, session: Session) -> None:
        seen.append(created.order)

    batch = []
    for _ in range(3):
        shop.start()
        batch.append(Incoming(shop.message("order.created", "users").body))
        shop.play.waiting.clear()
    Receiver(watch, engine).take_in_batch(batch)
    assert len(seen) == 3
    assert shop.rows("SELECT 1 FROM outbox.saga WHERE participant = 'watch'") == []
