"""Download images and videos from URLs that clients name, without giving them access to the operator's network.

A name is resolved once, all of its addresses are checked, and the connection goes to a checked address. So a name that
changes its address between check and connection gains nothing; redirects are checked in the same way.
"""

import asyncio
import functools
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from huggingface_hub.utils import httpx

from mgllava.errors import MGLlavaError

from .errors import RequestError
from .limits import MAX_LOOKUPS, ServingLimits

_MAX_REDIRECTS = 4
_STANDARD_PORTS = {"http": 80, "https": 443}
# IPv6 networks that embed IPv4 addresses, beyond those that `ipaddress` unwraps.
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _RefusedError(MGLlavaError):
    """A URL that must not be requested; its message follows the name of the field."""


@dataclass(frozen=True)
class ImageHosts:
    """Which hosts images may come from.

    Attributes:
        public: Whether all hosts with public addresses are allowed.
        listed: Hosts that are allowed regardless of their addresses, each with its port (`None`: 80 for http, 443 for
            https).
    """

    public: bool = True
    listed: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def parse(cls, text: str) -> "ImageHosts":
        """Read `"none"`, or a list of `public`, `host` and `host:port` separated by commas."""
        entries = [entry.strip().lower() for entry in text.split(",")]
        if entries == ["none"]:
            return cls(public=False)
        listed: set[tuple[str, int | None]] = set()
        for entry in entries:
            try:
                url = httpx.URL(f"//{entry}")
                is_host = bool(url.raw_host) and url.raw_path in (b"", b"/") and not url.userinfo and "*" not in entry
            except (httpx.InvalidURL, ValueError):
                is_host = False
            if not is_host or entry == "none":
                raise ValueError(
                    "`allowed_image_hosts` must be 'none', or a list of 'public', 'host' and 'host:port' separated by "
                    f"commas, got {entry!r} in {text!r}."
                )
            if entry != "public":
                listed.add((url.raw_host.decode("ascii"), url.port))
        return cls("public" in entries, frozenset(listed))

    def lists(self, url: httpx.URL) -> bool:
        """Tell whether the operator listed the host and port of an http(s) URL."""
        standard = _STANDARD_PORTS[url.scheme]
        port = url.port or standard
        host = url.raw_host.decode("ascii")
        return (host, port) in self.listed or (port == standard and (host, None) in self.listed)


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet.

    Private, loopback, link-local, multicast, reserved and unspecified addresses do not, nor do IPv6 addresses that
    embed such an IPv4 address or have a zone.
    """
    try:
        parsed: _Address = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id is not None:
            return False
        embedded = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if any(parsed in network for network in _NAT64):
            embedded.append(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
        if any(ipv4 is not None for ipv4 in embedded):
            return all(is_public(str(ipv4)) for ipv4 in embedded if ipv4 is not None)
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)


class _Lookups:
    """Resolves names in its own threads, as the system's resolver can take half a minute and cannot be interrupted.

    The threads of asyncio stay free for other work. While all lookup threads are busy, further names wait until their
    downloads time out.
    """

    def __init__(self, most: int):
        self._room = asyncio.Semaphore(most)

    async def resolve(self, host: str, port: int) -> list[str]:
        """List the addresses of a host."""
        await self._room.acquire()  # released by the thread, even if the caller was cancelled
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[str]] = loop.create_future()

        def finish(addresses: list[str], error: Exception | None) -> None:
            self._room.release()
            if not result.done():
                result.set_result(addresses) if error is None else result.set_exception(error)

        def look_up() -> None:
            addresses, failure = [], None
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
            except Exception as error:
                failure = error
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(finish, addresses, failure)

        # A daemon, so that the server can end without it.
        threading.Thread(target=look_up, name="lookup", daemon=True).start()
        return await result


_lookups = _Lookups(MAX_LOOKUPS)


class _CheckedTransport(httpx.AsyncBaseTransport):
    """Resolves and checks hosts, and connects to checked addresses; httpx also sends redirects through here."""

    def __init__(self, hosts: ImageHosts):
        self._hosts = hosts
        self._transport = httpx.AsyncHTTPTransport(verify=_ssl_context())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in _STANDARD_PORTS or not url.raw_host:
            raise _RefusedError("must be an http or https URL.")
        if url.userinfo:
            raise _RefusedError("must not hold a user name or password.")
        failure: Exception = httpx.ConnectError("no address")
        for address in await self._addresses(url):
            # The Host header and the certificate remain those of the name.
            pinned = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.raw_host.decode("ascii")},
            )
            try:
                return await self._transport.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _addresses(self, url: httpx.URL) -> Iterable[str]:
        listed = self._hosts.lists(url)
        if not (listed or self._hosts.public):
            raise _RefusedError(f"must be at a host from which this server downloads images, got {url.host[:200]!r}.")
        try:
            addresses = await _lookups.resolve(url.raw_host.decode("ascii"), url.port or _STANDARD_PORTS[url.scheme])
        except (OSError, UnicodeError):
            raise _RefusedError(f"must be at a known host, got {url.host[:200]!r}.") from None
        if not (listed or all(is_public(address) for address in addresses)):
            raise _RefusedError(f"must be at a public address, which {url.host[:200]!r} is not.")
        return addresses

    async def aclose(self) -> None:
        await self._transport.aclose()


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class DownloadRoom:
    """Counts the bytes of all images and videos of a request, up to a limit."""

    def __init__(self, most: int):
        self._most = self._left = most

    def take(self, size: int) -> None:
        """Count bytes; raise a `RequestError` if they are too many."""
        self._left -= size
        if self._left < 0:
            raise RequestError(
                f"The images and videos of a request must have at most {self._most:,} bytes together, got more.",
                code="image_too_large",
            )


async def download_image(url: str, param: str, hosts: ImageHosts, limits: ServingLimits, room: DownloadRoom) -> bytes:
    """Return the bytes that a host sends for an http(s) URL; `param` is the field of the request that held it."""
    return await _download_in_time(url, param, hosts, "image", limits.image_bytes, limits.image_timeout, room)


async def download_video(url: str, param: str, hosts: ImageHosts, limits: ServingLimits, room: DownloadRoom) -> bytes:
    """Return the bytes of a video in the same way."""
    return await _download_in_time(url, param, hosts, "video", limits.video_bytes, limits.video_timeout, room)


async def _download_in_time(
    url: str, param: str, hosts: ImageHosts, kind: str, most: int, timeout: float, room: DownloadRoom
) -> bytes:
    try:
        return await asyncio.wait_for(_download(url, hosts, kind, most, timeout, room), timeout)
    except _RefusedError as error:
        message = f"`{param}` {error} Send the {kind} itself as a data URL."
    except (asyncio.TimeoutError, httpx.TimeoutException):
        message = f"`{param}` must be downloaded within {timeout:g} seconds, which it was not."
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        message = f"`{param}` could not be downloaded: {error or type(error).__name__}."
    raise RequestError(message, param, f"invalid_{kind}_url")


async def _download(url: str, hosts: ImageHosts, kind: str, most: int, timeout: float, room: DownloadRoom) -> bytes:
    # A new client for each image: cookies must not pass from one request to another. `trust_env=False`: a proxy of the
    # environment would resolve names itself.
    client = httpx.AsyncClient(
        transport=_CheckedTransport(hosts),
        trust_env=False,
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=timeout,
        headers={"User-Agent": "mgllava-serve", "Accept": f"{kind}/*", "Accept-Encoding": "identity"},
    )
    async with client, client.stream("GET", url) as response:
        if response.status_code != 200:
            article = "an" if kind == "image" else "a"
            raise _RefusedError(f"must be {article} {kind}, but its host answered with status {response.status_code}.")
        if response.headers.get("Content-Encoding", "identity") != "identity":  # could unpack to any size
            raise _RefusedError("must be sent uncompressed, which its host does not do.")
        data = bytearray()
        announced = response.headers.get("Content-Length", "0")
        too_large = announced.isdecimal() and int(announced) > most
        if not too_large:
            async for chunk in response.aiter_raw():
                room.take(len(chunk))
                data += chunk
                if too_large := len(data) > most:
                    break
        if too_large:
            raise _RefusedError(f"must have at most {most:,} bytes (`--max-{kind}-bytes`), got more.")
    return bytes(data)


__all__ = ["DownloadRoom", "ImageHosts", "download_image", "download_video", "is_public"]
