"""The statements of ordered keys, as the library sends them, must do on the model what they do on PostgreSQL."""

from __future__ import annotations

import re

import pytest

from outbox import counting, ordering, places, schema
from outbox.busy_keys import SPAN
from tests.simulation.two_sessions import assert_alike

Value = str | int | None


def written(template: str, *values: Value, **named: Value) -> str:
    """*template* with its parameters written out."""
    given = iter(values)
    sql = re.sub("%s", lambda _: _literal(next(given)), template.replace("{schema}", "outbox"))
    return re.sub(r"(?<![:\w]):(\w+)", lambda found: _literal(named[found[1]]), sql)


def _literal(value: Value) -> str:
    return "NULL" if value is None else f"'{value}'" if isinstance(value, str) else str(value)


SHOP = ("shop", "order.moved")
SETUP = (
    "CREATE SCHEMA outbox",
    *(
        statement.replace("{schema}", "outbox")
        for version in schema.component.versions
        for statement in version.UP
    ),
    f"INSERT INTO outbox.outbox_key VALUES ('shop', 'order.moved', 'near', {SPAN - 1}), ('shop', 'order.moved', 'hot', NULL), "
    "('shop', 'order.moved', 'other', NULL)",
    f"INSERT INTO outbox.outbox_busy_key VALUES ('shop', 'order.moved', 'hot', 1, {2 * SPAN - 2}), ('shop', 'order.moved', 'other', 1, {SPAN})",
    "INSERT INTO outbox.inbox_order (handler, source, type, key, next_seq) VALUES "
    f"('books.book', 'shop', 'order.moved', 'near', {SPAN - 1}), ('books.book', 'shop', 'order.moved', 'hot', 0)",
    "INSERT INTO outbox.inbox_busy_order (handler, source, type, key, span, next_seq) VALUES "
    f"('books.book', 'shop', 'order.moved', 'hot', 1, {2 * SPAN - 1})",
    "INSERT INTO outbox.pending_delivery (service, handler, event_id, reason, next_attempt_at, type, key, key_seq, body) "
    "SELECT 'books', 'books.book', CAST(new.id AS uuid), 'early', clock_timestamp(), 'order.moved', new.key, new.seq, 'x' "
    "FROM unnest(ARRAY['00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-000000000002'], "
    f"ARRAY['near', 'hot'], ARRAY[{SPAN}, {2 * SPAN}]) AS new (id, key, seq)",
    "INSERT INTO outbox.quarantine (service, digest, reason, headers, key_seq, body) "
    """VALUES ('books', 'd', 'unreadable', '{}', 7, '{"partitionkey":"hot","data":')""",
)

# --- publishing
COUNT_NEAR, COUNT_HOT, COUNT_COLD = (
    written(counting._COUNT, *SHOP, key, 1) for key in ("near", "hot", "cold")
)
BUSY_NEAR, BUSY_HOT, BUSY_OTHER, BUSY_COLD = (
    written(counting._COUNT_BUSY, *SHOP, key, 1) for key in ("near", "hot", "other", "cold")
)
MANY_HOT = written(counting._COUNT_BUSY, *SHOP, "hot", 3 * SPAN)
MOVE_NEAR = written(counting._MOVE, *SHOP, "near", *SHOP, "near", 1, SPAN)
COUNTERS = "SELECT key, span, seq FROM outbox.outbox_busy_key"

# --- handling


def of(template: str, key: str, seq: int = 0, **named: Value) -> str:
    place = {"service": "books", "handler": "books.book", "source": "shop", "type": "order.moved"}
    return written(template, **place, key=key, seq=seq, **named)


def standing(template: str, key: str) -> str:
    return f"SELECT next_seq, passed FROM ({of(template, key)}) AS found"


def step_hot(seq: int, span: int) -> str:
    following = seq + 1
    return of(places._STEP_BUSY, "hot", seq, next=following, span=span, next_span=following // SPAN)


LOCK_NEAR, LOCK_HOT, LOCK_COLD = (standing(places._LOCK, key) for key in ("near", "hot", "cold"))
LOCK_BUSY_NEAR, LOCK_BUSY_HOT = (standing(places._LOCK_BUSY, key) for key in ("near", "hot"))
SEE_COLD, SEE_COLD_LATER = (of(places._FIRST_SEEN, "cold", seq) for seq in (1, 5))
STEP_NEAR, STEP_OF_ONE_THAT_MOVED = (of(places._STEP, key, next=SPAN) for key in ("near", "hot"))
MOVE_PLACE = of(places._MOVE, "near", next=SPAN, next_span=1, passed=f"{{{SPAN + 2}}}")
RELEASE_NEAR = of(places._RELEASE, "near", next=SPAN)
PASS_OVER = of(
    places._SET_BUSY,
    "hot",
    next=2 * SPAN - 1,
    span=1,
    next_span=1,
    passed=f"{{{2 * SPAN},{2 * SPAN + 2}}}",
)
SET_NEAR = of(places._SET, "near", next=None, passed="{}")
KNOWN = of(ordering._KNOWN_BEFORE, "hot", 2 * SPAN + 1, as_written='"partitionkey":"hot"')
KNOWN_OF_ANOTHER = of(
    ordering._KNOWN_BEFORE, "cold", 2 * SPAN + 1, as_written='"partitionkey":"cold"'
)
IS_ANYTHING_MISSED = of(ordering._IS_ANYTHING_MISSED, "hot")
PLACES = "SELECT key, span, next_seq, passed FROM outbox.inbox_busy_order"

SCRIPTS: dict[str, list[str]] = {
    "second_to_count_waits_and_goes_on_from_what_the_first_has_left": [f"1 {BUSY_HOT}", f"2 {BUSY_HOT}", "1 COMMIT", f"1 {BUSY_HOT}", "2 COMMIT", "1 COMMIT", f"2 {COUNTERS}"],
    "second_to_count_gets_the_number_of_the_first_that_rolls_back": [f"1 {BUSY_HOT}", f"2 {BUSY_HOT}", "1 ROLLBACK", "2 COMMIT", f"1 {COUNTERS}"],
    "three_count_in_line": [f"1 {BUSY_HOT}", f"2 {BUSY_HOT}", "1 COMMIT", f"3 {BUSY_HOT}", "2 COMMIT", "3 COMMIT"],
    "span_that_changes_during_the_wait_is_no_hindrance": [f"1 {MANY_HOT}", f"2 {BUSY_HOT}", f"1 {MANY_HOT}", "1 COMMIT", "2 COMMIT", f"1 {COUNTERS}"],
    "different_busy_keys_do_not_wait": [f"1 {BUSY_HOT}", f"2 {BUSY_OTHER}", "1 COMMIT", "2 COMMIT"],
    "two_busy_keys_in_opposite_order_are_a_deadlock": ["1 SET deadlock_timeout = '1min'", f"1 {BUSY_HOT}", f"2 {BUSY_OTHER}", f"1 {BUSY_OTHER}", f"2 {BUSY_HOT}"],
    "number_drawn_in_a_savepoint_is_given_again": [f"1 {BUSY_HOT}", "1 SAVEPOINT a", f"1 {BUSY_HOT}", f"2 {BUSY_HOT}", "1 ROLLBACK TO SAVEPOINT a", f"1 {BUSY_HOT}", "1 COMMIT", "2 COMMIT"],
    "counting_that_waits_for_a_savepoint_goes_on_at_its_rollback": ["1 SAVEPOINT a", f"1 {BUSY_HOT}", f"2 {BUSY_HOT}", "1 ROLLBACK TO SAVEPOINT a", "2 COMMIT"],
    "key_that_moved_has_no_number_at_its_first_row": [f"1 {COUNT_HOT}", f"2 {COUNT_HOT}", "1 COMMIT", f"2 {BUSY_HOT}", "2 COMMIT"],
    "key_without_a_busy_row_has_no_number_there": [f"1 {BUSY_COLD}", f"1 {COUNT_COLD}", f"2 {BUSY_COLD}", f"2 {COUNT_COLD}", "1 COMMIT", "2 COMMIT"],
    "key_that_moves_is_waited_for_at_its_first_row_and_found_at_the_other": [
        f"1 {COUNT_NEAR}", f"1 {MOVE_NEAR}", f"2 {BUSY_NEAR}", f"2 {COUNT_NEAR}", "1 COMMIT", f"2 {BUSY_NEAR}", "2 COMMIT", f"1 {COUNTERS}"],
    "key_whose_move_is_rolled_back_is_moved_by_the_next": [
        f"1 {COUNT_NEAR}", f"1 {MOVE_NEAR}", f"2 {COUNT_NEAR}", "1 ROLLBACK", f"2 {MOVE_NEAR}", f"1 {COUNT_NEAR}", "2 COMMIT", f"1 {BUSY_NEAR}", "1 COMMIT"],
    "key_that_moves_in_a_savepoint_moves_again": [
        "1 SAVEPOINT a", f"1 {COUNT_NEAR}", f"1 {MOVE_NEAR}", f"1 {BUSY_NEAR}", "1 ROLLBACK TO SAVEPOINT a", f"1 {BUSY_NEAR}", f"1 {COUNT_NEAR}", f"1 {MOVE_NEAR}", "1 COMMIT", f"2 {COUNTERS}"],
    "key_that_moves_twice_is_refused": [f"1 {MOVE_NEAR}", f"1 {MOVE_NEAR}", "1 ROLLBACK"],
    "second_worker_waits_for_the_place_and_sees_where_the_first_has_left_it": [
        f"1 {LOCK_BUSY_HOT}", f"2 {LOCK_BUSY_HOT}", f"1 {step_hot(2 * SPAN - 1, 1)}", f"1 {step_hot(2 * SPAN, 2)}", "1 COMMIT", f"2 {step_hot(2 * SPAN + 1, 2)}", "2 COMMIT", f"1 {PLACES}"],
    "second_worker_sees_the_place_as_it_was_after_a_rollback": [f"1 {LOCK_BUSY_HOT}", f"1 {step_hot(2 * SPAN - 1, 1)}", f"2 {LOCK_BUSY_HOT}", "1 ROLLBACK", "2 COMMIT"],
    "place_that_moves_is_waited_for_at_its_first_row_and_found_at_the_other": [
        f"1 {LOCK_NEAR}", f"1 {STEP_NEAR}", f"2 {LOCK_NEAR}", f"1 {MOVE_PLACE}", f"1 {RELEASE_NEAR}", f"3 {LOCK_BUSY_NEAR}", "1 COMMIT", f"2 {LOCK_BUSY_NEAR}", "2 COMMIT", f"1 {PLACES}"],
    "place_that_moves_hides_nothing_from_others_until_it_is_committed": [f"1 {MOVE_PLACE}", f"2 {LOCK_BUSY_NEAR}", "2 SELECT key, next_seq FROM outbox.inbox_order", "1 ROLLBACK", f"2 {LOCK_NEAR}"],
    "place_that_has_moved_makes_no_step_at_its_first_row": [f"1 {LOCK_HOT}", f"1 {STEP_OF_ONE_THAT_MOVED}", "1 COMMIT"],
    "place_with_numbers_passed_over_makes_no_simple_step": [f"1 {PASS_OVER}", f"1 {step_hot(2 * SPAN - 1, 1)}", "1 COMMIT", f"2 {LOCK_BUSY_HOT}"],
    "place_is_written_once_by_two_that_see_the_key_first": [f"1 {SEE_COLD}", f"2 {SEE_COLD_LATER}", f"3 {LOCK_COLD}", "1 COMMIT", f"2 {LOCK_COLD}"],
    "place_is_written_by_the_second_where_the_first_rolls_back": [f"1 {SEE_COLD}", f"2 {SEE_COLD_LATER}", "1 ROLLBACK", f"2 {LOCK_COLD}", f"2 {SET_NEAR}", f"2 {LOCK_NEAR}", "2 COMMIT"],
    "what_is_known_of_a_key_is_what_is_put_by_and_what_names_it_in_quarantine": [f"1 {KNOWN}", f"1 {KNOWN_OF_ANOTHER}", f"1 {IS_ANYTHING_MISSED}"],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_model_answers_as_postgresql_does(script: list[str], database_url: str) -> None:
    assert_alike(SETUP, script, database_url)
