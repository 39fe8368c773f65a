"""Every command in the documents is run, as it stands there, on what it is about, and does what they say.

Only hosts are other ones. `CASES` says what has to be there for a command, what it then says and does, and why, where
it does not end with exit code 0. A command that is not in it fails.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from sqlalchemy import Engine, create_engine

import outbox.cli
import saga.cli
from tests import stages
from tests.mock_kafka import MockKafka
from tests.stages import SAGA_ID, Scene
from tests.workers import eventually

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Case:
    """What to expect of a documented command."""

    says: str
    """A part of what it prints or logs."""
    stage: Callable[[Scene], None] = stages.nothing
    """Makes what it is about."""
    exits: int = 0
    because: str = ""
    """Why it does not end with 0."""
    on_source: bool = False
    """It works on the source's database, not on the subscriber's."""
    brings_about: Callable[[Scene], bool] = stages.anything
    """Whether it has done what it is for, where that is not in what it says."""
    runs_on: bool = False
    """Until it is told to stop, which it is when it has brought that about."""


CASES = {
    "outbox migrate": Case("Tables", stages.no_tables, brings_about=stages.has_tables),
    "outbox migrate --check": Case("Tables"),
    "outbox migrate --sql": Case("CREATE TABLE"),
    "outbox relay": Case(
        "3 events confirmed",
        stages.three_events_not_yet_sent,
        on_source=True,
        brings_about=stages.are_sent,
        runs_on=True,
    ),
    "celery -A billing worker": Case(
        "billing.events", brings_about=stages.is_subscribed, runs_on=True
    ),
    "outbox consume": Case(
        "consuming billing.events", brings_about=stages.is_subscribed, runs_on=True
    ),
    "outbox status": Case("nothing waits"),
    "outbox metrics": Case('handler="billing.write_invoice"', stages.a_dead_letter),
    "outbox doctor": Case(" 0 failed"),
    "outbox dead list": Case("Dead letters: 1 of 1", stages.a_dead_letter),
    "outbox dead show": Case("CardDeclined", stages.a_dead_letter),
    "outbox dead redrive": Case("1 redriven", stages.a_dead_letter),
    "outbox dead discard": Case("1 discarded", stages.a_dead_letter),
    "outbox quarantine list": Case("no envelope", stages.a_quarantined_message),
    "outbox quarantine show": Case("no envelope", stages.a_quarantined_message),
    "outbox quarantine redrive": Case("1 redriven", stages.a_quarantined_message),
    "outbox quarantine discard": Case("1 discarded", stages.a_quarantined_message),
    "outbox holes list": Case("1 hole", stages.a_hole_that_is_gone),
    "outbox holes forget": Case("1 hole forgotten", stages.a_hole_that_is_gone),
    "outbox audit": Case("Nothing is missing", stages.three_events),
    "outbox audit --repair": Case(
        "send them again now",
        stages.three_events_one_of_which_was_lost,
        exits=1,
        because="it tells what was missing; only the relays repair it",
    ),
    "outbox replay": Case("3 events sent to billing.events", stages.three_events, on_source=True),
    "outbox replay --dry-run": Case(" 3 ", stages.three_events, on_source=True),
    "outbox adopt-cluster": Case("adopted", stages.a_restored_log, on_source=True),
    "saga list": Case(str(SAGA_ID), stages.a_saga),
    "saga stuck": Case("Stuck"),
    "saga show": Case("reserve_stock", stages.a_stuck_step),
    "saga resume": Case("Resumed: 1", stages.a_stuck_step),
    "saga abort": Case("is aborted by orders", stages.a_saga),
    "saga resolve": Case("did not happen", stages.an_unresolved_charge),
    "saga skip-compensation": Case("counts as compensated", stages.a_stuck_compensation),
    "saga peers": Case("shipping", stages.a_saga),
    "saga retire": Case("waits for shipping no longer", stages.a_saga),
    "saga check": Case("0 errors"),
    "python -m examples.trip_saga.simulated": Case("20 schedules"),
}


def commands() -> list[str]:
    """Each line of a block, once."""
    blocks = [
        block
        for document in DOCUMENTS
        for block in re.findall(
            r"^```bash\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE
        )
    ]
    return list(dict.fromkeys(line for block in blocks for line in block.splitlines() if line))


def name_of(words: list[str]) -> str:
    """Of its case: that of the most words that the command has, too."""
    fitting = [name for name in CASES if set(name.split()) <= set(words)]
    assert fitting, f"not prepared: {shlex.join(words)}"
    return max(fitting, key=len)


def mentioned() -> list[str]:
    """Commands in the prose, which leave out what does not matter there."""
    return [
        " ".join(span.split())
        for document in DOCUMENTS
        for span in re.findall(
            r"`((?:outbox|saga) [^`]+)`",
            re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE),
        )
    ]


@pytest.fixture
def scene(make_migrated_database: Callable[[], str], mock_kafka: MockKafka) -> Iterator[Scene]:
    source, subscriber = (create_engine(make_migrated_database()) for _ in range(2))
    for topic in ("events.order", "billing.events"):
        mock_kafka.create_topic(topic, 2)
    yield Scene(source, subscriber)
    source.dispose()
    subscriber.dispose()


def url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


@pytest.mark.parametrize("command", commands(), ids=lambda value: str(value).replace(" ", "_"))
def test_a_command_in_the_documents_does_what_they_say(
    command: str,
    scene: Scene,
    redis_url: str,
    mock_kafka: MockKafka,
    tmp_path: Path,
) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        # What the targets do, tests of their own show; here: that they are there.
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    case = CASES[name_of(words)]
    case.stage(scene)
    (tmp_path / "shop.py").write_text(stages.SHOP)
    (tmp_path / "billing.py").write_text(stages.BILLING)
    hosts = {
        "postgresql://orders@db/orders": url(scene.source),
        "postgresql://billing@db/billing": url(scene.subscriber),
        "kafka://host": mock_kafka.url,
    }
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "OUTBOX_DATABASE_URL": url(scene.source if case.on_source else scene.subscriber),
        "OUTBOX_BROKER_URL": redis_url,
    }
    said = tmp_path / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [BIN / words[0], *(hosts.get(word, word) for word in words[1:])],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        if case.runs_on:
            eventually(
                lambda: case.brings_about(scene) or process.poll() is not None, 30, said.read_text
            )
            process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert code == case.exits, said.read_text()
    assert case.says in said.read_text()
    assert case.brings_about(scene)
    assert "Traceback (most recent call last)" not in said.read_text()


def test_what_does_not_end_with_0_has_a_reason() -> None:
    assert all(case.because for case in CASES.values() if case.exits)


def test_every_case_is_of_a_command_in_the_documents() -> None:
    used = {name_of(shlex.split(line)) for line in commands() if not line.startswith("make")}
    assert set(CASES) - used == set()


def test_commands_and_options_that_are_only_mentioned_exist() -> None:
    assert len(mentioned()) > 40
    for words in map(str.split, mentioned()):
        command: click.Command = {"outbox": outbox.cli.main, "saga": saga.cli.main}[words[0]]
        context, rest = click.Context(command), words[1:]
        while isinstance(command, click.Group) and not rest[0].startswith("--"):
            found = command.get_command(context, rest.pop(0))
            assert found is not None, words
            command = found
        known = {
            option
            for one in command.get_params(context)
            for option in (*one.opts, *one.secondary_opts)
        }
        assert {word for word in rest if word.startswith("--")} <= known, words
