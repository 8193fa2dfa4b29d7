"""Requests and their parts, for a running server or for an application in this process."""

import asyncio
import base64
import http.client
import io
import json


def text(string="What is it?"):
    return {"type": "text", "text": string}


def image(url, **extra):
    return {"type": "image_url", "image_url": {"url": url}, **extra}


def user(*content):
    return {"role": "user", "content": list(content) if len(content) > 1 else content[0]}


def as_data_url(picture):
    """Encode a PIL image, or the bytes of a file."""
    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def post(server, path, body, **headers):
    """Send a request to a running server; `body` is bytes, or an object for JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("localhost", server.port, timeout=300)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(text) if is_json else text
    finally:
        connection.close()


async def call(app, path, body=b"{}", method="POST", **headers):
    """Send one request to an application; `body` is bytes or an async generator of pieces."""
    headers = {"host": "localhost", "content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    sent, is_read = [], False

    async def receive():
        nonlocal is_read
        if isinstance(body, bytes):
            if is_read:
                await asyncio.Event().wait()
            is_read = True
            return {"type": "http.request", "body": body}
        try:
            return {"type": "http.request", "body": await anext(body), "more_body": True}
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"}"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
