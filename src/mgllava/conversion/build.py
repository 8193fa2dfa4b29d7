"""Build a new model from trained parts: language model, CLIP and ConvNeXt."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.utils import logging

from mgllava.model_files.sources import clip_config, language_model_config
from mgllava.model_files.tensor_matching import match_tensors
from mgllava.model_files.vocabulary import add_placeholders, generation_config, load_tokenizer, plan_vocabulary
from mgllava.modeling import (
    MGLlavaConfig,
    MGLlavaForConditionalGeneration,
    MGLlavaHighResVisionConfig,
    MGLlavaHighResVisionModel,
    SlimeConfig,
    SlimeForConditionalGeneration,
)
from mgllava.modeling.language_model_common import LanguageModelHead
from mgllava.processing import CHAT_TEMPLATES, MGLlavaProcessor, SlimeProcessor
from mgllava.processing.text_chunks_common import IMAGE_TOKEN, VIDEO_TOKEN, read_format

from .slime.processor import make_processor as make_slime_processor
from .slime.processor import separator_of
from .xtuner.open_clip import HIGH_RES_TOWER, open_high_res_tower
from .xtuner.processor import make_processor

logger = logging.get_logger(__name__)

# Arguments of the downloads of all parts.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
# Arguments of `from_pretrained` for the language model; the first ones also for its tokenizer.
_TOKENIZER_ARGUMENTS = ("revision", "subfolder", "gguf_file", "trust_remote_code", "code_revision")
_LLM_ARGUMENTS = (*_TOKENIZER_ARGUMENTS, "variant", "use_safetensors", "weights_only")
_CONFIG_ARGUMENTS = (
    "fusion_type",
    "object_merging",
    "box_feature_type",
    "box_multi_level_size",
    "projector_hidden_act",
    "initializer_range",
)
_SLIME_ARGUMENTS = (
    "separator_token_id",
    "num_local_queries",
    "local_order",
    "router_top_p",
    "router_temperature",
    "router_sees_answers",
    "branch",
    "forced_expert",
    "attn_implementation",
)
# Arguments of `from_pretrained` that need a complete model folder.
_WHOLE_ARGUMENTS = (
    "quantization_config",
    "load_in_4bit",
    "load_in_8bit",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "tp_plan",
    "tp_size",
    "device_mesh",
    "distributed_config",
    "output_loading_info",
    "ignore_mismatched_sizes",
    "state_dict",
    "config",
    "adapter_kwargs",
    "key_mapping",
    "use_kernels",
    "low_cpu_mem_usage",
)


def build_from_parts(
    llm: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str],
    high_res_tower: str | os.PathLike[str],
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    dtype: torch.dtype | str = "auto",
    **kwargs: Any,
) -> MGLlavaForConditionalGeneration:
    r"""Build a model from trained parts, with random fusion and projectors, to start stage 1 from.

    The embedding table gets a row for each placeholder, and is padded to a multiple of 64 rows.

    Example:
    ```python
    >>> import mgllava

    >>> model = mgllava.build_from_parts(
    ...     llm="lmsys/vicuna-7b-v1.5",
    ...     vision_tower="openai/clip-vit-large-patch14-336",
    ...     high_res_tower="laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    ... )
    ```

    Args:
        llm (`str` or `os.PathLike`): Folder or Hub id of a causal language model. Its generation config is kept.
        vision_tower (`str` or `os.PathLike`): Folder or Hub id of a CLIP model or of its vision tower.
        high_res_tower (`str` or `os.PathLike`): Folder, Hub id or open_clip name of a model with a ConvNeXt.
        image_token_id (`int`, *optional*):
            Id of the placeholder. By default that of `<image>` in the language model's tokenizer or, if it has none,
            the one that `tokenizer.add_tokens` would assign.
        video_token_id (`int`, *optional*): Id of the placeholder of videos. By default the model takes no videos; see
            [`add_videos`].
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Dtype of all weights; `"auto"` is that of the language model. `torch_dtype` is an older name.
        **kwargs:
            - `high_res_image_size` (768 by default), and of [`MGLlavaConfig`] `fusion_type`, `object_merging`,
              `box_feature_type`, `box_multi_level_size`, `projector_hidden_act` and `initializer_range` (standard
              deviation of the random weights; by default that of the language model's configuration);
            - for the whole model `attn_implementation`, and `device_map` with a single device;
            - for the downloads of all parts `cache_dir`, `force_download`, `local_files_only` and `token`;
            - for `llm` alone `revision`, `subfolder`, `gguf_file`, `trust_remote_code`, `code_revision`, `variant`,
              `use_safetensors` and `weights_only` of `from_pretrained`.

    Returns:
        `MGLlavaForConditionalGeneration`: The model, in evaluation mode.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If a part is a model of another kind, lacks weights or is quantized, if the parts do not fit
            together, or if an argument of `from_pretrained` needs a complete model folder.
        ImportError: If `gguf_file` is given and the package `gguf` is missing.
        OSError: If a part cannot be read.
    """
    if (older := kwargs.pop("torch_dtype", None)) is not None:
        logger.warning_once("`torch_dtype` is deprecated! Use `dtype` instead!")
        dtype = older if dtype == "auto" else dtype
    location = _pop(kwargs, _LOCATION_ARGUMENTS)
    llm_options = _pop(kwargs, _LLM_ARGUMENTS)
    attention, device = kwargs.pop("attn_implementation", None), _single_device(kwargs.pop("device_map", None))
    high_res_size = kwargs.pop("high_res_image_size", 768)
    _refuse_arguments(kwargs)

    language_model = _load_language_model(llm, dtype=dtype, **location, **llm_options)
    weights_dtype: torch.dtype = language_model.dtype
    tower = _load_clip(vision_tower, dtype=weights_dtype, **location)
    high_res = _load_high_res_tower(high_res_tower, high_res_size, weights_dtype, location)

    if image_token_id is None:
        tokenizer_options = {name: llm_options[name] for name in _TOKENIZER_ARGUMENTS if name in llm_options}
        tokenizer: Any = AutoTokenizer.from_pretrained(llm, **location, **tokenizer_options)
        image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))
    shared = _add_placeholder(language_model, image_token_id, video_token_id)
    if video_token_id is not None:
        shared["video_token_id"] = video_token_id
    config = MGLlavaConfig(
        **shared, vision_config=tower.config, high_res_vision_config=high_res.config, dtype=weights_dtype, **kwargs
    )
    towers = {"vision_tower": tower, "high_res_vision_tower": high_res}
    model = _join(MGLlavaForConditionalGeneration, config, language_model, towers)
    if attention is not None:
        model.set_attn_implementation(attention)
    if device is not None:
        model.to(device)
    return model.eval()


def _pop(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Take the arguments of these names out of `kwargs`."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _refuse_arguments(kwargs: dict[str, Any]) -> None:
    """Raise for arguments that `build_from_parts` does not take."""
    if whole := [name for name in kwargs if name in _WHOLE_ARGUMENTS]:
        raise ValueError(
            f"`{whole[0]}` is for a complete model folder: build the model without it, call `save_pretrained`, and "
            "pass it to `from_pretrained`."
        )
    if unknown := [name for name in kwargs if name not in _CONFIG_ARGUMENTS]:
        known = [*_CONFIG_ARGUMENTS, "high_res_image_size", "attn_implementation", "device_map", "torch_dtype"]
        raise TypeError(
            f"build_from_parts() got an unexpected keyword argument {unknown[0]!r}. In addition to the parts, "
            "`image_token_id`, `video_token_id` and `dtype` it takes "
            f"{', '.join([*known, *_LOCATION_ARGUMENTS, *_LLM_ARGUMENTS])}."
        )


def _single_device(device_map: Any) -> torch.device | None:
    """Read a `device_map` that names one device."""
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"`device_map` must be a single device here, such as 'cuda:0', got {device_map!r}. To spread a model, "
            "build it without `device_map`, call `save_pretrained`, and pass it to `from_pretrained`."
        ) from None


def _load(model_class: Any, argument: str, name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a part with `from_pretrained`; raise if weights are missing, which would be random."""
    model, loaded = model_class.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"`{argument}`: {name} lacks the weights {missing[:5]}.")
    return model


def _load_language_model(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a language model that is not quantized."""
    language_model = _load(AutoModelForCausalLM, "llm", name, **options)
    # The weights of a GGUF file are dequantized, although the model keeps its quantization config.
    if getattr(language_model, "is_quantized", False):
        raise ValueError(
            f"`llm`: {name} is quantized. Pass its weights in 16 or 32 bits; save the model that is built, and load "
            "that with a `quantization_config`."
        )
    return language_model


def _load_clip(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a CLIP vision tower without its last layer: the model reads the hidden state before it."""
    tower = _load(CLIPVisionModel, "vision_tower", name, **options)
    del tower.encoder.layers[-1]
    tower.config.num_hidden_layers -= 1
    tower.config.name_or_path = ""
    tower.post_layernorm = nn.Identity()
    return tower


def add_videos(model: MGLlavaForConditionalGeneration, processor: MGLlavaProcessor) -> None:
    """Let a model and a processor that were saved without videos take videos. Save both afterwards.

    The tokenizer gets the placeholder `<video>`, and the configuration its id. No weights change, unless the embedding
    table has no unused row left. A chat template of this package is replaced by its present version.

    Args:
        model ([`MGLlavaForConditionalGeneration`]): The model.
        processor ([`MGLlavaProcessor`]): Its processor.

    Raises:
        TypeError: If the model or the processor is of a family that takes no videos.
    """
    if not hasattr(model, "get_video_features") or not hasattr(processor, "find_video_token"):
        raise TypeError(
            "`model` and `processor` must be of a family that takes videos, got "
            f"{type(model).__name__} and {type(processor).__name__}."
        )
    add_placeholders(processor.tokenizer, (VIDEO_TOKEN,))
    processor.find_video_token()
    token_id, config = processor.video_token_id, model.config
    assert token_id is not None  # it was added
    rows, unpadded = config.text_config.vocab_size, config.unpadded_vocab_size
    if token_id >= rows:
        padded = plan_vocabulary(config.image_token_id, rows, token_id).padded_rows
        model.resize_token_embeddings(padded)
        config.unpadded_vocab_size = rows if unpadded is None else unpadded
    config.video_token_id = token_id
    suppressed = set(model.generation_config.suppress_tokens or ())
    model.generation_config.suppress_tokens = sorted(suppressed | set(config.unused_token_ids))
    processor.video_processor.low_res_size = config.vision_config.image_size
    processor.chat_template = _with_videos(processor)


def _with_videos(processor: MGLlavaProcessor) -> Any:
    """Replace chat templates by those of the package that write the same strings, which take videos."""
    names, own = processor.tokenizer.special_tokens_map, processor.chat_template
    known = {read_format(template, names): template for template in CHAT_TEMPLATES.values()}

    def replace(template: str) -> str:
        return known.get(read_format(template, names), template)

    return {name: replace(text) for name, text in own.items()} if isinstance(own, dict) else own and replace(own)


def _add_placeholder(language_model: Any, image_token_id: int, video_token_id: int | None = None) -> dict[str, Any]:
    """Add rows to the embedding table, and return what the configuration says about the language model."""
    vocabulary = plan_vocabulary(image_token_id, language_model.config.vocab_size, video_token_id)
    language_model.resize_token_embeddings(vocabulary.padded_rows, mean_resizing=False)
    language_model.config.name_or_path = ""
    return {
        "text_config": language_model.config,
        "image_token_id": image_token_id,
        "unpadded_vocab_size": vocabulary.original_rows,
    }


def _join(model_class: Any, config: Any, language_model: Any, towers: dict[str, nn.Module]) -> Any:
    """Build a model from loaded parts; its other modules are initialized."""
    # On the meta device, to save memory: almost all weights are loaded already.
    with torch.device("meta"):
        model: Any = model_class(config)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    suppressed = set(model.generation_config.suppress_tokens or ())
    model.generation_config.suppress_tokens = sorted(suppressed | set(config.unused_token_ids))
    model.model.language_model, model.lm_head = LanguageModelHead(language_model).take_parts()
    for name, part in list(model.model.named_children()):
        if name in towers:
            setattr(model.model, name, towers[name])
        elif name != "language_model":
            # Children first: a module may initialize its layers in a way of its own.
            part.to_empty(device="cpu").to(config.dtype).apply(model._init_weights)
    model.tie_weights()
    return model


def _load_high_res_tower(
    name: str | os.PathLike[str], image_size: int, dtype: torch.dtype, location: dict[str, Any]
) -> MGLlavaHighResVisionModel:
    """Load the trunk of an open_clip model."""
    tower = open_high_res_tower(os.fspath(name), **location)
    config = MGLlavaHighResVisionConfig(
        architecture=tower.architecture, depths=tower.depths, hidden_sizes=tower.hidden_sizes, image_size=image_size
    )
    with torch.device("meta"):
        model: Any = MGLlavaHighResVisionModel(config)
    tensors = match_tensors(
        tower.source.tensors,
        {f"{HIGH_RES_TOWER}{key}": tuple(tensor.shape) for key, tensor in model.state_dict().items()},
        tower.source.unexpected,
        f"`high_res_tower`: the weights of {name} are not those of its {tower.architecture}.",
    )
    # Copied, because values may be mapped from files.
    weights = {key.removeprefix(HIGH_RES_TOWER): value.load().to(dtype, copy=True) for key, value in tensors.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True).eval()


def build_mgllava(
    *,
    llm: str | Path,
    vision_tower: str | Path,
    high_res_tower: str | Path,
    prompt_template: str,
    dtype: Any,
    **config: Any,
) -> tuple[MGLlavaForConditionalGeneration, MGLlavaProcessor]:
    """Build the model and the processor that a training starts from."""
    text_config, llm_folder = language_model_config(llm)
    _, image_settings = clip_config(vision_tower)
    tokenizer = load_tokenizer(llm_folder, placeholders=(IMAGE_TOKEN, VIDEO_TOKEN))
    image_token_id, video_token_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])
    placeholders = {"image_token_id": image_token_id, "video_token_id": video_token_id}
    model = build_from_parts(llm, vision_tower, high_res_tower, **placeholders, dtype=dtype, **config)
    model.generation_config = generation_config(
        llm_folder, text_config, tokenizer, prompt_template, model.config.unused_token_ids
    )
    return model, make_processor(model.config, tokenizer, image_settings, prompt_template)


def build_slime(
    *, llm: str | Path, vision_tower: str | Path, prompt_template: str, dtype: Any, **config: Any
) -> tuple[SlimeForConditionalGeneration, SlimeProcessor]:
    """Build a model and its processor for the start of a training run."""
    if unknown := [name for name in config if name not in _SLIME_ARGUMENTS]:
        raise TypeError(
            f"A SliME model is not built with {unknown[0]!r}. In addition to the parts it takes "
            f"{', '.join(_SLIME_ARGUMENTS)}."
        )
    attention = config.pop("attn_implementation", None)
    text_config, llm_folder = language_model_config(llm)
    _, image_settings = clip_config(vision_tower)
    tokenizer = load_tokenizer(llm_folder, pad_token_id=getattr(text_config, "pad_token_id", None))
    language_model = _load_language_model(llm, dtype=dtype)
    tower = _load_clip(vision_tower, dtype=language_model.dtype)
    shared = _add_placeholder(language_model, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    config = {"separator_token_id": separator_of(tokenizer), **config}
    model_config = SlimeConfig(**shared, vision_config=tower.config, dtype=language_model.dtype, **config)
    model = _join(SlimeForConditionalGeneration, model_config, language_model, {"vision_tower": tower})
    model.generation_config = generation_config(
        llm_folder, text_config, tokenizer, prompt_template, model_config.unused_token_ids
    )
    if attention is not None:
        model.set_attn_implementation(attention)
    return model.eval(), make_slime_processor(model_config, tokenizer, image_settings, prompt_template)


__all__ = ["add_videos", "build_from_parts", "build_mgllava", "build_slime"]
