"""The text of the steps: what could go wrong with it on its way through Alembic."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import text

import outbox.schema
import saga.schema
from outbox.errors import ConfigurationError
from outbox.schema import Component
from outbox.sql import in_schema

COMPONENTS = (outbox.schema.component, saga.schema.component)
STATEMENTS = [
    pytest.param(statement, id=f"{component.name}-{number}-{index}")
    for component in COMPONENTS
    for number, step in enumerate(component.versions, 1)
    for index, statement in enumerate((*step.UP, *step.DOWN))
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_nothing_in_a_step_is_taken_for_a_parameter(statement: str) -> None:
    assert text(in_schema(statement, "outbox")).compile().params == {}
    assert "%" not in statement, "psycopg would read it, offline SQL would not"


@pytest.mark.parametrize("statement", STATEMENTS)
def test_every_table_in_a_step_is_named_with_its_schema(statement: str) -> None:
    before = "TABLE|REFERENCES|ON|OF|SEQUENCE|INSERT INTO|UPDATE|FUNCTION"
    named = re.findall(rf"\b(?:{before})\s+(\S+)", statement)
    qualified = [name for name in named if name.startswith("{schema}.")]
    others = [
        name for name in named if name not in qualified and name not in {"DELETE", "FUNCTION"}
    ]
    assert qualified
    assert others == []


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda each: each.name)
def test_what_a_component_creates_it_drops(component: Component) -> None:
    for step in component.versions:
        dropped = set(re.findall(r"\{schema\}\.(\w+)", " ".join(step.DOWN)))
        created = {
            name
            for statement in step.UP
            for name in re.findall(r"CREATE TABLE \{schema\}\.(\w+)", statement)
            if "PARTITION OF" not in statement
        }
        assert created <= dropped


def test_partitions_are_among_the_tables_a_component_knows_as_its_own() -> None:
    assert {"outbox_event", "outbox_event_default", "outbox_cursor_0"} <= (
        outbox.schema.component.table_names
    )
    assert {"saga", "saga_step", "saga_join_arrival"} < saga.schema.component.table_names


@pytest.mark.parametrize(
    "schema", ["", "Upper", "with space", 'quo"te', "semi;colon", "1digit", "x" * 64, "pg-x"]
)
def test_a_name_that_could_carry_sql_never_gets_into_a_step(schema: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a database schema"):
        in_schema("CREATE TABLE {schema}.t (id int)", schema)
