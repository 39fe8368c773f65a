"""The demo as its users run it: a process of its own, with real servers and real processes below it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import make_url

from examples.order_saga.demo.services import QUEUES
from tests.local_servers import await_condition

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "examples.order_saga.demo"]
ORDERS = 40

pytestmark = pytest.mark.timeout(300)


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "report.json"


@pytest.fixture(scope="module")
def run(report_file: Path) -> subprocess.CompletedProcess[str]:
    """One run, which several tests look at."""
    return run_demo("--orders", str(ORDERS), "--seed", "7", "--json", str(report_file))


@pytest.fixture(scope="module")
def report(run: subprocess.CompletedProcess[str], report_file: Path) -> dict[str, Any]:
    assert report_file.exists(), run.stdout + run.stderr
    report: dict[str, Any] = json.loads(report_file.read_text())
    return report


def test_it_succeeds_and_complains_of_nothing(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert "Traceback" not in run.stdout


def test_every_order_ends_confirmed_or_cancelled(report: dict[str, Any]) -> None:
    orders = report["orders"]
    assert orders["placed"] == ORDERS
    assert orders["confirmed"] + orders["cancelled"] == ORDERS
    assert (orders["pending"], orders["stuck"]) == (0, 0)
    assert report["audit"] == {"violations": []}


def test_no_event_is_lost_and_none_is_made_up(report: dict[str, Any]) -> None:
    events = report["events"]
    assert events["published"] > 4 * ORDERS
    assert (events["lost"], events["phantom"]) == (0, 0)
    assert events.keys() == {"published", "lost", "phantom", "redelivered", "absorbed"}


def test_a_service_is_killed_missed_by_nobody_and_catches_up(
    report: dict[str, Any], run: subprocess.CompletedProcess[str]
) -> None:
    assert report["outage"]["service"] == "users"
    assert report["outage"]["orders_accepted_meanwhile"] >= ORDERS // 4
    assert report["outage"]["caught_up"] is True
    assert "users is killed" in run.stdout
    assert "0 events handled" in run.stdout


def test_latencies_are_measured(report: dict[str, Any]) -> None:
    for name in ("accept", "settle"):
        assert 0 < report["latency_ms"][name]["p50"] <= report["latency_ms"][name]["p99"]


def test_each_of_the_three_services_says_no(run: subprocess.CompletedProcess[str]) -> None:
    said = next(line for line in run.stdout.splitlines() if "no was said by" in line)
    for service in ("inventory", "users", "shipping"):
        assert f"{service} to " in said


def test_one_order_is_told_from_its_beginning_to_its_end(
    run: subprocess.CompletedProcess[str],
) -> None:
    told = run.stdout.partition("An order that could not be fulfilled")[2]
    assert "stored the order" in told
    assert " said no: " in told
    assert "cancelled the order" in told


def test_servers_that_are_given_are_used_and_left_as_they_were(
    make_database: Any, rabbitmq_url: str, tmp_path: Path
) -> None:
    database_url, report_file = make_database(), tmp_path / "report.json"
    run = run_demo(
        *("--orders", "20", "--database-url", plain(database_url), "--broker-url", rabbitmq_url),
        *("--json", str(report_file)),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(report_file.read_text())["audit"] == {"violations": []}
    with psycopg.connect(plain(database_url)) as connection:
        left = connection.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE 'order_saga_%'"
        ).fetchall()
    assert left == []
    assert queues_left(rabbitmq_url) == []


@pytest.fixture
def demo() -> Iterator[subprocess.Popen[str]]:
    """The demo, interrupted by nobody yet, with orders coming in."""
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "orders come in" in line:
            break
    assert process.poll() is None, "".join(said)
    yield process
    if process.poll() is None:
        process.kill()
    process.stdout.close()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_demo_however_it_ends(
    demo: subprocess.Popen[str], number: signal.Signals
) -> None:
    children = psutil.Process(demo.pid).children(recursive=True)
    directories = {Path(child.cwd()) for child in children} - {ROOT, Path("/")}
    assert len(children) > 10
    assert directories
    os.killpg(demo.pid, number)
    code = demo.wait(timeout=60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    await_condition(lambda: not any(map(is_alive, children)), within=30, what="all children end")
    await_condition(
        lambda: not any(directory.exists() for directory in directories),
        within=30,
        what="the data are removed",
    )


def test_too_few_orders_are_refused_before_anything_starts() -> None:
    run = run_demo("--orders", "3")
    assert run.returncode == 2
    assert "--orders" in run.stderr


def test_a_server_that_does_not_answer_is_said_in_one_line() -> None:
    run = run_demo("--database-url", "postgresql://127.0.0.1:1/none")
    assert run.returncode == 3
    assert "the database server cannot be used" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def queues_left(broker_url: str) -> list[str]:
    from kombu import Connection

    left = []
    with Connection(broker_url) as connection:
        for queue in QUEUES:
            channel = connection.channel()
            try:
                channel.queue_declare(queue, passive=True)
                left.append(queue)
            except connection.channel_errors:
                continue
    return left
