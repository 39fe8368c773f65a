"""JSON that came from outside: limits that are checked before anything parses it, and what JSON leaves open, refused.

JSON is an amplifier: a few bytes can ask for a deep recursion or a number of 100,000 digits. And it is ambiguous: of a
name that stands twice in an object one reader takes the first value and another the last, and `1e400` is a number to
one and infinity to another. The same limits hold where an event is published, so that what is refused here was never
accepted there.

Everything here takes time and space linear in the size, also for bytes made to hurt. No regular expressions: one that
looks for strings is quadratic in quotes that are never closed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

from pydantic_core import from_json

from outbox.errors import ConfigurationError, MalformedMessage

_NUMBER_AS_ZEROS = bytes.maketrans(b"123456789.eE+-", b"0" * 14)
_EXPONENT_AS_ZEROS = bytes.maketrans(b"123456789E-", b"0" * 9 + b"e+")
_LONG_EXPONENTS = (b"e0000", b"e+0000")
_SHORTEST_OF_CONCERN = b"000000"  # 1e0000
_NUL, _BACKSLASH, _ARRAY = b"\x00\\["  # as integers they are looked for in a tenth of the time
NODES_OF_A_HEAD = 64
_SHORTEST_NUMBER_LENGTH = 11


@dataclass(frozen=True)
class Limits:
    """What an encoded event may be at most."""

    size: int = 1_048_576
    """Size of the encoded envelope, in bytes. Brokers and intermediaries like it below 65,536."""
    depth: int = 64
    """Levels of nested arrays and objects."""
    nodes: int = 100_000
    """Values in all, counted as separators and opening brackets."""
    number_length: int = 400
    """Characters of one number; 11 at least, as the envelope's own may have."""

    def __post_init__(self) -> None:
        if self.number_length < _SHORTEST_NUMBER_LENGTH:
            raise ConfigurationError(
                f"number_length is {self.number_length}: with less than {_SHORTEST_NUMBER_LENGTH} an extension of the "
                "envelope (-2147483648, say) would be published and then not be read"
            )

    @cached_property
    def of_data(self) -> Limits:
        """What the payload may be at most, so that with any head around it these limits hold."""
        return replace(self, depth=self.depth - 1, nodes=self.nodes - NODES_OF_A_HEAD)

    @cached_property
    def _too_short_to_offend(self) -> int:
        """The size up to which a flat object is within all limits, whatever is in it."""
        return min(self.size, self.nodes, self.number_length) if self.depth else 0

    @cached_property
    def plain_values(self) -> int:
        """As many texts, truth values and integers of 19 characters as one object may have."""
        return self.nodes if self.depth > 0 and self.number_length > 18 else 0

    def parse_flat(self, body: bytes) -> dict[str, Any] | None:
        """What `parse` makes of *body*, if it is plain at a glance that nothing is wrong with it; else None.

        It is for a short object of texts and integers, at half the cost. Each comparison errs towards None: a bracket,
        comma or colon inside of a text is taken for a structure.
        """
        if (
            len(body) > self._too_short_to_offend
            or _BACKSLASH in body
            or _ARRAY in body
            or body.rfind(b"{") != 0
        ):
            return None
        try:
            value: dict[str, Any] = from_json(
                body, allow_inf_nan=False
            )  # refuses a NUL that is not escaped
        except ValueError:
            return None
        members = len(value)
        # Each member but the first has a comma before it, and each has a colon: no more of either, no name came twice.
        if members != body.count(b",") + 1 and members != body.count(b":"):
            return None
        return None if float in map(type, value.values()) else value

    def check(self, body: bytes) -> None:
        """Raises what `parse` raises."""
        if self.parse_flat(body) is None:
            self.parse(body)

    def parse(self, body: bytes) -> Any:
        """The JSON value in *body*, checked first.

        Raises `MalformedMessage`: over a limit, not JSON, not UTF-8, a NUL or half a surrogate pair, a number that is
        infinite or none, a name twice in one object.
        """
        outline = self._checked_outline(body)
        try:
            value = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise MalformedMessage(f"the message is no JSON: {error}") from error
        if _count_members(value) != outline.count(b":"):
            raise MalformedMessage(
                "the message has an object with the same name twice, so readers would not agree on its value"
            )
        return value

    def _checked_outline(self, body: bytes) -> bytes:
        if len(body) > self.size:
            raise MalformedMessage(
                f"the message has {len(body):,} bytes; the limit is {self.size:,}"
            )
        # Pairs of backslashes first: what is left before a character then really escapes it.
        unpaired = body.replace(b"\\\\", b"") if _BACKSLASH in body else body
        if _NUL in body or (_BACKSLASH in unpaired and b"\\u0000" in unpaired):
            raise MalformedMessage(
                "the message holds a NUL character, which PostgreSQL cannot store as text"
            )
        outline = _without_strings(unpaired)
        self._check_nesting(outline)
        self._check_numbers(outline)
        return outline

    def _check_nesting(self, outline: bytes) -> None:
        opened = outline.count(b"[") + outline.count(b"{")
        nodes = outline.count(b",") + opened
        if nodes > self.nodes:
            raise MalformedMessage(f"the message has {nodes:,} values; the limit is {self.nodes:,}")
        if opened <= self.depth:
            return
        depth = 0
        for byte in outline:
            if byte in b"[{":
                depth += 1
                if depth > self.depth:
                    raise MalformedMessage(f"the message nests more than {self.depth} levels")
            elif byte in b"]}":
                depth -= 1

    def _check_numbers(self, outline: bytes) -> None:
        numbers = outline.translate(_NUMBER_AS_ZEROS)
        if numbers.find(_SHORTEST_OF_CONCERN) < 0:
            return
        if b"0" * (self.number_length + 1) in numbers:
            raise MalformedMessage(
                f"the message has a number of more than {self.number_length:,} characters"
            )
        exponents = outline.translate(_EXPONENT_AS_ZEROS)
        if any(long in exponents for long in _LONG_EXPONENTS):
            raise MalformedMessage("the message has a number whose exponent is out of range")


DEFAULT_LIMITS = Limits()


def _without_strings(unpaired: bytes) -> bytes:
    """JSON text with its strings emptied: exact where it is JSON, and JSON is parsed only afterwards."""
    if _BACKSLASH in unpaired:
        unpaired = unpaired.replace(b'\\"', b"")
    return b'"'.join(unpaired.split(b'"')[::2])


def _count_members(value: Any) -> int:
    """The members of all objects in *value*, which are as many as its text had colons, unless a name came twice."""
    kind = type(value)
    if kind is not dict and kind is not list:
        value = [value]
    members = 0
    containers: list[Any] = [value]
    for container in containers:  # grows on the way
        if type(container) is dict:
            members += len(container)
            items = container.values()
        else:
            items = container
        for item in items:
            kind = type(item)
            if kind is str or kind is int:
                continue
            if kind is dict or kind is list:
                containers.append(item)
            elif kind is float and not isfinite(item):
                raise MalformedMessage("the message has a number that is out of range")
    return members
