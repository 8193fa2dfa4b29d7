"""Errors in the form that clients of OpenAI's API expect."""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mgllava.errors import MGLlavaError


class RequestError(MGLlavaError):
    """A request that cannot be answered; `param` is a field such as `messages[0].content[1].boxes`."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.headers = message, param, code, status, headers


def as_request_error(error: Exception) -> RequestError:
    """Return an error for the client; details of an unexpected one go only to the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):  # Starlette raises them for unknown paths and methods
        return RequestError(str(error.detail), status=error.status_code, headers=error.headers)
    return RequestError("The server failed on this request; its log says why.", status=500)


def error_body(error: Exception) -> dict[str, Any]:
    """Return the JSON of an error."""
    known = as_request_error(error)
    kind = "invalid_request_error"
    if known.status >= 500:
        kind = "server_error"
    elif known.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": known.message, "type": kind, "param": known.param, "code": known.code}}


def error_response(error: Exception) -> JSONResponse:
    """Return the HTTP response to an error."""
    known = as_request_error(error)
    return JSONResponse(error_body(known), known.status, known.headers)


__all__ = ["RequestError", "error_body", "error_response"]
