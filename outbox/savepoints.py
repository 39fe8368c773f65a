"""A savepoint for who runs many functions in one transaction, at a fraction of what the session's own costs.

`Session.begin_nested` makes two objects, sends two messages and has what is held of events written out before it. Here
one message moves the place forward to which the transaction can be taken back, and held events stay held. The session
knows nothing of it: so what was written or loaded since is forgotten when it is taken back, and whoever writes
something that must outlive that, writes it before or after.

It stays set until it is moved or the transaction ends. That changes nothing for statements that come later: only
`take_back` goes back to it, and only to where it was last moved.
"""

from __future__ import annotations

from typing import Final

import psycopg
from sqlalchemy.orm import Session

from outbox.direct import command_directly
from outbox.publishing import Held, held_by, withdraw

_SET: Final = "SAVEPOINT outbox_place"
_FORGET: Final = "RELEASE SAVEPOINT outbox_place"
_TAKE_BACK: Final = "ROLLBACK TO SAVEPOINT outbox_place"


class Savepoint:
    """One place in the transaction of a session, outside of any savepoint of the session's own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._is_set = False
        self._held = Held(0, 0)

    def move_here(self) -> None:
        """From now on `take_back` goes back to here."""
        self._session.flush()
        self._held = held_by(self._session)
        self._execute(*((_FORGET,) if self._is_set else ()), _SET)
        self._is_set = True

    def take_back(self) -> bool:
        """Undo all that was written and published since; False, with nothing done, where that cannot be.

        Then events that were held from before were written since, as somebody has begun a savepoint of the session's.
        """
        assert self._is_set
        if not withdraw(self._session, self._held):
            return False
        self._session.expunge_all()
        self._execute(_TAKE_BACK)
        return True

    def _execute(self, *commands: str) -> None:
        connection = self._session.connection()
        driver = connection.connection.driver_connection
        if isinstance(driver, psycopg.Connection) and command_directly(driver, *commands):
            return
        for command in commands:
            connection.exec_driver_sql(command)
