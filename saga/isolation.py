"""Countermeasures to what sagas lack: isolation (Garcia-Molina & Salem 1987; Richardson, 4.3).

Between two commits of a saga everybody can see what it has done so far, and it may yet be undone.

**Semantic lock.** A column of the user's own row says which saga it is pending for. Others then fail
(`Held`, to be turned into a rejection), wait (the delivery is looked at again later and uses up no
attempt), or read past it (`is_free()` in a WHERE).

    class Seat(Base):
        number: Mapped[int] = mapped_column(primary_key=True)
        pending_saga: Mapped[UUID | None]

    seats = SemanticLock(theatre, Seat.pending_saga)

    @theatre.step(on=Booked, emits=SeatTaken, rejects=SeatGone)
    def take(booked: Booked, session: Session) -> SeatTaken:
        try:
            (seat,) = seats.take(session, Seat.number == booked.seat)
        except Held as held:
            raise Reject(SeatGone(booked.seat)) from held

Nobody has to release it. The lock is held exactly as long as the journal says, in the same database,
that the saga is open here: so it ends with the commit that completes the saga here or that undoes
the last of it, it cannot be forgotten, and it cannot outlive its saga. What it needs for that is a
saga that ends: one that nobody ever decides holds it for ever.

Why two sagas never have it at once: `take` locks the rows (in the order of their keys, so that two
cannot deadlock over them) before it looks whose they are, in a statement of its own. So the second
sees what the first has written. It may see a holder as open whose end is not committed yet; then it
fails or waits for nothing, never the other way round. Two sagas that *wait* for each other's rows
wait until one of them is aborted: give such sagas a deadline, or let one fail.

**Reread value.** What a saga was told some steps ago may have changed since: `reread` locks the row
and raises `Changed` where it has.

The third countermeasure needs no helper: an update that commutes (``available = available - 1``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, inspect, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from outbox.work import Busy
from saga.context import current
from saga.errors import Changed, Held, OutsideSaga
from saga.participant import Participant
from saga.tables import make_tables

Otherwise = Literal["fail", "wait"]

_OPEN = ("running", "compensating")


class SemanticLock:
    """Marks rows as pending for the sagas of one participant."""

    def __init__(
        self, participant: Participant, pending_saga: InstrumentedAttribute[UUID | None]
    ) -> None:
        """*pending_saga*: the mapped column of the rows that holds the id of the saga, or NULL."""
        self.participant = participant
        self._column = pending_saga
        self._row: Any = pending_saga.class_
        self._saga = make_tables(participant.schema).tables[f"{participant.schema}.saga"]

    def holder(self) -> UUID:
        """The saga that is worked for: what a row that a step inserts has in its column.

        Raises `OutsideSaga` outside of this participant's steps and compensations.
        """
        saga = current()
        if saga is None or saga.participant != self.participant.name:
            raise OutsideSaga(
                f"a row can be pending only for a saga of {self.participant.name}, in one of its "
                "steps; elsewhere use check() or is_free()"
            )
        return saga.saga_id

    def take(
        self,
        session: Session,
        *criteria: ColumnElement[bool],
        otherwise: Otherwise = "fail",
        saga_id: UUID | None = None,
    ) -> Sequence[Any]:
        """Mark the rows that meet *criteria* as pending for the current saga; returns them.

        Rows that it holds already stay its own. Where another saga holds one: raises `Held`, or,
        with ``otherwise="wait"``, has the delivery come back later, uncounted. *saga_id* is for the
        caller of `start`, who works in no saga yet.
        """
        holder = saga_id or self.holder()
        rows = self._locked(session, criteria, otherwise, holder)
        for row in rows:
            setattr(row, self._column.key, holder)
        session.flush()
        return rows

    def check(
        self, session: Session, *criteria: ColumnElement[bool], otherwise: Otherwise = "fail"
    ) -> Sequence[Any]:
        """Lock the rows until the transaction ends, provided that no other saga holds one."""
        saga = current()
        return self._locked(session, criteria, otherwise, saga.saga_id if saga else None)

    def is_free(self) -> ColumnElement[bool]:
        """Of a row: no open saga holds it. For a WHERE that reads past the others."""
        return or_(self._column.is_(None), ~self._is_open())

    def is_pending(self) -> ColumnElement[bool]:
        """Of a row: an open saga holds it."""
        return and_(self._column.is_not(None), self._is_open())

    def _locked(
        self,
        session: Session,
        criteria: Iterable[ColumnElement[bool]],
        otherwise: Otherwise,
        mine: UUID | None,
    ) -> Sequence[Any]:
        keys = inspect(self._row).primary_key
        found: Select[Any] = select(self._row).where(*criteria).order_by(*keys)
        locking = found.with_for_update(key_share=True).execution_options(populate_existing=True)
        rows = session.scalars(locking).all()
        pending = {getattr(row, self._column.key) for row in rows} - {None, mine}
        for holder in self._open_ones(session, pending):
            what = f"a row of {self._row.__name__} is pending for saga {holder}"
            if otherwise == "wait":
                raise Busy(what)
            raise Held(what, holder)
        return rows

    def _open_ones(self, session: Session, ids: set[UUID]) -> Sequence[UUID]:
        if not ids:
            return []
        saga = self._saga.c
        return session.scalars(
            select(saga.saga_id).where(
                saga.saga_id.in_(ids),
                saga.participant == self.participant.name,
                saga.state.in_(_OPEN),
            )
        ).all()

    def _is_open(self) -> ColumnElement[bool]:
        saga = self._saga.c
        return (
            select(1)
            .where(
                saga.saga_id == self._column,
                saga.participant == self.participant.name,
                saga.state.in_(_OPEN),
            )
            .exists()
        )


def reread(
    session: Session,
    *criteria: ColumnElement[bool],
    unchanged: Mapping[InstrumentedAttribute[Any], object],
) -> None:
    """Lock the row that meets *criteria* and see that its columns still have the values given.

    Raises `Changed`, naming what differs, also where there is no such row any more. Until the
    transaction ends nobody else can change them.
    """
    columns = list(unchanged)
    row = session.execute(
        select(*columns).where(*criteria).with_for_update(key_share=True)
    ).one_or_none()
    where = f"the row of {columns[0].class_.__name__}"
    if row is None:
        raise Changed(f"{where} that was read before is gone")
    differing = [
        f"{column.key} was {expected!r} and is {found!r}"
        for (column, expected), found in zip(unchanged.items(), row, strict=True)
        if found != expected
    ]
    if differing:
        raise Changed(f"{where} has changed since it was read: {', '.join(differing)}")
