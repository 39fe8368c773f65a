"""Transactions of a worker: begun anew where that helps, thrown away where nothing can be known.

An error out of a commit says nothing about the commit. So no stage that is run here may take an
exception for a rollback: it is run again, and meets what the first run committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from outbox.errors import ConfigurationError, OutboxError
from outbox.pending import DUE_AT_ONCE
from outbox.transient import is_database_error, is_transient

R = TypeVar("R")
Stage = Callable[[Session], R]

_BETWEEN_STATEMENTS = (
    TransactionStatus.IDLE,
    TransactionStatus.INTRANS,
    TransactionStatus.INERROR,
)


class NotSettled(OutboxError):
    """The database could not be had for so long that the message should go back to its queue."""


class NotBegun(Exception):
    """The transaction failed before anything of its own ran; its cause says why."""


class DeliverySession(Session):
    """A session whose transaction belongs to the delivery: it cannot be ended from inside."""

    def commit(self) -> NoReturn:
        _refuse("commit")

    def rollback(self) -> NoReturn:
        _refuse("rollback")

    def close(self) -> NoReturn:
        _refuse("close")

    def commit_delivery(self) -> None:
        super().commit()

    def abandon(self) -> None:
        """Roll back, if there is anything to roll back, and let go of the connection."""
        super().close()


class Transactions:
    """Runs stages, each in a transaction of its own."""

    def __init__(
        self,
        engine: Engine | Callable[[], Engine],
        *,
        patience: timedelta = timedelta(seconds=30),
        tries: int = 5,
        interrupts: tuple[type[BaseException], ...] = (),
        on_due: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """*patience*: how long to wait for a database that cannot be had.

        *tries*: how often a stage is run that deadlocks or loses its connection. *interrupts*: what
        a signal may raise anywhere, even inside the driver; the connection is not used after it.
        *on_due*: called after a commit that left something due at once.
        """
        self._engine = engine
        self._patience = patience.total_seconds()
        self._tries = tries
        self._interrupts = interrupts
        self._on_due = on_due
        self._sleep = sleep

    def once(self, stage: Stage[R]) -> R:
        """Run *stage* and commit. Raises what it raises, or `NotBegun` without a connection."""
        connection = self._connect()
        session = DeliverySession(bind=connection)
        try:
            result = stage(session)
            session.commit_delivery()
        except BaseException as error:
            if self._is_suspect(error, connection):
                connection.invalidate()
            raise
        finally:
            self._release(session, connection)
        if session.info.get(DUE_AT_ONCE):
            self._on_due()
        return result

    def retried(self, stage: Stage[R]) -> R:
        """Run *stage* again after a deadlock, a lost connection, and while the database is away.

        Raises what it raised in its last run, `NotSettled` where it could not even begin.
        """
        try:
            result: R = self._retrying(_may_pass, self._has_had_its_tries)(self.once, stage)
            return result
        except NotBegun as error:
            raise NotSettled(_no_database(error)) from error

    def settled(self, stage: Stage[R]) -> R:
        """Run *stage* until it is committed, whatever the database says. Raises `NotSettled`."""
        try:
            result: R = self._retrying(_is_the_database, self._has_been_patient)(self.once, stage)
            return result
        except Exception as error:
            if _is_the_database(error):
                raise NotSettled(_no_database(error)) from error
            raise

    def _connect(self) -> Connection:
        engine = self._engine if isinstance(self._engine, Engine) else self._engine()
        try:
            return engine.connect()
        except Exception as error:
            if is_database_error(error):
                raise NotBegun(str(error)) from error
            raise

    def _release(self, session: DeliverySession, connection: Connection) -> None:
        try:
            session.abandon()
            connection.close()
        except Exception as error:
            # The error that brought us here says more than a rollback that failed because of it.
            connection.invalidate(error)
            connection.close()

    def _is_suspect(self, error: BaseException, connection: Connection) -> bool:
        """Whether the driver may have been interrupted in the middle of a conversation."""
        if not isinstance(error, Exception):
            return True
        if any(isinstance(one, self._interrupts) for one in _chain(error)):
            return True
        if connection.closed or connection.invalidated:
            return False
        info = getattr(connection.connection.driver_connection, "info", None)
        return info is not None and info.transaction_status not in _BETWEEN_STATEMENTS

    def _retrying(
        self,
        is_worth_it: Callable[[BaseException], bool],
        is_enough: Callable[[RetryCallState], bool],
    ) -> Retrying:
        return Retrying(
            retry=retry_if_exception(is_worth_it),
            stop=is_enough,
            wait=wait_random_exponential(multiplier=0.05, max=2),
            sleep=self._sleep,
            reraise=True,
        )

    def _has_been_patient(self, state: RetryCallState) -> bool:
        return (state.seconds_since_start or 0.0) >= self._patience

    def _has_had_its_tries(self, state: RetryCallState) -> bool:
        failed = state.outcome.exception() if state.outcome is not None else None
        if isinstance(failed, NotBegun):
            return self._has_been_patient(state)
        return state.attempt_number >= self._tries


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, NotBegun) or is_transient(error)


def _is_the_database(error: BaseException) -> bool:
    return isinstance(error, NotBegun) or is_database_error(error)


def _no_database(error: BaseException) -> str:
    return f"the database could not be had: {error.__cause__ or error}"


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and len(chain) < 20:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


def _refuse(verb: str) -> NoReturn:
    raise ConfigurationError(
        f"a handler called session.{verb}(): the transaction also holds the record that the event "
        "was handled, and is ended by the worker; use session.begin_nested() for a part that may "
        "be undone"
    )
