"""Plans that were run, and what they cost: counted in buffers, which no busy machine changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg

PLANS = ("force_custom_plan", "force_generic_plan")


class Plan:
    """A plan that was run."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self.buffers: int = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        self.rows: int = int(root["Actual Rows"])

    def nodes(self, root: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        root = root or self._root
        if root.get("Actual Loops"):
            yield root
            for child in root.get("Plans", ()):
                yield from self.nodes(child)

    @property
    def thrown_away(self) -> int:
        """Rows that were looked at and not taken."""
        return sum(int(node.get("Rows Removed by Filter", 0)) for node in self.nodes())

    @property
    def scans(self) -> set[str]:
        """How partitions with anything in them were gone through."""
        return {
            node["Node Type"]
            for node in self.nodes()
            if "Relation Name" in node and node["Shared Hit Blocks"] + node["Shared Read Blocks"]
        }


def explain(
    connection: psycopg.Connection[Any],
    sql: str,
    given: Mapping[str, Any],
    types: Mapping[str, str],
    plan: str,
) -> Plan:
    """Run *sql* with its `%(name)s` as a prepared statement, and say how: EXPLAIN of the bare text would be
    planned for these values, whatever is forced."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", sql)))
    numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", sql)
    declared = ", ".join(types[name] for name in names)
    head = f"({declared})" if names else ""
    with connection.transaction():
        connection.execute(f"SET LOCAL plan_cache_mode = {plan}".encode())
        connection.execute(f"PREPARE asked{head} AS {numbered}".encode())
        values = ", ".join(f"%s::{types[name]}" for name in names)
        with psycopg.ClientCursor(connection) as asking:
            asking.execute(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE asked"
                + (f"({values})" if names else ""),
                [given[name] for name in names],
            )
            (told,) = asking.fetchone() or ([],)
        connection.execute("DEALLOCATE asked")
    return Plan(told[0]["Plan"])
