"""Whether whatever one JSON Schema describes can be read by another: writer and reader of an event.

A reader may know fewer fields than the writer writes, and may have optional ones of its own. What it
must not do is to require what the writer may leave out, or to expect something else under a name.
It knows the JSON Schema that pydantic makes; titles, descriptions and defaults mean nothing to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Schema = Mapping[str, Any]

_DEFINITION: Final = "#/$defs/"
_LOWER_BOUNDS: Final = ("minimum", "exclusiveMinimum", "minLength", "minItems")
_UPPER_BOUNDS: Final = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")
_EXACT: Final = ("format", "pattern", "multipleOf", "uniqueItems")


def unreadable(written: Schema, accepted: Schema) -> list[str]:
    """Why something written by *written* may not be read by *accepted*; empty where all of it can."""
    comparison = _Comparison(written.get("$defs", {}), accepted.get("$defs", {}))
    try:
        return list(dict.fromkeys(comparison.problems(written, accepted, "")))
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        # Contracts are files, and whoever sent one may have edited it.
        return [f"one of the two schemas is no JSON Schema ({type(error).__name__}: {error})"]


@dataclass
class _Comparison:
    written_definitions: Schema
    accepted_definitions: Schema
    under_way: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of definitions: a class that contains itself fits if the rest of it does."""

    def problems(self, written: Schema, accepted: Schema, at: str) -> Iterator[str]:
        pair = (written.get("$ref", ""), accepted.get("$ref", ""))
        if pair in self.under_way:
            return
        if all(pair):
            self.under_way.append(pair)
        accepted = _resolved(accepted, self.accepted_definitions)
        for option in _options(_resolved(written, self.written_definitions)):
            yield from self._one_of(_resolved(option, self.written_definitions), accepted, at)
        if all(pair):
            self.under_way.remove(pair)

    def _one_of(self, written: Schema, accepted: Schema, at: str) -> Iterator[str]:
        best: list[str] | None = None
        for option in _options(accepted):
            found = list(self._plain(written, _resolved(option, self.accepted_definitions), at))
            best = found if best is None or len(found) < len(best) else best
        yield from best or ()

    def _plain(self, written: Schema, accepted: Schema, at: str) -> Iterator[str]:
        yield from _types(written, accepted, at)
        yield from _values(written, accepted, at)
        yield from _limits(written, accepted, at)
        yield from self._properties(written, accepted, at)
        yield from self._items(written, accepted, at)

    def _properties(self, written: Schema, accepted: Schema, at: str) -> Iterator[str]:
        known = accepted.get("properties", {})
        sent = written.get("properties", {})
        always = set(written.get("required", ()))
        for name in accepted.get("required", ()):
            if name not in sent:
                yield f"{_path(at, name)} is required and never written"
            elif name not in always:
                yield f"{_path(at, name)} is required and not always written"
        for name, schema in sent.items():
            if name in known:
                yield from self.problems(schema, known[name], _path(at, name))
            elif accepted.get("additionalProperties") is False:
                yield f"{_path(at, name)} is written, and unknown fields are refused"
        values = written.get("additionalProperties"), accepted.get("additionalProperties")
        if isinstance(values[0], dict) and isinstance(values[1], dict):
            yield from self.problems(values[0], values[1], _path(at, "*"))

    def _items(self, written: Schema, accepted: Schema, at: str) -> Iterator[str]:
        ours, theirs = written.get("prefixItems", ()), accepted.get("prefixItems", ())
        if len(ours) != len(theirs):
            yield f"{at or 'payload'} has {len(ours)} fixed items and {len(theirs)} are expected"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from self.problems(one, other, _path(at, str(index)))
        if isinstance(accepted.get("items"), dict) and not ours:
            yield from self.problems(written.get("items", {}), accepted["items"], _path(at, "[]"))


def _types(written: Schema, accepted: Schema, at: str) -> Iterator[str]:
    expected = accepted.get("type")
    if expected is None or "const" in written or "enum" in written:
        return
    found = written.get("type")
    if found != expected and (found, expected) != ("integer", "number"):
        yield f"{at or 'payload'} is written as {found or 'anything'} and read as {expected}"


def _values(written: Schema, accepted: Schema, at: str) -> Iterator[str]:
    expected, found = _listed_values(accepted), _listed_values(written)
    if expected is None:
        if found is not None and not _fits_type(found, accepted.get("type")):
            yield f"{at or 'payload'} is written as one of {found} and read as {accepted['type']}"
    elif found is None:
        yield f"{at or 'payload'} may have any value and is read as one of {expected}"
    elif unknown := [value for value in found if value not in expected]:
        yield f"{at or 'payload'} may be {', '.join(map(repr, unknown))}, which is not known"


def _listed_values(schema: Schema) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _fits_type(values: list[Any], expected: str | None) -> bool:
    return expected is None or all(
        isinstance(value, _PYTHON_TYPES.get(expected, ())) for value in values
    )


def _limits(written: Schema, accepted: Schema, at: str) -> Iterator[str]:
    for names, sign in ((_LOWER_BOUNDS, 1), (_UPPER_BOUNDS, -1)):
        for name in names:
            limit, kept = accepted.get(name), written.get(name)
            if limit is not None and (kept is None or sign * kept < sign * limit):
                yield f"{at or 'payload'} is read with {name} {limit} and written without"
    for name in _EXACT:
        if name in accepted and accepted[name] != written.get(name) and "const" not in written:
            yield (
                f"{at or 'payload'} is read with {name} {accepted[name]} and written with "
                f"{written.get(name, 'none')}"
            )


def _options(schema: Schema) -> list[Schema]:
    return [
        nested
        for option in schema.get("anyOf") or schema.get("oneOf") or [schema]
        for nested in ([option] if option is schema else _options(option))
    ]


def _resolved(schema: Schema, definitions: Schema) -> Schema:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: Schema = definitions.get(reference.removeprefix(_DEFINITION), {})
    return _resolved(found, definitions)


def _path(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
