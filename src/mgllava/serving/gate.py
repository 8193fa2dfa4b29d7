"""Access to the server: the host names by which requests may address it, and API keys."""

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import RequestError, error_response

_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}


class Gate:
    """Middleware that refuses requests for other hosts and requests without a key.

    A web page can change the address of its own name to that of this machine (DNS rebinding). Its requests then reach
    a local server, but their `Host` header still has the page's name.
    """

    def __init__(self, app: ASGIApp, hosts: "AllowedHosts", api_keys: Sequence[str]):
        self._app, self._hosts = app, hosts
        self._keys = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with an error, or pass it on."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        await (error_response(error) if error else self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        if not self._hosts.allow(headers.getlist("host")):
            message = (
                f"The header Host must name this server, got {headers.get('host', '')[:200]!r}. Its operator can add "
                "--allowed-hosts."
            )
            return RequestError(message, code="host_not_allowed", status=403)
        if self._keys and scope["path"] != "/health" and not self._has_key(headers):
            return RequestError(
                "The header Authorization must be 'Bearer' and a key of this server.",
                code="invalid_api_key",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All keys are compared, so that the time reveals nothing.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class AllowedHosts:
    """The names by which requests may address this server.

    `bound` is the address that the server listens at. The entries of `more` are further names, also several separated
    by commas, or `"*"` for all.
    """

    def __init__(self, bound: str, more: Sequence[str] = ()):
        names = [name.strip().lower().rstrip(".") for entry in more for name in entry.split(",")]
        for name in names:
            if name != "*" and (_host_name(name) != name.strip("[]") or not name):
                raise ValueError(f"`allowed_hosts` must hold host names without ports, or '*', got {name!r}.")
        self._allows_all = "*" in names
        self._names = {*_LOCAL_NAMES, bound.lower(), *(name.strip("[]") for name in names)}
        # A server that listens at all addresses may be addressed by any of them and by the name of its machine.
        # Unlike names, addresses cannot be changed by others to lead here.
        self._allows_addresses = bound in ("0.0.0.0", "::", "")
        if self._allows_addresses:
            self._names.add(socket.gethostname().lower())

    def allow(self, headers: Sequence[str]) -> bool:
        """Tell whether a request with these `Host` headers is allowed; browsers always send one."""
        if self._allows_all or not headers:
            return True
        name = _host_name(headers[0].lower())
        if len(headers) > 1 or name is None:
            return False
        return name in self._names or (self._allows_addresses and _is_address(name))


def _host_name(host: str) -> str | None:
    """Return a `Host` header without its port."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::\d*)?", host)
    return None if match is None else (match[1] or match[2]).rstrip(".")


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


__all__ = ["AllowedHosts", "Gate"]
