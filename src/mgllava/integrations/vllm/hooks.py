"""All names of vLLM that the plugin uses, and a check that the methods which it overrides still exist.

vLLM does not promise that these stay. A name that is gone fails here on import; a method that is gone would not fail
when it is overridden, so [`check_hooks`] looks for it.
"""

import inspect
from typing import Any

import vllm
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.image import open_image
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.transformers_utils.processor import cached_processor_from_config
from vllm.utils.async_utils import make_async

# The methods that the plugin overrides, with the arguments that it takes from vLLM.
OVERRIDDEN: dict[type, dict[str, tuple[str, ...]]] = {
    HfRenderer: {
        "render_messages": ("messages", "params"),
        "render_messages_async": ("messages", "params"),
        "tokenize_prompts": ("prompts", "params"),
        "tokenize_prompts_async": ("prompts", "params"),
        "_tokenize_prompt": ("prompt", "params"),
        "_process_multimodal": ("prompt", "mm_data", "mm_uuids", "mm_processor_kwargs"),
    },
    BaseProcessingInfo: {
        "get_supported_mm_limits": (),
        "get_mm_max_tokens_per_item": ("seq_len", "mm_counts"),
        "get_data_parser": (),
    },
    BaseDummyInputsBuilder: {
        "get_dummy_text": ("mm_counts",),
        "get_dummy_mm_data": ("seq_len", "mm_counts"),
    },
    MultiModalDataParser: {"_parse_image_data": ("data",)},
    BaseMultiModalProcessor: {
        "_get_mm_hashes": ("inputs",),
        "_call_hf_processor": ("hf_data", "hf_kwargs"),
        "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
        "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
        "_apply_prompt_updates": ("token_ids", "mm_prompt_updates"),
    },
    TransformersMultiModalForCausalLM: {
        "_from_config_kwargs": (),
        "embed_multimodal": (),
        "compute_logits": ("hidden_states",),
        "get_placeholder_str": ("modality", "i"),
    },
    VerifyAndUpdateConfig: {
        "verify_and_update_model_config": ("model_config",),
        "verify_and_update_config": ("vllm_config",),
    },
}


def missing_hooks(overridden: dict[type, dict[str, tuple[str, ...]]]) -> list[str]:
    """List the methods that are gone, or no longer have the arguments that are expected."""
    missing = []
    for owner, methods in overridden.items():
        for name, arguments in methods.items():
            method: Any = getattr(owner, name, None)
            known = inspect.signature(method).parameters if callable(method) else {}
            lacking = [argument for argument in arguments if argument not in known]
            if method is None or lacking:
                missing.append(f"{owner.__name__}.{name}({', '.join(lacking)})")
    return missing


def check_hooks() -> None:
    """Refuse a release of vLLM in which a method that the plugin overrides is gone."""
    if missing := missing_hooks(OVERRIDDEN):
        raise RuntimeError(
            f"The mgllava plugin does not work with vLLM {vllm.__version__}, which no longer has "
            f"{', '.join(missing)}. Install a release that docs/vllm.md names."
        )


__all__ = [
    "MODELS_CONFIG_MAP",
    "MULTIMODAL_REGISTRY",
    "RENDERER_REGISTRY",
    "BaseDummyInputsBuilder",
    "BaseMultiModalProcessor",
    "BaseProcessingInfo",
    "HfRenderer",
    "MediaWithBytes",
    "ModelRegistry",
    "MultiModalDataParser",
    "MultiModalFieldConfig",
    "ProcessorBatchItems",
    "PromptReplacement",
    "TokenizerRegistry",
    "TokensPrompt",
    "TransformersMultiModalForCausalLM",
    "VLLMValidationError",
    "VerifyAndUpdateConfig",
    "cached_processor_from_config",
    "check_hooks",
    "make_async",
    "missing_hooks",
    "open_image",
    "parse_chat_messages",
    "parse_chat_messages_async",
]
