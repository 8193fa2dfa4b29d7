"""The endpoints that generate text: OpenAI's chat completions, responses and completions."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers.utils import logging

from .errors import RequestError, error_body
from .generation import Answer, DeviceHealth, Generator
from .limits import MAX_PROMPTS
from .messages import Conversation, MessageReader, check_text_length
from .options import CHAT_FIELDS, COMPLETION_FIELDS, RESPONSE_FIELDS, Fields, Options, check_fields, read_options
from .prompts import PromptMaker
from .values import shown, wrong_value

logger = logging.get_logger(__name__)

Respond = Callable[[Response], Awaitable[None]]


@dataclass
class ServedModel:
    """The one model of a server.

    Attributes:
        model_id: The folder or Hub id that the operator named.
        name: How clients call it.
        vocab_size: Number of token ids.
        context_length: Tokens that a prompt and its answer may have together.
        compile: Whether to decode with a static cache.
    """

    model_id: str
    name: str
    model: Any
    messages: MessageReader
    prompts: PromptMaker
    generator: Generator
    health: DeviceHealth
    vocab_size: int
    context_length: int
    compile: bool = False


@dataclass
class _Job:
    """A request that has been checked.

    Attributes:
        frame: `id`, `created` and `model` of the answer.
        body: The request itself.
        prompts: The model's inputs for one prompt each.
    """

    frame: dict[str, Any]
    body: dict[str, Any]
    prompts: list[Any]
    options: Options


class _Handler(ABC):
    """Base class of the endpoints."""

    fields: Fields
    id_prefix: str

    def __init__(self, served: ServedModel):
        self._served = served

    async def handle_request(self, body: dict[str, Any], request_id: str, respond: Respond) -> None:
        """Answer a request through `respond`; raise a `RequestError` if it is invalid."""
        self._served.health.check()
        # In a thread, as checking the longest requests takes time.
        options, content = await asyncio.to_thread(self._read, body)
        frame = {"id": f"{self.id_prefix}{request_id}", "created": int(time.time()), "model": self._served.name}
        async with AsyncExitStack() as stack:
            job = _Job(frame, body, await self._make_prompts(content, stack), options)
            if options.is_stream:
                async with aclosing(_as_text(self._events(job))) as texts:
                    await respond(StreamingResponse(texts, media_type="text/event-stream"))
            else:
                await respond(JSONResponse(await self._whole(job)))

    def _read(self, body: dict[str, Any]) -> tuple[Options, Any]:
        """Check a request as a whole."""
        served = self._served
        check_fields(body, self.fields)
        if body.get("model") not in (None, served.name, served.model_id):
            raise RequestError(
                f"`model` must be {served.name!r}, got {shown(body['model'])}: this server has one model.",
                "model",
                "model_not_found",
                404,
            )
        options = read_options(body, served.model.generation_config, served.vocab_size, served.compile)
        return options, self._read_content(body)

    @abstractmethod
    def _read_content(self, body: dict[str, Any]) -> Any:
        """Check the field with the content of the prompts, and return it."""

    async def _make_prompts(self, content: Any, stack: AsyncExitStack) -> list[Any]:
        """Make the model's inputs; `stack` is closed after the answer."""
        return [await self._served.prompts.from_conversation(content, stack)]

    @abstractmethod
    async def _whole(self, job: _Job) -> dict[str, Any]:
        """Return the JSON of an answer."""

    @abstractmethod
    def _events(self, job: _Job) -> AsyncGenerator[Any, None]:
        """Generate the events of a stream."""


class _ChoiceHandler(_Handler):
    """Base class of chat completions and completions: answers are choices, and streams are chunks of choices."""

    kind: str
    chunk_kind: str
    is_continuation = False
    # Content of choices in a stream before and after the text.
    first: dict[str, Any] | None = None
    last: dict[str, Any]

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """Return the content of a whole choice."""

    @abstractmethod
    def _piece(self, text: str) -> dict[str, Any]:
        """Return the content of a choice in a stream."""

    async def _whole(self, job: _Job) -> dict[str, Any]:
        generator = self._served.generator
        answers = [await generator.answer(inputs, job.options, self.is_continuation) for inputs in job.prompts]
        choices = [
            _choice(index, self._content(answer.text), answer.finish_reason) for index, answer in enumerate(answers)
        ]
        return {**job.frame, "object": self.kind, "choices": choices, "usage": _usage(answers)}

    async def _events(self, job: _Job) -> AsyncGenerator[Any, None]:
        frame = {**job.frame, "object": self.chunk_kind}
        answers: list[Answer] = []
        for index, inputs in enumerate(job.prompts):
            if self.first is not None:
                yield {**frame, "choices": [_choice(index, self.first)]}
            async with aclosing(self._served.generator.stream(inputs, job.options, self.is_continuation)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, str):
                        yield {**frame, "choices": [_choice(index, self._piece(piece))]}
                    else:
                        answers.append(piece)
            end = {**frame, "choices": [_choice(index, self.last, answers[-1].finish_reason)]}
            # By default the numbers of tokens are in the last chunk, as in `transformers serve`.
            if index == len(job.prompts) - 1 and job.options.usage_in_stream is None:
                end["usage"] = _usage(answers)
            yield end
        if job.options.usage_in_stream:
            yield {**frame, "choices": [], "usage": _usage(answers)}
        yield "[DONE]"


class ChatCompletionHandler(_ChoiceHandler):
    """`/v1/chat/completions`."""

    fields = CHAT_FIELDS
    id_prefix = "chatcmpl-"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    first, last = {"delta": {"role": "assistant", "content": ""}}, {"delta": {}}

    def _read_content(self, body: dict[str, Any]) -> Conversation:
        return self._served.messages.read(body.get("messages"), boxes=body.get("boxes"))

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


class CompletionHandler(_ChoiceHandler):
    """`/v1/completions`: raw text without images; several prompts get one choice each."""

    fields = COMPLETION_FIELDS
    id_prefix = "cmpl-"
    kind = chunk_kind = "text_completion"
    is_continuation = True
    last = {"text": ""}

    def _read_content(self, body: dict[str, Any]) -> list[str | list[int]]:
        prompt = body.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) or _is_token_list(prompt) else prompt
        if not isinstance(prompts, list) or not 0 < len(prompts) <= MAX_PROMPTS:
            raise RequestError(
                f"`prompt` must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of them, got "
                f"{shown(prompt)}.",
                "prompt",
            )
        for index, one in enumerate(prompts):
            param = "prompt" if one is prompt else f"prompt[{index}]"
            if not (isinstance(one, str) or _is_token_list(one)) or not one:
                raise wrong_value(param, "text or a list of token ids", one, param="prompt")
            if isinstance(one, list) and not all(0 <= token < self._served.vocab_size for token in one):
                raise RequestError(
                    f"`{param}` must have token ids below {self._served.vocab_size}, got {shown(one)}.", "prompt"
                )
        check_text_length(sum(map(len, prompts)), "prompt")
        return prompts

    async def _make_prompts(self, content: list[str | list[int]], stack: AsyncExitStack) -> list[Any]:
        maker = self._served.prompts
        return [
            await maker.from_text(prompt, "prompt") if isinstance(prompt, str) else maker.from_tokens(prompt, "prompt")
            for prompt in content
        ]

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _piece = _content


class ResponseHandler(_Handler):
    """`/v1/responses`."""

    fields = RESPONSE_FIELDS
    id_prefix = "resp_"

    def _read_content(self, body: dict[str, Any]) -> Conversation:
        given, instructions = body.get("input"), body.get("instructions")
        if instructions is not None:
            if not isinstance(instructions, str):
                raise wrong_value("instructions", "a string", instructions)
            check_text_length(len(instructions), "instructions")
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        elif isinstance(given, list) and given and all(isinstance(item, dict) for item in given):
            # Parts without a message are the content of one message.
            if not any("role" in item or item.get("type") == "message" for item in given):
                given = [{"role": "user", "content": given}]
        else:
            raise wrong_value("input", "a string or a list of objects", given)
        return self._served.messages.read(given, "input", instructions, body.get("boxes"))

    def _response(self, job: _Job, status: str, **fields: Any) -> dict[str, Any]:
        return {
            "id": job.frame["id"],
            "object": "response",
            "created_at": job.frame["created"],
            "model": job.frame["model"],
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": job.body.get("instructions"),
            "max_output_tokens": job.body.get("max_output_tokens"),
            "metadata": job.body["metadata"] if isinstance(job.body.get("metadata"), dict) else {},
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": job.body.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": job.body.get("top_p"),
            "truncation": "disabled",
            "usage": None,
            **fields,
        }

    def _finished(self, job: _Job, answer: Answer) -> dict[str, Any]:
        is_whole = answer.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        usage = {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
        details = None if is_whole else {"reason": "max_output_tokens"}
        output = [self._message(job, status, answer.text)]
        return self._response(job, status, output=output, incomplete_details=details, usage=usage)

    def _message(self, job: _Job, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [_text_part(text)]
        name = job.frame["id"].removeprefix(self.id_prefix)
        return {"id": f"msg_{name}", "type": "message", "status": status, "role": "assistant", "content": content}

    async def _whole(self, job: _Job) -> dict[str, Any]:
        return self._finished(job, await self._served.generator.answer(job.prompts[0], job.options))

    async def _events(self, job: _Job) -> AsyncGenerator[Any, None]:
        number = -1

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": kind, "sequence_number": number, **fields}

        message = self._message(job, "in_progress")
        place: dict[str, Any] = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        for state in ("created", "in_progress"):
            yield event(f"response.{state}", response=self._response(job, "in_progress"))
        yield event("response.output_item.added", output_index=0, item=message)
        yield event("response.content_part.added", **place, part=_text_part(""))
        try:
            async with aclosing(self._served.generator.stream(job.prompts[0], job.options)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, str):
                        yield event("response.output_text.delta", **place, delta=piece, logprobs=[])
                        continue
                    finished = self._finished(job, piece)
                    yield event("response.output_text.done", **place, text=piece.text, logprobs=[])
                    yield event("response.content_part.done", **place, part=_text_part(piece.text))
                    yield event("response.output_item.done", output_index=0, item=finished["output"][0])
                    yield event(f"response.{finished['status']}", response=finished)
        except Exception as error:
            details = _error_details(error)
            yield event(
                "error", message=details["message"], code=details["code"] or details["type"], param=details["param"]
            )
            failure = {"code": "server_error", "message": details["message"]}
            yield event("response.failed", response=self._response(job, "failed", error=failure))


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _choice(index: int, content: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(answers: list[Answer]) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error_details(error: Exception) -> dict[str, Any]:
    """Return the JSON of an error that occurs after the answer has begun."""
    if not isinstance(error, RequestError):
        logger.error("Generation failed.", exc_info=error)
    details: dict[str, Any] = error_body(error)["error"]
    return details


async def _as_text(events: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
    """Write server-sent events; an error is the last one."""
    async with aclosing(events):
        try:
            async for event in events:
                data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
                kind = f"event: {event['type']}\n" if isinstance(event, dict) and "type" in event else ""
                yield f"{kind}data: {data}\n\n"
        except Exception as error:
            yield f"data: {json.dumps({'error': _error_details(error)})}\n\n"


__all__ = ["ChatCompletionHandler", "CompletionHandler", "ResponseHandler", "ServedModel"]
