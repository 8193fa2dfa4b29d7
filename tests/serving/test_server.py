"""The server as clients see it: the OpenAI client against a server process."""

import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from tests.serving.conftest import MAX_REQUESTS
from tests.serving.requests import as_data_url, image, post, text

PROMPT_TOKENS = 100  # more than any text here has, fewer than an image


@pytest.fixture(scope="module")
def readable(processor):
    """A bias against all tokens that are not plain text, EOS included, as random weights choose any token."""
    vocabulary = range(len(processor.tokenizer))
    plain = [token for token in vocabulary if processor.decode([token], skip_special_tokens=True).isalnum()]
    return {str(token): -100 for token in vocabulary if token not in plain}


@pytest.fixture(scope="module")
def ask(client, readable):
    def run(*content, turns=(), **options):
        messages = [*turns, {"role": "user", "content": list(content)}]
        options = {"max_tokens": 8, "temperature": 0, "logit_bias": readable, **options}
        return client.chat.completions.create(model="small", messages=messages, **options)

    return run


def answer_of(response):
    return response.choices[0].message.content


@pytest.fixture(scope="module")
def alone(model, served_repository, readable):
    """Ask the model itself, without a server."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(served_repository)

    def run(messages, max_new_tokens=8):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, **options)
        bias = {(int(token),): float(value) for token, value in readable.items()}
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, sequence_bias=bias)
        length = inputs["input_ids"].shape[1]
        return processor.decode(output[0, length:], skip_special_tokens=True), length

    return run


OWN_BOXES = [[10, 20, 110, 70], [5, 5, 60, 90]]
DETECTED = {"boxes": [[10, 20, 110, 70], [12, 20, 110, 70]], "labels": ["cup", "cup"], "scores": [0.5, 0.9]}


@pytest.mark.parametrize("boxes", [None, [], OWN_BOXES, DETECTED], ids=["found", "none", "own", "detected"])
def test_answer_and_boxes_are_those_of_the_model_alone(ask, alone, data_url, boxes):
    extra = {} if boxes is None else {"boxes": boxes}
    response = ask(image(data_url, **extra), text())
    expected = alone([{"role": "user", "content": [{"type": "image", "url": data_url, **extra}, text()]}])
    assert (answer_of(response), response.usage.prompt_tokens) == expected


def test_several_images_and_turns_are_those_of_the_model_alone(ask, alone, data_url):
    other = {"type": "image", "url": data_url, "boxes": OWN_BOXES[:1]}
    first = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(data_url, boxes=OWN_BOXES), image(data_url), text("Two?")]},
        {"role": "assistant", "content": "Yes."},
    ]
    response = ask(image(data_url, boxes=OWN_BOXES[:1]), text(), turns=first)
    same = [{"type": "image", "url": data_url, "boxes": OWN_BOXES}, {"type": "image", "url": data_url}, text("Two?")]
    turns = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": same},
        {"role": "assistant", "content": [text("Yes.")]},
        {"role": "user", "content": [other, text()]},
    ]
    assert (answer_of(response), response.usage.prompt_tokens) == alone(turns)


def test_text_alone(ask, alone):
    response = ask(text("Hello"))
    assert (answer_of(response), response.usage.prompt_tokens) == alone([{"role": "user", "content": [text("Hello")]}])
    assert response.choices[0].finish_reason == "length"


def test_stream_has_the_whole_answer(ask, data_url):
    content = image(data_url, boxes=OWN_BOXES), text()
    chunks = list(ask(*content, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert sum(map(bool, pieces)) > 1, "not streamed"
    assert "".join(pieces) == answer_of(ask(*content))
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 8


def test_temperature_makes_it_sample(ask):
    """transformers ignores it where the model's default is greedy, so that all answers are equal."""
    assert len({answer_of(ask(text(), temperature=2, seed=seed)) for seed in range(4)}) > 1
    assert answer_of(ask(text(), temperature=2, seed=1)) == answer_of(ask(text(), temperature=2, seed=1))


def test_stop_ends_the_answer(ask):
    whole = answer_of(ask(text()))
    for stop in (whole[2], whole[2:5], [whole[4:7], whole[3]]):
        places = [whole.index(string) for string in ([stop] if isinstance(stop, str) else stop)]
        response = ask(text(), stop=stop)
        assert answer_of(response) == whole[: min(places)] and response.choices[0].finish_reason == "stop"
        chunks = list(ask(text(), stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: min(places)]
    assert answer_of(ask(text(), stop=[])) == answer_of(ask(text(), stop="never in it")) == whole


def test_image_of_a_listed_host_by_url_and_redirect(ask, site, data_url):
    expected = answer_of(ask(image(data_url), text()))
    for path in ("/picture.png", "/to-picture"):
        assert answer_of(ask(image(site.url + path), text())) == expected


def test_responses_and_completions(client, data_url):
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": data_url}]
    content[1]["boxes"] = OWN_BOXES
    options = {"model": "small", "max_output_tokens": 4, "instructions": "Be brief."}
    response = client.responses.create(input=[{"role": "user", "content": content}], **options)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens > PROMPT_TOKENS
    events = list(client.responses.create(input="Hello", stream=True, **options))
    assert events[-1].type == "response.incomplete" and events[-1].response.usage.output_tokens == 4
    completion = client.completions.create(model="small", prompt="Hello", max_tokens=4)
    assert completion.usage.completion_tokens == 4
    chunks = list(client.completions.create(model="small", prompt="Hello", max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_model_list_has_the_one_model(client):
    assert [model.id for model in client.models.list()] == [client.models.retrieve("small").id] == ["small"]


def refused(error, status=400, param=None, code=None):
    """Check that an error has OpenAI's form."""
    body = error.value.body
    assert error.value.status_code == status and set(body) == {"message", "type", "param", "code"}
    assert (param or "") in (body["param"] or "") and (code is None or body["code"] == code), body
    return body["message"]


PRIVATE = [
    "http://127.0.0.1:{port}/picture.png",
    "http://127.1:{port}/picture.png",
    "http://2130706433:{port}/picture.png",
    "http://[::1]:{port}/picture.png",
    "http://[::ffff:127.0.0.1]:{port}/picture.png",
    "http://0.0.0.0:{port}/picture.png",
    "http://localhost/picture.png",
    "http://user:word@localhost:{port}/picture.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/",
    "http://no-such-host.invalid/",
    "http://",
    "file:///etc/hostname",
    "ftp://localhost:{port}/picture.png",
    "/etc/hostname",
    "{file}",
    "",
]


@pytest.mark.parametrize("url", PRIVATE)
def test_private_url_is_refused_without_a_request(ask, site, tmp_path, picture, url):
    file = tmp_path / "picture.png"
    file.write_bytes(picture)
    site.seen.clear()
    with pytest.raises(openai.BadRequestError) as error:
        ask(image(url.format(port=site.port, file=file)), text())
    refused(error, param="messages[0].content[0].image_url.url", code="invalid_image_url")
    assert not site.seen


@pytest.mark.parametrize(
    "path", ["/to-private", "/to-file", "/compressed", "/announced", "/endless", "/slow", "/gone"]
)
def test_failed_download_is_refused(ask, site, path):
    site.seen.clear()
    with pytest.raises(openai.BadRequestError) as error:
        ask(image(site.url + path), text())
    refused(error, param="messages[0].content[0].image_url.url", code="invalid_image_url")
    assert site.seen == [path]


def with_side(large_picture, side):
    """The same header for another side; Pillow accepts 12,000."""
    header = b"IHDR" + struct.pack(">II", side, side) + large_picture[24:29]
    return large_picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + large_picture[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_file_that_is_not_an_image_within_the_limits_is_refused(ask, site, picture, large_picture):
    cases = {
        as_data_url(b"no picture"): "invalid_image",
        as_data_url(picture[: len(picture) // 2]): "invalid_image",
        as_data_url(b"P5 2 2 255 abcd"): "invalid_image",  # a format that Pillow reads, and the server does not
        as_data_url(large_picture): "image_too_large",
        as_data_url(with_side(large_picture, 12_000)): "image_too_large",
        as_data_url(bytes(500_000)): "image_too_large",
        "data:image/png;base64,%%%": "invalid_base64_image",
        "data:text/html;base64,AAAA": "invalid_image_url",
        site.url + "/text.png": "invalid_image",
    }
    for url, code in cases.items():
        with pytest.raises(openai.BadRequestError) as error:
            ask(image(url), text())
        refused(error, param="messages[0].content[0].image_url.url", code=code)


BAD = {
    "boxes-shape": ({"boxes": [[1, 2, 3]]}, "messages[0].content[0].boxes"),
    "boxes-text": ({"boxes": "all"}, "messages[0].content[0].boxes"),
    "boxes-corners": ({"boxes": [[9, 9, 1, 1]]}, "messages[0].content[0].boxes"),
    "boxes-relative": ({"boxes": [[0.1, 0.2, 0.5, 0.6]]}, "messages[0].content[0].boxes"),
    "boxes-outside": ({"boxes": [[9, 9, 20, 20], [9000, 9, 9001, 20]]}, "messages[0].content[0].boxes"),
    "boxes-many": ({"boxes": [[0, 0, 1, 1]] * 51}, "messages[0].content[0].boxes"),
    "boxes-key": ({"boxes": {"boxes": [], "file": "x"}}, "messages[0].content[0].boxes"),
    "boxes-scores": ({"boxes": {"boxes": [[0, 0, 1, 1]], "scores": [[1]]}}, "messages[0].content[0].boxes.scores"),
    "boxes-labels": ({"boxes": {"boxes": [[0, 0, 1, 1]], "labels": [[1]]}}, "messages[0].content[0].boxes.labels"),
}


@pytest.mark.parametrize("extra, param", BAD.values(), ids=BAD)
def test_bad_boxes_are_named(ask, data_url, extra, param):
    with pytest.raises(openai.BadRequestError) as error:
        ask(image(data_url, **extra), text())
    assert param in refused(error, param=param)


def test_too_many_images_are_refused(ask, data_url):
    with pytest.raises(openai.BadRequestError) as error:
        ask(*[image(data_url)] * 4, text())
    assert "at most 3 images" in refused(error, param="messages[0].content[3]")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        ["Hello"],
        [{"role": "tool", "content": "Hello", "tool_call_id": "1"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
        [{"role": "user", "content": "word " * 9000}],
    ],
)
def test_bad_messages_are_refused(client, messages):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="small", messages=messages, max_tokens=2)
    refused(error)


def test_other_model_is_refused(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="owner/other", messages=[{"role": "user", "content": "Hello"}])
    refused(error, 404, "model", "model_not_found")


def test_raw_requests_get_errors_in_json(server):
    chat = "/v1/chat/completions"
    for path, body, headers, status in (
        (chat, b"{", {}, 400),
        (chat, b"[]", {}, 400),
        (chat, b"{}", {"Content-Type": "text/plain"}, 415),
        (chat, b'{"messages": "%s"}' % (b"a" * 3_000_000), {}, 413),
        (chat, b'{"unknown": 1}', {}, 422),
        # Endpoints of `transformers serve` for the operator's own machine: loading, unloading, other models.
        ("/load_model", b'{"model": "owner/other"}', {}, 404),
        ("/reset", b"{}", {}, 404),
        ("/v1/audio/transcriptions", b"{}", {}, 404),
        ("/health", b"{}", {}, 405),
    ):
        got, answer = post(server, path, body, **headers)
        assert got == status and answer["error"]["message"], (path, body[:20], got, answer)


def test_parallel_requests_get_their_own_answers(ask, data_url):
    contents = [
        (image(data_url, boxes=OWN_BOXES), text()),
        (image(data_url), text()),
        (text("Hello"),),
        (image(data_url, boxes=[]), text("Where?")),
    ]
    expected = [answer_of(ask(*content)) for content in contents]
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda index: answer_of(ask(*contents[index % 4])), range(16)))
    assert answers == expected * 4


def when_free(request):
    """Repeat a request until the server has noticed which clients have disconnected."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return request()
        except openai.RateLimitError:
            assert time.monotonic() < deadline, "The server still works for clients that left."
            time.sleep(0.05)


def test_disconnecting_clients_stop_their_generation(ask, client):
    """Together these answers of thousands of tokens take minutes; the next client must not wait for them."""
    hello = {"model": "small", "messages": [{"role": "user", "content": "Hello"}]}

    def leave_while_waiting(_):
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**hello, max_tokens=8000, timeout=2)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(leave_while_waiting, range(6)))
    streams = [
        when_free(lambda: client.chat.completions.create(**hello, max_tokens=8000, stream=True))
        for _ in range(MAX_REQUESTS)
    ]
    with pytest.raises(openai.RateLimitError) as error:
        ask(text())
    refused(error, 429, code="overloaded")
    for stream in streams:
        stream.close()
    last = when_free(lambda: client.chat.completions.create(**hello, max_tokens=1, timeout=20))
    assert last.usage.completion_tokens == 1
