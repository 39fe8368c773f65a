"""The `saga` command: where sagas stand in one participant's database, and what they wait for.

Exit codes and `--json` are as for `outbox`: 0 all is well, 1 there is a problem, 2 called wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from outbox.cli import options
from outbox.cli.bodies import envelope_of
from outbox.cli.output import (
    console,
    first_line,
    not_found,
    print_json,
    print_table,
    printable,
    reporting_problems,
)

if TYPE_CHECKING:
    from saga.standing import SagaStanding, StepStanding, Story

_STATES: Final = ("running", "completed", "compensating", "compensated")

_participant = click.option("--participant", help="Only this participant's.")
_limit = click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="outbox-saga", prog_name="saga")
def main() -> None:
    """Sagas that always end, completed or undone.

    Databases are named by --database-url or OUTBOX_DATABASE_URL. Each participant knows its own
    part of a saga: ask each database, or the observer.
    """


@main.command("list")
@options.database_url()
@options.schema
@_participant
@click.option("--state", type=click.Choice(_STATES), help="Only those that stand so.")
@click.option("--all", "everything", is_flag=True, help="Also those that have ended.")
@_limit
@options.as_json
@reporting_problems
def list_command(
    database_url: str,
    schema: str,
    participant: str | None,
    state: str | None,
    everything: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List sagas, newest first; without --all or --state, those that have not ended."""
    from saga import standing

    with options.session(database_url, "saga list") as session:
        if everything or state is not None:
            sagas = standing.all_sagas(
                session, participant=participant, state=state, limit=limit, schema=schema
            )
        else:
            sagas = standing.open_sagas(
                session, participant=participant, limit=limit, schema=schema
            )
    _print_sagas(sagas, "Sagas", as_json)


@main.command("stuck")
@options.database_url()
@options.schema
@_participant
@_limit
@options.as_json
@reporting_problems
def stuck_command(
    database_url: str, schema: str, participant: str | None, limit: int, as_json: bool
) -> None:
    """List sagas that wait for a person, with the reason and what resumes them.

    Exits 1 where there is one.
    """
    from saga import standing

    with options.session(database_url, "saga stuck") as session:
        stuck = standing.stuck_sagas(session, participant=participant, limit=limit, schema=schema)
        found = [standing.story(session, one, schema=schema) for one in _ids(stuck)]
    stories = [one for one in found if one is not None]
    if as_json:
        print_json([_stuck_document(one) for one in stories])
    else:
        rows = [row for one in stories for row in _stuck_rows(one)]
        columns = ["saga", "participant", "step", "since", "reason", "resume with"]
        print_table(columns, rows, title=f"Stuck: {len(stories)}")
    if stories:
        raise SystemExit(1)


@main.command("show")
@click.argument("saga_id", type=click.UUID)
@options.database_url()
@options.schema
@options.as_json
@reporting_problems
def show_command(saga_id: UUID, database_url: str, schema: str, as_json: bool) -> None:
    """Show one saga: its state, its steps, and what its joins have."""
    from saga import standing

    with options.session(database_url, "saga show") as session:
        told = standing.story(session, saga_id, schema=schema)
    if told is None:
        not_found(f"saga {saga_id} in schema {schema!r}")
    if as_json:
        print_json(_document(told))
        return
    _print_sagas(told.sagas, f"Saga {saga_id}", as_json=False)
    print_table(
        ["participant", "step", "state", "ran", "changed", "reason"],
        [
            [one.participant, one.step, one.state, one.ran_at, one.changed_at, one.reason]
            for one in told.steps
        ],
        title="Steps",
    )
    if told.arrivals:
        print_table(
            ["participant", "join", "event", "arrived"],
            [[one.participant, one.join, one.type, one.arrived_at] for one in told.arrivals],
            title="Arrived for joins",
        )
    if told.interventions:
        print_table(
            ["participant", "verb", "step", "by", "why", "at"],
            [
                [one.participant, one.verb, one.step, one.operator, one.reason, one.at]
                for one in told.interventions
            ],
            title="Done by hand",
        )
    for line in _advice(told):
        console().print(printable(line), markup=False, soft_wrap=True)


def _print_sagas(sagas: Sequence[SagaStanding], title: str, as_json: bool) -> None:
    if as_json:
        print_json([asdict(one) for one in sagas])
        return
    print_table(
        ["saga", "participant", "state", "since", "why"],
        [
            [
                one.saga_id,
                one.participant,
                _state(one),
                one.changed_at,
                first_line(one.reason or ""),
            ]
            for one in sagas
        ],
        title=f"{title}: {len(sagas)}",
    )


def _state(one: SagaStanding) -> str:
    return f"{one.state}, stuck" if one.stuck else one.state


def _ids(sagas: Sequence[SagaStanding]) -> list[UUID]:
    return list(dict.fromkeys(one.saga_id for one in sagas))


def _stuck_rows(told: Story) -> list[list[object]]:
    return [
        [
            told.sagas[0].saga_id,
            one.participant,
            one.step,
            one.changed_at,
            first_line(one.reason or ""),
            _resume_with(told),
        ]
        for one in told.steps
        if one.is_stuck
    ]


def _resume_with(told: Story) -> str:
    return f"saga resume {told.sagas[0].saga_id}"


def _or_resolve(one: StepStanding) -> str:
    if one.state != "unresolved":
        return ""
    return f"; or say what you know: saga resolve ID {one.participant}.{one.step} (see --help)"


def _advice(told: Story) -> list[str]:
    return [
        *(
            f"{one.participant}.{one.step} is undone once {' and '.join(one.waits_for)} said so"
            for one in told.waits
        ),
        *(
            f"{one.participant}.{one.step} is stuck: {first_line(one.reason or '')}. "
            f"Once that is put right: {_resume_with(told)}{_or_resolve(one)}"
            for one in told.steps
            if one.is_stuck
        ),
    ]


def _stuck_document(told: Story) -> dict[str, Any]:
    return {
        "saga_id": told.sagas[0].saga_id,
        "steps": [
            {
                "participant": one.participant,
                "step": one.step,
                "state": one.state,
                "since": one.changed_at,
                "reason": one.reason,
                "resume_with": _resume_with(told),
            }
            for one in told.steps
            if one.is_stuck
        ],
    }


def _document(told: Story) -> dict[str, Any]:
    return {
        "saga_id": told.sagas[0].saga_id,
        "participants": [asdict(one) for one in told.sagas],
        "steps": [
            {
                **asdict(one),
                "trigger": envelope_of(one.trigger),
                "emitted": None if one.emitted is None else envelope_of(one.emitted),
            }
            for one in told.steps
        ],
        "arrivals": [asdict(one) for one in told.arrivals],
        "dead_letters": [{"id": id, "handler": handler} for id, handler in told.dead_letters],
        "waits": [asdict(one) for one in told.waits],
        "interventions": [asdict(one) for one in told.interventions],
    }
