"""Is this broker one that keeps what it was given, and does it know our exchange and queues?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from outbox.doctor.finding import Answer, Check, Finding, Level, fail, ok, run, warn
from outbox.doctor.kafka import examine_kafka
from outbox.errors import told

Arguments = Mapping[str, Any]
Queues = Mapping[str, Arguments | None]
"""The queues that must be there, each with the arguments that its worker declares, if known."""

TIMEOUT: Final = 5.0
_HERE: Final = {"localhost", "127.0.0.1", "::1", None}


def examine_broker(
    url: str, *, exchange: str = "events", queues: Queues | Iterable[str] = ()
) -> Iterator[Finding]:
    """Make all checks on the broker at *url*: amqp, amqps, redis, rediss or kafka.

    *queues* are those that must be there. One finding only where the broker does not answer.
    """
    if not isinstance(queues, Mapping):
        queues = dict.fromkeys(queues)
    scheme = urlsplit(url).scheme.partition("+")[0]
    if scheme in {"amqp", "amqps", "pyamqp"}:
        return _examine_rabbitmq(url, exchange, queues)
    if scheme in {"redis", "rediss"}:
        return _examine_redis(url, exchange, queues)
    if scheme == "kafka":
        return examine_kafka(url, exchange, queues, TIMEOUT)
    return iter(
        [
            Finding(
                "broker reachable",
                Level.FAIL,
                f"{scheme or 'no scheme'} is no broker that is known here",
                "use amqp://, amqps://, redis://, rediss:// or kafka://",
            )
        ]
    )


def _unreachable(error: Exception) -> Finding:
    return Finding(
        "broker reachable", Level.FAIL, told(error), "check the URL, the network, the user"
    )


# --- RabbitMQ -------------------------------------------------------------------------------


@dataclass(frozen=True)
class RabbitMQ:
    connection: Any
    url: str
    exchange: str
    queues: Queues

    def try_declaring(self, kind: str, **arguments: Any) -> tuple[int, str]:
        """The AMQP reply code and text: 0 for done. A refusal closes the channel, so each has its own."""
        from amqp.exceptions import AMQPError

        channel = self.connection.channel()
        try:
            answer = getattr(channel, f"{kind}_declare")(**arguments)
        except AMQPError as error:
            return int(error.reply_code or -1), str(error.reply_text)
        with closing(channel):
            return 0, f"{answer.message_count} waiting, {answer.consumer_count} consumers" if (
                kind == "queue"
            ) else ""


def _examine_rabbitmq(url: str, exchange: str, queues: Queues) -> Iterator[Finding]:
    from kombu import Connection

    try:
        connection = Connection(url, connect_timeout=TIMEOUT)
        connection.connect()
    except Exception as error:
        yield _unreachable(error)
        return
    with closing(connection):
        server = connection.connection.server_properties
        yield Finding(
            "broker reachable",
            Level.OK,
            f"{server.get('product', 'AMQP broker')} {server.get('version', '')}",
        )
        yield from run(RABBITMQ_CHECKS, RabbitMQ(connection, url, exchange, queues))


def publisher_confirms(broker: RabbitMQ) -> Answer:
    offered = broker.connection.connection.server_properties.get("capabilities", {})
    if not offered.get("publisher_confirms"):
        return fail("not offered by this broker", "use RabbitMQ: without confirms events get lost")
    return ok("offered")


def rabbitmq_exchange(broker: RabbitMQ) -> Answer:
    name = broker.exchange
    code, said = broker.try_declaring("exchange", exchange=name, type="topic", passive=True)
    if code == 404:
        return warn(
            f"{name!r} is not there yet", "the relay and the workers declare it; start them"
        )
    if code:
        return warn(f"{name!r} could not be looked at: {said}", "give this user rights on it")
    code, said = broker.try_declaring(
        "exchange", exchange=name, type="topic", durable=True, auto_delete=False
    )
    if code == 406:
        return fail(
            f"{name!r} is no durable topic exchange: {said}",
            "delete it while nothing is published, and let the relay declare it",
        )
    if code:
        return warn(
            f"{name!r} is there; its kind could not be checked: {said}", "give rights on it"
        )
    return ok(f"{name!r}, topic, durable")


def rabbitmq_queues(broker: RabbitMQ) -> Answer:
    told = []
    for name, arguments in broker.queues.items():
        code, said = broker.try_declaring("queue", queue=name, passive=True)
        if code == 404:
            return fail(
                f"{name!r} is not there: events for it go nowhere",
                "start the service's worker once; it declares and binds its queue",
            )
        if code:
            return warn(f"{name!r} could not be looked at: {said}", "give this user rights on it")
        told.append(f"{name!r} {said}")
        code, said = broker.try_declaring(
            "queue", queue=name, durable=True, auto_delete=False, arguments=dict(arguments or {})
        )
        # Durability is compared before arguments, and the answer names what differs.
        passing = any(f"'{each}'" in said for each in ("durable", "auto_delete"))
        if code == 406 and (passing or arguments is not None):
            return fail(
                f"{name!r} {'does not outlive a restart' if passing else 'is another kind'}: {said}",
                "stop the worker, empty and delete the queue, start the worker: it makes it anew",
            )
    return ok("; ".join(told) or "none asked for (name them with --queue)")


def encryption(broker: RabbitMQ | Redis) -> Answer:
    parts = [urlsplit(each) for each in broker.url.split(";")]
    clear = [each for each in parts if each.scheme not in {"amqps", "rediss"}]
    if not clear:
        return ok("encrypted")
    away = [str(each.hostname) for each in clear if each.hostname not in _HERE]
    if away:
        return warn(f"in the clear to {', '.join(away)}", "use amqps:// or rediss://")
    return ok("local connection")


# --- Redis ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Redis:
    client: Any
    url: str
    exchange: str
    queues: Queues

    def setting(self, name: str) -> str | None:
        """A server setting; None where this user may not ask, as with most hosted ones."""
        from redis.exceptions import ResponseError

        try:
            found = self.client.config_get(name)
        except ResponseError:
            return None
        return str(found[name]) if name in found else None


def _examine_redis(url: str, exchange: str, queues: Queues) -> Iterator[Finding]:
    import redis

    try:
        client = redis.Redis.from_url(
            url, socket_connect_timeout=TIMEOUT, socket_timeout=TIMEOUT, decode_responses=True
        )
        version = client.info("server")["redis_version"]
    except Exception as error:
        yield _unreachable(error)
        return
    with closing(client):
        yield Finding("broker reachable", Level.OK, f"Redis {version}")
        yield from run(REDIS_CHECKS, Redis(client, url, exchange, queues))


def eviction(broker: Redis) -> Answer:
    policy = broker.setting("maxmemory-policy")
    if policy is None:
        return warn("this user may not ask for it", "make sure that maxmemory-policy is noeviction")
    if policy != "noeviction":
        return fail(
            f"maxmemory-policy is {policy}: under pressure Redis deletes queues and bindings",
            "CONFIG SET maxmemory-policy noeviction, and in redis.conf",
        )
    return ok(policy)


def append_only_file(broker: Redis) -> Answer:
    kept = broker.setting("appendonly")
    if kept is None:
        return warn("this user may not ask for it", "make sure that appendonly is yes")
    if kept != "yes":
        return warn(
            "appendonly is no: a crash of Redis loses what was written since its last snapshot",
            "CONFIG SET appendonly yes, and in redis.conf; or use RabbitMQ",
        )
    return ok(f"appendonly, fsync {broker.setting('appendfsync')}")


def redis_bindings(broker: Redis) -> Answer:
    bound = broker.client.smembers(f"_kombu.binding.{broker.exchange}")
    if not bound:
        return warn(
            f"nobody is bound to {broker.exchange!r}: on Redis an event without a taker is gone",
            "start the subscribers' workers before the relay",
        )
    return ok(f"{len(bound)} bindings to {broker.exchange!r}")


def redis_queues(broker: Redis) -> Answer:
    bound = {
        each.rpartition("\x06\x16")[2]
        for each in broker.client.smembers(f"_kombu.binding.{broker.exchange}")
    }
    missing = [name for name in broker.queues if name not in bound]
    if missing:
        return fail(
            f"not bound to {broker.exchange!r}: {', '.join(missing)}",
            "start the service's worker once; it binds its queue",
        )
    told = [f"{name!r} {broker.client.llen(name)} waiting" for name in broker.queues]
    return ok("; ".join(told) or "none asked for (name them with --queue)")


RABBITMQ_CHECKS: Final[tuple[Check[RabbitMQ], ...]] = (
    ("publisher confirms", publisher_confirms),
    ("exchange", rabbitmq_exchange),
    ("queues", rabbitmq_queues),
    ("broker encryption", encryption),
)
REDIS_CHECKS: Final[tuple[Check[Redis], ...]] = (
    ("eviction", eviction),
    ("append-only file", append_only_file),
    ("exchange", redis_bindings),
    ("queues", redis_queues),
    ("broker encryption", encryption),
)
