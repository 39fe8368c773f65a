"""Taking messages out of a Redis list without losing them, many at once, and acknowledging them at once.

kombu pops a message and then notes it as unacknowledged. It is lost where the process dies in
between, and that may be long: the pop is sent ahead, and its answer waits in the socket while the
worker is busy. Here a script moves messages from the list to kombu's notes in one step, so that at
any moment a message is in the list or it is noted, and a dead worker's notes go back in time. To
wait for the first one, `BLMOVE` moves the last item to where it is.

`BLMOVE` waits for one list: where the worker consumes others too (no `events_only`), or the server
is older than 6.2, kombu's own pop waits for the first message, and only the rest is taken so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from hashlib import sha1
from queue import Empty
from typing import Any, Final

from kombu.transport.virtual import QoS as VirtualQoS
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from pydantic_core import from_json
from redis.exceptions import NoScriptError, ResponseError

from outbox.celery.redis import readable

log = logging.getLogger(__name__)

# What is no message of kombu's is left in the list, to be popped one by one and quarantined.
_TAKE: Final = """
local function tag_of(message)
    local properties = type(message) == 'table' and message.properties
    local came_by = type(properties) == 'table' and properties.delivery_info
    if type(came_by) == 'table' and type(properties.delivery_tag) == 'string'
        and type(came_by.exchange) == 'string' and type(came_by.routing_key) == 'string'
        and type(message.headers) == 'table' and type(message.body) == 'string'
        and properties.body_encoding == 'base64' and not string.find(message.body, '[^%w+/=]')
    then
        return properties.delivery_tag, came_by
    end
end

local taken = {}
for number = 1, tonumber(ARGV[1]) do
    local item = redis.call('LINDEX', KEYS[1], -1)
    local readable, message = pcall(cjson.decode, item or '')
    local tag, came_by
    if readable then tag, came_by = tag_of(message) end
    if not tag then break end
    redis.call('RPOP', KEYS[1])
    redis.call('ZADD', KEYS[3], ARGV[2], tag)
    redis.call('HSET', KEYS[2], tag, '[' .. item .. ',' .. cjson.encode(came_by.exchange)
        .. ',' .. cjson.encode(came_by.routing_key) .. ']')
    taken[number] = item
end
return taken
"""
_OWN_TYPE: Final = b"__type__"
_TAKE_SHA: Final = sha1(_TAKE.encode(), usedforsecurity=False).hexdigest()


def _loaded(item: bytes) -> Any:
    """As kombu reads it, at a fifth of the cost: for values of types of its own it makes a decoder for each message."""
    if _OWN_TYPE not in item:
        try:
            return from_json(item)
        except ValueError:
            pass  # kombu takes more for JSON, half a surrogate pair for one
    return loads(bytes_to_str(item))


def taking(channel: type[Any], queue: str, size: int) -> type[Any]:
    """kombu's Redis *channel*, which takes up to *size* messages of *queue* at once."""
    base: Any = channel.QoS

    class QoS(base):  # type: ignore[misc]
        is_noted = False
        """Whether what is delivered now stands among the unacknowledged already."""

        def append(self, message: Any, delivery_tag: str) -> None:
            if self.is_noted:
                VirtualQoS.append(self, message, delivery_tag)
            else:
                super().append(message, delivery_tag)

        def ack_together(self, tags: Sequence[str]) -> None:
            with self.pipe_or_acquire() as pipe:
                pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()
            for tag in tags:
                VirtualQoS.ack(self, tag)

    class Channel(channel):  # type: ignore[misc]
        _can_script = True
        _can_wait = True
        _waits = False

        def ack_together(self, tags: Sequence[str]) -> None:
            self.qos.ack_together(tags)

        def _brpop_start(self, timeout: float | None = None) -> None:
            self._waits = self._takes and self._can_wait and set(self.active_queues) == {queue}
            if not self._waits:
                super()._brpop_start(timeout)
                return
            key = self._q_for_pri(queue, 0)
            seconds = self.brpop_timeout if timeout is None else timeout
            self._in_poll = self.client.connection
            self._brpop_sent_at = time.monotonic()
            self.client.connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", seconds or 0)

        def _brpop_read(self, **options: Any) -> Any:
            if self._waits:
                self._await_first(**options)
                if not (self._closing or self._take(size)):
                    self._take_unreadable()
                return True
            answer = super()._brpop_read(**options)
            if size > 1 and self._takes and queue in self.active_queues and not self._closing:
                self._take(size)
            return answer

        @property
        def _takes(self) -> bool:
            """A prefix of all keys kombu puts before one key of a script only."""
            return self._can_script and not self.global_keyprefix

        def _await_first(self, **options: Any) -> None:
            try:
                answer = self.client.parse_response(self.client.connection, "BLMOVE", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            except ResponseError as error:
                self._can_wait = False
                log.warning("the server cannot wait for messages without popping one: %s", error)
                raise Empty from error
            finally:
                self._in_poll = None
                self._flush_brpop_reauth()
            if answer is None:
                raise Empty

        def _take(self, count: int) -> bool:
            """Whether any was taken, or none can be now."""
            room = self.qos.can_consume_max_estimate()
            count = count if room is None else min(count, room)
            if count == 0:
                return True
            try:
                items = self._moved(count)
            except ResponseError as error:
                self._can_script = False
                log.warning("messages are taken from Redis one by one: %s", error)
                return True
            for item in items:
                self.qos.is_noted = True
                try:
                    self.connection._deliver(_loaded(item), queue)
                finally:
                    self.qos.is_noted = False
            return bool(items)

        def _moved(self, count: int) -> list[bytes]:
            keys = [self._q_for_pri(queue, 0), self.unacked_key, self.unacked_index_key]
            given = (len(keys), *keys, count, time.time())
            moved: list[bytes]
            try:
                try:
                    moved = self._answer_to("EVALSHA", _TAKE_SHA, *given)
                except NoScriptError:
                    moved = self._answer_to("EVAL", _TAKE, *given)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            return moved

        def _answer_to(self, *command: Any) -> Any:
            """On the connection that waited for the first message, which is idle now: another one would have to be
            taken out of a pool and looked at, which takes as long again as the script."""
            connection = self.client.connection
            connection.send_command(*command)
            return connection.read_response()

        def _take_unreadable(self) -> None:
            """Pop what no script can read; another worker may have had it meanwhile."""
            with self.conn_or_acquire() as client:
                item = client.rpop(self._q_for_pri(queue, 0))
            if item is not None:
                self.connection._deliver(loads(bytes_to_str(readable(item, queue))), queue)

    Channel.QoS = QoS
    return Channel
