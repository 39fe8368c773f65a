"""`python -m bench.null_relay URL`: a relay whose bus takes everything, and says on stdout how much it has taken."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence

from outbox.buses import OutgoingMessage, Topology
from outbox.cli.process import collect_garbage_seldom
from outbox.relay import Relay


class Taken:
    """What is sent is confirmed."""

    def wait(self) -> None: ...


class NullBus:
    """A broker that costs nothing."""

    unrouted: Mapping[str, int] = {}

    def declare(self, topology: Topology) -> None: ...

    def send(self, batch: Sequence[OutgoingMessage]) -> Taken:
        print(len(batch), flush=True)
        return Taken()

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    """Relay until terminated, in a process like that of `outbox relay`."""
    collect_garbage_seldom()
    relay = Relay(sys.argv[1], NullBus())
    signal.signal(signal.SIGTERM, lambda *_: relay.stop())
    relay.run()


if __name__ == "__main__":
    main()
