"""Two hundred requests of all kinds do not let the memory of the server grow."""

import gc

import openai
import pytest

from tests.serving.conftest import free_port

REQUESTS, ROUND = 200, 20
TOLERANCE = 16e6  # bytes; a leak of one small image (0.2 MB) or of the inputs (7 MB) per request would be far more


@pytest.mark.slow
def test_memory_does_not_grow(client, server, site, data_url):
    boxes = [[10, 20, 110, 70]]

    def one_round():
        for index in range(ROUND):
            kind = index % 5
            part = {"type": "image_url", "image_url": {"url": site.url + "/picture.png" if kind == 1 else data_url}}
            if kind == 2:
                part["boxes"] = boxes * (index + 1)
            content = [{"type": "text", "text": "What is it? " * (index + 1)}, *([part] if kind < 4 else [])]
            messages = [{"role": "user", "content": content}]
            stream = client.chat.completions.create(model="small", messages=messages, max_tokens=8, stream=True)
            if kind == 3:
                stream.close()  # leaves
            else:
                list(stream)
            with pytest.raises(openai.BadRequestError):
                part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{free_port()}/"}}
                client.chat.completions.create(model="small", messages=[{"role": "user", "content": [part]}])
        gc.collect()
        return server.memory.memory_info().rss

    warm = max(one_round() for _ in range(5))
    sizes = [one_round() for _ in range(REQUESTS // ROUND)]
    print(f"resident after warm-up {warm / 1e6:.1f} MB, then", *(f"{size / 1e6:.1f}" for size in sizes))
    assert sizes[-1] - warm < TOLERANCE, (warm, sizes)
