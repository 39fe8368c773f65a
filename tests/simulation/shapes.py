"""A saga with everything in it: a diamond, a participant with several steps, a delayed step, a saga that another one
starts and waits for, a pivot, retriable steps, a deadline, and compensations that fail until a person resumes them.

Every step and compensation writes down that it ran and when, so that what is left behind shows, and what came too
early.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import dead_letters
from outbox.dead_letters import Matching
from outbox.events import Registry
from outbox.service import RetryPolicy
from saga import Participant, Reject, current
from saga.participant import Unwinding
from saga.testing.simulation import Faults, Request, Simulation
from saga.testing.world import SimulatedService, World

NAMES = ("desk", "left", "right", "meeting", "side", "carrier", "hotel", "mail")
THREE_TIMES = RetryPolicy(attempts=3, first=timedelta(seconds=5), cap=timedelta(seconds=30))
FAILURES = 4
"""More than one round of attempts, so that it takes a person."""
FAULTS = Faults(kills=3, lost_connections=3, duplicates=4, outages=2, time_jumps=2)
CAUSES = (
    ("start", "left"), ("start", "right"), ("left", "meet"), ("right", "meet"), ("meet", "again"),
    ("meet", "later"), ("meet", "leg"), ("again", "side"),
)  # fmt: skip
"""What caused what: the effect is undone before its cause."""
PIVOT = {"pivot": True, "no_deadline": "its parent waits for as long"}
FORWARD_ONLY = frozenset({"finish", "thank", "thanked", "carry", "ticket"})


@dataclass(frozen=True)
class Fact:
    name: str
    refused_by: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    """What fails for a while: "left.undo"."""


class Opened(Fact): ...


class Left(Fact): ...


class Right(Fact): ...


class Met(Fact): ...


class Again(Fact): ...


class Beside(Fact): ...


class Later(Fact): ...


class LegAsked(Fact): ...


class RoomHeld(Fact): ...


class Carried(Fact): ...


class LegBooked(Fact): ...


class NoLeg(Fact): ...


class Refused(Fact): ...


class TooLate(Fact): ...


class Finished(Fact): ...


class Thanked(Fact): ...


SAGAS = (
    Opened("fine"),
    *(Opened(f"refused by {who}", (who,)) for who in ("right", "side", "hold", "carry")),
    Opened("two refuse", ("side", "hold"), ("start.undo",)),
    Opened("steps fail", (), ("left.do", "later.do")),
    Opened("compensations fail", ("side",), ("left.undo", "meet.undo", "leg.undo")),
    Opened("all of it fails", ("carry",), ("right.undo", "left.do")),
)


@dataclass
class Shapes:
    """The participants, which undo as told: each in turn, or every second one at once."""

    unwind: tuple[Unwinding, ...] = ("reverse",)
    failures: dict[tuple[UUID, str], int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        registry = Registry()
        for cls in Fact.__subclasses__():
            registry.event(f"shape.{cls.__name__.lower()}", key="name")(cls)
        self.participants = {
            name: Participant(
                name, registry=registry, unwind=how, retry=THREE_TIMES,
                compensation_retry=THREE_TIMES,
            )
            for name, how in zip(NAMES, itertools.cycle(self.unwind), strict=False)
        }  # fmt: skip
        self._ordinals = itertools.count(1)
        self._declare()

    def simulation(self, batch: int = 1) -> Simulation:
        return Simulation(
            services=[SimulatedService(one, create=_create) for one in self.participants.values()],
            requests=[
                Request("desk", partial(self._open, UUID(int=number), opened), opened.name)
                for number, opened in enumerate(SAGAS, 1)
            ],
            invariants=[self.every_saga_is_whole],
            faults=FAULTS,
            sample=2,
            batch=batch,
            operator=_redrive,
        )

    # ---- the participants ----

    def _declare(self) -> None:
        desk, meeting = self.participants["desk"], self.participants["meeting"]
        opening = desk.starts(Opened)
        opening.compensation(lambda opened, session: self._ran("start", "undo", opened, session))
        desk.starts(LegAsked, nothing_to_undo="a question")
        self._step("left", "left", Opened, Left)
        self._step("right", "right", Opened, Right, rejects=Refused)
        join = meeting.join(Left, Right, emits=Met, name="meet")(
            lambda left, right, session: self._answer("meet", left, Met, session)
        )
        join.compensation(
            lambda left, right, met, session: self._ran("meet", "undo", left, session)
        )
        self._step("left", "again", Met, Again)
        self._step("side", "side", Again, Beside, rejects=Refused)
        self._step("mail", "later", Met, Later, after=timedelta(minutes=5))
        self._declare_leg(desk)
        desk.join(LegBooked, Beside, Later, emits=Finished, completes=True, name="finish")(
            lambda leg, beside, later, session: self._answer("finish", leg, Finished, session)
        )
        desk.deadline(minutes=15, after=opening, rejects=TooLate, name="late")(
            lambda opened, session: TooLate(opened.name)
        )
        self._step("mail", "thank", Finished, Thanked, retriable=True)
        self._step("left", "thanked", Thanked, None, retriable=True)

    def _declare_leg(self, desk: Participant) -> None:
        child = desk.child(on=Met, opens=LegAsked, emits=LegBooked, rejects=NoLeg, name="leg")(
            lambda met, session: LegAsked(met.name, met.refused_by, met.broken)
        )
        child.completed(lambda met, session: self._answer("leg", met, LegBooked, session))
        child.aborted(lambda met, session: NoLeg(met.name))
        child.compensation(lambda met, booked, session: self._ran("leg", "undo", met, session))
        self._step("hotel", "hold", LegAsked, RoomHeld, rejects=Refused)
        self._step("carrier", "carry", RoomHeld, Carried, rejects=Refused, **PIVOT)
        self._step("mail", "ticket", Carried, None, retriable=True)

    def _step(
        self, owner: str, name: str, on: type[Fact], emits: type[Fact] | None, **how: Any
    ) -> None:
        step = self.participants[owner].step(on=on, emits=emits, name=name, **how)(
            lambda event, session: self._answer(name, event, emits, session)
        )
        if name in FORWARD_ONLY:
            return
        step.compensation(lambda event, emitted, session: self._ran(name, "undo", event, session))

    def _answer(
        self, name: str, event: Fact, answer: type[Fact] | None, session: Session
    ) -> Fact | None:
        self._ran(name, "do", event, session)
        if name in event.refused_by:
            raise Reject(Refused(event.name))
        return None if answer is None else answer(event.name, event.refused_by, event.broken)

    def _ran(self, name: str, what: str, event: Fact, session: Session) -> None:
        saga = current()
        assert saga is not None
        self._note(session, saga.saga_id, name, what)
        run = saga.saga_id, f"{name}.{what}"
        if run[1] in event.broken and self.failures[run] < FAILURES:
            self.failures[run] += 1
            raise RuntimeError(f"{name} is broken")

    def _note(self, session: Session, saga_id: UUID, step: str, what: str) -> None:
        session.execute(
            text("INSERT INTO effect (at, saga_id, step, what) VALUES (:at, :saga, :step, :what)"),
            {"at": next(self._ordinals), "saga": saga_id, "step": step, "what": what},
        )

    def _open(self, saga_id: UUID, opened: Opened, session: Session) -> None:
        self.failures.clear()
        self.participants["desk"].start(session, opened, saga_id=saga_id)
        self._note(session, saga_id, "start", "do")

    # ---- what must hold ----

    def every_saga_is_whole(self, world: World) -> None:
        effects, ends = _effects(world), _ends(world)
        for saga_id, ran in effects.items():
            (end,) = ends[saga_id]
            of_step: dict[str, list[str]] = defaultdict(list)
            for step, what in ran:
                of_step[step].append(what)
            for step, whats in of_step.items():
                expected = ["do"] if end == "completed" else ["do", "undo"]
                assert whats == expected, f"{end}, but {step} has {whats}"
            assert end == "completed" or not FORWARD_ONLY & of_step.keys()
            if set(self.unwind) == {"reverse"}:
                undone = [step for step, what in ran if what == "undo"]
                for cause, effect in CAUSES:
                    assert not {cause, effect} <= set(undone) or (
                        undone.index(effect) < undone.index(cause)
                    ), f"out of order: {undone}"


def _effects(world: World) -> dict[UUID, list[tuple[str, str]]]:
    """What ran for each saga, in the order of running, and was committed."""
    rows = [row for node in world.nodes.values() for row in node.query("SELECT * FROM effect")]
    found: dict[UUID, list[tuple[str, str]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.at):
        found[row.saga_id].append((row.step, row.what))
    return found


def _ends(world: World) -> dict[UUID, set[str]]:
    found: dict[UUID, set[str]] = defaultdict(set)
    for node in world.nodes.values():
        for row in node.rows("saga"):
            found[row["saga_id"]].add(row["state"])
    return found


def _redrive(world: World) -> bool:
    """Everything that was given up is tried again."""
    redriven = 0
    for node in world.nodes.values():
        if node.rows("dead_letter"):
            with Session(node.engine) as session, session.begin():
                redriven += dead_letters.redrive(session, Matching())
    return redriven > 0


def _create(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE effect (at bigint PRIMARY KEY, saga_id uuid, step text, what text)")
        )
