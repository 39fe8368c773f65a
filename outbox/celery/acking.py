"""Acknowledging the messages of a batch with one write, where the transport can."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import amqp

if TYPE_CHECKING:
    from kombu import Message

log = logging.getLogger(__name__)

_METHOD_FRAME: Final = struct.Struct(">BHIHHQBB")
_BASIC_ACK: Final = (60, 80)
_ACK_SIZE: Final = 13
_FRAME_END: Final = 0xCE


def ack_together(messages: Sequence[Message], errors: tuple[type[BaseException], ...]) -> None:
    """Acknowledge *messages* of one channel. *errors*: what a lost connection raises; it is logged,
    as the broker hands the messages out again."""
    if not messages:
        return
    channel: Any = messages[0].channel
    tags = [message.delivery_tag for message in messages]
    try:
        if hasattr(channel, "ack_together"):
            channel.ack_together(tags)
        elif isinstance(channel, amqp.Channel) and channel.connection is not None:
            channel.connection.transport.write(_frames(channel.channel_id or 0, tags))
        else:
            for tag in tags:
                channel.basic_ack(tag)
    except errors as error:
        log.critical("%d messages were not acknowledged: %r", len(messages), error)
    for message in messages:
        message._state = "ACK"  # type: ignore[attr-defined]


def _frames(channel_id: int, tags: Sequence[Any]) -> bytes:
    """Not one ack of several: others of the channel, with tags in between, may be under way."""
    return b"".join(
        _METHOD_FRAME.pack(1, channel_id, _ACK_SIZE, *_BASIC_ACK, tag, 0, _FRAME_END)
        for tag in tags
    )
