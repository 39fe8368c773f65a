"""Limits on bytes that came from outside, checked before anything parses them.

JSON is an amplifier: a few bytes can ask for a deep recursion or a number of 100,000 digits. The same limits hold
where an event is published, so that what is refused here was never accepted there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from outbox.errors import MalformedMessage

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STRUCTURE = re.compile(rb"[\[\]{}]")
_NUMBER = re.compile(rb"-?[0-9][0-9.eE+-]*")
_BIG_EXPONENT = re.compile(rb"[eE][+-]?0*[0-9]{4,}")
_NUL_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


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
    """Characters of one number."""

    def check(self, body: bytes) -> None:
        """Raise `MalformedMessage` if *body* is over a limit or holds a NUL; says which limit and by how much."""
        if len(body) > self.size:
            raise MalformedMessage(
                f"the message has {len(body):,} bytes; the limit is {self.size:,}"
            )
        if b"\x00" in body or _NUL_ESCAPE.search(body):
            raise MalformedMessage(
                "the message holds a NUL character, which PostgreSQL cannot store as text"
            )
        bare = _STRING.sub(b'""', body)
        nodes = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
        if nodes > self.nodes:
            raise MalformedMessage(f"the message has {nodes:,} values; the limit is {self.nodes:,}")
        self._check_depth(bare)
        self._check_numbers(bare)

    def _check_depth(self, bare: bytes) -> None:
        if bare.count(b"[") + bare.count(b"{") <= self.depth:
            return
        depth = 0
        for bracket in _STRUCTURE.findall(bare):
            depth += 1 if bracket in b"[{" else -1
            if depth > self.depth:
                raise MalformedMessage(f"the message nests more than {self.depth} levels")

    def _check_numbers(self, bare: bytes) -> None:
        longest = max(map(len, _NUMBER.findall(bare)), default=0)
        if longest > self.number_length:
            raise MalformedMessage(
                f"the message has a number of {longest:,} characters; the limit is {self.number_length:,}"
            )
        if _BIG_EXPONENT.search(bare):
            raise MalformedMessage("the message has a number whose exponent is out of range")


DEFAULT_LIMITS = Limits()
