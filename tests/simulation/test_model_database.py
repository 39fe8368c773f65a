"""The model database and PostgreSQL must answer the same scripts alike: otherwise the simulation proves nothing."""

from __future__ import annotations

import pytest

from saga.testing.model import ModelDatabase, ModelGap
from tests.simulation.two_sessions import assert_alike

SETUP = (
    "CREATE TABLE item (sku text PRIMARY KEY, stock integer NOT NULL CHECK (stock >= 0), note text)",
    "CREATE TABLE inbox (event_id integer, handler text, PRIMARY KEY (event_id, handler))",
    "CREATE TABLE barrier (saga integer, step text, op text, PRIMARY KEY (saga, step))",
    "INSERT INTO item (sku, stock) VALUES ('apple', 5), ('pear', 1), ('plum', 0)",
)

TAKE_ONE = "UPDATE item SET stock = stock - 1 WHERE sku = 'apple' AND stock >= 1 RETURNING stock"
SEEN = "INSERT INTO inbox VALUES (1, 'h') ON CONFLICT DO NOTHING RETURNING event_id"
LOCK_OR_ADD = (
    "WITH known AS MATERIALIZED (SELECT op FROM barrier WHERE saga = 1 AND step = 's' FOR UPDATE), "
    "added AS (INSERT INTO barrier (saga, step, op) SELECT 1, 's', 'run' WHERE NOT EXISTS (SELECT 1 FROM known) "
    "ON CONFLICT DO NOTHING RETURNING op) "
    "SELECT op, false AS new FROM known UNION ALL SELECT op, true AS new FROM added"
)
TAKE_ALONG = (
    "WITH entered AS (INSERT INTO inbox (event_id, handler) SELECT new.id, new.name "
    "FROM unnest(ARRAY[1, 2], ARRAY['a', 'b']) AS new (id, name) "
    "WHERE CASE WHEN new.name = 'a' THEN EXISTS (SELECT FROM barrier WHERE barrier.saga = new.id AND barrier.op = 'owed') "
    "ELSE true END ORDER BY new.id ON CONFLICT DO NOTHING RETURNING event_id, handler), "
    "withdrawn AS (DELETE FROM barrier USING entered WHERE barrier.saga = entered.event_id AND barrier.op = 'owed' RETURNING barrier.saga) "
    "SELECT entered.event_id, withdrawn.saga IS NOT NULL AS was_owed FROM entered LEFT JOIN withdrawn ON withdrawn.saga = entered.event_id"
)
OWE = "1 INSERT INTO barrier VALUES (1, 's', 'owed')"
MOVE_SEVERAL = (
    "UPDATE item SET stock = new.after FROM unnest(ARRAY['apple', 'pear'], ARRAY[5, 1], ARRAY[7, 8]) "
    "AS new (sku, before, after) WHERE item.sku = new.sku AND item.stock = new.before RETURNING item.sku, item.stock"
)

SHARE = (
    "1 CREATE FUNCTION public.share(of_sku text, parts integer) RETURNS bigint LANGUAGE plpgsql STRICT AS $$ DECLARE found bigint; "
    "BEGIN SELECT item.stock + parts FROM item WHERE item.sku = of_sku INTO found; RETURN found; END $$"
)
LOOK = "1 SELECT public.share('apple', 1), public.share('none', 1), public.share(NULL, 1), public.share('apple', NULL)"

SCRIPTS: dict[str, list[str]] = {
    "note_taken_along_by_the_insert_that_it_allows": [OWE, "1 COMMIT", f"1 {TAKE_ALONG}", "1 COMMIT", "2 SELECT saga FROM barrier", f"2 {TAKE_ALONG}"],
    "note_that_changes_during_the_wait_is_not_taken_along": [OWE, "1 COMMIT", "1 UPDATE barrier SET op = 'begun'", f"2 {TAKE_ALONG}", "1 COMMIT", "2 COMMIT", "1 SELECT op FROM barrier"],
    "note_whose_change_is_rolled_back_is_taken_along": [OWE, "1 COMMIT", "1 UPDATE barrier SET op = 'begun'", f"2 {TAKE_ALONG}", "1 ROLLBACK", "2 COMMIT", "1 SELECT op FROM barrier"],
    "update_of_several_from_lists_leaves_out_what_changed_during_the_wait": ["1 UPDATE item SET stock = 4 WHERE sku = 'apple'", f"2 {MOVE_SEVERAL}", "1 COMMIT", "2 COMMIT", "1 SELECT sku, stock FROM item"],
    "second_inserter_of_a_key_waits_and_finds_a_duplicate": [f"1 {SEEN}", f"2 {SEEN}", "1 COMMIT", "2 COMMIT"],
    "second_inserter_of_a_key_waits_and_wins_after_a_rollback": [f"1 {SEEN}", f"2 {SEEN}", "1 ROLLBACK", "2 COMMIT", f"1 {SEEN}"],
    "plain_insert_of_a_taken_key_fails": ["1 INSERT INTO inbox VALUES (1, 'h')", "1 COMMIT", "2 INSERT INTO inbox VALUES (1, 'h')", "2 SELECT 1", "2 ROLLBACK", "2 SELECT 1"],
    "plain_insert_waits_then_fails": ["1 INSERT INTO inbox VALUES (1, 'h')", "2 INSERT INTO inbox VALUES (1, 'h')", "1 COMMIT"],
    "update_waits_and_looks_again_at_the_new_version": [f"1 {TAKE_ONE}", f"2 {TAKE_ONE}", "1 COMMIT", "2 COMMIT", "1 SELECT sku, stock FROM item"],
    "update_that_no_longer_fits_after_the_wait_touches_nothing": [
        "1 UPDATE item SET stock = 0 WHERE sku = 'pear'", "2 UPDATE item SET stock = stock - 1 WHERE sku = 'pear' AND stock >= 1 RETURNING stock", "1 COMMIT", "2 COMMIT"],
    "update_after_a_rollback_of_the_holder_sees_the_old_version": [
        "1 UPDATE item SET stock = 0 WHERE sku = 'pear'", "2 UPDATE item SET stock = stock - 1 WHERE sku = 'pear' AND stock >= 1 RETURNING stock", "1 ROLLBACK", "2 COMMIT"],
    "row_that_begins_to_fit_during_the_wait_is_not_seen": [
        "1 UPDATE item SET note = 'x'", "2 UPDATE item SET stock = 9 WHERE note = 'x'", "1 COMMIT", "2 UPDATE item SET stock = 9 WHERE note = 'x'", "2 ROLLBACK"],
    "uncommitted_rows_are_not_read": ["1 UPDATE item SET stock = 4 WHERE sku = 'apple'", "2 SELECT stock FROM item WHERE sku = 'apple'", "1 COMMIT", "2 SELECT stock FROM item WHERE sku = 'apple'"],
    "own_writes_are_read": ["1 UPDATE item SET stock = 4 WHERE sku = 'apple'", "1 SELECT stock FROM item WHERE sku = 'apple'", "1 ROLLBACK", "1 SELECT stock FROM item WHERE sku = 'apple'"],
    "for_update_makes_the_second_wait_and_shows_it_the_new_version": [
        "1 SELECT stock FROM item WHERE sku = 'apple' FOR UPDATE", "2 SELECT stock FROM item WHERE sku = 'apple' FOR UPDATE", "1 UPDATE item SET stock = 1 WHERE sku = 'apple'", "1 COMMIT", "2 COMMIT"],
    "for_update_leaves_out_a_row_that_no_longer_fits": [
        "1 UPDATE item SET stock = 0 WHERE sku = 'pear'", "2 SELECT sku FROM item WHERE stock = 1 FOR UPDATE", "1 COMMIT", "2 COMMIT"],
    "for_update_leaves_out_a_deleted_row": ["1 DELETE FROM item WHERE sku = 'pear'", "2 SELECT sku FROM item WHERE sku = 'pear' FOR UPDATE", "1 COMMIT", "2 COMMIT"],
    "for_update_does_not_stop_readers": ["1 SELECT stock FROM item FOR UPDATE", "2 SELECT stock FROM item", "1 COMMIT"],
    "skip_locked_leaves_the_locked_row_to_its_owner": [
        "1 SELECT sku FROM item WHERE sku = 'apple' FOR UPDATE", "2 SELECT sku FROM item ORDER BY sku FOR UPDATE SKIP LOCKED", "1 COMMIT", "2 COMMIT"],
    "skip_locked_counts_only_what_it_took": [
        "1 SELECT sku FROM item WHERE sku = 'apple' FOR UPDATE", "2 SELECT sku FROM item ORDER BY sku LIMIT 1 FOR UPDATE SKIP LOCKED", "1 COMMIT", "2 COMMIT"],
    "nowait_fails_at_once": ["1 SELECT sku FROM item FOR UPDATE", "2 SELECT sku FROM item FOR UPDATE NOWAIT", "2 ROLLBACK", "1 COMMIT"],
    "two_keys_in_opposite_order_are_a_deadlock": [
        "1 SET deadlock_timeout = '1min'", "1 UPDATE item SET note = 'a' WHERE sku = 'apple'", "2 UPDATE item SET note = 'b' WHERE sku = 'pear'", "1 UPDATE item SET note = 'a' WHERE sku = 'pear'", "2 UPDATE item SET note = 'b' WHERE sku = 'apple'"],
    "savepoint_rolled_back_undoes_only_what_followed_it": [
        "1 UPDATE item SET stock = 4 WHERE sku = 'apple'", "1 SAVEPOINT a", "1 UPDATE item SET stock = 3 WHERE sku = 'apple'", "1 INSERT INTO item VALUES ('fig', 1)",
        "1 ROLLBACK TO SAVEPOINT a", "1 COMMIT", "2 SELECT sku, stock FROM item"],
    "savepoint_rolled_back_gives_back_its_locks": [
        "1 SAVEPOINT a", "1 UPDATE item SET stock = 3 WHERE sku = 'apple'", "2 UPDATE item SET stock = 2 WHERE sku = 'apple'", "1 ROLLBACK TO SAVEPOINT a", "2 COMMIT", "1 SELECT stock FROM item WHERE sku = 'apple'"],
    "savepoint_saves_a_transaction_from_an_error": [
        "1 SAVEPOINT a", "1 INSERT INTO item VALUES ('apple', 1)", "1 SELECT 1", "1 ROLLBACK TO SAVEPOINT a", "1 INSERT INTO item VALUES ('fig', 1)", "1 COMMIT", "2 SELECT sku FROM item"],
    "savepoint_released_keeps_its_locks": ["1 SAVEPOINT a", "1 UPDATE item SET stock = 3 WHERE sku = 'apple'", "1 RELEASE SAVEPOINT a", "2 UPDATE item SET stock = 2 WHERE sku = 'apple'", "1 COMMIT", "2 COMMIT"],
    "commit_of_a_failed_transaction_rolls_back": ["1 UPDATE item SET stock = 4 WHERE sku = 'apple'", "1 INSERT INTO item VALUES ('apple', 1)", "1 ROLLBACK", "1 SELECT stock FROM item WHERE sku = 'apple'"],
    "on_conflict_update_waits_and_adds_to_the_new_version": [
        "1 INSERT INTO item VALUES ('apple', 1) ON CONFLICT (sku) DO UPDATE SET stock = item.stock + excluded.stock RETURNING stock",
        "2 INSERT INTO item VALUES ('apple', 1) ON CONFLICT (sku) DO UPDATE SET stock = item.stock + excluded.stock RETURNING stock", "1 COMMIT", "2 COMMIT"],
    "on_conflict_update_inserts_when_the_holder_rolls_back": [
        "1 INSERT INTO item VALUES ('fig', 1)", "2 INSERT INTO item VALUES ('fig', 7) ON CONFLICT (sku) DO UPDATE SET stock = item.stock + excluded.stock RETURNING stock", "1 ROLLBACK", "2 COMMIT"],
    "compensation_waits_for_the_action_in_flight": [
        "1 INSERT INTO barrier VALUES (1, 'step', 'action') ON CONFLICT DO NOTHING RETURNING op", "2 INSERT INTO barrier VALUES (1, 'step', 'undo') ON CONFLICT DO NOTHING RETURNING op", "1 COMMIT", "2 SELECT op FROM barrier"],
    "late_action_finds_the_tombstone": [
        "2 INSERT INTO barrier VALUES (1, 'step', 'undo') ON CONFLICT DO NOTHING RETURNING op", "2 COMMIT", "1 INSERT INTO barrier VALUES (1, 'step', 'action') ON CONFLICT DO NOTHING RETURNING op"],
    "second_to_lock_or_add_waits_and_finds_neither_until_it_looks_again": [f"1 {LOCK_OR_ADD}", f"2 {LOCK_OR_ADD}", "1 COMMIT", f"2 {LOCK_OR_ADD}"],
    "second_to_lock_or_add_adds_after_a_rollback": [f"1 {LOCK_OR_ADD}", f"2 {LOCK_OR_ADD}", "1 ROLLBACK", "2 COMMIT", f"1 {LOCK_OR_ADD}"],
    "lock_or_add_shows_the_new_version_after_the_wait": [
        f"1 {LOCK_OR_ADD}", "1 COMMIT", f"1 {LOCK_OR_ADD}", f"2 {LOCK_OR_ADD}", "1 UPDATE barrier SET op = 'undo'", "1 COMMIT", "2 COMMIT"],
    "lock_or_add_adds_what_was_deleted_during_the_wait": [
        f"1 {LOCK_OR_ADD}", "1 COMMIT", "1 DELETE FROM barrier", f"2 {LOCK_OR_ADD}", "1 COMMIT", "2 COMMIT", "1 SELECT op FROM barrier"],
    "deleted_key_can_be_taken_after_the_commit": ["1 DELETE FROM item WHERE sku = 'pear'", "2 INSERT INTO item VALUES ('pear', 9)", "1 COMMIT", "2 COMMIT", "1 SELECT stock FROM item WHERE sku = 'pear'"],
    "deleted_key_stays_taken_after_a_rollback": ["1 DELETE FROM item WHERE sku = 'pear'", "2 INSERT INTO item VALUES ('pear', 9)", "1 ROLLBACK"],
    "lock_alone_does_not_delay_a_conflicting_insert": ["1 SELECT 1 FROM item WHERE sku = 'pear' FOR UPDATE", "2 INSERT INTO item VALUES ('pear', 9) ON CONFLICT DO NOTHING", "1 COMMIT"],
    "check_constraint_refuses": ["1 UPDATE item SET stock = stock - 1 WHERE sku = 'plum'", "1 ROLLBACK"],
    "not_null_refuses": ["1 INSERT INTO item VALUES ('fig', NULL)", "1 ROLLBACK"],
    "delete_waits_for_an_update_and_removes_the_new_version": ["1 UPDATE item SET stock = 3 WHERE sku = 'apple'", "2 DELETE FROM item WHERE sku = 'apple' RETURNING stock", "1 COMMIT", "2 COMMIT"],
    "three_wait_in_line": [f"1 {TAKE_ONE}", f"2 {TAKE_ONE}", "1 COMMIT", f"3 {TAKE_ONE}", "2 COMMIT", "3 COMMIT"],
    "null_compares_to_nothing": ["1 SELECT sku FROM item WHERE note = 'x' OR NOT note = 'x'", "1 SELECT count(*) FROM item WHERE note IS NULL"],
    "aggregates_of_no_rows": ["1 SELECT count(*), sum(stock), max(stock) FROM item WHERE sku = 'none'", "1 SELECT sku, sum(stock) FROM item GROUP BY sku HAVING sum(stock) > 0"],
    "aggregate_in_a_subquery_leaves_the_rows_as_they_are": ["1 SELECT sku, (SELECT count(*) FROM inbox) FROM item WHERE stock > 0", "1 SELECT (SELECT count(*) FROM item) FROM item WHERE stock > 9"],
    "rows_of_a_list": ["1 SELECT sku FROM item WHERE sku = ANY(ARRAY['apple', 'fig']) OR sku IN (SELECT 'pear')", "1 SELECT exists(SELECT 1 FROM item WHERE stock = 0)"],
    "null_in_a_list_leaves_open_what_it_might_be": [
        "1 SELECT sku FROM item WHERE NOT sku = ANY(ARRAY['apple', NULL])", "1 SELECT sku FROM item WHERE sku = ANY(ARRAY['apple', NULL])", "1 SELECT sku FROM item WHERE sku NOT IN ('apple', NULL)",
        "1 SELECT sku FROM item WHERE (sku IN ('apple', NULL)) IS NULL", "1 SELECT 1 WHERE NOT NULL IN (SELECT sku FROM item WHERE stock > 9)"],
    "array_written_as_text": [
        "1 SELECT CAST('{a,NULL,b}' AS text[]), CAST('{1,null}' AS integer[]), CAST('{}' AS text[])", "1 SELECT sku FROM item WHERE sku = ANY('{apple,fig}')", "1 SELECT sku FROM item WHERE NOT sku = ANY('{apple,NULL}')"],
    "array_without_an_item_is_malformed": ["1 SELECT CAST('{,}' AS text[])", "1 ROLLBACK", "1 SELECT CAST('{a,}' AS text[])"],
    "not_null_over_nulls_is_refused": ["1 ALTER TABLE item ALTER COLUMN note SET NOT NULL", "1 ROLLBACK", "1 INSERT INTO item VALUES ('fig', 1)"],
    "not_null_in_lines_holds_from_then_on": [
        "1 UPDATE item SET note = 'x'", "1 COMMIT", "1 ALTER TABLE item\n  ALTER COLUMN note\n  SET NOT NULL", "1 COMMIT", "1 INSERT INTO item VALUES ('fig', 1)", "1 ROLLBACK",
        "1 ALTER TABLE item ALTER note\nDROP NOT NULL, ALTER COLUMN stock DROP NOT NULL", "1 INSERT INTO item VALUES ('fig', NULL)", "1 COMMIT"],
    "altering_what_is_not_there": [
        "1 ALTER TABLE IF EXISTS nowhere ALTER COLUMN note SET NOT NULL", "1 ALTER TABLE nowhere ALTER COLUMN note SET NOT NULL", "1 ROLLBACK", "1 ALTER TABLE item ALTER COLUMN nowhere DROP NOT NULL"],
    "strict_function_of_a_null_is_null": [SHARE, LOOK, SHARE, "1 ROLLBACK"],
    "function_that_is_not_strict_takes_a_null": [SHARE.replace(" STRICT", ""), LOOK, "1 SELECT public.share('apple')"],
    "function_that_is_replaced": [SHARE, "1 COMMIT", SHARE.replace("CREATE", "CREATE OR REPLACE").replace(" + parts", " - parts"), LOOK, "1 COMMIT", LOOK],
    "function_without_parameters": [SHARE.replace("of_sku text, parts integer", "").replace("item.stock + parts", "sum(item.stock)").replace("= of_sku", "<> 'pear'"), "1 SELECT public.share()"],
}  # fmt: skip

SEVERAL_STATEMENTS = SHARE[2:].replace("RETURN found", "found := 0; RETURN found")


@pytest.mark.parametrize(
    "after",
    [
        SEVERAL_STATEMENTS.replace("CREATE", "CREATE OR REPLACE"),
        SEVERAL_STATEMENTS.replace("CREATE", "CREATE OR REPLACE").replace("public.", ""),
        SHARE[2:].replace("parts integer", "parts bigint"),
        SHARE[2:].replace("parts integer", "parts integer, more integer\nDEFAULT 1"),
        SHARE[2:].replace("parts integer", "parts integer, more integer = 1"),
        SHARE[2:].replace("parts integer", "parts integer, VARIADIC more integer[]"),
    ],
    ids=["several statements", "no schema", "overload", "default", "equals", "variadic"],
)
def test_a_function_that_the_model_no_longer_knows_is_a_gap(after: str) -> None:
    database = ModelDatabase()
    database.define(*SETUP, SHARE[2:])
    database.define(after)
    with pytest.raises(ModelGap, match=r"the function public\.share\(\)"):
        database.connect().cursor().execute(LOOK[2:])


def test_what_else_an_alteration_asks_for_is_a_gap() -> None:
    database = ModelDatabase()
    database.define(*SETUP)
    with pytest.raises(ModelGap, match="ADD COLUMN"):
        database.define("ALTER TABLE item ALTER stock DROP NOT NULL, ADD COLUMN more text")


def test_a_run_leaves_the_functions_of_its_template_as_they_are() -> None:
    template, run = ModelDatabase(), ModelDatabase()
    template.define(*SETUP, SHARE[2:])
    run.storage.copy_from(template.storage)
    run.define(SEVERAL_STATEMENTS.replace("CREATE", "CREATE OR REPLACE"))
    cursor = template.connect().cursor().execute(LOOK[2:])
    assert cursor.fetchall() == [(6, None, None, None)]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_model_answers_as_postgresql_does(script: list[str], database_url: str) -> None:
    assert_alike(SETUP, script, database_url)
