"""Loading a model and serving it."""

import json
import os
from pathlib import Path
from typing import Any, cast

import uvicorn
from transformers import AutoConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import set_torch_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

import mgllava
from mgllava.serving.app import build_app
from mgllava.serving.generation import ServingGenerationState
from mgllava.serving.handlers import (
    MGLlavaChatCompletionHandler,
    MGLlavaCompletionHandler,
    MGLlavaResponseHandler,
    ServedModel,
)
from mgllava.serving.image_urls import ImageHosts
from mgllava.serving.limits import ServingLimits

# Seconds that answers may still take after the server was told to stop.
_SHUTDOWN_TIMEOUT = 30


def run_server(
    model: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    limits: ServingLimits | None = None,
    allowed_image_hosts: str = "public",
    served_model_name: str | None = None,
    box_detector: bool = True,
    compile: bool = False,
    chat_template_kwargs: str | None = None,
    enable_cors: bool = False,
    log_level: str = "warning",
    default_seed: int | None = None,
    **model_options: Any,
) -> None:
    """Load a model and serve it until the process is told to stop.

    Args:
        model (`str`): MG-LLaVA repository: folder or Hub id, which may end in `@revision`.
        host (`str`): Address to listen at.
        port (`int`): Port to listen at.
        limits ([`ServingLimits`], *optional*): What a request may cost.
        allowed_image_hosts (`str`): See [`ImageHosts.parse`].
        served_model_name (`str`, *optional*): How clients call the model; by default the folder's name, or the id.
        box_detector (`bool`): Whether to use the detector of the repository, if it has one.
        compile (`bool`): Whether to compile decoding, with a static cache.
        chat_template_kwargs (`str`, *optional*): JSON object; variables of the chat template.
        enable_cors (`bool`): Whether web pages of all origins may send requests.
        log_level (`str`): Of transformers and this package.
        default_seed (`int`, *optional*): Seed of sampling.
        **model_options: `device`, `dtype`, `quantization`, `attn_implementation` and `trust_remote_code` as in
            `transformers serve`.

    Raises:
        OSError: If there is no such repository.
        ValueError: If it is no MG-LLaVA, or an option has no such value.
    """
    hosts = ImageHosts.parse(allowed_image_hosts)
    limits = limits or ServingLimits()
    template_kwargs = json.loads(chat_template_kwargs) if chat_template_kwargs else {}
    if not isinstance(template_kwargs, dict):
        raise ValueError(f"`chat_template_kwargs` must be a JSON object, got {chat_template_kwargs!r}.")
    if log_level.lower() not in logging.log_levels:
        raise ValueError(f"`log_level` must be one of {', '.join(logging.log_levels)}, got {log_level!r}.")
    for package in ("transformers", "mgllava"):
        logging.get_logger(package).setLevel(logging.log_levels[log_level.lower()])
    if default_seed is not None:
        set_torch_seed(default_seed)

    model_id, _, revision = model.partition("@")
    trust_remote_code = bool(model_options.get("trust_remote_code"))
    config = AutoConfig.from_pretrained(model_id, revision=revision or "main", trust_remote_code=trust_remote_code)
    if config.model_type != mgllava.MGLlavaConfig.model_type:
        raise ValueError(
            f"`model` must be an MG-LLaVA repository, got {model!r} of type {config.model_type!r}. "
            "Use `transformers serve` for other models."
        )
    # Where transformers looks up, by names only, which classes it can serve.
    class_name = mgllava.MGLlavaForConditionalGeneration.__name__
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[mgllava.MGLlavaConfig.model_type] = class_name
    manager = ModelManager(force_model=model, **model_options)
    loaded, processor = cast(Any, manager.load_model_and_processor(manager.process_model_name(model)))
    if not box_detector:
        processor.box_detector = None
    processor.box_detector  # noqa: B018  (loads it: the first request should not wait, nor several load it at once)

    name = served_model_name or (Path(os.path.abspath(model)).name if os.path.isdir(model) else model)
    served = ServedModel(model, name, loaded.eval(), processor)
    state = ServingGenerationState(compile=compile)
    arguments = (served, limits, hosts, manager, state)
    handlers = {
        "/v1/chat/completions": MGLlavaChatCompletionHandler(*arguments, chat_template_kwargs=template_kwargs),
        "/v1/responses": MGLlavaResponseHandler(*arguments, chat_template_kwargs=template_kwargs),
        "/v1/completions": MGLlavaCompletionHandler(*arguments),
    }
    app = build_app(handlers, name, limits, enable_cors)
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT)
