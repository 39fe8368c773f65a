"""Redis lists hold what anyone pushed; kombu expects its own messages in them and dies of others.

An item that is no kombu message is put into one, as its raw body, before the transport reads it: so
it is counted as unacknowledged, reaches the quarantine table, and the worker lives on.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

from outbox.crash_points import crash_point


def readable(item: bytes | str, queue: str) -> bytes | str:
    """*item*, if kombu can read it, else a kombu message with *item* as its body."""
    try:
        if _is_message(json.loads(item)):
            return item
    except (ValueError, RecursionError):
        pass
    raw = item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass")
    return json.dumps(
        {
            "body": base64.b64encode(raw).decode(),
            "content-type": "application/octet-stream",
            "content-encoding": "binary",
            "headers": {},
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_mode": 2,
                "priority": 0,
            },
        }
    )


def _is_message(payload: Any) -> bool:
    match payload:
        case {
            "body": str() as body,
            "headers": dict(),
            "properties": {
                "delivery_tag": str(),
                "delivery_info": {"exchange": str(), "routing_key": str()},
                "body_encoding": "base64",
            },
        }:
            return _is_base64(body)
    return False


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True


def reading_anything(channel: type[Any]) -> type[Any]:
    class Channel(channel):  # type: ignore[misc]
        _kept: Any = None

        def _create_client(self, asynchronous: bool = False) -> Any:
            if asynchronous:
                return self._reads_anything(super()._create_client(asynchronous=True))
            # kombu makes one for each acknowledgement, which takes longer than to send that, and leaves garbage behind.
            if self._kept is None or self._kept.connection_pool is not self.pool:
                self._kept = super()._create_client()
            return self._kept

        def _reads_anything(self, client: Any) -> Any:
            """*client* is the one that waits for messages."""
            parse = client.parse_response

            def parse_response(connection: Any, command_name: str, **options: Any) -> Any:
                reply = parse(connection, command_name, **options)
                if command_name == "BRPOP" and reply:
                    # Gone from the list, and not yet among the unacknowledged.
                    crash_point("redis.popped")
                    key, item = reply
                    queue = key.decode() if isinstance(key, bytes) else key
                    return key, readable(item, queue.rsplit(self.sep, 1)[0])
                return reply

            client.parse_response = parse_response
            return client

    return Channel
