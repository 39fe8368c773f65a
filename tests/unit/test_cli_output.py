"""What reaches the screen: no secrets, nothing that steers a terminal, and readable durations."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from outbox.cli.bodies import envelope_of
from outbox.cli.output import ago, first_line, masked, print_json, printable


@pytest.mark.parametrize(
    "secret",
    [
        "postgresql://me:sesame@db.example/orders",
        "connection to amqp://me:sesame@mq.example:5672// failed",
        "redis://:sesame@cache.example/0",
        "postgresql:///orders?user=me&password=sesame&sslmode=require",
        "host=db password=sesame dbname=orders",
        "host=db password='open sesame' dbname=orders",
        "amqp://a:sesame@one.example;amqp://b:sesame@two.example",
    ],
)
def test_passwords_are_masked_and_the_rest_stays(secret: str) -> None:
    assert "sesame" not in masked(secret)
    assert "***" in masked(secret)
    for kept in ("example", "orders", "sslmode=require", "//me"):
        assert (kept in masked(secret)) == (kept in secret)


@pytest.mark.parametrize(
    "harmless", ["postgresql://me@db/orders", "http://x/y:z@w", "at 12:30: no such table", ""]
)
def test_text_without_a_password_is_left_as_it_is(harmless: str) -> None:
    assert masked(harmless) == harmless


def test_control_characters_are_shown_and_not_sent() -> None:
    assert printable("a\x1b[2Jb\x07c\x00d\x9be\r") == "a\\x1b[2Jb\\x07c\\x00d\\x9be\\x0d"
    assert printable("line\n\ttab ü 漢") == "line\n\ttab ü 漢"


@pytest.mark.parametrize(
    ("duration", "told"),
    [
        (timedelta(seconds=0.25), "0.2 s"),
        (timedelta(seconds=-3), "0.0 s"),
        (timedelta(seconds=59.9), "59.9 s"),
        (timedelta(seconds=150), "2 min 30 s"),
        (timedelta(hours=3, minutes=12), "3 h 12 min"),
        (timedelta(days=3, hours=5), "3 d 5 h"),
        (None, "-"),
    ],
)
def test_a_duration_is_told_in_its_largest_two_units(duration: timedelta | None, told: str) -> None:
    assert ago(duration) == told


def test_a_long_error_is_cut_to_one_line() -> None:
    assert first_line("boom\nand more") == "boom"
    assert first_line("x" * 200, width=10) == "x" * 9 + "…"


def test_an_envelope_is_indented_and_anything_else_shown_as_it_is() -> None:
    assert envelope_of(b'{"id":"1"}', indent=2) == '{\n  "id": "1"\n}'
    assert envelope_of(b"\x80pickle", indent=2) == "\\x80pickle"
    assert envelope_of(b"[" * 9000, indent=2) == "[" * 9000
    assert envelope_of(b"x" * 20_000).endswith("(3,616 more bytes)")


def test_json_output_holds_times_ids_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "at": datetime(2026, 1, 2, tzinfo=UTC),
            "for": timedelta(seconds=1.5),
            "id": UUID(int=1),
            "body": b"\xff",
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "at": "2026-01-02T00:00:00+00:00",
        "for": 1.5,
        "id": "00000000-0000-0000-0000-000000000001",
        "body": "\\xff",
    }
