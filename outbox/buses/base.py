"""What the relay asks of a broker, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from outbox.buses.topology import Topology


class OutgoingMessage(NamedTuple):
    """One event on its way to the broker, as the database gives it: there are many, so nothing is made of it twice."""

    id: str
    """The event's id, as text."""
    type: str
    key: str | None
    body: bytes
    """The envelope's exact bytes."""
    lane: int
    position: int
    key_seq: int | None = None
    queue: str | None = None
    """None: to the topic exchange, by type. Otherwise to this queue only."""
    handler: str | None = None
    """Only this handler is meant (a retry, a timer, a redrive)."""


class Confirmation(Protocol):
    """The broker's answer to one batch."""

    def wait(self) -> None:
        """Return once the broker has taken every message of the batch; raise `BusError` otherwise.

        May be asked again, and in any order among batches. After a `BusError` the batch is to be sent again, whole,
        and so is every batch that was sent after it and is not confirmed.
        """


class Bus(Protocol):
    """A connection to a broker, made when it is needed and made again after it failed. For one thread.

    What `send` was given and `wait` did not confirm may or may not have arrived: it is to be sent again.
    """

    @property
    def unrouted(self) -> Mapping[str, int]:
        """Events by type that no queue was bound to: legal, and perhaps not meant."""

    def declare(self, topology: Topology) -> None:
        """Make the exchange, the service's queue and its bindings, if they are not there.

        Raises `BusError`, and `ConfigurationError` where one of them is there with other properties.
        """

    def send(self, batch: Sequence[OutgoingMessage]) -> Confirmation:
        """Hand over a batch, in order, without waiting for the broker's answer. Raises `BusError`."""

    def keep_alive(self) -> None:
        """Called about every second while there is nothing to send. Never waits, never raises."""

    def close(self) -> None:
        """Let go of the connection. What is not confirmed by now never will be."""
