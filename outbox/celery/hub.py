"""An event loop that does not fall asleep over work that is ready.

kombu's hub runs what was called soon, fires its timers and waits for its sockets, for up to 10 s. What one of those
called soon in its turn it leaves lying meanwhile: the acknowledgement of an event that was handled right there (in the
pool `solo`, or when a timer hands a batch over), or the next read of a connection whose bytes TLS has taken off the
socket already. With the prefetch used up by events whose acknowledgements lie, nothing comes that would end the wait
(https://github.com/celery/kombu/pull/1587).
"""

from __future__ import annotations

from typing import Any


def stay_awake(hub: Any) -> None:
    """Let *hub* only look at its sockets, and not wait for them, while there is something to run."""
    poller = hub.poller
    if getattr(poller, "outbox_stays_awake", False):
        return
    poll = poller.poll

    def poll_if_idle(timeout: float) -> Any:
        return poll(0 if hub._ready else timeout)

    poller.poll = poll_if_idle
    poller.outbox_stays_awake = True
