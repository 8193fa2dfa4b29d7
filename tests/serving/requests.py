"""Requests to an application in this process, without a server."""

import asyncio
import json


async def call(app, path, body=b"{}", method="POST", **headers):
    """Send one request; `body` is bytes or an async generator of pieces."""
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
