"""The HTTP application: reading requests, answering them, and noticing who left."""

import asyncio
import json
import time
import uuid
from collections.abc import Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from transformers.utils import logging

from mgllava.serving.errors import RequestError, error_response
from mgllava.serving.limits import BODY_TIMEOUT, ServingLimits

logger = logging.get_logger(__name__)

_REQUEST_ID = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 128
# Of a request that is too large, this many times the limit is read before the connection is closed.
_MOST_DISCARDED = 4


class _Admission:
    """Counts the requests that are being answered, over all endpoints."""

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


class _GenerationEndpoint:
    """ASGI application of one handler.

    Not a function of a framework: reading the request within limits, and stopping all work as soon as the client has
    left, while it waits as well as while it streams, need the connection itself.
    """

    def __init__(self, handler: Any, limits: ServingLimits, admission: _Admission):
        self._handler, self._limits, self._admission = handler, limits, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, body = Headers(scope=scope), _Body(receive, self._limits.request_bytes)
        request_id = headers.get(_REQUEST_ID, "")
        if not 0 < len(request_id) <= _MAX_REQUEST_ID_LENGTH:
            request_id = str(uuid.uuid4())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_REQUEST_ID.encode(), request_id.encode("latin-1"))]
            await send(message)

        try:
            with self._admission:
                content = await body.read_json(headers.get("content-type", ""))
                await _until_client_leaves(receive, self._answer(content, request_id, scope, send_with_id))
        except ClientDisconnect:
            pass
        except RequestError as error:
            await body.discard()
            await error_response(error)(scope, receive, send_with_id)

    async def _answer(self, content: dict[str, Any], request_id: str, scope: Scope, send: Send) -> None:
        try:
            response = await self._handler.handle_request(content, request_id)
        except (RequestError, HTTPException) as error:
            response = error_response(error)
        except Exception as error:
            logger.exception(f"Request {request_id} failed.")
            response = error_response(error)
        await response(scope, _receive_nothing, send)


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

    def __init__(self, receive: Receive, most: int):
        self._receive, self._most = receive, most
        self._size, self._is_complete = 0, False

    async def read_json(self, content_type: str) -> dict[str, Any]:
        """Read a JSON object."""
        # A web page that the user happens to visit can send other types to a local server without asking it first.
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise RequestError("The header Content-Type must be application/json.", status=415)
        try:
            data = await asyncio.wait_for(self._read(), BODY_TIMEOUT)
        except asyncio.TimeoutError:
            raise RequestError(f"A request must arrive within {BODY_TIMEOUT:g} seconds.", status=408) from None
        try:
            body = await asyncio.to_thread(json.loads, data)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The body must be JSON: {error}.", code="invalid_json") from None
        if not isinstance(body, dict):
            raise RequestError(f"The body must be a JSON object, got {type(body).__name__}.")
        return body

    async def discard(self) -> None:
        """Read on without keeping anything: clients that still send do not see an answer."""
        with suppress(asyncio.TimeoutError, ClientDisconnect):
            await asyncio.wait_for(self._discard(), BODY_TIMEOUT)

    async def _read(self) -> bytes:
        data = bytearray()
        while not self._is_complete:
            data += await self._receive_chunk()
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


def build_app(handlers: Mapping[str, Any], model_name: str, limits: ServingLimits, enable_cors: bool) -> Starlette:
    """Make the application.

    Only what a client of one model needs is there: transformers' endpoints that load, list and unload models of the
    operator's machine are not.

    Args:
        handlers (`Mapping`): For each path the handler that answers it.
        model_name (`str`): How clients call the model.
        limits ([`ServingLimits`]): What a request may cost.
        enable_cors (`bool`): Whether web pages of all origins may send requests.

    Returns:
        `Starlette`: The application.
    """
    entry = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "mgllava"}

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [entry]})

    async def get_model(request: Request) -> JSONResponse:
        if request.path_params["name"] != model_name:
            message = f"There is no such model here, but {model_name!r}."
            return error_response(RequestError(message, "model", "model_not_found", 404))
        return JSONResponse(entry)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        logger.warning(f"Serving {model_name}.")
        yield

    admission = _Admission(limits.concurrent_requests)
    routes = [
        Route(path, _GenerationEndpoint(handler, limits, admission), methods=["POST"])
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
        middleware=[cors] if enable_cors else [],
        exception_handlers={HTTPException: on_error, Exception: on_error},
        lifespan=lifespan,
    )
