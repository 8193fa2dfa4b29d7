"""The application without a model: keys, hosts, health, and bodies that arrive slowly."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from starlette.responses import JSONResponse

from mgllava.serving import bodies
from mgllava.serving.app import build_app
from mgllava.serving.gate import AllowedHosts
from mgllava.serving.limits import ServingLimits
from tests.serving.requests import call


class Handler:
    async def handle_request(self, body, request_id, respond):
        await respond(JSONResponse({"got": len(json.dumps(body))}))


def make_app(api_keys=(), failure=None, **limits):
    served = SimpleNamespace(name="small", context_length=64, health=SimpleNamespace(failure=failure))
    limits = ServingLimits(**limits)
    return build_app({"/v1/x": Handler()}, served, limits, True, AllowedHosts("localhost"), api_keys)


def test_key_is_needed_for_everything_but_health():
    app = make_app(["first key", "second"])

    async def run():
        for wrong in (None, "Bearer ", "Bearer third", "second"):
            headers = {} if wrong is None else {"authorization": wrong}
            for path, method in (("/v1/x", "POST"), ("/v1/models", "GET"), ("/nothing", "GET")):
                status, body = await call(app, path, method=method, **headers)
                assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert (await call(app, "/health", method="GET"))[0] == 200
        for right in ("Bearer second", "bearer first key"):
            assert (await call(app, "/v1/x", authorization=right))[0] == 200

    asyncio.run(run())


def test_health_reports_a_failed_device():
    status, body = asyncio.run(call(make_app(failure="The device cuda:0 has failed."), "/health", method="GET"))
    assert status == 503 and "cuda:0" in body["reason"]


@pytest.mark.parametrize(
    "bound, more, allowed, refused",
    [
        ("localhost", (), ["localhost:1", "127.0.0.1", "[::1]:80"], ["a.test", "10.0.0.1"]),
        ("localhost", (), [], ["", "[::1", "localhost:1:2"]),
        ("10.0.0.1", (), ["10.0.0.1", "localhost"], ["10.0.0.2", "a.test"]),
        ("0.0.0.0", (), ["10.0.0.1:80", "[fe80::1]", "localhost"], ["a.test", "10.0.0.1.a.test"]),
        ("localhost", ("A.test, d.test", "b.test."), ["a.test:80", "B.TEST", "d.test"], ["c.test", "x.a.test"]),
        ("localhost", ("*",), ["a.test", "anything at all"], []),
    ],
)
def test_allowed_hosts(bound, more, allowed, refused):
    hosts = AllowedHosts(bound, more)
    assert all(hosts.allow([name]) for name in allowed) and not any(hosts.allow([name]) for name in refused)
    assert hosts.allow([]) and (more == ("*",) or not hosts.allow(["localhost", "a.test"]))


@pytest.mark.parametrize("name", ["", "a.test:80", "http://a.test", "a b"])
def test_invalid_names_are_refused_at_the_start(name):
    with pytest.raises(ValueError, match="allowed_hosts"):
        AllowedHosts("localhost", [name])


def test_slow_bodies_time_out_and_the_slowest_is_refused_when_memory_is_short(monkeypatch):
    monkeypatch.setattr(bodies, "BODY_PAUSE", 0.2)
    app = make_app(request_bytes=1000, concurrent_requests=2)  # 2,000 bytes may arrive at a time

    async def endless():
        yield b"{" + b" " * 900
        await asyncio.Event().wait()

    async def run():
        status, body = await call(app, "/v1/x", endless())
        assert status == 408, body
        monkeypatch.setattr(bodies, "BODY_PAUSE", 30)
        slow = [asyncio.ensure_future(call(app, "/v1/x", endless())) for _ in range(2)]
        await asyncio.sleep(0.05)
        status, body = await asyncio.wait_for(call(app, "/v1/x", b"{" + b" " * 900 + b"}"), 20)
        assert status == 200, body
        done, waiting = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        assert slow[0] in done and slow[0].result()[0] == 429 and waiting == {slow[1]}
        slow[1].cancel()
        await asyncio.wait(slow)

    asyncio.run(run())
