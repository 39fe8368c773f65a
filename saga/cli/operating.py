"""`saga resume`, `saga abort`, `saga skip-compensation`: what a person does to a saga, on the record."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from outbox.cli import options
from outbox.cli.output import Problem, first_line, print_json, print_table, reporting_problems

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

_LOCK_TIMEOUT = "SET LOCAL lock_timeout = '5s'"
_PATIENCE = timedelta(seconds=10)

_by = click.option("--by", metavar="NAME", help="Who does it.  [default: the system's user]")
_participant = click.option("--participant", help="Only this participant's part.")


def _common(command: F) -> F:
    for option in (options.as_json, _by, _participant, options.schema, options.database_url()):
        command = option(command)
    return command


@click.command("resume")
@click.argument("saga_id", type=click.UUID)
@_common
@click.option("--reason", default="resumed", help="Why; it is kept with the saga.")
@reporting_problems
def resume_command(
    saga_id: UUID,
    database_url: str,
    schema: str,
    participant: str | None,
    by: str | None,
    as_json: bool,
    reason: str,
) -> None:
    """Try again whatever is stuck in a saga here, with all attempts before it.

    Exits 1 where something is stuck and cannot be tried again.
    """
    from saga import operating

    operator = operating.Operator(by or _user(), reason)
    resumed = _carry_out(
        database_url,
        "saga resume",
        lambda session: operating.resume(
            session, saga_id, operator, participant=participant, schema=schema
        ),
    )
    if as_json:
        print_json({"saga_id": saga_id, "resumed": [vars(one) for one in resumed]})
    elif not resumed:
        click.echo(f"nothing of saga {saga_id} is stuck here")
    else:
        print_table(
            ["participant", "step", "was", "tried again from"],
            [[one.participant, one.step, one.state, first_line(one.by)] for one in resumed],
            title=f"Resumed: {len(resumed)}",
        )
    if not all(one.goes_on for one in resumed):
        raise SystemExit(1)


@click.command("abort")
@click.argument("saga_id", type=click.UUID)
@_common
@click.option("--reason", required=True, help="Why; every participant keeps it.")
@click.option("--force", is_flag=True, help="Also where the saga is not decided. Read the warning.")
@reporting_problems
def abort_command(
    saga_id: UUID,
    database_url: str,
    schema: str,
    participant: str | None,
    by: str | None,
    as_json: bool,
    reason: str,
    force: bool,
) -> None:
    """Abort a running saga: every participant undoes its part.

    Only in the database of the participant that decides it (the one with the completing join),
    where the abort and the decision exclude each other. --force aborts it elsewhere: if it is
    completed at the same moment, participants differ, and it is shown as stuck.
    """
    from saga import operating

    operator = operating.Operator(by or _user(), reason)
    where = _carry_out(
        database_url,
        "saga abort",
        lambda session: operating.abort(
            session, saga_id, operator, participant=participant, force=force, schema=schema
        ),
    )
    if force:
        click.echo(
            "warning: forced; if the saga was completed elsewhere meanwhile, its participants "
            "differ: watch `saga stuck` in their databases",
            err=True,
        )
    if as_json:
        print_json({"saga_id": saga_id, "aborted_by": where, "operator": operator.name})
    else:
        click.echo(f"saga {saga_id} is aborted by {where}; see `saga show {saga_id}`")


@click.command("skip-compensation")
@click.argument("saga_id", type=click.UUID)
@click.argument("step")
@_common
@click.option("--trigger", type=click.UUID, help="Which run, where the step ran more than once.")
@click.option("--reason", required=True, help="Why it needs none; it is kept with the saga.")
@reporting_problems
def skip_compensation_command(
    saga_id: UUID,
    step: str,
    database_url: str,
    schema: str,
    participant: str | None,
    by: str | None,
    as_json: bool,
    trigger: UUID | None,
    reason: str,
) -> None:
    """Count STEP as undone without calling its compensation: somebody has undone it by hand.

    The saga goes on as if the compensation had succeeded; what was parked for it is discarded.
    """
    from saga import operating

    operator = operating.Operator(by or _user(), reason)
    key = _carry_out(
        database_url,
        "saga skip-compensation",
        lambda session: operating.skip_compensation(
            session, saga_id, step, operator,
            participant=participant, trigger_id=trigger, schema=schema,
        ),
    )  # fmt: skip
    if as_json:
        document = {"saga_id": saga_id, "step": key.step, "trigger_id": key.trigger_id}
        print_json({**document, "operator": operator.name})
    else:
        click.echo(f"{key} counts as compensated")


@click.command("resolve")
@click.argument("saga_id", type=click.UUID)
@click.argument("step")
@_common
@click.option("--happened/--did-not-happen", default=None, help="Whether the call took effect.")
@click.option("--event", metavar="JSON", help="With --happened: the payload that the step emits.")
@click.option("--trigger", type=click.UUID, help="Which run, where the step ran more than once.")
@click.option("--reason", required=True, help="How you know; it is kept with the saga.")
@reporting_problems
def resolve_command(
    saga_id: UUID,
    step: str,
    database_url: str,
    schema: str,
    participant: str | None,
    by: str | None,
    as_json: bool,
    happened: bool | None,
    event: str | None,
    trigger: UUID | None,
    reason: str,
) -> None:
    """Say whether the call of an unresolved external STEP took effect, once nothing else can tell.

    A worker then goes on: it writes the result down or calls again; in an aborted saga it undoes
    what happened.
    """
    from saga import operating

    if happened is None:
        raise click.UsageError("say --happened or --did-not-happen")
    if event is not None and not happened:
        raise click.UsageError("--event goes with --happened")
    operator = operating.Operator(by or _user(), reason)
    key = _carry_out(
        database_url,
        "saga resolve",
        lambda session: operating.resolve(
            session, saga_id, step, operator, happened=bool(happened), event=event,
            participant=participant, trigger_id=trigger, schema=schema,
        ),
    )  # fmt: skip
    if as_json:
        document = {"saga_id": saga_id, "step": key.step, "trigger_id": key.trigger_id}
        print_json({**document, "happened": happened, "operator": operator.name})
    else:
        click.echo(f"{key}: {'happened' if happened else 'did not happen'}")


def _carry_out(database_url: str, command: str, stage: Callable[[Session], R]) -> R:
    """One transaction, again after a deadlock; a worker that does not let go is a problem."""
    from sqlalchemy import text

    from outbox.transactions import NotSettled, Transactions
    from outbox.transient import is_lock_timeout
    from outbox.work import Busy

    def locked_briefly(session: Session) -> R:
        session.execute(text(_LOCK_TIMEOUT))
        return stage(session)

    with options.database(database_url, command) as engine:
        try:
            return Transactions(engine, patience=_PATIENCE, tries=3).retried(locked_briefly)
        except NotSettled:
            raise
        except Exception as error:
            if isinstance(error, Busy) or is_lock_timeout(error):
                raise Problem("a worker is at work on this saga and holds it; try again") from error
            raise


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
