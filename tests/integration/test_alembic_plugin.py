"""A user's own Alembic project lives beside our tables as if they were not there."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from sqlalchemy import Engine, NullPool, create_engine, inspect, text

import outbox.schema
import saga.schema
from tests.installed import Installed

ENV = """
from alembic import context
from sqlalchemy import create_engine
from models import Base

url = context.get_x_argument(as_dictionary=True)["url"]
options = dict(target_metadata=Base.metadata, include_schemas=True)
if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""
MODELS = """
from sqlalchemy import Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase): ...

class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text)
"""
OWN_TABLE = """
import sqlalchemy as sa
from alembic import op
revision = "a1"
down_revision = None

def upgrade():
    op.create_table("customer", sa.Column("id", sa.Integer, primary_key=True),
                    sa.Column("name", sa.Text, nullable=False))

def downgrade():
    op.drop_table("customer")
"""
OUR_TABLES = """
import outbox.schema, saga.schema
from alembic import op
revision = "a2"
down_revision = "a1"

def upgrade():
    outbox.schema.upgrade(op, to=2, from_=0)
    saga.schema.upgrade(op, to=1, from_=0)

def downgrade():
    saga.schema.downgrade(op, to=0, from_=1)
    outbox.schema.downgrade(op, to=0, from_=1)
"""


@dataclass
class Project:
    """A throwaway project: models, an env.py and a first revision, all the user's own."""

    directory: Path
    url: str
    installed: Installed
    engine: Engine

    def alembic(self, *arguments: str) -> CompletedProcess[str]:
        return self.installed.run(
            "python", "-m", "alembic", "-x", f"url={self.url}", *arguments, cwd=self.directory
        )

    def write(self, name: str, content: str) -> None:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(content))

    def tables(self, schema: str = "outbox") -> set[str]:
        return set(inspect(self.engine).get_table_names(schema=schema))


@pytest.fixture
def project(installed: Installed, database_url: str, tmp_path: Path) -> Iterator[Project]:
    engine = create_engine(database_url, poolclass=NullPool)
    project = Project(tmp_path, database_url, installed, engine)
    project.write("alembic.ini", "[alembic]\nscript_location = mine\nprepend_sys_path = .\n")
    project.write("models.py", MODELS)
    project.write("mine/env.py", ENV)
    project.write("mine/script.py.mako", "${upgrades}")
    project.write("mine/versions/a1_own_table.py", OWN_TABLE)
    yield project
    engine.dispose()


def succeeded(result: CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def project_beside_our_tables(project: Project) -> Project:
    outbox.schema.upgrade_engine(project.engine)
    saga.schema.upgrade_engine(project.engine)
    succeeded(project.alembic("upgrade", "head"))
    return project


def test_alembic_check_finds_nothing_to_do_beside_our_tables(
    project_beside_our_tables: Project,
) -> None:
    result = project_beside_our_tables.alembic("check")
    assert "No new upgrade operations" in succeeded(result)
    assert result.stderr == "", "and says nothing about types that SQLAlchemy does not know"


def test_without_the_plugin_alembic_would_drop_our_tables(
    project_beside_our_tables: Project,
) -> None:
    project = project_beside_our_tables
    project.write("mine/env.py", ENV.replace(
        "include_schemas=True", 'include_schemas=True, autogenerate_plugins=["alembic.'
        'autogenerate.*", "~alembic.autogenerate.outbox"]'
    ))  # fmt: skip
    result = project.alembic("check")
    assert result.returncode != 0
    assert "remove_table" in result.stderr + result.stdout


def test_the_users_own_changes_are_still_seen(project_beside_our_tables: Project) -> None:
    project = project_beside_our_tables
    project.write("models.py", MODELS + "    email: Mapped[str | None]\n")
    with project.engine.begin() as connection:
        connection.execute(text("CREATE TABLE forgotten (id int)"))
        connection.execute(text("CREATE TABLE inbox (id int)"))
    result = project.alembic("check")
    found = result.stdout + result.stderr
    assert "add_column" in found
    assert "forgotten" in found
    assert "'inbox'" in found, "a table of the user's that only shares a name with one of ours"
    assert "outbox_event" not in found


def test_our_schema_may_have_any_name(project: Project) -> None:
    for component in (outbox.schema.component, saga.schema.component):
        component.upgrade_engine(project.engine, schema="public")
        component.upgrade_engine(project.engine, schema="events")
    succeeded(project.alembic("upgrade", "head"))
    assert "No new upgrade operations" in succeeded(project.alembic("check"))


def test_a_partition_made_later_is_left_alone_too(project_beside_our_tables: Project) -> None:
    project = project_beside_our_tables
    with project.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE outbox.outbox_event_later PARTITION OF outbox.outbox_event "
                "FOR VALUES FROM (9000000) TO (10000000)"
            )
        )
    assert "No new upgrade operations" in succeeded(project.alembic("check"))


def test_our_models_in_the_users_metadata_are_left_alone(project: Project) -> None:
    succeeded(project.alembic("upgrade", "head"))
    project.write(
        "models.py", f"{MODELS}\nimport outbox.tables\noutbox.tables.make_tables('outbox', "
        "Base.metadata)\n",
    )  # fmt: skip
    assert "No new upgrade operations" in succeeded(project.alembic("check"))


def test_a_revision_of_the_users_makes_and_drops_our_tables(project: Project) -> None:
    project.write("mine/versions/a2_our_tables.py", OUR_TABLES)
    succeeded(project.alembic("upgrade", "head"))
    assert {"outbox_event", "inbox", "saga"} <= project.tables()
    with project.engine.connect() as connection:
        outbox.schema.check(connection)
        saga.schema.check(connection)
    assert "No new upgrade operations" in succeeded(project.alembic("check"))
    succeeded(project.alembic("downgrade", "a1"))
    assert project.tables() == set()
    assert project.tables("public") == {"customer", "alembic_version"}


def test_a_revision_of_the_users_prints_our_sql(project: Project) -> None:
    project.write("mine/versions/a2_our_tables.py", OUR_TABLES)
    script = succeeded(project.alembic("upgrade", "head", "--sql"))
    with project.engine.begin() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute(script.replace("BEGIN;", "").replace("COMMIT;", ""))
    assert {"outbox_event", "inbox", "saga"} <= project.tables()
    assert "drop table outbox.saga" in succeeded(
        project.alembic("downgrade", "a2:a1", "--sql")
    ).lower().replace("_join_arrival", "")


def test_a_failing_revision_takes_our_tables_back_with_it(project: Project) -> None:
    broken = OUR_TABLES.replace("def downgrade", "    raise RuntimeError\n\ndef downgrade")
    project.write("mine/versions/a2_our_tables.py", broken)
    assert project.alembic("upgrade", "head").returncode != 0
    assert project.tables() == set()


def test_importing_alembic_stays_light_and_never_fails_because_of_us(
    installed: Installed, tmp_path: Path
) -> None:
    program = (
        "import sys, alembic.command; "
        "assert 'outbox.alembic_plugin' in sys.modules; "
        "heavy = {'celery', 'kombu', 'psycopg'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    succeeded(installed.run("python", "-c", program, cwd=tmp_path))


def test_importing_outbox_first_and_alembic_second_works(
    installed: Installed, tmp_path: Path
) -> None:
    program = "import outbox, saga, outbox.schema, alembic.command, alembic.autogenerate"
    succeeded(installed.run("python", "-c", program, cwd=tmp_path))
