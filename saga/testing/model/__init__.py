"""A PostgreSQL in one thread, for simulation: the real services' SQL, run on a model that one scheduler drives."""

from __future__ import annotations

from saga.testing.model.driver import ModelDatabase
from saga.testing.model.expressions import ModelGap

__all__ = ["ModelDatabase", "ModelGap"]
