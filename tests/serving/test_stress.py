"""A thousand mixed requests from 16 threads, 30 % of them invalid: the same answers, constant memory, no crash."""

import functools
import http.client
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import Server
from tests.serving.requests import image, post

REQUESTS, THREADS, ROUND = 1000, 16, 100
TOLERANCE = 10e6  # bytes; the pixels of one image are 7 MB

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def busy_server(served_repository, site, tmp_path_factory):
    options = "--served-model-name", "small", "--allowed-image-hosts", f"localhost:{site.port}"
    server = Server(served_repository, tmp_path_factory.mktemp("stress") / "log.txt", *options)
    server.wait()
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


def chat(*content, **options):
    messages = [{"role": "user", "content": list(content)}]
    return "/v1/chat/completions", {"max_tokens": 6, "temperature": 0, "messages": messages, **options}


def good_requests(data_url, site):
    text, boxes = {"type": "text", "text": "What?"}, [[10, 20, 110, 70], [5, 5, 60, 90]]
    return [
        chat(text),
        chat(text, temperature=1.5, seed=7, max_tokens=12),
        chat(text, temperature=1.5, seed=8, top_k=50, min_p=0.01, presence_penalty=1),
        chat(text, stream=True, max_tokens=10),
        chat(image(data_url, boxes=boxes), text),
        chat(image(data_url), text),
        chat(image(f"{site.url}/picture.png"), text),
        chat(image(data_url, boxes=[]), image(data_url, boxes=boxes[:1]), text, stream=True),
        chat({"type": "text", "text": "</s><image> " * 20}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 5, "temperature": 2, "seed": 1}),
        ("/v1/completions", {"prompt": ["Hello", "What"], "max_tokens": 5, "seed": 3, "temperature": 1}),
    ]


def bad_requests(data_url):
    broken = data_url[: len(data_url) // 2]
    return [
        chat(temperature=1e-40),
        chat({"type": "text", "text": 3}),
        chat(image(broken)),
        chat(image("http://127.0.0.1:1/")),
        chat(image(data_url, boxes=[[1, 2, 3]])),
        chat({"type": "text", "text": "a"}, logit_bias={"5": 1e308}),
        chat({"type": "text", "text": "word " * 9000}),
        ("/v1/responses", {"input": [[]]}),
        ("/v1/completions", {"prompt": {}}),
    ]


def leave(server, _):
    """Disconnect in the middle of an answer."""
    path, body = chat({"type": "text", "text": "Tell"}, stream=True, max_tokens=500)
    connection = http.client.HTTPConnection("localhost", server.port, timeout=300)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(10)
    connection.close()


def content(status, body):
    """Return the part of an answer that does not depend on its time and id."""
    if status != 200:
        return status, body["error"]["param"]
    if isinstance(body, str):
        assert body.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
        return status, "".join(pieces), events[-1]["usage"]
    return status, body["output"][0]["content"] if "output" in body else body["choices"], body["usage"]


def test_a_thousand_mixed_requests(busy_server, data_url, site):
    good, bad = good_requests(data_url, site), bad_requests(data_url)
    alone = {json.dumps(request): content(*post(busy_server, *request)) for request in [*good, *bad]}
    assert all(alone[json.dumps(request)][0] == 200 for request in good)
    assert all(400 <= alone[json.dumps(request)][0] < 500 for request in bad)

    chooser = random.Random(0)
    requests = [chooser.choice(bad if chooser.random() < 0.3 else good) for _ in range(REQUESTS)]

    def check(request):
        assert content(*post(busy_server, *request)) == alone[json.dumps(request)], request

    sizes = []
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, REQUESTS, ROUND):
            list(threads.map(check, requests[start : start + ROUND]))
            list(threads.map(functools.partial(leave, busy_server), range(ROUND // 10)))
            sizes.append(busy_server.memory.memory_info().rss)
    print("resident after each round:", *(f"{size / 1e6:.0f}" for size in sizes), "MB")
    # What threads have freed goes back to the system now and then, so single sizes differ by some 40 MB; a leak raises
    # all later ones.
    assert min(sizes[-4:]) - max(sizes[2:6]) < TOLERANCE
