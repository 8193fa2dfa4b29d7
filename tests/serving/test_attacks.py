"""Hostile requests to a running server: none may deny other clients an answer, or cause an unexpected error."""

import functools
import http.client
import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.serving import requests
from tests.serving.conftest import MAX_REQUESTS
from tests.serving.requests import as_data_url, image, text, user

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@pytest.fixture(scope="module")
def post(server):
    return functools.partial(requests.post, server)


@pytest.fixture(scope="module")
def chat(post):
    def run(messages, **options):
        return post(CHAT, {"max_tokens": 2, "temperature": 0, "messages": messages, **options})

    return run


def prompt_tokens(answer):
    status, body = answer
    assert status == 200, body
    return body["usage"]["prompt_tokens"]


# ----- user text is text


def test_control_tokens_of_users_are_text(chat, processor, data_url):
    tokenizer = processor.tokenizer
    plain = prompt_tokens(chat([user("Say x")]))
    for token in {*tokenizer.all_special_tokens, processor.image_token}:
        as_text = len(tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True))
        assert prompt_tokens(chat([user(f"Say x{token}")])) >= plain + min(2, as_text)
        for message in ({"role": "system", "content": token}, {"role": "assistant", "content": f"So {token}"}):
            assert chat([message, *HELLO])[0] == 200
    with_image = prompt_tokens(chat([user(image(data_url, boxes=[]), text("x"))]))
    with_placeholders = prompt_tokens(chat([user(image(data_url, boxes=[]), text("x <image> <image>"))]))
    assert with_image < with_placeholders < with_image + 50
    # Characters that mark control tokens or boundaries inside the processor cannot be forged.
    for mark in ("\U000f0000</s>\U000f0001", "\U000ff4d0</s>\U000ff4d1<image>"):
        assert chat([user(f"x{mark}")])[0] == 200


def test_raw_prompts_have_no_images(post, processor):
    status, body = post(COMPLETIONS, {"prompt": "An <image> tag", "max_tokens": 1})
    assert status == 200 and 3 < body["usage"]["prompt_tokens"] < 20
    status, body = post(COMPLETIONS, {"prompt": [1, processor.image_token_id], "max_tokens": 1})
    assert status == 400 and "stands for images" in body["error"]["message"]


# ----- values that overflow, and values of other types

WILD = [
    *(
        [],
        {},
        [[]],
        [{}],
        {"a": 1},
        [1],
        ["a"],
        "",
        "a",
        "\x00",
        "1",
        True,
        False,
        0,
        1,
        -1,
        1.5,
        2**31,
        2**63,
        -(2**64),
    ),
    *(1e-40, 1e308, -1e308, 10**400, -(10**400), 5e-324, "9" * 400, "a" * 5000, [None], [[1] * 5] * 5),
]
FIELDS = {
    CHAT: [
        *(
            "model",
            "messages",
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
        ),
        *("repetition_penalty", "frequency_penalty", "presence_penalty", "stop", "logit_bias", "n", "stream_options"),
        *("generation_config", "response_format", "tools", "logprobs", "modalities", "user", "metadata", "unknown"),
    ],
    RESPONSES: [
        *("input", "instructions", "max_output_tokens", "temperature", "top_p", "text", "background", "reasoning"),
        *("include", "truncation", "previous_response_id", "metadata", "tool_choice", "prompt", "store"),
    ],
    COMPLETIONS: ["prompt", "max_tokens", "temperature", "suffix", "echo", "logprobs", "best_of", "stop", "seed"],
}
VALID = {
    CHAT: {"messages": HELLO, "max_tokens": 1},
    RESPONSES: {"input": "Hello", "max_output_tokens": 1},
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 1},
}


def in_config(name, value):
    return {"generation_config": json.dumps({"max_new_tokens": 1, name: value})}


CONFIG = [
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams"),
    *(
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "bad_words_ids",
        "min_new_tokens",
    ),
    *("suppress_tokens", "no_repeat_ngram_size", "max_new_tokens", "stop_strings", "transformers_version"),
]
MESSAGES = [
    *([{**HELLO[0], "role": value}] for value in WILD[::2]),
    *([{**HELLO[0], "content": value}] for value in WILD[::2]),
    *([{**HELLO[0], "name": value, "tool_calls": value}] for value in WILD[::2]),
    *([user({"type": value, "text": "a"}, text())] for value in WILD[::2]),
    *([user({"type": "text", "text": value}, text())] for value in WILD[::2]),
    *([user({"type": "image_url", "image_url": value}, text())] for value in WILD[::2]),
    *([user({"type": "image_url", "image_url": {"url": value, "detail": value}}, text())] for value in WILD[::2]),
    *([user({"type": "image", "url": value, "extras": value, "mime_type": value}, text())] for value in WILD[::2]),
    *([user({"type": "image", "base64": "AAAA", "mime_type": value}, text())] for value in WILD[::2]),
]


def check_no_server_error(post, path, body):
    """Check that a request is answered, or refused with a reason."""
    status, answer = post(path, body)
    assert status < 500, (body, answer)
    if status != 200:
        error = answer["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
    return status


@pytest.mark.filterwarnings("ignore:Unfeasible length")  # from transformers, for a large `min_new_tokens`
def test_wild_values_are_answered_or_refused(post):
    bodies = [(path, {**VALID[path], name: value}) for path in FIELDS for name in FIELDS[path] for value in WILD]
    bodies += [(CHAT, {**VALID[CHAT], **in_config(name, value)}) for name in CONFIG for value in WILD[1::2]]
    bodies += [(CHAT, {**VALID[CHAT], "messages": messages}) for messages in MESSAGES]
    # Long answers take time, and are tested elsewhere.
    long = {2**31, 2**63}
    bodies = [case for case in bodies if not any(type(value) is int and value in long for value in case[1].values())]
    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(lambda case: check_no_server_error(post, *case), bodies))
    assert statuses.count(200) < len(statuses) / 2 and {200, 400, 404, 422} <= set(statuses)


@pytest.mark.parametrize("position", ["boxes", "row", "number", "scores", "labels"])
def test_wild_boxes_are_answered_or_refused(post, data_url, position):
    for value in WILD:
        boxes = {
            "boxes": value,
            "row": [value],
            "number": [[1, 1, value, 50]],
            "scores": {"boxes": [[1, 1, 9, 9]], "scores": value},
            "labels": {"boxes": [[1, 1, 9, 9]], "labels": value, "scores": [0.5]},
        }[position]
        check_no_server_error(post, CHAT, {**VALID[CHAT], "messages": [user(image(data_url, boxes=boxes), text())]})


REFUSED = {
    "temperature": [1e-40, 1e-7, 2.1, -0.1, "1", True],
    "top_p": [-0.1, 1.1],
    "top_k": [-2, 1.5, 10**30],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 1e-30, 1e30],
    "frequency_penalty": [-2.1],
    "presence_penalty": [2.1, 3],
    "max_tokens": [0],
    "n": [2],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "chat_template_kwargs": [{"processor_kwargs": {"images": "/etc/hostname"}}],
    "generation_config": ['{"num_return_sequences": 1000}', '{"num_beams": 1000}'],
    "seed": [0.5, 2**63, -(2**63) - 1],
    "logit_bias": [{"100000": 1}, {"5": 1e308}, {"5": 101}, {"5": -100.5}, {"-1": 1}, {"٣": 1}, {"9" * 5000: 1}, [5]],
    "stop": [["a"] * 5, [""], "a" * 101, [1]],
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_beyond_the_limits_are_refused(chat, name):
    for value in REFUSED[name]:
        status, body = chat(HELLO, **{name: value})
        assert status == 400 and body["error"]["param"] == name and f"`{name}" in body["error"]["message"]


def test_values_at_the_limits_are_answered(chat):
    for options in (
        *({"temperature": 1e-6}, {"temperature": 2}, {"top_p": 0, "temperature": 1}, {"top_k": -1}, {"top_k": 0}),
        *({"min_p": 1, "temperature": 1}, {"repetition_penalty": 100}, {"repetition_penalty": 0.01}, {"stop": []}),
        *({"logit_bias": {"5": 100}}, {"logit_bias": {"5": -100}}, {"seed": 2**63 - 1}, {"seed": -(2**63)}),
        *({"frequency_penalty": -2}, {"presence_penalty": 2}, {"top_k": 2**40, "temperature": 1}, {"stop": None}),
    ):
        status, body = chat(HELLO, **options)
        assert status == 200, (options, body)


# ----- availability


def test_silent_clients_do_not_take_places(server, chat):
    """More such clients than places: some send a head without a body, some half a head, some nothing."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    silent = []
    try:
        for start in (head + b"Content-Length: 1000\r\n\r\n", head + b"Content-Length: 1000\r\n\r\n{", head, b""):
            for _ in range(MAX_REQUESTS):
                silent.append(socket.create_connection(("localhost", server.port), timeout=30))
                silent[-1].sendall(start)
        assert chat(HELLO)[0] == 200
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.slow
def test_silent_clients_are_disconnected(server):
    """After ten seconds each, whichever part of a request they hold back."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answers = []
    for start in (b"", head, head + b"Content-Length: 1000\r\n\r\n{"):
        with socket.create_connection(("localhost", server.port), timeout=60) as connection:
            connection.sendall(start)
            answers.append(connection.recv(1000))
    assert answers[:2] == [b"", b""] and b" 408 " in answers[2]


def test_json_that_would_stall_the_server_is_refused(post, server):
    lists, nested = b"[" + b"[]," * 600_000 + b"[]]", b"[" * 60 + b"]" * 60
    escapes = b'{"messages": "' + b'\\"' * 990_000 + b'"}'
    for body, status in ((lists, 413), (escapes, 400), (b'{"messages": %s}' % nested, 400), (b"[" * 100_000, 400)):
        assert post(CHAT, body)[0] == status
    assert post(CHAT, b'{"messages": %s}' % (b"[" * 45 + b"]" * 45))[0] == 400
    # Brackets within a string are not nesting.
    assert post(CHAT, {**VALID[CHAT], "messages": [user("[" * 500 + '"\\"')]})[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\udfff": 1}',
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": Infinity}',
        b'{"model": "a", "model": "b"}',
        b"\xff\xfe{\x00}\x00",
        b'{"seed": %s}' % (b"9" * 5000),
        b'"text"',
        b"",
    ],
)
def test_bodies_that_are_not_plain_json_are_refused(post, body):
    status, answer = post(CHAT, body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "name"), [("", "prompt"), ([99_999], "prompt"), (["a", 5], "prompt[1]"), ([[99_999]], "prompt[0]")]
)
def test_the_wrong_one_of_several_prompts_is_named(post, prompt, name):
    status, body = post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert status == 400 and body["error"]["message"].startswith(f"`{name}` must ")


def test_floods_of_messages_parts_and_tokens_are_refused(chat, post):
    empty = {"role": "user", "content": ""}
    for messages in (
        [empty] * 60_000,
        [user(*[text("")] * 60_000)],
        [user("</s>" * 90_000)],
        [user("<image>" * 50_000)],
        [{"role": "system", "content": "a" * 200_000}, user("a" * 200_001)],
    ):
        status, body = chat(messages)
        assert status == 400, body
    assert chat([empty] * 1000)[0] == 200 and chat([user(*[text("a ")] * 1500)])[0] == 200
    assert post(COMPLETIONS, {"prompt": ["a"] * 33})[0] == 400
    assert post(COMPLETIONS, {"prompt": "</s>" * 90_000})[0] == 400
    assert post(COMPLETIONS, {"prompt": [5] * 300_000})[0] == 400


def test_client_that_reads_nothing_does_not_disturb_others(server, chat):
    body = json.dumps({"messages": HELLO, "max_tokens": 500, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("localhost", server.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert chat(HELLO)[0] == 200
        # Disconnects without reading: the server gets a reset.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert chat(HELLO)[0] == 200


# ----- the same request, the same answer


def test_sampled_answers_are_the_same_alone_and_among_others(chat, data_url):
    def ask(seed, **options):
        status, body = chat([user("Tell")], seed=seed, temperature=2, max_tokens=12, **options)
        assert status == 200, body
        return body["choices"][0]["message"]["content"]

    alone = {seed: ask(seed) for seed in range(3)}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(ask, None) for _ in range(8)]
        answers = list(threads.map(ask, [0, 1, 2] * 8))
    assert answers == [alone[seed] for seed in [0, 1, 2] * 8]
    assert len({other.result() for other in others}) > 1


# ----- access


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "localhost@evil.example", "10.0.0.1", "a b"]
)
def test_other_hosts_are_refused(post, server, host):
    status, body = post(CHAT, VALID[CHAT], Host=f"{host}:{server.port}")
    assert status in (400, 403) and ("Host" in body["error"]["message"])


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8000", "localhost."])
def test_own_names_are_answered(post, host):
    assert post(CHAT, VALID[CHAT], Host=host)[0] == 200


# ----- what clients send

CONVERSATIONS = {
    "two users": ([user("Hello"), user("there")], [user("Hello\nthere")]),
    "two answers": (
        [user("a"), {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}, user("d")],
        [user("a"), {"role": "assistant", "content": "b\nc"}, user("d")],
    ),
    "assistant first": (
        [{"role": "assistant", "content": "Hi"}, user("a")],
        [user(""), {"role": "assistant", "content": "Hi"}, user("a")],
    ),
    "assistant last": (
        [user("a"), {"role": "assistant", "content": "b"}],
        [user("a"), {"role": "assistant", "content": "b"}, user("")],
    ),
    "null": (
        [user("a"), {"role": "assistant", "content": None}, user("b")],
        [user("a"), {"role": "assistant", "content": ""}, user("b")],
    ),
    "later system": ([user("a"), {"role": "system", "content": "S"}], [{"role": "system", "content": "S"}, user("a")]),
    "two systems": (
        [{"role": "system", "content": "S"}, {"role": "developer", "content": "T"}, user("a")],
        [{"role": "system", "content": "S\nT"}, user("a")],
    ),
    "an answer as it came": (
        [
            user("a"),
            {
                "role": "assistant",
                "content": "b",
                "refusal": None,
                "tool_calls": None,
                "annotations": [],
                "audio": None,
            },
            user("b"),
        ],
        [user("a"), {"role": "assistant", "content": "b"}, user("b")],
    ),
}


@pytest.mark.parametrize("messages, same", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_turns_in_any_order_are_brought_into_that_of_training(chat, messages, same):
    (status, got), (_, expected) = chat(messages, max_tokens=6), chat(same, max_tokens=6)
    assert status == 200, got
    assert (got["choices"], got["usage"]) == (expected["choices"], expected["usage"])


BOXES = [[10, 20, 110, 70], [5, 5, 60, 90]]


def test_boxes_arrive_wherever_clients_put_them(chat, data_url):
    payload = data_url.partition(",")[2]
    block = {"base64": payload, "mime_type": "image/png"}
    places = [
        image(data_url, boxes=BOXES),
        {"type": "image_url", "image_url": {"url": data_url, "boxes": BOXES, "detail": "auto"}},
        {"type": "input_image", "image_url": data_url, "boxes": BOXES},
        {"type": "image", "url": data_url, "boxes": BOXES},
        {"type": "image", **block, "boxes": BOXES},
        {"type": "image", **block, "extras": {"boxes": BOXES}},
        {"type": "image", "source_type": "base64", "data": payload, "mime_type": "image/png", "boxes": BOXES},
    ]
    answers = [chat([user(part, text())])[1] for part in places]
    answers.append(chat([user(image(data_url), text())], boxes=[BOXES])[1])
    answers.append(chat([user(image(data_url, boxes=BOXES), text())], boxes=[None])[1])
    without = prompt_tokens(chat([user(image(data_url, boxes=[]), text())]))
    assert all(answer["choices"] == answers[0]["choices"] for answer in answers), answers
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {without + 1}


def test_boxes_next_to_the_messages_are_one_entry_per_image(chat, data_url):
    part = image(data_url, boxes=BOXES)
    for boxes, one in (([], image(data_url)), ([BOXES, None], image(data_url)), ([BOXES], part), ("a", part)):
        status, body = chat([user(one, text())], boxes=boxes)
        assert status == 400 and body["error"]["param"] == "boxes"
    status, body = chat([user(image(data_url), text())], boxes=[[[1, 2, 3]]])
    assert status == 400 and body["error"]["param"] == "boxes[0]"


@pytest.mark.parametrize(
    "part, name",
    [
        ({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, "cache_control"),
        ({"type": "text", "text": "a", "boxes": BOXES}, "boxes"),
        ({"type": "image_url", "image_url": {"url": "data:,", "size": 3}}, "image_url.size"),
        ({"type": "image_url", "image_url": {"url": "data:,"}, "labels": ["a"]}, "labels"),
        ({"type": "image_url", "image_url": {"url": "data:,", "boxes": BOXES}, "boxes": BOXES}, "image_url.boxes"),
        ({"type": "image_url", "image_url": {"url": "data:,"}, "detail": "huge"}, "detail"),
        ({"type": "image", "url": "data:,", "extras": {"regions": BOXES}}, "extras.regions"),
        ({"type": "input_image", "file_id": "f"}, "file_id"),
    ],
)
def test_unknown_keys_of_a_part_are_refused(chat, part, name):
    status, body = chat([user(part, text())])
    assert status == 400 and body["error"]["param"] == f"messages[0].content[0].{name}", body


def test_base64_may_have_line_breaks_and_lack_padding(chat, data_url):
    head, _, payload = data_url.partition(",")
    lines = "\r\n".join(payload[start : start + 76] for start in range(0, len(payload), 76))
    expected = chat([user(image(data_url), text())])[1]["choices"]
    for url in (f"{head},{lines}\n", f"{head.upper()},{payload.rstrip('=')}"):
        assert chat([user(image(url), text())])[1]["choices"] == expected


def test_options_of_responses_are_refused_unless_neutral(post):
    for name, value in {
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}},
        "background": True,
        "previous_response_id": "resp_1",
        "tools": [{"type": "web_search"}],
        "truncation": "auto",
        "reasoning": {"effort": "high"},
    }.items():
        status, body = post(RESPONSES, {**VALID[RESPONSES], name: value})
        assert status == 400 and body["error"]["param"] == name
    neutral = {"text": {"format": {"type": "text"}}, "background": False, "tools": [], "truncation": "disabled"}
    assert post(RESPONSES, {**VALID[RESPONSES], **neutral, "store": True})[0] == 200


def test_several_prompts_have_a_choice_each(post, processor):
    def texts(prompt):
        status, body = post(COMPLETIONS, {"prompt": prompt, "max_tokens": 5, "temperature": 0})
        assert status == 200, body
        return [choice["text"] for choice in body["choices"]]

    ids = [processor.tokenizer.bos_token_id, *processor.tokenizer.encode("Hello", add_special_tokens=False)]
    alone = [texts("Hello")[0], texts("What is it")[0]]
    assert texts(["Hello", "What is it"]) == alone
    assert texts(ids) == texts([ids]) == [alone[0]]


def test_stream_reports_usage_as_requested(client):
    options = {"model": "small", "messages": HELLO, "max_tokens": 3, "stream": True}
    chunks = list(client.chat.completions.create(**options, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    chunks = list(client.chat.completions.create(**options, stream_options={"include_usage": False}))
    assert all(chunk.usage is None for chunk in chunks)


def test_health_answers_while_the_server_works(server, post):
    """A supervisor must not restart it because of a long answer or a large image."""
    heavy = {**VALID[CHAT], "messages": [user(image(as_data_url(Image.new("RGB", (1900, 1900)))), text())]}
    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(post, CHAT, {**VALID[CHAT], "max_tokens": 300}), threads.submit(post, CHAT, heavy)]
        while not all(job.done() for job in busy):
            connection = http.client.HTTPConnection("localhost", server.port, timeout=20)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
            time.sleep(0.05)
    assert [job.result()[0] for job in busy] == [200, 200]


@pytest.mark.parametrize(
    ("cycle", "is_closed"),
    [(None, True), (SimpleNamespace(response_complete=True), True), (SimpleNamespace(response_complete=False), False)],
)
def test_connections_without_a_request_are_closed(cycle, is_closed):
    """A fast sibling of `test_silent_clients_are_disconnected`."""
    from mgllava.serving.server import _ImpatientProtocol

    closed = []
    protocol = SimpleNamespace(cycle=cycle, transport=SimpleNamespace(abort=lambda: closed.append(True)))
    _ImpatientProtocol._hang_up(protocol)
    assert bool(closed) == is_closed
