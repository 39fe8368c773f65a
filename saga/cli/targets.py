"""What a TARGET names: participants and services in Python modules, and contract files."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.service import Service
    from saga.contract import Contract


targets = click.argument("targets", nargs=-1, required=True, metavar="TARGET...")


def contracts(named: Iterable[str]) -> list[Contract]:
    """The contracts that the targets name, each once. Raises `ConfigurationError`."""
    from saga.contract import contract_of, read_contract

    found: list[Contract] = []
    services: dict[int, Service] = {}
    for target in named:
        if target.endswith(".json"):
            found.append(read_contract(Path(target)))
        else:
            services.update({id(service): service for service in _services(target)})
    return [*(contract_of(service) for service in services.values()), *found]


def one_contract(target: str) -> Contract:
    """The one contract that *target* names. Raises `ConfigurationError` for several."""
    found = contracts([target])
    if len(found) > 1:
        names = ", ".join(contract.name for contract in found)
        raise ConfigurationError(f"{target} holds several ({names}): name one as module:attribute")
    return found[0]


def _services(target: str) -> list[Service]:
    from outbox.service import Service

    name, _, attribute = target.partition(":")
    module = _module(name)
    if attribute:
        if attribute not in vars(module):
            raise ConfigurationError(f"module {name} has no {attribute}")
        service = vars(module)[attribute]
        if not isinstance(service, Service):
            raise ConfigurationError(
                f"{target} is a {type(service).__name__}, no Participant and no Service"
            )
        return [service]
    found = [value for value in vars(module).values() if isinstance(value, Service)]
    if not found:
        raise ConfigurationError(f"module {name} has no Participant and no Service in it")
    return found


def _module(name: str) -> ModuleType:
    # As `python -m` does: what is beside the caller can be named.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"cannot import {name!r}: {error} (a target is module:attribute, a module, or a "
            "contract file that ends in .json)"
        ) from error
