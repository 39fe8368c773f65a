"""Databases for tests: each new, empty or migrated, and dropped when its test is over."""

from __future__ import annotations

import uuid
from typing import LiteralString, cast

import psycopg
from psycopg import sql
from sqlalchemy import URL, NullPool, create_engine, make_url

from tests.servers import Room


class Databases:
    """Makes databases on one server; a migrated one is copied from a template migrated once."""

    def __init__(self, server_url: str, room: Room) -> None:
        self._server = make_url(server_url).set(drivername="postgresql+psycopg")
        self._room = room
        self._connection: psycopg.Connection | None = None

    def create(self) -> str:
        return self._create(f"test_{uuid.uuid4().hex[:12]}")

    def create_migrated(self) -> str:
        # The name holds the server too: a session may use several
        template = f"template_{self._room.path.name}".replace("-", "_")
        self._room.once(
            f"template-{self._server.host}-{self._server.port}", lambda: self._migrate(template)
        )
        return self._create(f"test_{uuid.uuid4().hex[:12]}", template=template)

    def drop(self, url: str) -> None:
        self._drop(cast(str, make_url(url).database))

    def drop_template(self) -> None:
        self._drop(f"template_{self._room.path.name}".replace("-", "_"))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _migrate(self, name: str) -> str:
        import outbox.schema
        import saga.schema

        url = self._create(name)
        engine = create_engine(url, poolclass=NullPool)
        try:
            outbox.schema.upgrade_engine(engine)
            saga.schema.upgrade_engine(engine)
        except BaseException:
            engine.dispose()
            self._drop(name)
            raise
        return url

    def _create(self, name: str, *, template: str = "template1") -> str:
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        return self._url(name).render_as_string(hide_password=False)

    def _drop(self, name: str) -> None:
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _url(self, name: str) -> URL:
        return self._server.set(database=name)

    def _execute(self, statement: LiteralString, *names: str) -> None:
        if self._connection is None or self._connection.closed:
            plain = self._server.set(drivername="postgresql")
            self._connection = psycopg.connect(
                plain.render_as_string(hide_password=False), autocommit=True
            )
        self._connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
