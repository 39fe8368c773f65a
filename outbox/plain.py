"""Plain payloads: flat ones of texts, integers, truth values and UUIDs, in fields that ask for nothing else.

Whatever such a class holds is read back as it was written, if each value is of its field's very type: that is known
beforehand, so it need not be tried for each event. And it is written here, byte for byte as pydantic would (but a
model's fields always in the order of its class): between two round trips of a transaction, when other code has had the
processor's caches, that takes a third of the time. What pydantic says of a class is compared with what is known here,
word for word; a class with anything more to it (constraints, aliases, validators, its own constructor, its own way to
read an attribute) is not plain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import getattr_static, isdatadescriptor
from json.encoder import encode_basestring as quoted
from typing import Any, Final
from uuid import UUID

Fields = tuple[tuple[str, str, frozenset[type]], ...]
"""Each field's name, the JSON in front of its value, and the types that a value of it may have."""

_LEAVES: Final[Mapping[str, type]] = {"int": int, "str": str, "bool": bool, "uuid": UUID}
_NONE: Final = type(None)
_FOR_JSON_SCHEMA: Final = "pydantic_js_"
_LARGEST: Final = 10**18
_WORDS: Final = {None: "null", True: "true", False: "false"}
_NUL: Final = "\\u0000"
_CLASS: Final = {
    "dataclass": {
        "type", "cls", "fields", "schema", "post_init", "frozen", "slots", "config", "ref",
    },
    "model": {
        "type", "cls", "schema", "custom_init", "root_model", "config", "ref", "metadata", "frozen",
    },
}  # fmt: skip
_CONFIG: Final = {"title", "frozen", "strict", "extra_fields_behavior"}
_ARGUMENTS: Final = {
    "type", "dataclass_name", "model_name", "fields", "computed_fields", "collect_init_only", "extra_behavior",
}  # fmt: skip
_FIELD: Final = {"type", "name", "schema", "kw_only", "init", "metadata", "frozen"}
_DEFAULT: Final = {"type", "schema", "default", "default_factory", "default_factory_takes_data"}


def plain_fields(schema: Mapping[str, Any], payload_class: type[Any]) -> Fields | None:
    """The fields of a class whose core schema in pydantic is *schema*; None if it is not plain."""
    known = _CLASS.get(schema["type"])
    if known is None or not schema.keys() <= known or schema.get("cls") is not payload_class:
        return None
    arguments, config = schema["schema"], schema.get("config", {})
    if (
        any(schema.get(flag) for flag in ("post_init", "slots", "custom_init", "root_model"))
        or not config.keys() <= _CONFIG
        or not arguments.keys() <= _ARGUMENTS
        or arguments.get("computed_fields")
        or arguments.get("collect_init_only")
        or "allow" in (config.get("extra_fields_behavior"), arguments.get("extra_behavior"))
    ):
        return None
    fields = arguments["fields"]
    named = fields if isinstance(fields, dict) else {each["name"]: each for each in fields}
    # A dataclass takes its arguments in another order than it is written in, where some are `kw_only`.
    names: Iterable[str] = schema.get("fields", named)
    if not named or set(names) != named.keys() or not _is_read_plainly(payload_class, named):
        return None
    found: list[tuple[str, str, frozenset[type]]] = []
    for name in names:
        its = _kinds(named[name])
        if its is None:
            return None
        found.append((name, f"{',' if found else '{'}{quoted(name)}:", its))
    return tuple(found)


def _is_read_plainly(payload_class: type[Any], names: Iterable[str]) -> bool:
    """Whether an instance's attributes are what its `__dict__` holds."""
    reads = getattr_static(payload_class, "__getattribute__")
    return reads is object.__getattribute__ and not any(
        isdatadescriptor(getattr_static(payload_class, name, None)) for name in names
    )


def _kinds(field: Mapping[str, Any]) -> frozenset[type] | None:
    notes = field.get("metadata", {})
    if not field.keys() <= _FIELD or not field.get("init", True):
        return None
    if not all(note.startswith(_FOR_JSON_SCHEMA) for note in notes):
        return None
    schema = field["schema"]
    if schema["type"] == "default" and schema.keys() <= _DEFAULT:
        schema = schema["schema"]
    others: set[type] = set()
    if schema["type"] == "nullable" and schema.keys() == {"type", "schema"}:
        schema, others = schema["schema"], {_NONE}
    leaf = _LEAVES.get(schema["type"]) if schema.keys() == {"type"} else None
    return None if leaf is None else frozenset({leaf, *others})


def write_plain(fields: Fields, payload: object) -> bytes | None:
    """*payload*, of the class that the *fields* are of, as JSON; None if a reader is not known to get it back."""
    held, text = vars(payload), ""
    for name, label, kinds in fields:
        value = held.get(name, payload)  # itself where it is missing, which is of no kind
        kind = type(value)
        if kind not in kinds:
            return None
        if kind is str:
            text += label + quoted(value)
        elif kind is int:
            if not -_LARGEST < value < _LARGEST:
                return None
            text += label + str(value)
        elif kind is UUID:
            text += f'{label}"{value}"'
        else:
            text += label + _WORDS[value]
    if _NUL in text:
        return None
    try:
        return f"{text}}}".encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
