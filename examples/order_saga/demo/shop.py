"""The shop before it opens, and the orders that will be placed, both from one seed.

Most orders can be fulfilled. Some cannot, for a reason that one of the services has, or two of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

from examples.order_saga.analytics.models import Base as AnalyticsBase
from examples.order_saga.inventory.models import Base as InventoryBase
from examples.order_saga.inventory.models import Stock
from examples.order_saga.order.models import Base as OrderBase
from examples.order_saga.order.models import Product
from examples.order_saga.shipping.models import Base as ShippingBase
from examples.order_saga.shipping.models import ServedCountry
from examples.order_saga.users.models import Base as UsersBase
from examples.order_saga.users.models import User

PRICES = {"lamp": 4_900, "chair": 12_900, "desk": 34_900, "poster": 1_500, "signed-print": 25_000}
EVERYDAY = ("lamp", "chair", "desk", "poster")
RARE = "signed-print"
RARE_IN_STOCK = 2
BLOCKED = "mallory"
CUSTOMERS = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
SERVED = ("DE", "FR", "IT", "NL", "PL", "US")
UNSERVED = "AQ"
FEWEST_ORDERS = 20
"""Fewer could not hold each kind."""

TABLES = {
    "order": OrderBase.metadata,
    "inventory": InventoryBase.metadata,
    "users": UsersBase.metadata,
    "shipping": ShippingBase.metadata,
    "analytics": AnalyticsBase.metadata,
}


class Kind(StrEnum):
    """What an order is made for."""

    FINE = "fine"
    RARE = "rare"
    """For the product that runs out: the first ones get it, the others are rejected by inventory."""
    BLOCKED = "blocked"
    UNSERVED = "unserved"
    BLOCKED_AND_UNSERVED = "blocked and unserved"


PER_TWENTY = (Kind.RARE, Kind.BLOCKED, Kind.UNSERVED, Kind.BLOCKED_AND_UNSERVED)


@dataclass(frozen=True)
class PlannedOrder:
    """One order to be placed."""

    kind: Kind
    customer_id: str
    country: str
    quantities: dict[str, int]

    @property
    def body(self) -> dict[str, Any]:
        items = [{"sku": sku, "quantity": count} for sku, count in self.quantities.items()]
        return {"customer_id": self.customer_id, "country": self.country, "items": items}


@dataclass(frozen=True)
class Shop:
    """What there is at the beginning, and what customers will ask for."""

    orders: tuple[PlannedOrder, ...]
    stock: dict[str, int]

    @classmethod
    def of(cls, count: int, seed: int) -> Shop:
        random = Random(seed)
        orders = tuple(_order(kind, random) for kind in _kinds(count, random))
        asked = Counter[str]()
        for order in orders:
            asked.update(order.quantities)
        # As much as is asked for, so that of everyday products there is always enough.
        stock = {sku: asked[sku] for sku in EVERYDAY}
        return cls(orders, {**stock, RARE: RARE_IN_STOCK})

    def rows(self, service: str) -> list[object]:
        """What the database of *service* holds before the first order."""
        match service:
            case "order":
                return [Product(sku=sku, price_cents=price) for sku, price in PRICES.items()]
            case "inventory":
                return [Stock(sku=sku, available=count) for sku, count in self.stock.items()]
            case "users":
                customers = [User(id=name) for name in CUSTOMERS]
                return [*customers, User(id=BLOCKED, blocked=True)]
            case "shipping":
                return [ServedCountry(code=code) for code in SERVED]
        return []


def _kinds(count: int, random: Random) -> list[Kind]:
    """One of each difficult kind among twenty orders, in any place, and enough of the rare ones."""
    kinds = [Kind.FINE] * count
    difficult = list(PER_TWENTY) * (count // FEWEST_ORDERS)
    # The rare product has to run out, however few orders there are.
    difficult += [Kind.RARE] * max(RARE_IN_STOCK + 1 - difficult.count(Kind.RARE), 0)
    for place, kind in zip(random.sample(range(count), len(difficult)), difficult, strict=True):
        kinds[place] = kind
    return kinds


def _order(kind: Kind, random: Random) -> PlannedOrder:
    skus = [RARE] if kind is Kind.RARE else random.sample(EVERYDAY, random.randint(1, 3))
    is_blocked = kind in (Kind.BLOCKED, Kind.BLOCKED_AND_UNSERVED)
    is_unserved = kind in (Kind.UNSERVED, Kind.BLOCKED_AND_UNSERVED)
    return PlannedOrder(
        kind=kind,
        customer_id=BLOCKED if is_blocked else random.choice(CUSTOMERS),
        country=UNSERVED if is_unserved else random.choice(SERVED),
        quantities={sku: 1 if sku == RARE else random.randint(1, 4) for sku in skus},
    )
