"""What a Celery worker finds in its queue on Redis: list entries as kombu's transport would have made them.

For events of one type all but the ids and the body is the same, so an entry is made once per queue and type, and cut
where those go.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Final
from uuid import uuid4

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import CONTENT_ENCODING, CONTENT_TYPE, message_headers

_BODY: Final = "\x01body"
_ID: Final = "\x01id"
_TAG: Final = "\x01tag"
_MOST_TEMPLATES: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Template:
    before_body: bytes
    before_tag: tuple[bytes, ...]
    """What stands between body and delivery tag, cut where the id goes."""
    after_tag: bytes


class EntryEncoder:
    """Makes list entries. No two have the same delivery tag, whichever queue they are for.

    kombu itself gives the copies of a message one tag, and keeps what is not acknowledged by tag, for all queues of a
    database together: one service's ack then takes away what another one's crash would have brought back.
    """

    def __init__(self) -> None:
        self._templates: dict[tuple[str, str], _Template] = {}
        self._tag_prefix = uuid4().hex.encode()
        self._numbers = count()

    def encode(self, message: OutgoingMessage, body: bytes, queue: str) -> bytes:
        """The entry of *message* for *queue*; *body*: `message_body(message)`."""
        template = self._templates.get((queue, message.type))
        if template is None:
            if len(self._templates) >= _MOST_TEMPLATES:
                self._templates.clear()
            template = self._templates[queue, message.type] = _make_template(queue, message.type)
        return b"%b%b%b%b-%d%b" % (
            template.before_body,
            b64encode(body),
            message.id.encode().join(template.before_tag),
            self._tag_prefix,
            next(self._numbers),
            template.after_tag,
        )


def command(*arguments: bytes) -> bytes:
    """A Redis command as it goes over the wire."""
    return b"*%d\r\n%b" % (len(arguments), _bulk(arguments))


def push(queue: str, entries: list[bytes]) -> bytes:
    """`LPUSH` of all *entries*, in order: the first of them will be read first."""
    head = b"*%d\r\n" % (len(entries) + 2)
    return head + _bulk((b"LPUSH", queue.encode())) + _bulk(entries)


def _bulk(arguments: Iterable[bytes]) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


def _make_template(queue: str, event_type: str) -> _Template:
    entry = json.dumps(
        {
            "body": _BODY,
            "content-encoding": CONTENT_ENCODING,
            "content-type": CONTENT_TYPE,
            "headers": message_headers(event_type, _ID),
            "properties": {
                "correlation_id": _ID,
                "delivery_mode": 2,
                # What is not acknowledged goes back to where this says: to its own queue, and not once more to
                # everyone who is bound to the type.
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": _TAG,
            },
        }
    ).encode()
    before_body, _, rest = entry.partition(_mark(_BODY))
    before_tag, _, after_tag = rest.rpartition(_mark(_TAG))
    return _Template(before_body, tuple(before_tag.split(_mark(_ID))), after_tag)


def _mark(placeholder: str) -> bytes:
    """As it stands inside a JSON string."""
    return json.dumps(placeholder)[1:-1].encode()
