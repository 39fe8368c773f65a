"""What the tests of checks declare their small choreographies with."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import Any

from outbox import Service
from outbox.events import Registry
from saga import Participant
from saga.contract import Contract, contract_of
from saga.findings import Finding


@dataclass(frozen=True)
class A:
    id: str


@dataclass(frozen=True)
class B:
    id: str


@dataclass(frozen=True)
class C:
    id: str


@dataclass(frozen=True)
class D:
    id: str


@dataclass(frozen=True)
class E:
    id: str


@dataclass(frozen=True)
class No:
    id: str


def anything(*_: Any) -> Any:
    """The body of any step, join or compensation: checks run none."""


class Stage:
    """One repository: a registry with t.a to t.e and t.no, and its services by name."""

    def __init__(self) -> None:
        self.registry = Registry()
        for cls in (A, B, C, D, E, No):
            self.registry.event(f"t.{cls.__name__.lower()}", key="id")(cls)
        self.services: list[Service] = []

    def participant(self, name: str) -> Participant:
        for service in self.services:
            if service.name == name and isinstance(service, Participant):
                return service
        made = Participant(name, registry=self.registry)
        self.services.append(made)
        return made

    def service(self, name: str) -> Service:
        made = Service(name, registry=self.registry)
        self.services.append(made)
        return made

    @property
    def order(self) -> Participant:
        return self.participant("order")

    @property
    def stock(self) -> Participant:
        return self.participant("stock")

    @property
    def pay(self) -> Participant:
        return self.participant("pay")

    def contracts(self) -> list[Contract]:
        return [contract_of(service) for service in self.services]


def source_of(finding: Finding) -> str:
    """The line of source that a finding names."""
    assert finding.place is not None
    return linecache.getline(finding.place.file, finding.place.line)
