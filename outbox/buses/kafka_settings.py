"""What a `kafka://` URL says: where the brokers are, how topics are made, and what librdkafka is told.

    kafka://one:9092,two:9092/?security.protocol=SSL&ssl.ca.location=/etc/ca.pem&partitions=12

A user and a password mean SASL over TLS (`PLAIN` unless `sasl.mechanism` says otherwise). Parameters are librdkafka's
properties by their own names, and ours: *partitions* (16) and *replication* (the cluster's default) of topics that are
made here, *create_topics* (true).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from outbox.buses.urls import masked, read_url, split_urls
from outbox.errors import ConfigurationError

_PORT: Final = 9092
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}
_OURS: Final = (
    "acks", "request.required.acks", "enable.idempotence", "message.timeout.ms", "delivery.timeout.ms",
    "delivery.report.only.error", "enable.gapless.guarantee", "transactional.id", "group.id", "enable.auto.commit",
    "auto.commit.enable", "enable.auto.offset.store", "bootstrap.servers", "metadata.broker.list",
)  # fmt: skip
"""Properties that the promises rest on."""


@dataclass(frozen=True)
class KafkaSettings:
    """A `kafka://` URL in parts."""

    servers: str
    """Where to begin, as librdkafka's `bootstrap.servers`. Holds no secret."""
    properties: Mapping[str, str] = field(repr=False)
    """librdkafka's own, without those that a producer or a consumer adds."""
    partitions: int = 16
    replication: int = -1
    """Copies of a topic that is made here; -1: the cluster's default."""
    create_topics: bool = True
    """Whether missing topics are made here. Otherwise by hand, or by the broker's `auto.create.topics.enable`."""

    @classmethod
    def of(cls, urls: str) -> KafkaSettings:
        """Read *urls*: several hosts with commas, or several URLs with `;`. Raises `ConfigurationError`."""
        servers: list[str] = []
        options: dict[str, str] = {}
        for one in _one_host_each(urls):
            url = read_url(one)
            if url.path:
                raise ConfigurationError(
                    f"{masked(one)!r} ends with {url.path!r}: Kafka has no databases or virtual hosts; "
                    "topics are named after the exchange"
                )
            servers.append(f"{url.host}:{url.port or _PORT}")
            if url.user is not None:
                options |= {"sasl.username": url.user, "sasl.password": url.password or ""}
                options.setdefault("sasl.mechanism", "PLAIN")
                options.setdefault("security.protocol", "SASL_SSL")
            options |= url.query
        _refuse_ours(options)
        return cls(
            ",".join(servers),
            partitions=_number(options, "partitions", cls.partitions),
            replication=_number(options, "replication", cls.replication),
            create_topics=_truth(options, "create_topics", cls.create_topics),
            properties=options,
        )

    def client(
        self, defaults: Mapping[str, Any] | None = None, fixed: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A client's configuration: *defaults*, which the URL may change, and *fixed*, which it may not."""
        return {
            **(defaults or {}),
            **self.properties,
            "bootstrap.servers": self.servers,
            **(fixed or {}),
        }


def _one_host_each(urls: str) -> list[str]:
    """`kafka://user@a,b/?x` as `kafka://user@a/?x` and `kafka://user@b/?x`."""
    found = []
    for url in split_urls(urls):
        scheme, _, rest = url.partition("://")
        end = min((rest.find(mark) for mark in "/?#" if mark in rest), default=len(rest))
        credentials, at, hosts = rest[:end].rpartition("@")
        found += [
            f"{scheme}://{credentials}{at}{host.strip()}{rest[end:]}" for host in hosts.split(",")
        ]
    return found


def _refuse_ours(options: Mapping[str, str]) -> None:
    refused = [name for name in _OURS if name in options]
    if refused:
        raise ConfigurationError(
            f"the URL of Kafka sets {', '.join(refused)}: that is not yours to set, the promises rest on it"
        )


def _number(options: dict[str, str], name: str, default: int) -> int:
    given = options.pop(name, str(default))
    if not given.removeprefix("-").isdecimal() or int(given) == 0:
        raise ConfigurationError(f"the URL of Kafka says {name}={given}: expected a number from 1")
    return int(given)


def _truth(options: dict[str, str], name: str, default: bool) -> bool:
    given = options.pop(name, str(default)).lower()
    if given not in _TRUTH:
        raise ConfigurationError(f"the URL of Kafka says {name}={given}: expected true or false")
    return _TRUTH[given]
