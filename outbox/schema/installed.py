"""Which components are installed: every package that names its `Component` under one entry point.

`outbox` never imports `saga`; it finds it here, from an editable install and from a wheel alike.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final

from outbox.errors import ConfigurationError
from outbox.schema.component import Component

GROUP: Final = "outbox.schema"


def installed_components() -> tuple[Component, ...]:
    """The components of all installed packages, `outbox` first, as the others may refer to it.

    Raises `ConfigurationError` for an entry point that does not lead to a `Component`, or where
    this package itself is not installed and so nothing can be found.
    """
    found: dict[str, Component] = {}
    for entry_point in entry_points(group=GROUP):
        component = entry_point.load()
        if not isinstance(component, Component):
            raise ConfigurationError(
                f"entry point {entry_point.name!r} of group {GROUP!r} leads to "
                f"{entry_point.value!r}, which is no outbox.schema.Component"
            )
        found[component.name] = component
    if "outbox" not in found:
        raise ConfigurationError(
            "no installed package offers the tables of 'outbox': "
            "install the distribution outbox-saga (`pip install -e .` in a source tree)"
        )
    return tuple(sorted(found.values(), key=lambda each: (each.name != "outbox", each.name)))
