"""The course of the demo: orders come in, a service dies and comes back, another one joins, all settles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime

from examples.order_saga.demo.books import Books, read_books
from examples.order_saga.demo.display import Display, View
from examples.order_saga.demo.interrupts import pause
from examples.order_saga.demo.load import Accepted, Customers, customers
from examples.order_saga.demo.processes import ProcessFailed, wait_until_ready
from examples.order_saga.demo.replay import died_in_hand, replay
from examples.order_saga.demo.services import NAMES, REDELIVER_AFTER_SECONDS, Service, api_answers
from examples.order_saga.demo.shop import PlannedOrder, Shop
from examples.order_saga.demo.stage import Stage
from examples.order_saga.demo.traffic import Traffic, examine
from examples.order_saga.demo.watch import Glance, Watch, watching

VICTIM = "users"
LATECOMER = "analytics"
LOOK_EVERY_SECONDS = 0.25
TICK_SECONDS = 0.02
READY_WITHIN_SECONDS = 60.0
ROUTES_KNOWN_AFTER_SECONDS = 1.5
"""On Redis, a relay looks up once a second which queues there are."""
SETTLED_WITHIN_SECONDS = 90.0
STALLED_AFTER_SECONDS = 5.0
SHORTEST_OUTAGE_SECONDS = 2 * REDELIVER_AFTER_SECONDS


@dataclass(frozen=True)
class Told:
    """What happened, and what is in the books afterwards."""

    accepted: list[Accepted]
    refused: list[str]
    killed_at: datetime
    restarted_at: datetime
    back_at: datetime
    """When the killed service was reading its queue again."""
    joined_at: datetime
    """From when on the latecomer gets every event."""
    replayed: int
    """Events that died inside the broker with the killed worker, and were sent again from the log."""
    books: Books
    traffic: Traffic


@dataclass
class Story:
    """Tells it, step by step, while customers keep ordering."""

    stage: Stage
    shop: Shop
    per_second: float
    display: Display
    watch: Watch = field(init=False)
    customers: Customers = field(init=False)
    _orders: Iterator[PlannedOrder] = field(init=False)
    _placed: int = field(default=0, init=False)
    _killed: set[str] = field(default_factory=set, init=False)
    _is_catching_up: bool = field(default=False, init=False)
    _replayed: int = field(default=0, init=False)
    _look_due_at: float = field(default=0.0, init=False)

    def tell(self) -> Told:
        with ExitStack() as opened:
            self.watch = opened.enter_context(watching(self.stage.database_urls))
            self.customers = opened.enter_context(customers(self.stage.base_url, self.per_second))
            self._orders = iter(self.shop.orders)
            self._open()
            opened.enter_context(self.display.live())
            return self._go_on()

    def _go_on(self) -> Told:
        total = len(self.shop.orders)
        self._place_until(total // 2)
        killed_at = self._kill_victim()
        self._stay_dead_while_orders_come_in(until=total * 3 // 4)
        restarted_at = self._start_again()
        # Some orders are kept for when the latecomer is there, so that it has something to count.
        self._while_ordering(self._both_are_ready, keep=max(total // 10, 4))
        back_at = self.watch.now()
        joined_at = self._let_latecomer_in()
        self._place_until(total)
        books, traffic = self._settle(killed_at, joined_at)
        return Told(
            accepted=list(self.customers.accepted),
            refused=list(self.customers.refused),
            killed_at=killed_at,
            restarted_at=restarted_at,
            back_at=back_at,
            joined_at=joined_at,
            replayed=self._replayed,
            books=books,
            traffic=traffic,
        )

    # ---- what happens ----

    def _open(self) -> None:
        early = [self._service(name) for name in NAMES if name != LATECOMER]
        for service in early:
            service.start()
        for service in early:
            service.wait_until_ready(READY_WITHIN_SECONDS)
        api = self._service("order").api
        assert api is not None
        wait_until_ready(api, lambda: api_answers(self.customers.client))
        processes = sum(len(list(service.processes)) for service in early)
        self.display.say(
            f"{', '.join(service.name for service in early)} are up, as {processes} processes; "
            f"{LATECOMER} is not"
        )
        self.display.say(
            f"{len(self.shop.orders)} orders come in over HTTP, {self.per_second:g} a second"
        )

    def _kill_victim(self) -> datetime:
        self._service(VICTIM).kill()
        self._killed.add(VICTIM)
        self.display.say(
            f"{VICTIM} is killed: SIGKILL to its worker and its relay; orders keep coming",
            style="bold red",
        )
        return self.watch.now()

    def _stay_dead_while_orders_come_in(self, until: int) -> None:
        long_enough_at = time.monotonic() + SHORTEST_OUTAGE_SECONDS
        self._place_until(until)
        while time.monotonic() < long_enough_at:
            self._for_a_moment()

    def _start_again(self) -> datetime:
        restarted_at = self.watch.now()
        self._service(VICTIM).start()
        self._killed.remove(VICTIM)
        self._is_catching_up = True
        glance = self.watch.glance()
        self.display.say(
            f"{VICTIM} starts again, {glance.seen['order'] - glance.seen[VICTIM]} orders behind",
            style="bold",
        )
        self._service(LATECOMER).start()
        self.display.say(f"{LATECOMER} starts for the first time; no other service is touched")
        return restarted_at

    def _let_latecomer_in(self) -> datetime:
        until = time.monotonic() + ROUTES_KNOWN_AFTER_SECONDS
        self._while_ordering(lambda: time.monotonic() > until, keep=len(self.shop.orders))
        self.display.say(f"{LATECOMER} is subscribed, and counts from now on")
        return self.watch.now()

    def _settle(self, killed_at: datetime, joined_at: datetime) -> tuple[Books, Traffic]:
        """Wait until there is nothing left to do, or for as long as that should take."""
        deadline = time.monotonic() + SETTLED_WITHIN_SECONDS
        while True:
            is_settled = self._nothing_moves(deadline)
            books = read_books(self.stage.database_urls)
            traffic = examine(books, {LATECOMER: joined_at})
            if (is_settled and not traffic.lost) or time.monotonic() > deadline:
                self.display.say("Nothing moves any more; all five databases have been read")
                return books, traffic
            if not is_settled and not self._replayed:
                self._replay(traffic, killed_at)
            self._for_a_moment(LOOK_EVERY_SECONDS)

    def _replay(self, traffic: Traffic, killed_at: datetime) -> None:
        broker_url = self.stage.broker_url
        if died_in_hand(traffic.lost, VICTIM, killed_at, broker_url):
            self._replayed = replay(traffic.lost, broker_url)
            self.display.say(
                f"Redis has let {self._replayed} die in the hands of {VICTIM}: sent again from "
                "the outbox, which keeps every event"
            )

    def _nothing_moves(self, deadline: float) -> bool:
        """Wait until all is settled (True), or until nothing has changed for a while."""
        before, changed_at = self._look(), time.monotonic()
        while time.monotonic() < min(changed_at + STALLED_AFTER_SECONDS, deadline):
            glance = self._look()
            if not glance.undecided and self.watch.is_quiet:
                return True
            if glance != before:
                before, changed_at = glance, time.monotonic()
            self._for_a_moment(LOOK_EVERY_SECONDS)
        return False

    # ---- meanwhile ----

    def _place_until(self, count: int) -> None:
        """Have orders placed until there are *count* in all, each of them answered."""
        while self._placed < count or not self.customers.all_answered:
            self._placed += self.customers.tick(self._orders, at_most=count - self._placed)
            self._for_a_moment()

    def _while_ordering(self, reached: Callable[[], bool], *, keep: int) -> None:
        """Wait for the condition while orders are placed, except for the last few."""
        deadline = time.monotonic() + READY_WITHIN_SECONDS
        while not reached():
            left = len(self.shop.orders) - keep - self._placed
            self._placed += self.customers.tick(self._orders, at_most=max(left, 0))
            if time.monotonic() > deadline:
                raise ProcessFailed(self._unready())
            self._for_a_moment()

    def _for_a_moment(self, seconds: float = TICK_SECONDS) -> None:
        if time.monotonic() >= self._look_due_at:
            self._look()
        pause(seconds)

    def _look(self) -> Glance:
        """See how far everyone is, and show it. Raises `ProcessFailed` if a service is gone."""
        self._look_due_at = time.monotonic() + LOOK_EVERY_SECONDS
        for service in self.stage.services.values():
            service.check()
        glance = self.watch.glance()
        self.display.show(self._view(glance))
        self._say_once_caught_up(glance)
        return glance

    def _say_once_caught_up(self, glance: Glance) -> None:
        if self._is_catching_up and glance.seen[VICTIM] >= glance.seen["order"]:
            self._is_catching_up = False
            self.display.say(f"{VICTIM} has caught up")

    # ---- how things are ----

    def _service(self, name: str) -> Service:
        return self.stage.services[name]

    def _both_are_ready(self) -> bool:
        return self._service(VICTIM).is_ready and self._service(LATECOMER).is_ready

    def _unready(self) -> str:
        late = [each for each in self.stage.services.values() if each.started and not each.is_ready]
        return "\n".join(
            f"{each.name} was not ready in time\n{each.worker.tail()}" for each in late
        )

    def _view(self, glance: Glance) -> View:
        return View(
            total=len(self.shop.orders),
            accepted=len(self.customers.accepted),
            glance=glance,
            services={name: self._state(service) for name, service in self.stage.services.items()},
        )

    def _state(self, service: Service) -> str:
        if service.name in self._killed:
            return "killed"
        if not service.started:
            return "not started"
        return "running" if service.is_ready else "starting"
