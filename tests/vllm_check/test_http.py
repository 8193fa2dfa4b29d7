"""`mgllava serve --engine vllm`, asked with OpenAI's client, gives the answers of `generate`."""

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm")

import openai

from .conftest import MODEL, ask, boxes_of, conversations, picture

pytestmark = pytest.mark.slow
START_SECONDS = 240


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_request(conversation):
    """Write a conversation as OpenAI's messages, with boxes next to images."""
    messages = []
    for message in conversation:
        parts = []
        for block in message["content"]:
            if block["type"] == "image":
                part = {"type": "image_url", "image_url": {"url": data_url(block["image"])}}
                parts.append({**part, "boxes": block["boxes"]} if "boxes" in block else part)
            else:
                parts.append(block)
        messages.append({"role": message["role"], "content": parts})
    return messages


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start the server; yield its port and its log."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = {"enforce_eager": True, "max_num_seqs": 32}
    command = [
        "serve",
        str(MODEL),
        "--engine",
        "vllm",
        "--dtype",
        "float32",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    command += ["--engine-options", json.dumps(options), "--allowed-image-hosts", "none", "--max-images", "3"]
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, "-m", "mgllava", *command], stdout=output, stderr=output)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
    yield port, log
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def text_of(client, messages, **options):
    answer = client.chat.completions.create(
        model=MODEL.name, messages=messages, temperature=0, max_tokens=24, **options
    )
    return answer.choices[0].message.content, answer.usage.prompt_tokens


@pytest.fixture(scope="module")
def expected(generate, processor):
    """Return a function from a conversation to its answer and the length of its prompt."""
    known = {}

    def find(conversation):
        key = repr(as_request(conversation))
        if key not in known:
            prompt, tokens = generate(conversation)
            known[key] = processor.tokenizer.decode(tokens, skip_special_tokens=True), len(prompt)
        return known[key]

    return find


def test_twenty_conversations(client, expected):
    for index, conversation in enumerate(conversations()):
        assert text_of(client, as_request(conversation)) == expected(conversation), index
    assert client.models.list().data[0].id == MODEL.name


def test_200_requests_at_once_equal_lone_ones(server, expected):
    asked = conversations()
    extra = [[ask("What is this?", (picture(seed), boxes_of(seed, seed % 6)))] for seed in range(20, 30)]
    asked = (asked + extra) * 7
    wanted = [expected(conversation) for conversation in asked[:200]]

    async def run():
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="none", max_retries=0, timeout=500
        )

        async def one(conversation):
            answer = await client.chat.completions.create(
                model=MODEL.name, messages=as_request(conversation), temperature=0, max_tokens=24
            )
            return answer.choices[0].message.content, answer.usage.prompt_tokens

        return await asyncio.gather(*map(one, asked[:200]))

    assert asyncio.run(run()) == wanted


def test_boxes_in_other_places(client, expected):
    image, boxes = picture(31), boxes_of(31, 2)
    conversation = [ask("What is in the picture?", (image, boxes))]
    plain = as_request([ask("What is in the picture?", (image, None))])
    assert text_of(client, plain, extra_body={"boxes": [boxes]}) == expected(conversation)
    plain[0]["content"][0]["image_url"]["boxes"] = boxes
    assert text_of(client, plain) == expected(conversation)


def test_the_detector_finds_boxes_that_are_not_given(client, expected):
    conversation = [ask("What is in the picture?", (picture(32), None))]
    found = [text_of(client, as_request(conversation)) for _ in range(2)]
    assert found == [expected(conversation)] * 2


def test_roles_are_brought_into_the_order_of_training(client, expected):
    image = (picture(33), boxes_of(33, 1))
    system = {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}
    messages = as_request([{**system, "role": "developer"}, ask("What is", image), ask("in the picture?")])
    joined = ask("What is", image)
    joined["content"][-1]["text"] += "\nin the picture?"
    assert text_of(client, messages) == expected([system, joined])


def test_control_tokens_in_messages_are_text(client, expected):
    broken = [ask("Is < image> a word? < /s>", (picture(34), boxes_of(34, 1)))]
    messages = as_request([ask("Is <image> a word? </s>", (picture(34), boxes_of(34, 1)))])
    assert text_of(client, messages) == expected(broken)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda part: part.update(boxes=[[500, 500, 600, 600]]), "must lie in the upright image"),
        (lambda part: part.update(boxes="all"), "a list of x1, y1, x2, y2"),
        (lambda part: part.update(boxes=[[1, 2, 3]]), "must have shape"),
        (lambda part: part.update(bxes=[[1, 2, 30, 40]]), "bxes"),
        (lambda part: part["image_url"].update(url="http://127.0.0.1:9/x.png"), "from which this server downloads"),
        (lambda part: part["image_url"].update(url="data:image/png;base64,AAAA"), "cannot be read"),
    ],
    ids=range(6),
)
def test_wrong_requests_get_an_error_that_names_the_field(client, change, error):
    messages = as_request([ask("What?", (picture(35), None))])
    change(messages[0]["content"][0])
    with pytest.raises(openai.BadRequestError, match=error):
        text_of(client, messages)


def test_limits(client):
    images = [(picture(seed), []) for seed in range(4)]
    with pytest.raises(openai.BadRequestError, match="3 images"):
        text_of(client, as_request([ask("What?", *images)]))
    with pytest.raises(openai.BadRequestError, match="one entry per image"):
        text_of(client, as_request([ask("What?", images[0])]), extra_body={"boxes": [[], []]})
