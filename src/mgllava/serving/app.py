"""The HTTP application: reads requests, answers them, and stops work when a client disconnects."""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from transformers.utils import logging

from .bodies import Body, Uploads
from .errors import RequestError, error_response
from .gate import AllowedHosts, Gate
from .handlers import ServedModel
from .limits import SEND_TIMEOUT, ServingLimits

logger = logging.get_logger(__name__)

_REQUEST_ID = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 128


class _Admission:
    """Limits how many requests of all endpoints are being answered; requests that are still arriving do not count."""

    def __init__(self, most: int):
        self._most, self._count = most, 0

    def __enter__(self) -> None:
        if self._count >= self._most:
            raise RequestError(
                f"The server already has {self._most} requests. Try again later.", code="overloaded", status=429
            )
        self._count += 1

    def __exit__(self, *exc_info: object) -> None:
        self._count -= 1


class _GenerationEndpoint:
    """ASGI application of one handler.

    It is not an endpoint function of Starlette, because it needs the connection itself: to read the request within
    limits, and to stop all work as soon as the client disconnects, while the request waits or its answer streams.
    """

    def __init__(self, handler: Any, limits: ServingLimits, admission: _Admission, uploads: Uploads):
        self._handler, self._limits, self._admission, self._uploads = handler, limits, admission, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, body = Headers(scope=scope), Body(receive, self._limits.request_bytes, self._uploads)
        request_id = headers.get(_REQUEST_ID, "")
        if not 0 < len(request_id) <= _MAX_REQUEST_ID_LENGTH:
            request_id = str(uuid.uuid4())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_REQUEST_ID.encode(), request_id.encode("latin-1"))]
            # Without a limit, a client that does not read its answer would keep its place forever.
            await asyncio.wait_for(send(message), SEND_TIMEOUT)

        try:
            content = await body.read_json(headers.get("content-type", ""))
            with self._admission:
                await _until_disconnect(receive, self._answer(content, request_id, scope, send_with_id))
        except ClientDisconnect:
            pass
        except RequestError as error:
            if error.status != 408:  # with 408 the client has stopped sending already
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
    """Wait forever: `_until_disconnect` already listens."""
    return await asyncio.get_running_loop().create_future()


async def _until_disconnect(receive: Receive, work: Any) -> None:
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


def build_app(
    handlers: Mapping[str, Any],
    served: ServedModel,
    limits: ServingLimits,
    enable_cors: bool,
    hosts: AllowedHosts,
    api_keys: Sequence[str] = (),
) -> Starlette:
    """Return the application that answers each path with its handler.

    It has only the endpoints that clients of one model need, not those of `transformers serve` that load, list and
    unload models on the operator's machine.
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
            message = f"There is no such model. This server has the model {model_name!r}."
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
    uploads = Uploads(limits.concurrent_requests * limits.request_bytes)
    routes = [
        Route(path, _GenerationEndpoint(handler, limits, admission, uploads), methods=["POST"])
        for path, handler in handlers.items()
    ]
    routes += [Route("/v1/models", list_models), Route("/v1/models/{name:path}", get_model), Route("/health", health)]
    # `allow_credentials` stays off, unlike in transformers: browsers would send the cookies of this host.
    cors = Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=routes,
        # The gate comes after CORS: preflight requests of browsers have no key, and its errors need CORS headers too.
        middleware=[*([cors] if enable_cors else []), Middleware(Gate, hosts=hosts, api_keys=api_keys)],
        exception_handlers={HTTPException: on_error, Exception: on_error},
        lifespan=lifespan,
    )


__all__ = ["build_app"]
