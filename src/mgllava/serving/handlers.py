"""The endpoints that generate: those of `transformers serve`, with another way from the request to the model's inputs.

Images are downloaded on the event loop; decoding, box detection and tokenization run in a worker thread, generation in
another one. So the server answers while it computes.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError
from starlette.responses import JSONResponse, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState

from mgllava.serving.errors import RequestError, error_body
from mgllava.serving.generation import with_free_memory_after_failure
from mgllava.serving.image_urls import ImageHosts, download_image
from mgllava.serving.images import decode_image, read_data_url
from mgllava.serving.limits import ServingLimits
from mgllava.serving.messages import Conversation, check_text_length, read_messages
from mgllava.serving.options import check_options


class ServedModel:
    """The one model of a server, and the thread that prepares its inputs.

    Args:
        model_id (`str`): What the operator asked for: folder or Hub id.
        name (`str`): How clients call it.
        model ([`MGLlavaForConditionalGeneration`]): The model.
        processor ([`MGLlavaProcessor`]): Its processor.
    """

    def __init__(self, model_id: str, name: str, model: Any, processor: Any):
        self.model_id, self.name, self.model, self.processor = model_id, name, model, processor
        # One thread: tokenizers and the detector's cache of text embeddings are not made for several, and so only one
        # request at a time has decoded images.
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inputs")

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self.model.config.get_text_config().max_position_embeddings)


class _ServingHandler(BaseHandler):
    """What the endpoints share; mixed into the handlers of transformers.

    Args:
        served ([`ServedModel`]): The model.
        limits ([`ServingLimits`]): What a request may cost.
        hosts ([`ImageHosts`]): Where images may come from.
        model_manager ([`ModelManager`]): As in the base class.
        generation_state ([`GenerationState`]): As in the base class.
        chat_template_kwargs (`dict`, *optional*): As in the base class.
    """

    def __init__(
        self,
        served: ServedModel,
        limits: ServingLimits,
        hosts: ImageHosts,
        model_manager: ModelManager,
        generation_state: GenerationState,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(model_manager, generation_state, chat_template_kwargs)
        self._served, self._limits, self._hosts = served, limits, hosts

    async def handle_request(self, body: dict[str, Any], request_id: str) -> StreamingResponse | JSONResponse:
        """Answer a request.

        Args:
            body (`dict`): The request.
            request_id (`str`): Its id.

        Returns:
            `StreamingResponse` or `JSONResponse`: The answer.

        Raises:
            RequestError: If the request is not as it must be.
            HTTPException: If it has unknown fields.
        """
        served = self._served
        self._validate_request(body)
        if body.get("model") not in (None, served.name, served.model_id):
            raise RequestError(
                f"`model` must be {served.name!r}, got {str(body['model'])[:200]!r}: this server has one model.",
                "model",
                "model_not_found",
                404,
            )
        body = check_options(body, len(served.processor.tokenizer))
        gen_config = self._build_generation_config(body, served.model.generation_config)
        inputs = await self._make_inputs(body)
        room = served.context_length - inputs["input_ids"].shape[-1]
        if room < 1:
            raise RequestError(
                f"The prompt must leave room in the context of {served.context_length} tokens, images and boxes "
                f"included, got {inputs['input_ids'].shape[-1]}.",
                code="context_length_exceeded",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, room)
        arguments = (request_id, served.model, served.processor, served.name)
        options = {"inputs": inputs, "gen_config": gen_config, **self._extra_options(body)}
        options["gen_manager"] = self.generation_state.get_manager(served.model_id)
        if body.get("stream"):  # for responses too, which transformers streams by default, but OpenAI does not
            return self._streaming(*arguments, **options)  # type: ignore[attr-defined]
        return await self._non_streaming(*arguments, **options)  # type: ignore[attr-defined]

    def _extra_options(self, body: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def _make_inputs(self, body: dict[str, Any]) -> Any:
        raise NotImplementedError

    async def _encode_conversation(self, conversation: Conversation) -> Any:
        """Load the images of a conversation and make the model's inputs."""
        images = [image for image in conversation.images if not image.url.startswith("data:")]
        downloads = [
            asyncio.ensure_future(download_image(image.url, image.param, self._hosts, self._limits))
            for image in images
        ]
        try:
            for image, data in zip(images, await asyncio.gather(*downloads), strict=True):
                image.data = data
        finally:
            for download in downloads:
                download.cancel()
        return await self._in_worker(self._apply_chat_template, conversation)

    async def _in_worker(self, function: Any, *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._served.worker, with_free_memory_after_failure, function, *args)

    def _apply_chat_template(self, conversation: Conversation) -> Any:
        for image in conversation.images:
            data = image.data
            if data is None:
                data = read_data_url(image.url, image.param, self._limits)
            image.block["image"] = decode_image(data, image.param, self._limits)
        try:
            return self._served.processor.apply_chat_template(
                conversation.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **self.chat_template_kwargs,
            )
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(str(error), "messages") from error

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        try:
            config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        except (TypeError, ValueError) as error:  # a value in `generation_config`
            raise RequestError(str(error), "generation_config") from error
        if config.max_new_tokens is None:
            config.max_new_tokens = 1024  # what transformers takes without a `generation_config`
        if body.get("temperature") or (body.get("top_p") and body.get("temperature") is None):
            config.do_sample = True  # transformers leaves it to the model's default, which is to ignore both
        if body.get("temperature") == 0:
            config.temperature = 1.0  # greedy in any case; 0 is no valid value
        return config


class MGLlavaChatCompletionHandler(_ServingHandler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    async def _make_inputs(self, body: dict[str, Any]) -> Any:
        return await self._encode_conversation(read_messages(body.get("messages"), self._limits))

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        return _as_openai_stream(super()._streaming(*args, **kwargs))


class MGLlavaResponseHandler(_ServingHandler, ResponseHandler):
    """`/v1/responses`."""

    def _extra_options(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"body": body}

    async def _make_inputs(self, body: dict[str, Any]) -> Any:
        given, instructions = body.get("input"), body.get("instructions")
        if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
            raise RequestError("`input` must be a string or a list of objects.", "input")
        try:
            messages = self._normalize_input({"input": given})
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"`input` has an item that cannot be read: {error!r}.", "input") from error
        conversation = read_messages(messages, self._limits, root="input")
        if instructions is not None:
            if not isinstance(instructions, str):
                raise RequestError(f"`instructions` must be a string, got {instructions!r}.", "instructions")
            check_text_length(len(instructions), "instructions")
            if conversation.messages[0]["role"] == "system":
                del conversation.messages[0]
            system = {"role": "system", "content": [{"type": "text", "text": instructions}]}
            conversation.messages.insert(0, system)
        return await self._encode_conversation(conversation)


class MGLlavaCompletionHandler(_ServingHandler, CompletionHandler):
    """`/v1/completions`: text only."""

    async def _make_inputs(self, body: dict[str, Any]) -> Any:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(f"`prompt` must be a string, got {str(prompt)[:80]!r}.", "prompt")
        if not isinstance(body.get("suffix"), str | None):
            raise RequestError("`suffix` must be a string.", "suffix")
        check_text_length(len(prompt), "prompt")
        return await self._in_worker(self._encode_prompt, prompt)

    def _encode_prompt(self, prompt: str) -> Any:
        try:
            return self._served.processor(text=prompt, return_tensors="pt")
        except ValueError as error:
            raise RequestError(str(error), "prompt") from error

    def _extra_options(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"suffix": body.get("suffix")}

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        return _as_openai_stream(super()._streaming(*args, **kwargs))


def _as_openai_stream(response: StreamingResponse) -> StreamingResponse:
    """Close a stream as OpenAI does, and give errors within it their form."""
    response.body_iterator = _openai_events(response.body_iterator)
    return response


async def _openai_events(chunks: Any) -> AsyncIterator[str]:
    start, end = 'data: {"error": "', '"}\n\n'
    async for chunk in chunks:
        # Within text this would be escaped; the message itself is not.
        events, found, message = chunk.partition(start)
        if found:
            error = json.dumps(error_body(message.removesuffix(end), 500))
            yield f"{events}data: {error}\n\n"
            return
        yield chunk
    yield "data: [DONE]\n\n"
