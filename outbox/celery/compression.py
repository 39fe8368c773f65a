"""Messages are decompressed while they are received, by kombu, to any size: here is the bound.

A megabyte can unpack to a gigabyte. Done in the worker's main process before any of our code runs,
that would kill one worker after the other.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final

from kombu import compression

MAX_BYTES: Final = 64 * 1024 * 1024

_DECOMPRESSORS: Final[dict[str, Callable[[], Any]]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}


def bound_decompression() -> None:
    """Replace kombu's decoders in this process by ones that stop at `MAX_BYTES`."""
    for content_type in compression.encoders():
        decompressor = _DECOMPRESSORS.get(content_type)
        decode = _unbounded if decompressor is None else _bounded(decompressor)
        found: Any = compression.get_encoder(content_type)  # with its type; the stubs forget that
        compression.register(found[0], decode, content_type)


def _bounded(decompressor: Callable[[], Any]) -> Callable[[bytes], bytes]:
    def decode(body: bytes) -> bytes:
        unpacking = decompressor()
        unpacked: bytes = unpacking.decompress(body, MAX_BYTES)
        if not unpacking.eof:
            raise ValueError(f"it is cut off, or unpacks to more than {MAX_BYTES:,} bytes")
        return unpacked

    return decode


def _unbounded(_: bytes) -> bytes:
    raise ValueError("its compression cannot be bounded, so it is not accepted; gzip is")
