"""The servers that tests run on, as fixtures. `tests/servers.py` says where they come from."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn, TypeVar

import hypothesis
import pytest
from sqlalchemy import Engine, create_engine, make_url

from outbox import doorbell
from tests import containers, servers
from tests.databases import Databases
from tests.kafka_brokers import Kafka, KafkaBroker, LocalKafka
from tests.local_servers import (
    LocalPgBouncer,
    LocalPostgres,
    LocalRabbitMQ,
    LocalRedis,
    LocalServer,
)
from tests.mock_kafka import MockKafka
from tests.servers import Room, Unavailable

# No test is timed: on a busy machine any example may take long.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SEEDS = ("SIMULATION_SEED", "OUTBOX_CHAOS_SEED")
ROOM = pytest.StashKey[Room]()
Server = TypeVar("Server", bound=LocalServer)


# ---- the session ----


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_docker: runs through testcontainers")
    # Fresh ones in every run, the same in all of its processes, and in the header to run them again.
    for name in SEEDS:
        os.environ.setdefault(name, str(int(time.time()) % 1_000_000))
    given = getattr(config, "workerinput", {}).get("room")
    config.stash[ROOM] = Room(servers.Path(given)) if given else Room.open()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["room"] = str(node.config.stash[ROOM].path)


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or ROOM not in config.stash:
        return
    room = config.stash[ROOM]
    given = os.environ.get(servers.VARIABLES["postgres"])
    if given and any(room.path.glob("template-*.json")):
        Databases(given, room).drop_template()
    room.close()


def pytest_report_header() -> list[str]:
    return [
        "servers: " + ", ".join(map(servers.describe, servers.TITLES)),
        "seeds: " + " ".join(f"{name}={os.environ[name]}" for name in SEEDS),
    ]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names and counts what no server was there for, apart from other skips."""
    missing = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        if "no server: " in reason:
            missing[report.nodeid] += 1
    if missing:
        terminalreporter.section(f"{missing.total()} not run for want of a server")
        for nodeid in sorted(missing):
            terminalreporter.line(nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_docker") is not None:
        for kind in containers.MADE_HERE:
            reason = containers.why_not(kind)
            if reason is not None:
                _do_without(reason)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Lets text that UTF-8 cannot hold cross from a worker: tests log such text on purpose."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value


def _do_without(reason: object) -> NoReturn:
    """A missing server skips a test; on CI it fails it."""
    if os.environ.get("CI"):
        pytest.fail(f"no server: {reason}", pytrace=False)
    pytest.skip(f"no server: {reason}")


def _shared(room: Room, kind: str, rung: str | None = None) -> str:
    try:
        return room.url(kind, rung)
    except Unavailable as unavailable:
        _do_without(unavailable)


@pytest.fixture(scope="session")
def room(pytestconfig: pytest.Config) -> Room:
    """The session's room: where its processes keep what they share."""
    return pytestconfig.stash[ROOM]


# ---- PostgreSQL ----


@pytest.fixture(scope="session")
def databases(room: Room) -> Iterator[Databases]:
    """Makes and drops databases on the session's PostgreSQL."""
    made = Databases(_shared(room, "postgres"), room)
    yield made
    made.close()


@pytest.fixture
def make_database(databases: Databases) -> Iterator[Callable[[], str]]:
    """Makes an empty database at each call and returns its URL; all are dropped after the test."""
    yield from _factory(databases, databases.create)


@pytest.fixture
def make_migrated_database(databases: Databases) -> Iterator[Callable[[], str]]:
    """As `make_database`, with the tables of outbox and saga."""
    yield from _factory(databases, databases.create_migrated)


def _factory(databases: Databases, create: Callable[[], str]) -> Iterator[Callable[[], str]]:
    made: list[str] = []

    def make() -> str:
        made.append(create())
        return made[-1]

    yield make
    for url in made:
        databases.drop(url)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """`create_engine`, with every engine disposed after the test."""
    made: list[Engine] = []

    def make(url: str, **options: Any) -> Engine:
        made.append(create_engine(url, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


@pytest.fixture
def database_url(make_database: Callable[[], str]) -> str:
    """An empty database of the test's own."""
    return make_database()


@pytest.fixture
def engine(database_url: str, make_engine: Callable[..., Engine]) -> Engine:
    """An engine on `database_url`."""
    return make_engine(database_url)


@pytest.fixture
def migrated_database_url(make_migrated_database: Callable[[], str]) -> str:
    """A database of the test's own, with the tables of outbox and saga."""
    return make_migrated_database()


@pytest.fixture
def migrated_engine(migrated_database_url: str, make_engine: Callable[..., Engine]) -> Engine:
    """An engine on `migrated_database_url`."""
    return make_engine(migrated_database_url)


@pytest.fixture(autouse=True)
def _rings_end_with_the_test() -> Iterator[None]:
    """Workers' apps that a test set up would go on ringing at its database."""
    yield
    for bell in doorbell.bells():
        bell.close()


# ---- brokers ----


@pytest.fixture
def unique_name() -> str:
    """A prefix for exchanges, queues and streams, which tests on one broker share."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def rabbitmq_url(room: Room) -> str:
    """The session's RabbitMQ, its default vhost. Name what you declare after `unique_name`."""
    return _shared(room, "rabbitmq")


@pytest.fixture
def redis_url(room: Room, worker_id: str) -> Iterator[str]:
    """A logical database that no other worker uses, empty."""
    import redis

    number = 1 + int(worker_id.removeprefix("gw") if worker_id != "master" else 0) % 15
    url = make_url(_shared(room, "redis")).set(database=str(number))
    text = url.render_as_string(hide_password=False)
    with redis.Redis.from_url(text) as client:
        client.flushdb()
        yield text
        client.flushdb()


@pytest.fixture(params=["rabbitmq", "redis"])
def bus_url(request: pytest.FixtureRequest) -> str:
    """The test runs once on each broker."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def mock_kafka() -> Iterator[MockKafka]:
    """librdkafka's mock cluster, of the test's own: it can refuse what a real one would."""
    cluster = MockKafka()
    yield cluster
    cluster.close()


@pytest.fixture
def kafka_broker(room: Room) -> KafkaBroker:
    """The session's Kafka. Name what you declare after `unique_name`."""
    return KafkaBroker(_shared(room, "kafka"))


@pytest.fixture(params=["mock", "broker"])
def kafka(request: pytest.FixtureRequest) -> Kafka:
    """The test runs on the mock cluster and on a broker."""
    name = {"mock": "mock_kafka", "broker": "kafka_broker"}[request.param]
    found: Kafka = request.getfixturevalue(name)
    return found


# ---- servers of the test's own, to be paused, killed and started again ----


@pytest.fixture
def private_postgres(room: Room) -> Iterator[LocalPostgres]:
    """A PostgreSQL 18 of the test's own: `url`, `stop`, `kill`, `start`, `pause`, `resume`."""
    yield from _private(LocalPostgres(room.private_directory()))


@pytest.fixture
def private_redis(room: Room) -> Iterator[LocalRedis]:
    """A Redis of the test's own that keeps its data over `kill` and `start`."""
    yield from _private(LocalRedis(room.private_directory(), durable=True))


@pytest.fixture
def forgetful_redis(room: Room) -> Iterator[LocalRedis]:
    """A Redis of the test's own that keeps nothing on disk: after `kill` and `start` it is empty."""
    yield from _private(LocalRedis(room.private_directory()))


@pytest.fixture
def private_rabbitmq(room: Room) -> Iterator[LocalRabbitMQ]:
    """A RabbitMQ of the test's own; takes some seconds to start."""
    reason = servers.why_not("rabbitmq", "local")
    if reason is not None:
        _do_without(reason)
    yield from _private(LocalRabbitMQ(room.private_directory()))


@pytest.fixture
def private_kafka(room: Room) -> Iterator[LocalKafka]:
    """A Tansu of the test's own, which has forgotten everything after `kill` and `start`."""
    reason = servers.why_not("kafka", "local")
    if reason is not None:
        _do_without(reason)
    yield from _private(LocalKafka(room.private_directory()))


@pytest.fixture
def make_pooler(room: Room) -> Iterator[Callable[..., LocalPgBouncer]]:
    """Starts a pgbouncer of the test's own in front of the database at a URL; `mode` is its pool_mode."""
    if LocalPgBouncer.program() is None:
        _do_without("no pgbouncer is installed")
    made: list[LocalPgBouncer] = []

    def make(database_url: str, **options: Any) -> LocalPgBouncer:
        made.append(LocalPgBouncer(room.private_directory(), database_url, **options))
        made[-1].start()
        return made[-1]

    yield make
    for server in made:
        server.discard()


def _private(server: Server) -> Iterator[Server]:
    server.start()
    yield server
    server.discard()


# ---- testcontainers, whatever the ladder chose ----


@pytest.fixture
def docker_postgres_url(room: Room) -> str:
    """The PostgreSQL that runs in a container."""
    return _shared(room, "postgres", "container")


@pytest.fixture
def docker_rabbitmq_url(room: Room) -> str:
    """The RabbitMQ that runs in a container."""
    return _shared(room, "rabbitmq", "container")


@pytest.fixture
def docker_redis_url(room: Room) -> str:
    """The Redis that runs in a container."""
    return _shared(room, "redis", "container")
