"""The application without a model: keys, hosts, health, and bodies that arrive slowly."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace

import pytest
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from mgllava.serving import bodies
from mgllava.serving.app import build_app
from mgllava.serving.gate import AllowedHosts
from mgllava.serving.limits import ServingLimits
from tests.serving.requests import call


class Handler:
    async def handle_request(self, body, request_id, respond):
        await respond(JSONResponse({"got": len(json.dumps(body))}))


def make_app(api_keys=(), failure=None, enable_cors=True, **limits):
    served = SimpleNamespace(name="small", context_length=64, health=SimpleNamespace(failure=failure))
    limits = ServingLimits(**limits)
    return build_app({"/v1/x": Handler()}, served, limits, enable_cors, AllowedHosts("localhost"), api_keys)


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


def test_what_is_refused_at_the_gate():
    client = TestClient(make_app(["a key"]), base_url="http://localhost:8000")
    refused = client.get("/v1/models")
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/models", headers={"Authorization": "Bearer  a key "}).status_code == 200
    other = client.get("/health", headers={"Host": "x" * 300})
    error = other.json()["error"]
    assert (other.status_code, error["code"], error["param"]) == (403, "host_not_allowed", None)
    assert "x" * 200 in error["message"] and "x" * 201 not in error["message"]


def test_health_reports_a_failed_device():
    status, body = asyncio.run(call(make_app(failure="The device cuda:0 has failed."), "/health", method="GET"))
    assert status == 503 and body == {"status": "failed", "reason": "The device cuda:0 has failed."}
    assert asyncio.run(call(make_app(), "/health", method="GET")) == (200, {"status": "ok"})


def test_models():
    """In OpenAI's form, with the length of the context as in vLLM."""
    client = TestClient(make_app(), base_url="http://localhost")
    before = int(time.time())
    listed = client.get("/v1/models").json()
    (entry,) = listed["data"]
    created = entry.pop("created")
    assert listed["object"] == "list" and before - 60 <= created <= time.time()
    assert entry == {"id": "small", "object": "model", "owned_by": "mgllava", "max_model_len": 64}
    assert client.get("/v1/models/small").json() == {**entry, "created": created}
    error = client.get("/v1/models/owner/other")
    assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
    assert error.json()["error"]["param"] == "model" and "'small'" in error.json()["error"]["message"]


def test_unknown_paths_and_methods_are_errors_in_json():
    client = TestClient(make_app(), base_url="http://localhost")
    for method, path, status in (("GET", "/", 404), ("GET", "/v1/x", 405), ("POST", "/health", 405)):
        answer = client.request(method, path)
        error = answer.json()["error"]
        assert answer.status_code == status and (error["type"], error["code"]) == ("invalid_request_error", None)
    assert "GET" in client.post("/health").headers["Allow"]


@pytest.mark.parametrize("enable_cors", [True, False])
def test_web_pages_of_other_origins(enable_cors):
    """A browser asks first, without a key; refusals can be read too."""
    client = TestClient(make_app(["a key"], enable_cors=enable_cors), base_url="http://localhost")
    origin = {"Origin": "http://page.test"}
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = client.options("/v1/x", headers=asked)
    assert preflight.status_code == (200 if enable_cors else 401)
    refused = client.post("/v1/x", headers=origin)
    for answer in (preflight, refused):
        assert answer.headers.get("Access-Control-Allow-Origin") == ("*" if enable_cors else None)
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("given", ["mine", "x" * 128, "x" * 129, ""])
def test_answers_have_the_id_of_the_request_or_a_new_one(given):
    client = TestClient(make_app(), base_url="http://localhost")
    found = client.post("/v1/x", json={}, headers={"X-Request-ID": given} if given else {}).headers["X-Request-ID"]
    assert found == given if 0 < len(given) <= 128 else len(found) == 36 and found != given
    assert client.post("/v1/x", json=[], headers={"X-Request-ID": "mine"}).headers["X-Request-ID"] == "mine"


@pytest.mark.parametrize("has_begun", [False, True])
def test_unexpected_failures_are_logged_and_say_nothing_more(has_begun, caplog, monkeypatch):
    async def fail(self, body, request_id, respond):
        if has_begun:
            await respond(JSONResponse({"begun": True}))
        raise KeyError("a secret")

    monkeypatch.setattr(Handler, "handle_request", fail)
    answer = TestClient(make_app(), base_url="http://localhost").post("/v1/x", json={})
    assert "a secret" in caplog.text and "a secret" not in answer.text
    if has_begun:
        assert answer.json() == {"begun": True}
    else:
        error = answer.json()["error"]
        assert answer.status_code == 500 and (error["type"], error["code"]) == ("server_error", None)


def test_only_so_many_requests_are_answered_at_a_time():
    app = make_app(concurrent_requests=1)

    async def run():
        go_on = asyncio.Event()

        async def wait(self, body, request_id, respond):
            await go_on.wait()
            await respond(JSONResponse({}))

        Handler.handle_request, before = wait, Handler.handle_request
        try:
            first = asyncio.ensure_future(call(app, "/v1/x"))
            await asyncio.sleep(0.05)
            status, body = await call(app, "/v1/x")
            go_on.set()
            assert (await first)[0] == (await call(app, "/v1/x"))[0] == 200
        finally:
            Handler.handle_request = before
        assert status == 429 and body["error"]["code"] == "overloaded", body
        assert body["error"]["type"] == "rate_limit_error"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{}", 200, None),
        (b'{"a": "%s"}' % (b"x" * 992), 413, "request_too_large"),
        (b'{"a": "%s"}' % (b"x" * 991), 200, None),
        (b"[" * 50 + b"]" * 50, 400, None),  # it may be nested so, but must be an object
        (b"[" * 51 + b"]" * 51, 400, "invalid_json"),
        (b'{"a": "' + b"[" * 99 + b'"}', 200, None),
        (b'{"a": "\\"' + b"[" * 99 + b'"}', 200, None),
        (b'{"a": "\\\\", "b": ' + b"[" * 50 + b"]" * 50 + b"}", 400, "invalid_json"),
        *(
            (text, 400, "invalid_json")
            for text in (b"", b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": -Infinity}')
        ),
        *((text, 400, "invalid_json") for text in (b'{"a": "\\ud800"}', b"\xff", b'{"a": 1} 2')),
        (b'{"a": "\\ud83d\\ude42"}', 200, None),
        *((text, 400, None) for text in (b"[]", b"3", b"null", b'"a"')),
    ],
)
def test_bodies_are_json_objects_within_limits(body, status, code):
    answer = TestClient(make_app(request_bytes=1000), base_url="http://localhost").post(
        "/v1/x", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("MAX_JSON_VALUES", b'{"a": [%s1]}'),
        ("MAX_JSON_VALUES", b'{"a": [%s{}]}'),
        ("MAX_JSON_ESCAPES", b'{"a": "%s"}'),
    ],
)
def test_values_and_escapes_are_counted_before_they_are_parsed(monkeypatch, name, body):
    monkeypatch.setattr(bodies, name, 20)
    client = TestClient(make_app(), base_url="http://localhost")

    def status(number):
        piece = b"\\n" if name == "MAX_JSON_ESCAPES" else b"1,"
        content = body % (piece * number)
        return client.post("/v1/x", content=content, headers={"Content-Type": "application/json"}).status_code

    marks = body.count(b"{") + body.count(b"[") if name == "MAX_JSON_VALUES" else 0
    assert (status(20 - marks), status(21 - marks)) == (200, 413)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_types_of_bodies_are_refused(kind):
    """Any web page can send them to a local server without a preflight request."""
    client = TestClient(make_app(), base_url="http://localhost")
    assert client.post("/v1/x", content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert client.post("/v1/x", content=b"{}", headers={"Content-Type": " Application/JSON ;x"}).status_code == 200


@pytest.mark.parametrize(
    "bound, more, allowed, refused",
    [
        ("localhost", (), ["localhost:1", "127.0.0.1", "[::1]:80"], ["a.test", "10.0.0.1"]),
        ("localhost", (), [], ["", "[::1", "localhost:1:2"]),
        ("10.0.0.1", (), ["10.0.0.1", "localhost"], ["10.0.0.2", "a.test"]),
        ("0.0.0.0", (), ["10.0.0.1:80", "[fe80::1]", "localhost"], ["a.test", "10.0.0.1.a.test"]),
        ("localhost", ("A.test, d.test", "b.test."), ["a.test:80", "B.TEST", "d.test"], ["c.test", "x.a.test"]),
        ("localhost", ("*",), ["a.test", "anything at all"], []),
        ("localhost", ("a.test,*",), ["b.test"], []),
        ("localhost", ("[fd00::1]", "a.test."), ["[fd00::1]:80", "a.test.", "A.Test.:80"], ["[fd00::2]", "fd00::1"]),
        ("Box.Local", (), ["box.local:80", "BOX.LOCAL"], ["local", "10.0.0.1"]),
        *[
            (every, (), ["10.0.0.1", "[fe80::1]:80", socket.gethostname()], ["a.test", "10.0.0", "[fe80::1"])
            for every in ("", "::", "0.0.0.0")
        ],
    ],
)
def test_allowed_hosts(bound, more, allowed, refused):
    hosts = AllowedHosts(bound, more)
    assert all(hosts.allow([name]) for name in allowed) and not any(hosts.allow([name]) for name in refused)
    assert hosts.allow([]) and ("*" in "".join(more) or not hosts.allow(["localhost", "a.test"]))


@pytest.mark.parametrize("name", ["", "a.test:80", "http://a.test", "a b", "a.test,", "[::1]:80", "."])
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
