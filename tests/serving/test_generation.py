"""What the running server cannot show: a lack of memory, errors within a stream, and bytes that are no text."""

import asyncio
import json

import pytest
import torch
from starlette.responses import StreamingResponse
from transformers import BatchFeature, GenerationConfig
from transformers.cli.serving.utils import _StreamError

from mgllava.serving import generation
from mgllava.serving.errors import RequestError
from mgllava.serving.generation import ServingGenerateManager
from mgllava.serving.handlers import _as_openai_stream


class Model:
    """Fails at generation, or generates until it is stopped."""

    device = "cpu"

    def __init__(self, error=None):
        self.error, self.steps = error, 0

    def generate(self, input_ids, stopping_criteria=None, **kwargs):
        if self.error is not None:
            raise self.error
        while not stopping_criteria(input_ids, None).all():
            self.steps += 1
        return input_ids


@pytest.fixture
def freed(monkeypatch):
    calls = []
    monkeypatch.setattr(generation, "clear_device_cache", lambda **kwargs: calls.append(kwargs))
    return calls


def inputs():
    return BatchFeature({"input_ids": torch.tensor([[1, 2]])})


async def answer(model, processor):
    manager = ServingGenerateManager()
    return await manager.generate_non_streaming(model, processor, inputs(), GenerationConfig(), "id")


async def stream(model, processor):
    manager = ServingGenerateManager()
    queue, _ = manager.generate_streaming(model, processor, inputs(), GenerationConfig(), "id")
    return await asyncio.wait_for(queue.get(), 10)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["device", "cpu", "python"])
def test_lack_of_memory_is_freed_and_said(processor, freed, error):
    with pytest.raises(RequestError) as raised:
        asyncio.run(answer(Model(error), processor))
    assert (raised.value.status, raised.value.code) == (503, "out_of_memory") and len(freed) == 1
    item = asyncio.run(stream(Model(error), processor))
    assert isinstance(item, _StreamError) and "memory does not suffice" in item.msg and len(freed) == 2


def test_other_failures_do_not_show_their_text(processor, freed):
    item = asyncio.run(stream(Model(RuntimeError("/home/operator/secret")), processor))
    assert "secret" not in item.msg and not freed
    with pytest.raises(RequestError, match="must be positive"):
        asyncio.run(answer(Model(ValueError("`temperature` must be positive")), processor))


def test_cancelled_answer_stops_and_a_waiting_one_never_starts(processor):
    async def run():
        manager = ServingGenerateManager()
        models = [Model(), Model()]
        tasks = [
            asyncio.ensure_future(manager.generate_non_streaming(model, processor, inputs(), GenerationConfig(), "id"))
            for model in models
        ]
        while models[0].steps == 0:
            await asyncio.sleep(0.01)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.wait_for(manager.async_submit(lambda: None), 10)  # the thread is free
        assert models[0].steps > 0 and models[1].steps == 0

    asyncio.run(run())


def test_stream_error_has_openai_form_whatever_its_text():
    async def chunks():
        yield 'data: {"choices": "data: {\\"error\\": \\""}\n\n'
        yield 'data: {"more": 1}\n\ndata: {"error": "a "quoted"\nmessage"}\n\n'

    async def run():
        response = _as_openai_stream(StreamingResponse(chunks()))
        return "".join([chunk async for chunk in response.body_iterator])

    events = asyncio.run(run()).split("\n\n")
    assert [json.loads(event.removeprefix("data: ")) for event in events[1:3]] == [
        {"more": 1},
        {"error": {"message": 'a "quoted"\nmessage', "type": "server_error", "param": None, "code": None}},
    ]
    assert "error" not in json.loads(events[0].removeprefix("data: "))


def test_bytes_that_form_no_character_do_not_end_a_stream(processor):
    """A byte-fallback letter is sent, the next byte makes both of them invalid: the text before has changed."""
    tokenizer = processor.tokenizer
    decoder = generation._DecodeStream(skip_special_tokens=True)
    tokens = tokenizer.convert_tokens_to_ids(["<0x47>", "<0xE2>", "o", "r"])
    pieces = [decoder.step(tokenizer._tokenizer, token) or "" for token in tokens]
    assert "".join(pieces) == "G\N{REPLACEMENT CHARACTER}or"
