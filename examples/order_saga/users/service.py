"""The users service's part in an order: give the customer points, or take them away again."""

from __future__ import annotations

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from examples.order_saga.contracts import OrderCreated, PointsAdded, PointsRejected
from examples.order_saga.users.models import PointsEntry, User
from saga import Participant, Reject

CENTS_PER_POINT = 100

users = Participant("users")


@users.step(on=OrderCreated, emits=PointsAdded, rejects=PointsRejected)
def add_points(order: OrderCreated, session: Session) -> PointsAdded:
    points = order.total_cents // CENTS_PER_POINT
    welcome = session.execute(
        update(User)
        .where(User.id == order.customer_id, ~User.blocked)
        .values(points=User.points + points)
        .returning(User.id)
    )
    if welcome.first() is None:
        reason = f"customer {order.customer_id} is blocked or unknown"
        raise Reject(PointsRejected(order_id=order.order_id, reason=reason))
    session.add(PointsEntry(order_id=order.order_id, user_id=order.customer_id, points=points))
    return PointsAdded(order_id=order.order_id, points=points)


@add_points.compensation
def take_points_away(order: OrderCreated, added: PointsAdded, session: Session) -> None:
    # Subtracted, not set back to what it was: other orders may have added points meanwhile.
    session.execute(
        update(User).where(User.id == order.customer_id).values(points=User.points - added.points)
    )
    session.execute(delete(PointsEntry).where(PointsEntry.order_id == order.order_id))
