"""Errors in the form that clients of OpenAI's API expect."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mgllava.errors import MGLlavaError


class RequestError(MGLlavaError):
    """A request that cannot be answered.

    Args:
        message (`str`): What was expected, what came, and what to do.
        param (`str`, *optional*): The field of the request, as in `messages[0].content[1].boxes`.
        code (`str`, *optional*): A word for programs.
        status (`int`, *optional*, defaults to 400): HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Make the JSON of an error.

    Args:
        message (`str`): What went wrong.
        status (`int`): HTTP status; decides about the type of the error.
        param (`str`, *optional*): The field of the request.
        code (`str`, *optional*): A word for programs.

    Returns:
        `dict`: `{"error": {"message", "type", "param", "code"}}`.
    """
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """Answer with an error.

    Args:
        error (`Exception`): A [`RequestError`], an `HTTPException` (transformers raises them), or anything else, of
            which the client is told nothing.

    Returns:
        `JSONResponse`: The response.
    """
    if isinstance(error, RequestError):
        content = error_body(error.message, error.status, error.param, error.code)
        return JSONResponse(content, error.status)
    if isinstance(error, HTTPException):
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)
    return JSONResponse(error_body("The server failed on this request; its log says why.", 500), 500)
