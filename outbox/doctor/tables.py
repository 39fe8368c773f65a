"""Are our tables in this database as they must be, and may this role use them?"""

from __future__ import annotations

from outbox.doctor.finding import Answer, fail, ok, warn
from outbox.doctor.patient import Patient
from outbox.errors import SchemaError


def schema_version(patient: Patient) -> Answer:
    versions = []
    for component in patient.components:
        try:
            component.check(patient.connection, patient.schema)
        except SchemaError as error:
            return fail(str(error), f"outbox migrate --schema {patient.schema}")
        status = component.status(patient.connection, patient.schema)
        versions.append(f"{status.component} {status.version} of {status.latest}")
        if status.behind:
            return warn(", ".join(versions), f"outbox migrate --schema {patient.schema}")
    return ok(", ".join(versions))


def rights(patient: Patient) -> Answer:
    missing = [
        f"{needed} on {table}"
        for table, needed in (
            ("outbox_event", "SELECT"),
            ("outbox_event", "INSERT"),
            ("outbox_cursor", "INSERT"),
            ("inbox", "INSERT"),
            ("pending_delivery", "DELETE"),
            ("dead_letter", "INSERT"),
        )
        if not patient.one(
            "SELECT has_table_privilege(CAST(:name AS text), :needed)",
            name=f"{patient.schema}.{table}",
            needed=needed,
        )
    ]
    role = patient.one("SELECT current_user")
    if missing:
        return warn(
            f"role {role} lacks {', '.join(missing)}",
            "grant them if this role is a relay's or a worker's; a producer needs INSERT only",
        )
    return ok(f"role {role} may do what relays and workers do")


def unlogged_tables(patient: Patient) -> Answer:
    unlogged = [
        row.relname
        for row in patient.rows(
            "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('{schema}') "
            "AND relkind IN ('r', 'p') AND relpersistence = 'u' ORDER BY relname"
        )
    ]
    if unlogged:
        return fail(
            f"emptied by a crash of the server: {', '.join(unlogged)}",
            "; ".join(f"ALTER TABLE {patient.schema}.{each} SET LOGGED" for each in unlogged),
        )
    return ok("none")


def default_partition(patient: Patient) -> Answer:
    if patient.one("SELECT EXISTS (SELECT FROM {schema}.outbox_event_default)"):
        return warn(
            "no relay made partitions in time, and events went to outbox_event_default; "
            "they are delivered like all others, but their space does not come back by itself",
            "keep a relay running; delete from the default what is delivered and old enough",
        )
    return ok("outbox_event_default is empty")


def system_identifier(patient: Patient) -> Answer:
    here = patient.one("SELECT system_identifier FROM pg_control_system()")
    adopted = patient.one(
        "SELECT system_identifier FROM {schema}.outbox_cluster ORDER BY adopted_at DESC LIMIT 1"
    )
    if adopted is None:
        return ok(f"{here}; no relay has run here yet")
    if adopted != here:
        return fail(
            f"cursors were stored in cluster {adopted}, this is cluster {here}: "
            "transaction ids of one mean nothing in the other",
            "after a restore: stop all relays and writers, then `outbox adopt-cluster`",
        )
    return ok(str(here))
