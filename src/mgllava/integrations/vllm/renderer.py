"""From messages and texts to ids and images with boxes, as the processor and `mgllava serve` do it."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from mgllava.families import takes_boxes
from mgllava.serving.messages import in_trained_order
from mgllava.user_text import break_tokens, control_tokens

from .box_finder import BoxFinder
from .boxed_images import BoxedImage, as_parts, boxed_images, boxes_in_parts, digest
from .hooks import (
    HfRenderer,
    TokensPrompt,
    VLLMValidationError,
    make_async,
    parse_chat_messages,
    parse_chat_messages_async,
)
from .options import PluginOptions
from .processing import open_item
from .requests import RequestReader

# Options of `apply_chat_template` that are not those of the processor, or are given apart.
_NOT_FOR_PROCESSORS = ("tokenize", "chat_template")


class ServedRenderer(HfRenderer):
    """Renders with the model's own processor.

    Messages from Python give the ids of `processor.apply_chat_template`. Messages over HTTP give those of
    `mgllava serve`, where control tokens in texts are text, and turns are brought into the order of training.
    """

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        self._options = PluginOptions.read(config.additional_config)
        self._encode_async = make_async(self._encode, executor=self._executor)

    @cached_property
    def _processor(self) -> Any:
        return self.get_mm_processor().info.get_hf_processor()

    @cached_property
    def _finder(self) -> BoxFinder | None:
        finds = self._options.box_detector and takes_boxes(self._processor)
        return BoxFinder(self._processor, self._options) if finds else None

    @cached_property
    def _reader(self) -> RequestReader | None:
        """Reads requests as `mgllava serve` does, if the operator wants that."""
        return RequestReader.of(self._options, self._processor)

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """Render messages from Python."""
        with _as_request_errors():
            messages = as_parts(messages)
            boxes = boxes_in_parts(messages)
            conversation, data, names = parse_chat_messages(
                messages,
                self.model_config,
                content_format="openai",
                media_io_kwargs=params.media_io_kwargs,
                mm_processor_kwargs=params.mm_processor_kwargs,
            )
            prompt = TokensPrompt(prompt_token_ids=self._encode(conversation, params))
            return conversation, self._with_images(prompt, data, names, params, boxes)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """Render messages of a request."""
        with _as_request_errors():
            if self._reader is not None:
                conversation, images = await self._reader.read(messages)
                prompt = TokensPrompt(prompt_token_ids=await self._encode_async(conversation, params, True))
                if images:
                    prompt["multi_modal_data"] = {"image": images}
                return conversation, prompt
            messages = as_parts(messages)
            boxes = boxes_in_parts(messages)
            conversation, data, names = await parse_chat_messages_async(
                messages,
                self.model_config,
                content_format="openai",
                media_io_kwargs=params.media_io_kwargs,
                mm_processor_kwargs=params.mm_processor_kwargs,
            )
            prompt = TokensPrompt(prompt_token_ids=await self._encode_async(conversation, params, True))
            return conversation, self._with_images(prompt, data, names, params, boxes)

    def _encode(self, conversation: list[Any], params: Any, is_request: bool = False) -> list[int]:
        """Return the ids of a conversation, with one placeholder per image."""
        options = dict(params.get_apply_chat_template_kwargs())
        template = options.get("chat_template")
        options = {
            name: value
            for name, value in options.items()
            if name not in _NOT_FOR_PROCESSORS and value is not None and value is not False
        }
        if is_request:
            conversation = break_tokens(_plain_blocks(conversation), control_tokens(self._processor))
            if not options.get("continue_final_message"):
                conversation = in_trained_order(conversation)
        with _as_request_errors():
            ids: list[int] = self._processor.encode_text(conversation, chat_template=template, **options)[0]
        return ids

    @staticmethod
    def _with_images(prompt: Any, data: Any, names: Any, params: Any, boxes: list[Any]) -> Any:
        """Add the images of a conversation, with their boxes, to a prompt."""
        if data is not None:
            images = [
                {"image": image, "boxes": entry} if entry is not None else image
                for image, entry in zip(data.get("image", []), boxes, strict=True)
            ]
            given = (params.mm_processor_kwargs or {}).get("boxes")
            prompt["multi_modal_data"] = {**data, "image": boxed_images(images, given)}
        if names is not None:
            prompt["multi_modal_uuids"] = names
        return prompt

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """Encode a text in the processor's chunks."""
        ids, _ = self._processor.encode_text(prompt["prompt"], add_special_tokens=params.add_special_tokens)
        return TokensPrompt(prompt_token_ids=ids, **prompt)

    def tokenize_prompts(self, prompts: Sequence[Any], params: Any) -> list[Any]:
        """Tokenize prompts, and find the boxes of all their images together."""
        prompts = super().tokenize_prompts(prompts, params)
        waiting = [self._submit(prompt) for prompt in prompts]
        return [
            self._completed(prompt, [future and future.result() for future in futures])
            for prompt, futures in zip(prompts, waiting, strict=True)
        ]

    async def tokenize_prompts_async(self, prompts: Sequence[Any], params: Any) -> list[Any]:
        """Tokenize prompts, and find the boxes of their images together with those of other requests."""
        prompts = await super().tokenize_prompts_async(prompts, params)
        waiting = [self._submit(prompt) for prompt in prompts]
        return [
            self._completed(prompt, [future and await asyncio.wrap_future(future) for future in futures])
            for prompt, futures in zip(prompts, waiting, strict=True)
        ]

    def _submit(self, prompt: Any) -> list[Future[Any] | None]:
        """Bring the images of a prompt together with their boxes; return what will give the missing ones."""
        images = (prompt.get("multi_modal_data") or {}).get("image")
        if images is None:
            if self._processor.image_token_id in prompt.get("prompt_token_ids", ()):
                raise VLLMValidationError(
                    "The prompt has a placeholder of an image, but no image.", parameter="prompt"
                )
            return []
        with _as_request_errors():
            items = boxed_images(images, (prompt.get("mm_processor_kwargs") or {}).get("boxes"))
        prompt["multi_modal_data"] = {**prompt["multi_modal_data"], "image": items}
        names = (prompt.get("multi_modal_uuids") or {}).get("image") or [None] * len(items)
        names = [names] if isinstance(names, str) else names
        return [self._find(item, name) for item, name in zip(items, names, strict=True)]

    def _find(self, item: BoxedImage, name: str | None) -> Future[Any] | None:
        """Ask for the boxes of an image that has none; `name` is what the user calls it."""
        if self._finder is None or item.boxes is not None or item.is_complete:
            return None
        if item.image is None and name is None:
            return None
        key = f"file {digest(item.image)}" if name is None else f"name {name}"
        return self._finder.submit(key, None if item.image is None else open_item(item.image))

    @staticmethod
    def _completed(prompt: Any, found: Sequence[Any]) -> Any:
        """Put boxes that were found into a prompt."""
        if not found:
            return prompt
        items = prompt["multi_modal_data"]["image"]
        items = [
            item if item.boxes is not None or item.is_complete else item.with_boxes(boxes)
            for item, boxes in zip(items, found, strict=True)
        ]
        return {**prompt, "multi_modal_data": {**prompt["multi_modal_data"], "image": items}}

    def _process_multimodal(
        self, prompt: list[int], mm_data: Any, mm_uuids: Any, mm_processor_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Process images, whose boxes are with them by now; the text is put with them if they depend on it."""
        if mm_data.get("image") is not None and self.get_mm_processor().info.has_router:
            token, images = self._processor.image_token_id, boxed_images(mm_data["image"])
            if prompt.count(token) != len(images):
                raise VLLMValidationError(
                    f"The prompt must have one placeholder (id {token}) per image, got {prompt.count(token)} "
                    f"placeholders for {len(images)} images: how many tokens an image takes depends on the text.",
                    parameter="prompt",
                )
            text_ids = tuple(token_id for token_id in prompt if token_id != token)
            mm_data = {**mm_data, "image": [replace(image, text_ids=text_ids) for image in images]}
        options = {name: value for name, value in (mm_processor_kwargs or {}).items() if name != "boxes"}
        return super()._process_multimodal(prompt, mm_data, mm_uuids, options, *args, **kwargs)


def _plain_blocks(conversation: list[Any]) -> list[Any]:
    """Copy a conversation with the roles and blocks that templates know, and without boxes."""
    roles = {"developer": "system"}
    copied = []
    for message in conversation:
        parts = message.get("content") or ""
        if isinstance(parts, str):  # results of tools, and empty messages
            parts = [{"type": "text", "text": parts}]
        blocks = [{key: part[key] for key in ("type", "text") if key in part} for part in parts]
        calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
        copied.append({"role": roles.get(message["role"], message["role"]), "content": blocks, **calls})
    return copied


class _as_request_errors:  # noqa: N801  (reads like a function)
    """Raises errors of the processor as errors of the request."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, ValueError | TypeError | TemplateError) and not isinstance(error, VLLMValidationError):
            raise VLLMValidationError(str(error), parameter="messages") from error


__all__ = ["ServedRenderer"]
