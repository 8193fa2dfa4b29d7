"""Loading a model and serving it."""

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

import mgllava

from .app import build_app
from .gate import AllowedHosts
from .generation import DeviceHealth, Generator
from .handlers import ChatCompletionHandler, CompletionHandler, ResponseHandler, ServedModel
from .image_urls import ImageHosts
from .limits import HEAD_TIMEOUT, ServingLimits
from .messages import MessageReader
from .prompts import PromptMaker

# Seconds that answers may still take after the server was told to stop.
_SHUTDOWN_TIMEOUT = 30
# Arguments of `apply_chat_template` that are no variables of the template.
_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "messages",
    "processor",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tools",
}


class _ImpatientProtocol(H11Protocol):
    """Hangs up where the head of a request does not arrive in time; uvicorn waits for ever."""

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
    limits: ServingLimits | None = None,
    allowed_image_hosts: str = "public",
    allowed_hosts: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    served_model_name: str | None = None,
    use_detector: bool = True,
    compile: bool = False,
    chat_template_kwargs: str | None = None,
    enable_cors: bool = False,
    log_level: str = "warning",
    default_seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    bits: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Load a model and serve it until the process is told to stop.

    Args:
        model (`str`): MG-LLaVA repository: folder or Hub id, which may end in `@revision`.
        host (`str`): Address to listen at.
        port (`int`): Port to listen at.
        limits ([`ServingLimits`], *optional*): What a request may cost.
        allowed_image_hosts (`str`): See [`ImageHosts.parse`].
        allowed_hosts (`Sequence[str]`): Names of this server, see [`AllowedHosts`].
        api_keys (`Sequence[str]`): Keys of which requests must have one; without any, all may ask.
        served_model_name (`str`, *optional*): How clients call the model; by default the folder's name, or the id.
        use_detector (`bool`): Whether to use the box detector of the model, if it has one.
        compile (`bool`): Whether to compile decoding, with a static cache.
        chat_template_kwargs (`str`, *optional*): JSON object; variables of the chat template.
        enable_cors (`bool`): Whether web pages of all origins may send requests.
        log_level (`str`): Of transformers and this package.
        default_seed (`int`, *optional*): Seed of sampling for requests that have none.
        device (`str`): `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"` or `"1"`.
        dtype (`str`): `"auto"`, or the name of a dtype of torch.
        bits (`int`, *optional*): 4 or 8, to load the language model quantized.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        trust_remote_code (`bool`): Whether code of the repository may run.

    Raises:
        OSError: If there is no such repository.
        ValueError: If it is no MG-LLaVA, or an option has no such value.
    """
    # Loading takes minutes: what can be wrong without the model is found before.
    hosts = ImageHosts.parse(allowed_image_hosts)
    names = AllowedHosts(host, allowed_hosts)
    if not all(key.strip() for key in api_keys):
        raise ValueError("`api_keys` must not be empty.")
    limits = limits or ServingLimits()
    template_kwargs = _read_template_kwargs(chat_template_kwargs)
    if log_level.lower() not in logging.log_levels:
        raise ValueError(f"`log_level` must be one of {', '.join(logging.log_levels)}, got {log_level!r}.")
    for package in ("transformers", "mgllava"):
        logging.get_logger(package).setLevel(logging.log_levels[log_level.lower()])
    quantization = None if bits is None else mgllava.quantization_config(bits)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto' or a dtype of torch such as 'bfloat16', got {dtype!r}.")
    if default_seed is not None and not -(2**63) <= default_seed < 2**63:
        raise ValueError(f"`default_seed` must have 64 bits, got {default_seed}.")

    name, _, revision = (model, "", "") if os.path.exists(model) else model.partition("@")
    source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **source)
    if config.model_type != mgllava.MGLlavaConfig.model_type:
        raise ValueError(
            f"`model` must be an MG-LLaVA repository, got {model!r} of type {config.model_type!r}. "
            "Use `transformers serve` for other models."
        )
    processor = AutoProcessor.from_pretrained(name, **source)
    if not use_detector:
        processor.box_detector = None
    processor.box_detector  # noqa: B018  (loads it: the first request should not wait)
    loaded = AutoModelForImageTextToText.from_pretrained(
        name,
        dtype=dtype,
        device_map=int(device) if device.isdecimal() else device,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
        **source,
    ).eval()

    health = DeviceHealth(loaded.device)
    context_length = int(loaded.config.get_text_config().max_position_embeddings)
    prompts = PromptMaker(processor, context_length, limits, hosts, health, template_kwargs)
    served = ServedModel(
        model,
        served_model_name or (Path(os.path.abspath(model)).name if os.path.isdir(model) else model),
        loaded,
        MessageReader(limits, prompts.has_boxes),
        prompts,
        Generator(loaded, processor.tokenizer, health, default_seed),
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
    """Raise the number of open files to what the system allows: clients that send nothing take some for a while."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


__all__ = ["run_server"]
