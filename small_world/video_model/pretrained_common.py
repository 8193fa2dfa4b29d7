"""Base classes of models for images and text: configuration, loading, quantization, vocabulary, initialization."""

import copy
import os
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

# Name of the KV cache, as an argument of language models and of `generate` and as a field of outputs: `cache` since
# transformers 5.24, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Arguments of `from_pretrained` that locate a model.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Names of the list of skipped modules in the quantization configurations of transformers: first that of bitsandbytes,
# then that of all other methods that replace layers.
_SKIP_ARGUMENTS = ("llm_int8_skip_modules", "modules_to_not_convert")
# Number of outputs in a block that bitsandbytes packs for processors with AVX512-BF16.
_PACKED_OUTPUTS = 32


class ImageTextPreTrainedModel(PreTrainedModel):
    """Base class of a family's models, whose configuration derives from `ImageTextConfig`.

    The base model has a child `language_model`; the model with a head has the children `model` and `lm_head`.
    """

    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Children of the base model that are never quantized by default: they are small compared with the language model,
    # run once per image, and every token of the answer depends on them.
    unquantized_modules: tuple[str, ...] = ()
    # Some of these children, which LLM.int8 cannot run, because their linear layers have inputs of four dimensions.
    modules_without_int8: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs
    ) -> "ImageTextPreTrainedModel":
        """Load a model. A `quantization_config` that lists no modules to skip quantizes only the language model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id.
            *model_args: See the base class.
            **kwargs: See the base class.

        Returns:
            The model, in evaluation mode; with `output_loading_info=True` also how its weights were loaded.
        """
        quantization_config = kwargs.get("quantization_config")
        if quantization_config is not None:
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                location = {name: kwargs[name] for name in _LOCATION_ARGUMENTS if name in kwargs}
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **location)
            # A model that was saved quantized has a list of its own, which a list from here could override.
            if getattr(config, "quantization_config", None) is None:
                kwargs["quantization_config"] = cls._with_skipped_modules(quantization_config)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _leave_unpackable_layers(model)
        _keep_applied_conversions(model)
        return loaded

    @classmethod
    def skipped_modules(cls) -> list[str]:
        """Return the names of the modules that are not quantized by default, for a quantization configuration."""
        # Names are compared with the start of a module's full name, which has the prefix `model.` only in the model
        # with a head. The list is saved, and either class may load it, so it holds both names.
        return [*_both_names(cls, cls.unquantized_modules), "lm_head"]

    @classmethod
    def _with_skipped_modules(cls, config: QuantizationConfigMixin | dict[str, Any]) -> QuantizationConfigMixin:
        """Return a copy of `config` that lists the modules to skip; keep the list if the user passed one."""
        config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
        for name in _SKIP_ARGUMENTS:
            if hasattr(config, name) and getattr(config, name) is None:
                setattr(config, name, cls.skipped_modules())
        if getattr(config, "load_in_8bit", False):
            skipped = config.llm_int8_skip_modules
            missing = [name for name in _both_names(cls, cls.modules_without_int8) if name not in skipped]
            if missing:
                logger.warning_once(
                    f"`llm_int8_skip_modules` does not list `{missing[0]}`. It is not quantized all the same, because "
                    "LLM.int8 cannot compute with inputs of four dimensions."
                )
                config.llm_int8_skip_modules = [*skipped, *missing]
        return config

    def post_init(self):
        """Initialize the weights, and keep only the names in `_no_split_modules` that this model has."""
        super().post_init()
        # FSDP refuses to start if no module has a class of such a name.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the embedding table; its first `new_num_tokens` rows are vocabulary from then on.

        Call it after adding tokens to the tokenizer, even if the padded table has enough rows.

        Args:
            new_num_tokens (`int`, *optional*): New number of tokens. By default the number of rows.
            pad_to_multiple_of (`int`, *optional*): Add rows, which are not vocabulary, up to a multiple of this.
            mean_resizing (`bool`, *optional*, defaults to `True`): Start new rows from the mean of the old ones.

        Returns:
            `nn.Embedding`: The table.

        Raises:
            ValueError: If this would remove the row of the placeholder.
        """
        config = self.config
        for modality, token_id in config.placeholder_ids.items():
            if new_num_tokens is not None and new_num_tokens <= token_id:
                raise ValueError(
                    f"`new_num_tokens` must be greater than the id of the placeholder (`config.{modality}_token_id`, "
                    f"{token_id}), got {new_num_tokens}. Pass the `len` of this model's tokenizer."
                )
        unpadded, unused = config.unpadded_vocab_size, set(config.unused_token_ids)
        rows = config.text_config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            unpadded = new_num_tokens
        elif unpadded is None and config.text_config.vocab_size > rows:
            unpadded = rows
        config.unpadded_vocab_size = unpadded
        if (generation_config := getattr(self, "generation_config", None)) is not None:
            others = set(generation_config.suppress_tokens or ()) - unused
            generation_config.suppress_tokens = sorted(others | set(config.unused_token_ids))
        return embeddings

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self):
        """Initialize missing weights, and what the language model's body computes for its layers (Falcon-H1)."""
        super().initialize_weights()
        # In a model class from outside transformers, the base class skips modules without direct weights.
        body = self.base_model.language_model
        body._init_weights(body)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # transformers skips third-party modules without direct parameters, so a block sets `initialization` on its
        # layers instead of initializing them here.
        initialization = getattr(module, "initialization", None)
        if initialization == "xavier_uniform":
            init.xavier_uniform_(module.weight)
        elif initialization == "zeros":
            init.zeros_(module.weight)


def _both_names(model_class: type[PreTrainedModel], names: tuple[str, ...]) -> list[str]:
    """Return names of children of the base model, as seen from the model with a head and from the base model."""
    return [*(f"{model_class.base_model_prefix}.{name}" for name in names), *names]


def _leave_unpackable_layers(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit layers of sizes that it cannot pack, on processors with AVX512-BF16.

    It packs blocks of 32 outputs, with a scale for each block of inputs, and fails at a layer with an incomplete block
    (bitsandbytes 0.50). Such layers are computed as on other processors. Layers of the published sizes are packed.
    """
    for module in model.modules():
        # Recognized by an attribute, since importing the class would import bitsandbytes for every model.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = module.weight.quant_state
            is_whole = state is None or module.in_features % state.blocksize == 0
            module.support_avx512bf16_for_cpu = is_whole and module.out_features % _PACKED_OUTPUTS == 0


def _keep_applied_conversions(model: PreTrainedModel) -> None:
    """Keep only those renamings for `save_pretrained` to revert that changed a name while the model was loaded.

    transformers (5.24) keeps all of them under ZeRO-3: the model would be saved with names of older releases.
    """
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


def either_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the KV cache that was passed under one of its two names; raise `ValueError` for both."""
    if past_key_values is not None and cache is not None:
        raise ValueError("Pass either `past_key_values` or `cache`, which are two names of one argument, got both.")
    return cache if past_key_values is None else past_key_values


def read_sub_config(value: Any, name: str, model_type: str, **defaults: Any) -> PreTrainedConfig:
    """Build the sub-configuration `name` from `None`, a dictionary (which is not changed) or a configuration."""
    if value is None:
        return CONFIG_MAPPING[model_type](**defaults)
    if isinstance(value, dict):
        model_type = value.get("model_type", model_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`{name}`: this release of transformers has no model of type {model_type!r}. A newer release may "
                "have it; register third-party classes with `AutoConfig.register` and `AutoModelForCausalLM.register`."
            )
        return CONFIG_MAPPING[model_type](**{**value, "model_type": model_type})
    if isinstance(value, PreTrainedConfig):
        return value
    raise TypeError(f"`{name}` must be a configuration or a dictionary, got {type(value).__name__}.")


@strict
class ImageTextConfig(PreTrainedConfig):
    """Base class of a family's configuration: a language model, a CLIP vision tower, and the placeholder of images."""

    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # `Trainer` treats all other outputs as predictions. These are not, and some exist only in batches with images.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]
    # Entries of `auto_map`: the model class, by the name of each Auto class that loads it.
    remote_classes = {}

    # `__post_init__` turns `None` and dictionaries into configurations.
    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 32000
    unpadded_vocab_size: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.text_config = read_sub_config(self.text_config, "text_config", "llama", vocab_size=32064)
        self.vision_config = read_sub_config(
            self.vision_config,
            "vision_config",
            "clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        # Most model folders set this in `text_config` only, while transformers reads it from the top level.
        self.tie_word_embeddings = self.tie_word_embeddings or getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check the kind of `vision_config`, and the token ids against the embedding table."""
        if self.vision_config.model_type != "clip_vision_model":
            raise ValueError(
                "`vision_config` must be a CLIP vision configuration (model_type 'clip_vision_model'), "
                f"got model_type {self.vision_config.model_type!r}."
            )
        rows = self.text_config.vocab_size
        for modality, token_id in self.placeholder_ids.items():
            if not 0 <= token_id < rows:
                raise ValueError(
                    f"`{modality}_token_id` must be a row of the embedding table, 0 to {rows - 1} "
                    f"(`text_config.vocab_size` is {rows}), got {token_id}."
                )
        if self.unpadded_vocab_size is not None and not 0 < self.unpadded_vocab_size <= rows:
            raise ValueError(
                f"`unpadded_vocab_size` must be between 1 and `text_config.vocab_size` ({rows}), "
                f"got {self.unpadded_vocab_size}."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, with all Auto classes in `auto_map`, where transformers itself writes only one."""
        if self._auto_class is not None:
            self.auto_map = {**self.remote_classes, **(getattr(self, "auto_map", None) or {})}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Id of the placeholder of each modality, such as `{"image": 32000}`."""
        return {"image": self.image_token_id}

    @property
    def unused_token_ids(self) -> list[int]:
        """Ids that must never be generated: placeholders and the padding of the embedding table."""
        rows = self.text_config.vocab_size
        first_padding = rows if self.unpadded_vocab_size is None else self.unpadded_vocab_size
        return sorted({*self.placeholder_ids.values(), *range(first_padding, rows)})


__all__ = ["CACHE_NAME", "ImageTextConfig", "ImageTextPreTrainedModel", "either_cache", "read_sub_config"]
