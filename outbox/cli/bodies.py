"""Stored bytes for the eyes of a person: never parsed into more than text."""

from __future__ import annotations

import json
from typing import Final

_SHOWN_BYTES: Final = 16_384


def envelope_of(body: bytes, *, indent: int | None = None) -> str:
    """The text of *body*, indented where it is JSON of a size to be looked at.

    Hostile bytes are shown escaped, and what is over 16 KiB is cut, saying so.
    """
    text = body[:_SHOWN_BYTES].decode("utf-8", "backslashreplace")
    if len(body) > _SHOWN_BYTES:
        return f"{text}... ({len(body) - _SHOWN_BYTES:,} more bytes)"
    if indent is None:
        return text
    try:
        return json.dumps(json.loads(text), indent=indent, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
