"""What waits for a person: found, given back to its handlers, or deleted with a reason."""

from __future__ import annotations

import logging
from uuid import uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import dead_letters, pending, quarantine
from outbox.dead_letters import Matching
from outbox.pending import Owed


@pytest.fixture
def session(migrated_engine: Engine) -> Session:
    return Session(migrated_engine)


def park(session: Session, handler: str = "b.bill", key: str = "k", error: str = "E") -> Owed:
    owed = Owed("billing", handler, uuid4(), "order.placed", b"body", key=key, key_seq=4)
    dead_letters.park(session, owed, 3, error, "Traceback")
    return owed


def keys(session: Session, **matching: object) -> list[str | None]:
    found = dead_letters.list_letters(session, Matching(**matching))  # type: ignore[arg-type]
    return [letter.key for letter in found]


def test_dead_letters_are_found_by_what_is_known_of_them(session: Session) -> None:
    park(session, "b.bill", "k1")
    park(session, "b.count", "k2")

    assert keys(session) == ["k2", "k1"]
    assert keys(session, handler="b.bill") == ["k1"]
    assert keys(session, type="order.placed", key="k2") == ["k2"]
    assert keys(session, service="shipping") == []
    assert dead_letters.count(session, Matching(key="k1")) == 1


def test_pages_follow_each_other(session: Session) -> None:
    for number in range(5):
        park(session, key=str(number))

    first = dead_letters.list_letters(session, limit=2)
    second = dead_letters.list_letters(session, limit=2, before=first[-1].id)

    assert [letter.key for letter in (*first, *second)] == ["4", "3", "2", "1"]


def test_a_redrive_owes_all_of_it_again(session: Session) -> None:
    owed = park(session)
    (letter,) = dead_letters.list_letters(session)

    assert dead_letters.redrive(session, Matching(id=letter.id)) == 1

    (again,) = pending.list_pending(session)
    assert (again.handler, again.event_id, again.body) == (owed.handler, owed.event_id, b"body")
    assert (again.key, again.key_seq, again.attempts, again.reason) == ("k", 4, 0, "redrive")
    assert dead_letters.list_letters(session) == []


def test_a_redrive_can_be_taken_in_portions_the_oldest_first(session: Session) -> None:
    for number in range(3):
        park(session, key=str(number))

    assert dead_letters.redrive(session, Matching(service="billing"), limit=2) == 2

    assert keys(session) == ["2"]


def test_parking_a_delivery_ends_what_was_owed(session: Session) -> None:
    owed = Owed("billing", "b.bill", uuid4(), "order.placed", b"body")
    pending.owe(session, owed, "retry")

    dead_letters.park(session, owed, 3, "E", "T")

    assert pending.list_pending(session) == []


def test_what_is_discarded_is_logged_with_the_reason(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    park(session, error="ValueError: broken")
    with caplog.at_level(logging.WARNING):
        assert dead_letters.discard(session, Matching(key="k"), "a test order") == 1

    assert keys(session) == []
    assert "a test order" in caplog.text
    assert "ValueError: broken" in caplog.text


def test_text_that_postgresql_cannot_hold_is_kept_readable(session: Session) -> None:
    park(session, error="bad \x00 and \ud800 " + "x" * 5_000)

    (letter,) = dead_letters.list_letters(session)
    assert letter.error.startswith("bad \\x00 and \\ud800 xxx")
    assert len(letter.error) == 2_000


def test_a_message_of_any_size_is_quarantined_and_says_when_it_was_cut(session: Session) -> None:
    body = b"x" * (quarantine.MAX_BODY_BYTES + 1)
    id = quarantine.put(session, "billing", body, "too much")

    message = quarantine.show(session, id)

    assert message is not None
    assert len(message.body) == quarantine.MAX_BODY_BYTES
    assert not message.is_whole
    assert "the first 2,097,152 of 2,097,153 bytes" in message.reason
    with pytest.raises(ValueError, match="cut off"):
        quarantine.redrive(session, id)


def test_bytes_that_are_no_text_are_not_fed_through(session: Session) -> None:
    id = quarantine.put(session, "billing", b"\xff\xfe", "no JSON")

    with pytest.raises(ValueError, match="no UTF-8"):
        quarantine.redrive(session, id)


@pytest.mark.parametrize("headers", [{("a", 1): object()}, {"x": "\x00\ud800"}, {"n": [1, {}]}])
def test_headers_of_any_kind_are_kept(session: Session, headers: dict[object, object]) -> None:
    id = quarantine.put(session, "billing", b"x", "odd", headers=headers)  # type: ignore[arg-type]

    assert quarantine.show(session, id) is not None


def test_two_services_quarantine_the_same_bytes_each_for_itself(session: Session) -> None:
    ids = {quarantine.put(session, service, b"x", "odd") for service in ("billing", "shipping")}

    assert len(ids) == 2
    for id in ids:
        assert quarantine.redrive(session, id)
    assert len(pending.list_pending(session)) == 2


def test_a_quarantined_message_is_discarded_with_the_reason(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    id = quarantine.put(session, "billing", b"x", "it was odd")
    with caplog.at_level(logging.WARNING):
        assert quarantine.discard(session, id, "spam")

    assert quarantine.list_messages(session) == []
    assert "spam" in caplog.text
    assert not quarantine.discard(session, id, "spam")
    assert not quarantine.redrive(session, id)
