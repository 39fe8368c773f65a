"""What a TARGET names: participants and services in Python modules, and contract files."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from outbox.cli.output import CalledWrongly
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.service import Service
    from saga.contract import Contract


targets = click.argument("targets", nargs=-1, required=True, metavar="TARGET...")


def contracts(named: Iterable[str]) -> list[Contract]:
    """The contracts that the targets name, each once. Raises `CalledWrongly`."""
    try:
        return _contracts(named)
    except ConfigurationError as error:
        raise CalledWrongly(str(error)) from error


def one_contract(target: str) -> Contract:
    """The one contract that *target* names. Raises `CalledWrongly` for several."""
    found = contracts([target])
    if len(found) > 1:
        names = ", ".join(contract.name for contract in found)
        raise CalledWrongly(f"{target} holds several ({names}): name one as module:attribute")
    return found[0]


def _contracts(named: Iterable[str]) -> list[Contract]:
    from saga.contract import contract_of, read_contract

    found: list[Contract] = []
    services: dict[int, Service] = {}
    for target in named:
        if target.endswith(".json"):
            found.append(read_contract(Path(target)))
        else:
            services.update({id(service): service for service in _services(target)})
    return [*(contract_of(service) for service in services.values()), *found]


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
    except ConfigurationError as error:
        raise ConfigurationError(f"cannot import {name!r}: {error}") from error
    # The module is the user's: whatever it does when it is imported is what is wrong with it.
    except (Exception, SystemExit) as error:
        raise ConfigurationError(_why_not(name, error)) from error


def _why_not(name: str, error: BaseException) -> str:
    from saga.contract import relative

    said = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    if not frames:
        return (
            f"cannot import {name!r}: {said} (a target is module:attribute, a module, or a contract "
            "file that ends in .json)"
        )
    return (
        f"cannot import {name!r}: {said} at {relative(frames[-1].filename)}:{frames[-1].lineno}; "
        "name the module that declares the participant, not the one that sets up its worker"
    )


def _is_users(file: str) -> bool:
    """Whether someone who reads of an error in *file* can do something about it."""
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    return file != __file__ and not file.startswith(("<", *libraries))
