"""`outbox metrics` says to Prometheus what `outbox status` says to a person."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from outbox import dead_letters, pending, quarantine
from outbox.cli import main
from outbox.ids import new_id
from outbox.metrics import StandingCollector

COMMAND = [sys.executable, "-c", "from outbox.cli import main; main()", "metrics"]
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def read(exposition: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"outbox_{name}", frozenset(labels.items())]


@pytest.fixture
def troubled(migrated_engine: Engine) -> Engine:
    """A database with one of everything that can be wrong."""
    with Session(migrated_engine) as session, session.begin():
        session.execute(
            text(
                "INSERT INTO outbox.outbox_event (lane, event_id, type, version, body, occurred_at) "
                "VALUES (3, :id, 't', 1, '', clock_timestamp() - interval '90 s')"
            ),
            {"id": new_id()},
        )
        owed = pending.Owed("billing", "billing.bill", new_id(), "order.placed", b"{}")
        dead_letters.park(session, owed, 8, "CardDeclined: no funds", "Traceback ...")
        pending.owe(session, owed_by("mailing"), "retry")
        quarantine.put(session, "billing", b"?", "not JSON")
        for gone, asks in ((False, 2), (True, 2), (False, 0)):
            session.execute(
                text(
                    "INSERT INTO outbox.awaited (handler, event_id, service, type, log, lane, position, next_ask_at,"
                    " noticed_at, asks, gone_at) VALUES ('billing.bill', :id, 'billing', 'order.placed', :log, 0, 1,"
                    " clock_timestamp(), clock_timestamp() - interval '40 s', :asks,"
                    " CASE WHEN :gone THEN clock_timestamp() END)"
                ),
                {"id": uuid4(), "log": UUID(int=1), "gone": gone, "asks": asks},
            )
    return migrated_engine


def owed_by(service: str) -> pending.Owed:
    return pending.Owed(service, f"{service}.send", new_id(), "order.placed", b"{}")


def test_each_thing_that_waits_or_needs_a_person_has_a_figure(
    troubled: Engine, migrated_database_url: str
) -> None:
    printed = CliRunner().invoke(main, ["metrics", "--database-url", migrated_database_url])

    assert printed.exit_code == 0, printed.output
    found = read(printed.stdout)
    assert of(found, "up") == 1
    assert of(found, "waiting_events", lane="3") == 1
    assert of(found, "waiting_events", lane="4") == 0
    assert 90 <= of(found, "oldest_waiting_seconds") < 150
    assert of(found, "relays") == 0
    assert of(found, "lanes_without_relay") == 16
    assert of(found, "owed_deliveries", service="mailing", reason="retry") == 1
    assert of(found, "dead_letters", service="billing", handler="billing.bill") == 1
    assert of(found, "quarantined_messages", service="billing") == 1
    assert of(found, "missing_events", service="billing", type="order.placed") == 1
    assert of(found, "gone_events", service="billing", type="order.placed") == 1
    assert of(found, "oldest_missing_seconds", service="billing", type="order.placed") >= 40


def test_it_is_served_and_read_anew_at_each_scrape(
    migrated_engine: Engine, migrated_database_url: str
) -> None:
    command = [*COMMAND, "--database-url", migrated_database_url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        url = served.stdout.readline().strip()

        def scrape() -> Samples:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return read(answer.read().decode())

        assert of(scrape(), "waiting_events", lane="0") == 0
        with migrated_engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO outbox.outbox_event (lane, event_id, type, version, body)"
                    " VALUES (0, gen_random_uuid(), 't', 1, '')"
                )
            )
        assert of(scrape(), "waiting_events", lane="0") == 1
        served.terminate()
        assert served.wait(20) == 0


def test_a_database_that_is_away_is_a_figure_and_no_failed_scrape() -> None:
    registry = CollectorRegistry()
    registry.register(StandingCollector(create_engine("postgresql+psycopg://x@127.0.0.1:1/x")))

    assert registry.get_sample_value("outbox_up") == 0
    assert registry.get_sample_value("outbox_relays") is None


def test_a_database_without_our_tables_is_a_mistake(database_url: str) -> None:
    printed = CliRunner().invoke(main, ["metrics", "--database-url", database_url])

    assert printed.exit_code == 1
    assert "outbox migrate" in printed.stderr
