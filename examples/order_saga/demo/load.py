"""Customers: they place orders over HTTP at a steady pace, whatever goes on behind the door."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import httpx

from examples.order_saga.demo.shop import PlannedOrder

CUSTOMERS_AT_ONCE = 4
TIMEOUT_SECONDS = 10.0
ASK_AGAIN_AFTER_SECONDS = 0.1


@dataclass(frozen=True)
class Accepted:
    """An order that the shop has answered with 202."""

    order_id: UUID
    planned: PlannedOrder
    answered_in_ms: float


@dataclass
class Customers:
    """Places planned orders. `tick` hands out those that are due; answers come in by themselves."""

    client: httpx.Client
    pool: ThreadPoolExecutor
    per_second: float
    patience: float = 0.0
    """For how many seconds a customer who gets no answer asks again, with the same key."""
    accepted: list[Accepted] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    _waiting: list[Future[None]] = field(default_factory=list)
    _next_due: float = 0.0

    def tick(self, orders: Iterator[PlannedOrder], *, at_most: int) -> int:
        """Place what is due by now, and return how many that were."""
        now = time.monotonic()
        self._next_due = max(self._next_due, now - 1.0)
        placed = 0
        while placed < at_most and self._next_due <= now:
            order = next(orders, None)
            if order is None:
                break
            self._waiting.append(self.pool.submit(self._place, order))
            self._next_due += 1 / self.per_second
            placed += 1
        return placed

    @property
    def answered(self) -> int:
        return len(self.accepted) + len(self.refused)

    @property
    def all_answered(self) -> bool:
        self._waiting = [future for future in self._waiting if not future.done()]
        return not self._waiting

    def _place(self, order: PlannedOrder) -> None:
        began = time.perf_counter()
        try:
            response = self._ask(order, until=began + self.patience)
        except httpx.HTTPError as error:
            self.refused.append(f"{type(error).__name__}: {error}")
            return
        took = (time.perf_counter() - began) * 1000
        if response.status_code == httpx.codes.ACCEPTED:
            order_id = UUID(response.headers["Location"].rpartition("/")[2])
            self.accepted.append(Accepted(order_id, order, took))
        else:
            self.refused.append(f"HTTP {response.status_code}: {response.text[:200]}")

    def _ask(self, order: PlannedOrder, until: float) -> httpx.Response:
        # No answer says nothing: the order may be in. With its key it is placed once all the same.
        key = {"Idempotency-Key": str(uuid4())}
        while True:
            try:
                return self.client.post("/orders", json=order.body, headers=key)
            except httpx.TransportError:
                if time.perf_counter() > until:
                    raise
                time.sleep(ASK_AGAIN_AFTER_SECONDS)


@contextmanager
def customers(base_url: str, per_second: float, patience: float = 0.0) -> Iterator[Customers]:
    """Customers of the shop at *base_url*, until the block ends."""
    with httpx.Client(base_url=base_url, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
        pool = ThreadPoolExecutor(CUSTOMERS_AT_ONCE, thread_name_prefix="customer")
        try:
            yield Customers(client, pool, per_second, patience)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
