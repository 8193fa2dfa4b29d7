"""Load a model and serve it."""

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import uvicorn
from transformers import ProcessorMixin
from transformers.utils import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from mgllava.chat.loading import load
from mgllava.extras import install_hint
from mgllava.families import takes_boxes, takes_videos
from mgllava.user_text import encode_conversation

from .app import build_app
from .gate import AllowedHosts
from .generation import DeviceHealth, Generator
from .handlers import ChatCompletionHandler, CompletionHandler, ResponseHandler, ServedModel
from .image_urls import ImageHosts
from .limits import HEAD_TIMEOUT, ServingLimits
from .messages import MessageReader
from .prompts import PromptMaker

# Seconds that answers may still take after the server has been asked to stop.
_SHUTDOWN_TIMEOUT = 30
# Arguments of the calls that apply a chat template, which are not variables of the template.
_TEMPLATE_ARGUMENTS = {
    "sanitize_control_tokens",
    *signature(encode_conversation).parameters,
    *signature(ProcessorMixin.apply_chat_template).parameters,
} - {"documents"}


class _ImpatientProtocol(H11Protocol):
    """Closes connections on which the head of a request does not arrive in time; uvicorn waits forever."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _hang_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def run_server(
    model: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    limits: ServingLimits,
    allowed_image_hosts: str = "public",
    allowed_hosts: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    served_model_name: str | None = None,
    compile: bool = False,
    chat_template_kwargs: str | None = None,
    enable_cors: bool = False,
    log_level: str = "warning",
    default_seed: int | None = None,
    num_frames: int | None = None,
    **options: Any,
) -> None:
    """Load a model and serve it until the process is stopped; the arguments are the options of `mgllava serve`."""
    # Loading takes minutes, so everything else is checked first.
    hosts = ImageHosts.parse(allowed_image_hosts)
    names = AllowedHosts(host, allowed_hosts)
    if not all(key.strip() for key in api_keys):
        raise ValueError("`api_keys` must not be empty.")
    template_kwargs = _read_template_kwargs(chat_template_kwargs)
    if log_level.lower() not in logging.log_levels:
        raise ValueError(f"`log_level` must be one of {', '.join(logging.log_levels)}, got {log_level!r}.")
    for package in ("transformers", "mgllava"):
        logging.get_logger(package).setLevel(logging.log_levels[log_level.lower()])
    if default_seed is not None and not -(2**63) <= default_seed < 2**63:
        raise ValueError(f"`default_seed` must have 64 bits, got {default_seed}.")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"`num_frames` must be a positive number, got {num_frames}.")
    if limits.videos and find_spec("av") is None:
        raise ImportError(f"`videos` needs PyAV, which decodes videos of clients. {install_hint('video')}")

    loaded, processor = load(model, **options)
    if takes_boxes(processor):
        processor.box_detector  # noqa: B018  (loads it: the first request should not wait)
    health = DeviceHealth(loaded.device)
    context_length = int(loaded.config.get_text_config().max_position_embeddings)
    no_videos, num_frames = _check_videos(processor, context_length, limits.videos, num_frames)
    prompts = PromptMaker(processor, context_length, limits, hosts, health, template_kwargs, num_frames)
    served = ServedModel(
        model,
        served_model_name or (Path(os.path.abspath(model)).name if os.path.isdir(model) else model),
        loaded,
        MessageReader(limits, prompts.takes_boxes, no_videos),
        prompts,
        Generator(loaded, processor.tokenizer, context_length, health, default_seed),
        health,
        vocab_size=len(processor.tokenizer),
        context_length=context_length,
        compile=compile,
    )
    handlers = {
        "/v1/chat/completions": ChatCompletionHandler(served),
        "/v1/responses": ResponseHandler(served),
        "/v1/completions": CompletionHandler(served),
    }
    app = build_app(handlers, served, limits, enable_cors, names, api_keys)
    _allow_many_connections()
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="info",
        http=_ImpatientProtocol,
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT,
    )


def _check_videos(
    processor: Any, context_length: int, max_videos: int, num_frames: int | None
) -> tuple[str | None, int]:
    """Return why no videos are taken (`None` if they are), and the number of frames; refuse what does not fit."""
    if not max_videos:
        if num_frames is not None:
            raise ValueError("`num_frames` must be left out without `videos`: no videos are taken.")
        if takes_videos(processor):
            return "this server takes no videos; its operator can allow them (`--max-videos`)", 0
        return "this model takes no videos", 0
    if not takes_videos(processor):
        raise ValueError(
            "`videos` must be 0: this model takes no videos. A model of MG-LLaVA that was saved without them gets "
            "them from `mgllava.add_videos`."
        )
    number = int(processor.video_processor.num_frames if num_frames is None else num_frames)
    least = number * processor.image_seq_length
    if least >= context_length:
        raise ValueError(
            f"`num_frames` must leave room in the model's context of {context_length} tokens "
            f"(`max_position_embeddings` of its language model): {number} frames take at least {least}. Sample at "
            f"most {(context_length - 1) // processor.image_seq_length}."
        )
    return None, number


def _read_template_kwargs(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text) if text else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"`chat_template_kwargs` must be a JSON object, got {text!r}.")
    if taken := sorted(_TEMPLATE_ARGUMENTS & set(values)):
        raise ValueError(f"`chat_template_kwargs` must hold variables of the template, got {', '.join(taken)}.")
    return values


def _allow_many_connections() -> None:
    """Raise the number of open files to the system's limit: even clients that send nothing hold one for a while."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


__all__ = ["run_server"]
