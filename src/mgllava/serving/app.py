"""The HTTP application: who may ask, reading requests, answering them, and noticing who left."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils import logging

from mgllava.serving.errors import RequestError, error_body, error_response
from mgllava.serving.handlers import ServedModel
from mgllava.serving.limits import (
    BODY_PAUSE,
    BODY_TIMEOUT,
    MAX_JSON_DEPTH,
    MAX_JSON_ESCAPES,
    MAX_JSON_VALUES,
    SEND_TIMEOUT,
    ServingLimits,
)

logger = logging.get_logger(__name__)

_REQUEST_ID = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 128
# Of a request that is too large, this many times the limit is read before the connection is closed.
_MOST_DISCARDED = 4
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
# What matters for the nesting of JSON; escapes are found first, so that an escaped quote ends no string.
_JSON_MARKS = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)


class _Admission:
    """Counts the requests that are being answered, over all endpoints. Those that still arrive do not count."""

    def __init__(self, most: int):
        self._most, self._count = most, 0

    def __enter__(self) -> None:
        if self._count >= self._most:
            raise RequestError(
                f"The server has {self._most} requests already. Try again later.", code="overloaded", status=429
            )
        self._count += 1

    def __exit__(self, *exc_info: object) -> None:
        self._count -= 1


class _Uploads:
    """Bounds the memory of all requests that arrive: where it is used up, the one that takes longest has to go."""

    def __init__(self, most: int):
        self._most, self._size = most, 0
        self._reading: dict[asyncio.Task[Any], None] = {}  # in the order in which they began

    def add(self, size: int) -> None:
        """Count bytes of the request that the present task reads."""
        task = asyncio.current_task()
        assert task is not None
        self._reading.setdefault(task)
        self._size += size
        if self._size > self._most:
            next(iter(self._reading)).cancel()

    def stop_reading(self, task: "asyncio.Task[Any]") -> None:
        """Note that a request has been read, or will not be."""
        self._reading.pop(task, None)

    def release(self, size: int) -> None:
        """Note that the bytes of a request are not in memory any more."""
        self._size -= size


class _GenerationEndpoint:
    """ASGI application of one handler.

    Not a function of a framework: reading the request within limits, and stopping all work as soon as the client has
    left, while it waits as well as while it streams, need the connection itself.
    """

    def __init__(self, handler: Any, limits: ServingLimits, admission: _Admission, uploads: _Uploads):
        self._handler, self._limits, self._admission, self._uploads = handler, limits, admission, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, body = Headers(scope=scope), _Body(receive, self._limits.request_bytes, self._uploads)
        request_id = headers.get(_REQUEST_ID, "")
        if not 0 < len(request_id) <= _MAX_REQUEST_ID_LENGTH:
            request_id = str(uuid.uuid4())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_REQUEST_ID.encode(), request_id.encode("latin-1"))]
            # A client that reads nothing would keep its place for ever.
            await asyncio.wait_for(send(message), SEND_TIMEOUT)

        try:
            content = await body.read_json(headers.get("content-type", ""))
            with self._admission:
                await _until_client_leaves(receive, self._answer(content, request_id, scope, send_with_id))
        except ClientDisconnect:
            pass
        except RequestError as error:
            if error.status != 408:  # who sends nothing would be waited for again
                await body.discard()
            await error_response(error)(scope, receive, send_with_id)

    async def _answer(self, content: dict[str, Any], request_id: str, scope: Scope, send: Send) -> None:
        has_begun = False

        async def respond(response: Response) -> None:
            nonlocal has_begun
            has_begun = True
            await response(scope, _receive_nothing, send)

        try:
            await self._handler.handle_request(content, request_id, respond)
        except asyncio.TimeoutError:
            logger.warning(f"The client of request {request_id} does not read its answer.")
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception(f"Request {request_id} failed.")
            if not has_begun:
                await respond(error_response(error))


async def _receive_nothing() -> Message:
    """Wait for ever: `_until_client_leaves` listens already."""
    return await asyncio.get_running_loop().create_future()


async def _until_client_leaves(receive: Receive, work: Any) -> None:
    """Run a coroutine; cancel it when the client closes the connection."""

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = {asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("Answering failed.", exc_info=result)


class _Body:
    """The body of a request, read within limits."""

    def __init__(self, receive: Receive, most: int, uploads: _Uploads):
        self._receive, self._most, self._uploads = receive, most, uploads
        self._size, self._held, self._is_complete = 0, 0, False

    async def read_json(self, content_type: str) -> dict[str, Any]:
        """Read a JSON object."""
        # A web page that the user happens to visit can send other types to a local server without asking it first.
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
            if task is not None and getattr(task, "cancelling", lambda: 0)():  # the server ends
                raise
            raise RequestError(
                "The server reads too many requests already. Try again later.", code="overloaded", status=429
            ) from None

    async def discard(self) -> None:
        """Read on without keeping anything: clients that still send do not see an answer."""
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
    """Parse JSON that is checked before: the parser takes seconds for millions of values, and stops all threads."""
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
                raise RequestError(f"The body must be nested at most {MAX_JSON_DEPTH} times.", code="invalid_json")
    body = json.loads(data.decode(), object_pairs_hook=_as_dict, parse_constant=_refuse_constant)
    if b"\\u" in data:  # alone, halves of surrogate pairs are no text: nothing can encode them
        json.dumps(body, ensure_ascii=False).encode()
    return body


def _as_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a key twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class _Gate:
    """Lets through who may ask: by the host that they ask for, and by their key.

    A web page whose name suddenly points to this machine (DNS rebinding) reaches a local server as if it were its
    own; its requests still have its name in them.
    """

    def __init__(self, app: ASGIApp, hosts: "AllowedHosts", api_keys: Sequence[str]):
        self._app, self._hosts = app, hosts
        self._keys = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: JSONResponse | None = None
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not self._hosts.allow(headers.getlist("host")):
                named = headers.get("host", "")[:200]
                message = (
                    f"The header Host must name this server, got {named!r}. Its operator can add --allowed-hosts."
                )
                error = JSONResponse(error_body(message, 403, code="host_not_allowed"), 403)
            elif self._keys and scope["path"] != "/health" and not self._has_key(headers):
                message = "The header Authorization must be 'Bearer' and a key of this server."
                error = JSONResponse(
                    error_body(message, 401, code="invalid_api_key"), 401, {"WWW-Authenticate": "Bearer"}
                )
        await (error or self._app)(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All of them, so that the time tells nothing.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class AllowedHosts:
    """Which names of this server requests may use.

    Args:
        bound (`str`): Address that the server listens at.
        more (`Sequence[str]`): Further names, also several separated by commas; `"*"`: all.

    Raises:
        ValueError: If one of them is not a name.
    """

    def __init__(self, bound: str, more: Sequence[str] = ()):
        names = [name.strip().lower().rstrip(".") for entry in more for name in entry.split(",")]
        for name in names:
            if name != "*" and (_host_name(name) != name.strip("[]") or not name):
                raise ValueError(f"`allowed_hosts` must hold host names without ports, or '*', got {name!r}.")
        self._allows_all = "*" in names
        self._names = {*_LOCAL_NAMES, bound.lower(), *(name.strip("[]") for name in names)}
        # Listening at all addresses, the server has all of them, and the name of its machine. An address is no name
        # that somebody else can point here.
        self._allows_addresses = bound in ("0.0.0.0", "::", "")
        if self._allows_addresses:
            self._names |= {socket.gethostname().lower()}

    def allow(self, headers: Sequence[str]) -> bool:
        """Tell whether a request names this server.

        Args:
            headers (`Sequence[str]`): Its headers `Host`; browsers always send one.

        Returns:
            `bool`: Whether it is allowed.
        """
        if self._allows_all or not headers:
            return True
        name = _host_name(headers[0].lower())
        if len(headers) > 1 or name is None:
            return False
        return name in self._names or (self._allows_addresses and _is_address(name))


def _host_name(host: str) -> str | None:
    """Take the port off a header `Host`."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::\d*)?", host)
    return None if match is None else (match[1] or match[2]).rstrip(".")


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def build_app(
    handlers: Mapping[str, Any],
    served: ServedModel,
    limits: ServingLimits,
    enable_cors: bool,
    hosts: AllowedHosts,
    api_keys: Sequence[str] = (),
) -> Starlette:
    """Make the application.

    Only what a client of one model needs is there: transformers' endpoints that load, list and unload models of the
    operator's machine are not.

    Args:
        handlers (`Mapping`): For each path the handler that answers it.
        served ([`ServedModel`]): The model.
        limits ([`ServingLimits`]): What a request may cost.
        enable_cors (`bool`): Whether web pages of all origins may send requests.
        hosts ([`AllowedHosts`]): Which names of this server requests may use.
        api_keys (`Sequence[str]`, *optional*): Keys of which requests must have one; without any, all may ask.

    Returns:
        `Starlette`: The application.
    """
    model_name = served.name
    entry = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "mgllava",
        "max_model_len": served.context_length,
    }

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [entry]})

    async def get_model(request: Request) -> JSONResponse:
        if request.path_params["name"] != model_name:
            message = f"There is no such model here, but {model_name!r}."
            return error_response(RequestError(message, "model", "model_not_found", 404))
        return JSONResponse(entry)

    async def health(request: Request) -> JSONResponse:
        if served.health.failure is not None:
            return JSONResponse({"status": "failed", "reason": served.health.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        logger.warning(f"Serving {model_name}.")
        yield

    admission = _Admission(limits.concurrent_requests)
    uploads = _Uploads(limits.concurrent_requests * limits.request_bytes)
    routes = [
        Route(path, _GenerationEndpoint(handler, limits, admission, uploads), methods=["POST"])
        for path, handler in handlers.items()
    ]
    routes += [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", get_model),
        Route("/health", health),
    ]
    # No credentials, unlike transformers: there are none, and with them browsers would send cookies of this host.
    cors = Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=routes,
        # The gate is within: preflight requests of browsers have no key, and errors need the headers too.
        middleware=[*([cors] if enable_cors else []), Middleware(_Gate, hosts=hosts, api_keys=api_keys)],
        exception_handlers={HTTPException: on_error, Exception: on_error},
        lifespan=lifespan,
    )
