"""Answers in the forms of OpenAI's API, as the classes of its client define them; the model is a stand-in."""

import functools
import json
import time
from types import SimpleNamespace

import openai.types
import openai.types.chat
import openai.types.responses
import pydantic
import pytest
import torch
from starlette.testclient import TestClient
from transformers import GenerationConfig

from mgllava.serving import messages
from mgllava.serving.app import build_app
from mgllava.serving.errors import RequestError
from mgllava.serving.gate import AllowedHosts
from mgllava.serving.generation import Answer, DeviceHealth
from mgllava.serving.handlers import ChatCompletionHandler, CompletionHandler, ResponseHandler
from mgllava.serving.limits import ServingLimits
from mgllava.serving.messages import MessageReader
from tests.serving.requests import image, text, user

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ID = {"X-Request-ID": "7"}
PIECES = ["Two ", "cups."]


class Model:
    """A stand-in for the parts of a served model; `calls` are what it was asked."""

    name, model_id, context_length, vocab_size, compile = "small", "org/small", 64, 10, False

    def __init__(self):
        self.model = SimpleNamespace(generation_config=GenerationConfig())
        self.health = DeviceHealth(torch.device("cpu"))
        self.messages = MessageReader(ServingLimits(), takes_boxes=True)
        self.prompts = self.generator = self
        self.calls, self.finish, self.error = [], "stop", None

    async def from_conversation(self, conversation, stack):
        return conversation

    async def from_text(self, prompt, param):
        return param, prompt

    def from_tokens(self, prompt, param):
        return param, prompt

    async def answer(self, inputs, options, is_continuation=False):
        self.calls.append((inputs, options, is_continuation))
        return Answer("".join(PIECES), self.finish, prompt_tokens=5, completion_tokens=3)

    async def stream(self, inputs, options, is_continuation=False):
        yield PIECES[0]
        if self.error is not None:
            raise self.error
        yield PIECES[1]
        yield await self.answer(inputs, options, is_continuation)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def post(model):
    handlers = {CHAT: ChatCompletionHandler(model), RESPONSES: ResponseHandler(model)}
    app = build_app(
        {**handlers, COMPLETIONS: CompletionHandler(model)}, model, ServingLimits(), False, AllowedHosts("")
    )
    client = TestClient(app, base_url="http://localhost")

    def run(path, body):
        return client.post(path, json=body, headers=ID)

    return run


BODIES = {
    CHAT: {"messages": [user("How many?")]},
    RESPONSES: {"input": "How many?"},
    COMPLETIONS: {"prompt": ["How many?", [1, 2]]},
}


form = functools.cache(pydantic.TypeAdapter)


def check_form(value, kind):
    """Check that a JSON value has the fields of a class, and no others."""
    found = form(kind).validate_python(value)
    pending = [found]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, pydantic.BaseModel):
            assert set(part.model_extra) <= {"store"}, part  # which the API sends, too
            pending += [getattr(part, name) for name in part.model_fields_set]
    return found


def events_of(answer):
    """The data of the events of a stream, of which those of responses are named."""
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
    events = []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        *name, data = event.split("\n")
        assert data.startswith("data: ")
        data = data.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
        assert name == ([f"event: {events[-1]['type']}"] if "type" in events[-1] else [])
    return events


def usage(answers=1):
    return {"prompt_tokens": 5 * answers, "completion_tokens": 3 * answers, "total_tokens": 8 * answers}


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_whole_answers(post, model, finish):
    model.finish = finish
    chat, completion = post(CHAT, BODIES[CHAT]).json(), post(COMPLETIONS, BODIES[COMPLETIONS]).json()
    check_form(chat, openai.types.chat.ChatCompletion)
    check_form(completion, openai.types.Completion)
    for body, prefix in ((chat, "chatcmpl-"), (completion, "cmpl-")):
        assert (body["id"], body["model"]) == (f"{prefix}7", "small") and time.time() - 60 < body["created"]
        assert {choice["finish_reason"] for choice in body["choices"]} == {finish}
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["Two cups."]
    assert [(choice["index"], choice["text"]) for choice in completion["choices"]] == [
        (0, "Two cups."),
        (1, "Two cups."),
    ]
    assert (chat["usage"], completion["usage"]) == (usage(), usage(2))
    # Only raw prompts are continued.
    assert [(call[0], call[2]) for call in model.calls[1:]] == [
        (("prompt", "How many?"), True),
        (("prompt", [1, 2]), True),
    ]
    assert model.calls[0][2] is False


@pytest.mark.parametrize("include", [None, False, True])
def test_streams_of_chunks(post, model, include):
    options = {"stream": True, **({} if include is None else {"stream_options": {"include_usage": include}})}
    *chunks, done = events_of(post(CHAT, {**BODIES[CHAT], **options}))
    assert done == "[DONE]"
    for chunk in chunks:
        check_form(chunk, openai.types.chat.ChatCompletionChunk)
        assert (chunk["id"], chunk["model"]) == ("chatcmpl-7", "small")
    with_choices = chunks[:-1] if include else chunks
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in PIECES), {}]
    assert [[choice["delta"] for choice in chunk["choices"]] for chunk in with_choices] == [
        [delta] for delta in deltas
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in with_choices]
    assert reasons == [None, None, None, "stop"]
    usages = [chunk.get("usage") for chunk in chunks]
    assert usages[:-1] == [None] * (len(chunks) - 1) and usages[-1] == (None if include is False else usage())
    assert not include or chunks[-1]["choices"] == []


def test_streams_of_several_prompts(post):
    *chunks, _ = events_of(post(COMPLETIONS, {**BODIES[COMPLETIONS], "stream": True}))
    for chunk in chunks:  # the class knows no chunks, whose reason is null
        choices = [{**choice, "finish_reason": "stop"} for choice in chunk["choices"]]
        check_form({**chunk, "choices": choices}, openai.types.Completion)
    found = [
        (choice["index"], choice["text"], choice["finish_reason"]) for chunk in chunks for choice in chunk["choices"]
    ]
    assert found == [
        (index, *rest) for index in (0, 1) for rest in ((PIECES[0], None), (PIECES[1], None), ("", "stop"))
    ]
    assert [chunk.get("usage") for chunk in chunks] == [None] * 5 + [usage(2)]


FIELDS = {
    "instructions": "Be brief.",
    "max_output_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
    "metadata": {"a": "b"},
}


@pytest.mark.parametrize(("finish", "status"), [("stop", "completed"), ("length", "incomplete")])
@pytest.mark.parametrize("fields", [{}, FIELDS])
def test_responses(post, model, finish, status, fields):
    model.finish = finish
    body = post(RESPONSES, {**BODIES[RESPONSES], **fields}).json()
    found = check_form(body, openai.types.responses.Response)
    assert (body["id"], body["model"], body["status"], found.output_text) == ("resp_7", "small", status, "Two cups.")
    assert time.time() - 60 < body["created_at"] <= time.time()
    assert {name: body[name] for name in FIELDS} == {**dict.fromkeys(FIELDS), "metadata": {}, **fields}
    details = None if status == "completed" else {"reason": "max_output_tokens"}
    assert (body["incomplete_details"], body["output"][0]["status"]) == (details, status)
    counts = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
    assert {name: body["usage"][name] for name in counts} == counts
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    # What the server does not do.
    absent = {"parallel_tool_calls": False, "store": False, "tools": [], "tool_choice": "none", "error": None}
    absent |= {"previous_response_id": None, "truncation": "disabled", "text": {"format": {"type": "text"}}}
    assert {name: body[name] for name in absent} == absent
    assert model.calls[0][2] is False


def test_responses_as_they_come(post, model):
    whole = post(RESPONSES, BODIES[RESPONSES]).json()
    events = events_of(post(RESPONSES, {**BODIES[RESPONSES], "stream": True}))
    for event in events:
        check_form(event, openai.types.responses.ResponseStreamEvent)
    kinds = ["created", "in_progress", "output_item.added", "content_part.added"]
    kinds += ["output_text.delta"] * 2 + ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event["type"] for event in events] == [f"response.{kind}" for kind in kinds]
    assert [event["sequence_number"] for event in events] == list(range(10))
    (item,) = whole["output"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]} == {"msg_7"}
    places = {(event.get("output_index", 0), event.get("content_index", 0)) for event in events}
    assert places == {(0, 0)}
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    for event in events[:2]:
        assert {**event["response"], "created_at": whole["created_at"]} == begun
    assert events[2]["item"] == {**item, "status": "in_progress", "content": []}
    assert events[3]["part"] == {**item["content"][0], "text": ""}
    assert [event["delta"] for event in events[4:6]] == PIECES
    assert events[6]["text"] == "Two cups." and events[7]["part"] == item["content"][0] and events[8]["item"] == item
    assert {**events[9]["response"], "created_at": whole["created_at"]} == whole
    model.finish = "length"
    assert events_of(post(RESPONSES, {**BODIES[RESPONSES], "stream": True}))[-1]["type"] == "response.incomplete"


KNOWN = RequestError("No memory.", "input", "out_of_memory", 503)


@pytest.mark.parametrize(("error", "code"), [(KNOWN, "out_of_memory"), (KeyError("a secret"), "server_error")])
def test_failures_after_an_answer_has_begun_are_its_last_events(post, model, caplog, error, code):
    model.error = error
    *_, last = events_of(post(CHAT, {**BODIES[CHAT], "stream": True}))
    *_, failure, failed = events_of(post(RESPONSES, {**BODIES[RESPONSES], "stream": True}))
    message = last["error"]["message"]
    assert (message == "No memory.") == (error is KNOWN) and "secret" not in message
    assert last["error"]["code"] == (code if error is KNOWN else None) and last["error"]["type"] == "server_error"
    check_form(failure, openai.types.responses.ResponseErrorEvent)
    check_form(failed, openai.types.responses.ResponseFailedEvent)
    assert (failure["message"], failure["code"], failure["param"]) == (message, code, last["error"]["param"])
    assert failed["response"]["error"] == {"code": "server_error", "message": message}
    assert failed["response"]["status"] == "failed" and failed["sequence_number"] == failure["sequence_number"] + 1
    assert ("a secret" in caplog.text) == (error is not KNOWN)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", [None, "small", "org/small"])
def test_the_model_is_named_or_left_out(post, path, name):
    assert post(path, {**BODIES[path], "model": name}).json()["model"] == "small"
    refused = post(path, {**BODIES[path], "model": "org/other"})
    assert refused.status_code == 404
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("path", BODIES)
def test_a_failed_device_refuses_all_requests(post, model, path):
    model.health.failure = "It has failed."
    refused = post(path, BODIES[path])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "device_failed") and not model.calls


PARTS = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "https://h.test/a.png"}]


@pytest.mark.parametrize(
    ("given", "roles", "images"),
    [
        ("a", ["user"], 0),
        (PARTS, ["user"], 1),
        (
            [{"role": "assistant", "content": "b"}, {"role": "user", "content": PARTS}],
            ["user", "assistant", "user"],
            1,
        ),
        ([{"type": "message", "role": "user", "content": "a"}], ["user"], 0),
    ],
)
def test_forms_of_input(post, model, given, roles, images):
    assert post(RESPONSES, {"input": given, "instructions": "Be brief."}).status_code == 200
    conversation = model.calls[0][0]
    assert [turn["role"] for turn in conversation.messages] == ["system", *roles]
    assert len(conversation.sources) == images and conversation.param == "input"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        *[(RESPONSES, {"input": value}, "input") for value in (None, [], {}, ["a"], [PARTS[0], "a"], 3)],
        (RESPONSES, {"input": [{"type": "message"}]}, "input[0].role"),
        *[(RESPONSES, {"input": "a", "instructions": value}, "instructions") for value in (3, ["a"], {})],
        (RESPONSES, {"input": "a" * 9}, "input"),
        (RESPONSES, {"input": "a", "instructions": "a" * 9}, "instructions"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [user("a")], "boxes": 3}, "boxes"),
        (RESPONSES, {"input": "a", "boxes": 3}, "boxes"),
        *[(COMPLETIONS, {"prompt": value}, "prompt") for value in (None, "", [], {}, 3, ["a"] * 33, ["a", ""])],
        *[
            (COMPLETIONS, {"prompt": value}, "prompt")
            for value in ([10], [-1], [[1], [10]], [True], [[]], ["a", [[]]])
        ],
        *[(COMPLETIONS, {"prompt": value}, "prompt") for value in ("a" * 9, ["a" * 4, [1] * 5], ["a", 3], [1, "a"])],
    ],
)
def test_what_cannot_be_read_is_refused(post, model, monkeypatch, path, body, param):
    monkeypatch.setattr(messages, "MAX_TEXT_CHARACTERS", 8)
    refused = post(path, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param) and not model.calls


def test_what_is_at_the_limits_is_answered(post, monkeypatch):
    assert len(post(COMPLETIONS, {"prompt": ["a"] * 32}).json()["choices"]) == 32
    monkeypatch.setattr(messages, "MAX_TEXT_CHARACTERS", 8)
    for path, body in (
        *((COMPLETIONS, {"prompt": prompt}) for prompt in ("a" * 8, [0, 9], [[0, 9]], ["a" * 4, [1] * 4])),
        *((RESPONSES, {"input": "a" * 8, "instructions": "a" * 8}), (CHAT, {"messages": [user("a" * 8)]})),
    ):
        assert post(path, body).status_code == 200


def test_boxes_of_the_request_go_to_its_images(post, model):
    boxes = [[1, 2, 3, 4]]
    part = image("https://h.test/a.png")
    assert post(CHAT, {"messages": [user(part, text())], "boxes": [boxes]}).status_code == 200
    assert post(RESPONSES, {"input": PARTS, "boxes": [boxes]}).status_code == 200
    assert [call[0].sources[0].boxes for call in model.calls] == [boxes, boxes]
