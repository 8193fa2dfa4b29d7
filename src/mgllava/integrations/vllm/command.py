"""`mgllava serve --engine vllm`: its options as those of vLLM's server."""

import json
import os
import runpy
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mgllava.extras import install_hint
from mgllava.serving.image_urls import ImageHosts
from mgllava.serving.limits import ServingLimits

from . import NAME
from .options import PluginOptions

# Works where the distribution is not called `vllm`, as that for CPUs; the command `vllm` does not.
_SERVER = "vllm.entrypoints.openai.api_server"
# Options that vLLM has no counterpart for, with the values that they may have.
_UNKNOWN_TO_VLLM: dict[str, tuple[Any, ...]] = {
    "bits": (None,),
    "device": ("auto",),
    "attn_implementation": (None,),
    "allowed_hosts": ((), [], None),
    "default_seed": (None,),
    "num_frames": (None,),
}
_LIMITS_UNKNOWN_TO_VLLM = ("request_bytes", "concurrent_requests")
_LIMITS_OF_VIDEOS = ("videos", "video_bytes", "video_seconds", "video_frames", "video_side", "video_timeout")


def run_vllm(model: str, *, engine_options: str | None = None, limits: ServingLimits, **options: Any) -> None:
    """Run vLLM's server in this process; the arguments are the options of `mgllava serve`.

    Raises:
        ValueError: If an option has no counterpart in vLLM, or `engine_options` are not options of vLLM.
        ImportError: If vLLM is not installed.
    """
    arguments = vllm_arguments(model, limits, read_engine_options(engine_options), **options)
    if find_spec("vllm") is None:
        raise ImportError(f"`--engine vllm` needs vLLM. {install_hint('vllm')}")
    # Not in a new process, whose command line would show the API keys.
    sys.argv = [_SERVER, *arguments]
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)


def vllm_arguments(
    model: str,
    limits: ServingLimits,
    engine_options: Mapping[str, Any],
    *,
    host: str = "localhost",
    port: int = 8000,
    revision: str | None = None,
    dtype: str = "auto",
    compile: bool = False,
    trust_remote_code: bool = False,
    chat_template_kwargs: str | None = None,
    use_box_detector: bool = True,
    served_model_name: str | None = None,
    allowed_image_hosts: str = "public",
    api_keys: Any = (),
    enable_cors: bool = False,
    log_level: str = "warning",
    **others: Any,
) -> list[str]:
    """Return the command line of vLLM's server for options of `mgllava serve`.

    Raises:
        ValueError: If an option has no counterpart in vLLM, or is given twice.
    """
    for name, values in _UNKNOWN_TO_VLLM.items():
        if name in others and others[name] not in values:
            raise ValueError(
                f"`{name}` must be left out with `--engine vllm`, got {others[name]!r}: vLLM has no such option."
            )
    for name in (*_LIMITS_UNKNOWN_TO_VLLM, *_LIMITS_OF_VIDEOS):
        if (value := getattr(limits, name)) != getattr(ServingLimits, name):
            reason = "it takes no videos" if name in _LIMITS_OF_VIDEOS else "vLLM has no such limit"
            raise ValueError(f"`{name}` must be left out with `--engine vllm`, got {value!r}: {reason}.")
    if unknown := sorted(set(others) - set(_UNKNOWN_TO_VLLM)):
        raise TypeError(f"unexpected options: {', '.join(unknown)}")
    ImageHosts.parse(allowed_image_hosts)
    if not all(key.strip() for key in api_keys):
        raise ValueError("`api_keys` must not be empty.")
    name = Path(os.path.abspath(model)).name if os.path.isdir(model) else model
    plugin = PluginOptions(
        box_detector=use_box_detector, max_boxes=limits.boxes, allowed_image_hosts=allowed_image_hosts, limits=limits
    )
    extra = dict(engine_options.get("additional_config") or {})
    own = {**plugin.as_dict(), **(extra.get(NAME) or {})}
    PluginOptions.read({NAME: own})
    given: dict[str, Any] = {
        "model": model,
        "host": host,
        "port": port,
        "revision": revision,
        "tokenizer_revision": revision,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code or None,
        "default_chat_template_kwargs": chat_template_kwargs
        and _read_object("chat_template_kwargs", chat_template_kwargs),
        "served_model_name": served_model_name or name,
        "limit_mm_per_prompt": {"image": limits.images},
        "api_key": list(api_keys) or None,
        "allowed_origins": ["*"] if enable_cors else None,
        "uvicorn_log_level": log_level.lower(),
        "middleware": f"{__package__}.requests.BoxesField",
    }
    if taken := sorted(set(engine_options) & set(given)):
        raise ValueError(f"`engine_options` must not have {', '.join(taken)}: the command sets them itself.")
    settings = {**given, **engine_options, "additional_config": {**extra, NAME: own}}
    if compile and settings.get("enforce_eager"):
        raise ValueError("`compile` must be left out with `enforce_eager` in `engine_options`.")
    return [word for option, value in settings.items() for word in _words(option, value)]


def _words(option: str, value: Any) -> list[str]:
    flag = f"--{option.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if option == "api_key":
        return [flag, *value]
    return [flag, value if isinstance(value, str) else json.dumps(value)]


def read_engine_options(text: str | None) -> dict[str, Any]:
    """Read the option `--engine-options`; raise a `ValueError` if it is not a JSON object."""
    return _read_object("engine_options", text) if text else {}


def _read_object(name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"`{name}` must be a JSON object, got {text!r}.")
    return values


__all__ = ["read_engine_options", "run_vllm", "vllm_arguments"]
