"""Reading the bodies of requests within limits of size, time and memory."""

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from .errors import RequestError
from .limits import BODY_PAUSE, BODY_TIMEOUT, MAX_JSON_DEPTH, MAX_JSON_ESCAPES, MAX_JSON_VALUES

# A request that is too large is read up to this multiple of the limit before the connection is closed.
_MOST_DISCARDED = 4
# Marks that determine the nesting of JSON; escapes come first, so that an escaped quote does not end a string.
_JSON_MARKS = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)


class Uploads:
    """Limits the memory of all requests that are arriving: when it is used up, the slowest of them is refused."""

    def __init__(self, most: int):
        self._most, self._size = most, 0
        self._reading: dict[asyncio.Task[Any], None] = {}  # in the order in which they began

    def add(self, size: int) -> None:
        """Count bytes of the request that the current task reads."""
        task = asyncio.current_task()
        assert task is not None
        self._reading.setdefault(task)
        self._size += size
        if self._size > self._most:
            next(iter(self._reading)).cancel()

    def stop_reading(self, task: "asyncio.Task[Any]") -> None:
        """Forget a request that has been read or refused."""
        self._reading.pop(task, None)

    def release(self, size: int) -> None:
        """Count bytes of a request that are no longer in memory."""
        self._size -= size


class Body:
    """The body of a request."""

    def __init__(self, receive: Receive, most: int, uploads: Uploads):
        self._receive, self._most, self._uploads = receive, most, uploads
        self._size, self._held, self._is_complete = 0, 0, False

    async def read_json(self, content_type: str) -> dict[str, Any]:
        """Read a JSON object."""
        # Any web page that the user visits can send other types to a local server without a preflight request.
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise RequestError("The header Content-Type must be application/json.", status=415)
        try:
            body = await asyncio.to_thread(_parse_json, await self._read_in_time())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The body must be JSON: {error}.", code="invalid_json") from None
        finally:
            self._uploads.release(self._held)
        if not isinstance(body, dict):
            raise RequestError(f"The body must be a JSON object, got {type(body).__name__}.")
        return body

    async def _read_in_time(self) -> bytes:
        reading = asyncio.ensure_future(self._read())
        reading.add_done_callback(self._uploads.stop_reading)
        try:
            return await asyncio.wait_for(reading, BODY_TIMEOUT)
        except asyncio.TimeoutError:
            raise RequestError(
                f"A request must arrive within {BODY_TIMEOUT:g} seconds, without pauses of {BODY_PAUSE:g} seconds.",
                status=408,
            ) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and getattr(task, "cancelling", lambda: 0)():  # the server is shutting down
                raise
            raise RequestError(
                "The server is reading too many requests. Try again later.", code="overloaded", status=429
            ) from None

    async def discard(self) -> None:
        """Read the rest without keeping it: a client that is still sending does not see an answer."""
        with suppress(asyncio.TimeoutError, ClientDisconnect):
            await asyncio.wait_for(self._discard(), BODY_PAUSE)

    async def _read(self) -> bytes:
        data = bytearray()
        while not self._is_complete:
            chunk = await asyncio.wait_for(self._receive_chunk(), BODY_PAUSE)
            data += chunk
            self._held += len(chunk)
            self._uploads.add(len(chunk))
            if self._size > self._most:
                raise RequestError(
                    f"A request must have at most {self._most:,} bytes.", code="request_too_large", status=413
                )
        return bytes(data)

    async def _discard(self) -> None:
        while not self._is_complete and self._size <= _MOST_DISCARDED * self._most:
            await self._receive_chunk()

    async def _receive_chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        self._size += len(chunk)
        self._is_complete = not message.get("more_body", False)
        return chunk


def _parse_json(data: bytes) -> Any:
    """Parse JSON after cheap checks: the parser takes seconds for millions of values, and blocks all threads."""
    counts = (("[{,", MAX_JSON_VALUES), ("]}", MAX_JSON_VALUES), ('"', MAX_JSON_ESCAPES), ("\\", MAX_JSON_ESCAPES))
    if any(sum(data.count(mark.encode()) for mark in marks) > most for marks, most in counts):
        raise RequestError(
            f"The body must have at most {MAX_JSON_VALUES:,} values and {MAX_JSON_ESCAPES:,} quotes and escaped "
            "characters.",
            code="request_too_large",
            status=413,
        )
    depth, is_string = 0, False
    for mark in _JSON_MARKS.finditer(data):
        kind = mark.group()
        if kind == b'"':
            is_string = not is_string
        elif not is_string and kind in b"[]{}":
            depth += 1 if kind in b"[{" else -1
            if depth > MAX_JSON_DEPTH:
                raise RequestError(
                    f"The body must be nested at most {MAX_JSON_DEPTH} levels deep.", code="invalid_json"
                )
    body = json.loads(data.decode(), object_pairs_hook=_as_dict, parse_constant=_refuse_constant)
    if b"\\u" in data:  # a lone surrogate is not a character and cannot be encoded
        json.dumps(body, ensure_ascii=False).encode()
    return body


def _as_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a key twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


__all__ = ["Body", "Uploads"]
