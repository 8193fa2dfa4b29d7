"""Base classes of models for images and text, around any causal language model of transformers."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateOutput
from transformers.integrations import is_fsdp_managed_module
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import is_torchdynamo_compiling, logging, torch_compilable_check

from .pretrained_common import CACHE_NAME, ImageTextPreTrainedModel

logger = logging.get_logger(__name__)

# Private methods that `generate` calls and that are overridden here. If transformers renamed one, the override would
# be ignored without an error.
_GENERATION_HOOKS = ("_expand_inputs_for_generation", "_supports_default_dynamic_cache")
# Arguments of `generate` behind those that it has by name here.
_LATER_ARGUMENTS = list(inspect.signature(GenerationMixin.generate).parameters)[5:]
_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
# Methods of `GenerationMixin` that the class of a language model may override, since calls are passed on to it.
_DELEGATED_HOOKS = {"prepare_inputs_for_generation", "_supports_default_dynamic_cache"}
# Arguments that the `forward` of a language model must take: embeddings of images, and a KV cache.
_ARGUMENTS = ("attention_mask", "inputs_embeds", CACHE_NAME)

_READS_IDS = "some of its layers read token ids, which images do not have"
# Types that the checks below accept although they do not work, with the reason.
_REFUSED_TYPES = {
    "blt": _READS_IDS,
    "deepseek_v4": _READS_IDS,
    "gemma3n_text": _READS_IDS,
    "git": "it has a vision tower of its own",
    "moshi": "it speaks and has an audio decoder",
    "phi4_multimodal": "it has towers of its own for images and audio",
}
if CACHE_NAME == "past_key_values":  # before transformers 5.24
    _REFUSED_TYPES |= {
        "dbrx": "this release does not read the configuration that it saves inside another one",
        "inkling_text": "this release normalizes the embeddings of ids, but not `inputs_embeds`",
    }
# Outputs of a language model, besides its last states, that have a place for every token.
_OUTPUTS_OF_ALL_TOKENS = ("output_attentions", "output_hidden_states", "output_router_logits")
# Kinds of layers that compute the same if masked tokens are absent; and those that do so in sequences that are no
# longer than their window, a value of the configuration.
_MASKABLE_LAYERS = {"full_attention", "mlp", "moe"}
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Configuration values that make layers read token ids.
_READS_IDS_IF = ("hidden_size_per_layer_input", "ple_layer_ids")


class UnsupportedLanguageModelError(ValueError):
    """A language model that would not compute the same inside a model for images."""

    def __init__(self, model_type: str, reason: str):
        super().__init__(
            f"`text_config`: a language model of type {model_type!r} cannot be used, since {reason}. "
            "docs/language_models.md lists the types that can."
        )


def language_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that `AutoModelForCausalLM` builds, or raise `UnsupportedLanguageModelError`."""
    model_type = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedLanguageModelError(
            model_type,
            "this release of transformers has no causal language model for it (register third-party classes with "
            "`AutoConfig.register` and `AutoModelForCausalLM.register`)",
        )
    if config.is_encoder_decoder:
        raise UnsupportedLanguageModelError(model_type, "it is an encoder-decoder")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedLanguageModelError(
            model_type, "it is the configuration of a multimodal model: pass that of its language model"
        )
    if model_type in _REFUSED_TYPES:
        raise UnsupportedLanguageModelError(model_type, _REFUSED_TYPES[model_type])
    if id_readers := [name for name in _READS_IDS_IF if getattr(config, name, None)]:
        raise UnsupportedLanguageModelError(model_type, f"{_READS_IDS} (`{id_readers[0]}`)")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not issubclass(model_class, GenerationMixin):
        raise UnsupportedLanguageModelError(model_type, "it does not generate")
    arguments = _forward_arguments(model_class)
    if missing := [name for name in _ARGUMENTS if name not in arguments]:
        raise UnsupportedLanguageModelError(model_type, f"its `forward` takes no {' and no '.join(missing)}")
    if own := [name for name in _own_hooks(model_class) if name not in _DELEGATED_HOOKS]:
        raise UnsupportedLanguageModelError(model_type, f"it overrides how transformers generates ({', '.join(own)})")
    return model_class


def _own_hooks(model_class: type) -> list[str]:
    """Names of the methods of `GenerationMixin` that a class overrides."""
    hooks = [name for name, value in vars(GenerationMixin).items() if callable(getattr(value, "__func__", value))]
    return [
        name
        for name in hooks
        if not name.startswith("__")
        and inspect.getattr_static(model_class, name) is not inspect.getattr_static(GenerationMixin, name)
    ]


def _forward_arguments(model_class: type) -> list[str]:
    """Names of the arguments of `forward`: of the first class in the MRO whose signature names them."""
    for base in model_class.__mro__:
        if "forward" in vars(base):
            arguments = inspect.signature(base.forward).parameters
            if not any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in arguments.values()):
                return list(arguments)
    return []


class LanguageModelHead:
    """A causal language model without its weights, which computes logits and loss (scales, caps, losses of experts).

    The `forward` of its class runs with a function in place of the body, and with `lm_head` of the whole model. The
    modules with weights are removed from the given model, and `take_parts` returns them. A model with weights outside
    of its body and one output layer raises `UnsupportedLanguageModelError`.
    """

    def __init__(self, model: PreTrainedModel):
        model_type = model.config.model_type
        try:
            body = _child_containing(model, model.get_input_embeddings())
        except NotImplementedError:
            body = None
        head = model.get_output_embeddings()
        children = dict(model.named_children())
        names = [name for name, child in children.items() if child is head]
        if body is None or not isinstance(children[body], PreTrainedModel):
            raise UnsupportedLanguageModelError(model_type, "it has no body apart from its head")
        if "inputs_embeds" not in _forward_arguments(type(children[body])):
            raise UnsupportedLanguageModelError(model_type, "its body takes no inputs_embeds")
        with_weights = {name for name, child in children.items() if [*child.parameters(), *child.buffers()]}
        if not names or with_weights - {body, names[0]} or model._parameters or model._buffers:
            raise UnsupportedLanguageModelError(model_type, "its head is not a single layer")
        width, hidden_size = model.get_input_embeddings().embedding_dim, model.config.hidden_size
        if width != hidden_size:
            raise UnsupportedLanguageModelError(
                model_type, f"its token embeddings ({width}) and its layers ({hidden_size}) differ in width"
            )
        self.body_name, self.head_name = body, names[0]
        self.tied_weights_keys = {
            self._new_name(target): self._new_name(source)
            for target, source in (model._tied_weights_keys or {}).items()
        }
        self.takes_positions = "position_ids" in _forward_arguments(type(model))
        self.body, self.layer = children[body], head
        del model._modules[body], model._modules[self.head_name]
        # The language model without the modules that hold weights: its class, configuration and plain attributes.
        self.rest = model

    def take_parts(self) -> tuple[PreTrainedModel, nn.Module]:
        """Return body and output layer and forget them, since a model registers them as its own. Call this once."""
        parts = self.body, self.layer
        del self.body, self.layer
        return parts

    def _new_name(self, name: str) -> str:
        """Translate the name of a weight in the language model to its name in the whole model."""
        for part, new in ((self.body_name, "model.language_model"), (self.head_name, "lm_head")):
            if name.startswith(f"{part}."):
                return new + name.removeprefix(part)
        return name

    def score(self, owner: nn.Module, body: Callable[..., Any], loss_function: Callable[..., Any], **kwargs) -> Any:
        """Run the class's `forward` with `lm_head` of `owner`, and with functions for its body and its loss."""
        model = self.bind(owner)
        vars(model)[self.body_name] = _FunctionAsBody(body, owner.model.language_model)
        model.loss_function = loss_function
        return model.forward(**kwargs)

    def bind(self, owner: nn.Module) -> PreTrainedModel:
        """Make an instance without a body for one call, so that threads and replicas of `owner` do not share it."""
        model = object.__new__(type(self.rest))
        parts = {**self.rest._modules, self.head_name: owner.lm_head}
        model.__dict__ = {**vars(self.rest), "_modules": parts, "training": owner.training}
        return model


def _child_containing(model: nn.Module, wanted: nn.Module) -> str | None:
    """Return the name of the child of `model` that contains a module."""
    for name, child in model.named_children():
        if any(module is wanted for module in child.modules()):
            return name
    return None


class _FunctionAsBody:
    """A function in place of a module, with the module's attributes.

    A submodule is the function again: OPT calls `decoder` of its body, not the body.
    """

    def __init__(self, function: Callable[..., Any], body: nn.Module):
        self.function, self.body = function, body

    def __call__(self, *args, **kwargs) -> Any:
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["body"], name)
        return self if isinstance(value, nn.Module) else value


def load_language_model(config: PreTrainedConfig) -> LanguageModelHead:
    """Build a language model with random weights; raise `UnsupportedLanguageModelError` if it cannot be used."""
    language_model_class(config)
    return LanguageModelHead(AutoModelForCausalLM.from_config(config))


# The argument of `forward` that holds the pixels of each modality. They are named like this in errors, too.
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# Name under which a cache holds the mask of the tokens that the language model saw, if some were dropped.
_SEEN = "_mgllava_seen"
_NO_CACHE = (
    "`past_key_values` (`cache`) must be empty for images, or in `generate` hold nothing but the text before the "
    "first image: what this model sees of an image depends on all text of the prompt. Pass the whole prompt with its "
    "images, without a cache of them."
)


@dataclass
class ImageTextModelOutputWithPast(BaseModelOutputWithPast):
    """Output of a body. The output class of a family derives from it and documents `image_hidden_states`."""

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    router_logits: tuple[torch.FloatTensor] | None = None

    # Some language models read these from the output of their body.
    cross_attentions = None
    shared_kv_states = None


@dataclass
class ImageTextCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of a model with its head. The output class of a family derives from it as well."""

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None


@dataclass
class SeenImageFeatures(BaseModelOutputWithPooling):
    """Image features after `generate` has dropped placeholders, which must not be dropped again."""


def must_be_touched(modules: list[nn.Module]) -> bool:
    """Tell whether every process must run these modules, even if its batch has no image.

    This is needed if their gradients are reduced across processes, or if each process holds a shard of their weights
    (ZeRO-3, FSDP): both are collective operations.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return True
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in parameters) or any(
        is_fsdp_managed_module(module) for module in modules
    )


class _UnusedTokens(LogitsProcessor):
    """Never generates unused rows of the embedding table, whatever generation configuration is passed."""

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids, dtype=torch.long)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ids = self.ids[self.ids < scores.shape[-1]]  # some language models remove the padding themselves
        return scores.index_fill(-1, ids.to(scores.device), -torch.inf)


def _repeat_seen(hidden_states: torch.FloatTensor, is_seen: torch.BoolTensor) -> torch.FloatTensor:
    """Replace the state of a token that is not seen by that of the last one before it: the next token is the same."""
    places = torch.arange(is_seen.shape[1], device=is_seen.device).masked_fill(~is_seen, 0).cummax(-1).values
    return hidden_states.gather(1, places.unsqueeze(-1).expand_as(hidden_states).to(hidden_states.device))


def _without_dropped_in_cache(cache: Cache, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Mask the tokens in a cache that were dropped, and number those after it without gaps."""
    embeds, mask, length = inputs["inputs_embeds"], inputs["attention_mask"], int(cache.get_seq_length())
    seen = getattr(cache, _SEEN)[:, :length]
    width = length + embeds.shape[1]
    if mask is None:
        mask = seen.new_ones(len(embeds), width)
    if not isinstance(mask, torch.Tensor) or mask.shape != (len(seen), width):
        given = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask)
        raise ValueError(
            f"`attention_mask` must have shape {(len(seen), width)}, of the {length} tokens in the cache, with those "
            f"of images, and of the new ones, got {given}."
        )
    mask = mask.clone()
    mask[:, : seen.shape[1]] *= seen.to(mask.device, mask.dtype)
    return {"attention_mask": mask, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)[:, length:]}


def _select_positions(hidden_states: torch.FloatTensor, logits_to_keep: int | torch.Tensor) -> torch.FloatTensor:
    """Select the hidden states whose logits are wanted; a mask selects them into a single row."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep].unsqueeze(0)
        return torch.take_along_dim(hidden_states, logits_to_keep.unsqueeze(-1), dim=1)
    raise ValueError(
        "`logits_to_keep` must be a number of positions or a tensor of one or two dimensions, got shape "
        f"{tuple(logits_to_keep.shape)}."
    )


class ImageTextModel(ImageTextPreTrainedModel):
    """Body of a family's model: the modules that embed images, and the language model without its head.

    The class of a family adds its modules, then calls `add_language_model`. It defines `get_image_features`,
    `dummy_images`, and a `forward` that passes its arguments to `embed_and_run`.
    """

    output_class: type[ImageTextModelOutputWithPast] = ImageTextModelOutputWithPast
    # A family whose language model does not see all placeholders defines this method. It is called with the arguments
    # of `_drop_placeholders`, by name, and returns a mask of shape `(batch_size, sequence_length)`, true where one is
    # dropped.
    placeholders_to_drop: Callable[..., torch.BoolTensor] | None = None

    def add_language_model(self, language_model: PreTrainedModel | None) -> None:
        """Add the language model, as the last module, and initialize all weights."""
        # The model with a head passes the body of the language model that its head comes from.
        self.language_model = language_model
        if language_model is None:
            self.language_model, _ = load_language_model(self.config.text_config).take_parts()
        self.post_init()

    def dummy_images(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments of `get_image_features` for one dummy image."""
        raise NotImplementedError

    def encode_inputs(self, inputs: dict[str, dict[str, Any]]) -> dict[str, BaseModelOutputWithPooling]:
        """Encode the inputs of each modality that a batch has, `"image"` and `"video"`.

        A family overrides this to run its modules once for all of them if other processes must run them as often.
        """
        encoders = {"image": "get_image_features", "video": "get_video_features"}
        return {
            modality: getattr(self, encoders[modality])(**arguments, return_dict=True)
            for modality, arguments in inputs.items()
        }

    def embed(
        self,
        images: dict[str, Any],
        videos: dict[str, Any] | None = None,
        *,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
    ) -> tuple[dict[str, Any], dict[str, torch.FloatTensor], dict[str, BaseModelOutputWithPooling]]:
        """Embed text, images and videos.

        `images` and `videos` hold the arguments of `get_image_features` and `get_video_features`. Returns the
        arguments of the language model and, of each modality that the batch has, the embeddings
        `(num_placeholders, hidden_size)` and the output of these methods.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        given = {"image": images, "video": videos or {}}
        outputs = {name: value for name, value in (mm_encoder_outputs or {}).items() if value is not None}
        to_encode = {name: values for name, values in given.items() if values.get(_PIXELS[name]) is not None}
        if doubled := [name for name in to_encode if name in outputs]:
            article = "an" if doubled[0] == "image" else "a"
            raise ValueError(
                f"Pass either `{_PIXELS[doubled[0]]}` or `mm_encoder_outputs` with {article} {doubled[0]}, not both."
            )
        self._check_modalities([*outputs, *to_encode])
        outputs |= self.encode_inputs(to_encode)
        # Other processes may have images in their batches, and run these modules now. This one runs them on a dummy
        # image, whose embeddings are multiplied by zero below.
        dummy = None
        if not outputs and cache is None and must_be_touched(self.vision_modules()):
            device = input_ids.device if inputs_embeds is None else inputs_embeds.device
            dummy = self.get_image_features(**self.dummy_images(device), return_dict=True)

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features, masks = {}, {}
        modalities = list(self.config.placeholder_ids)
        if input_ids is None and len(modalities) > 1 and self._have_equal_rows(modalities):
            # Then a placeholder can be of any modality.
            if len(outputs) > 1:
                raise ValueError(
                    f"Pass `input_ids` for a prompt with {' and '.join(f'{name}s' for name in outputs)}, got "
                    "`inputs_embeds`: the rows of their placeholders in the embedding table are equal, so they cannot "
                    "be told apart."
                )
            modalities = list(outputs) or modalities
        for modality in modalities:
            if modality in outputs:
                pooled = outputs[modality].pooler_output
                # Before features are put in, which could be taken for placeholders of another modality.
                masks[modality] = self.get_placeholder_mask(input_ids, inputs_embeds, pooled, modality)
                features[modality] = torch.cat(list(pooled)).to(inputs_embeds.device, inputs_embeds.dtype)
            else:
                self._check_no_placeholders(input_ids, inputs_embeds, modality)
        given_names = [name for name, value in images.items() if value is not None]
        if given_names and "image" not in outputs and cache is None and self.placeholders_to_drop is not None:
            raise ValueError(
                f"`pixel_values` must be given with `{given_names[0]}`, got None. Pass all or none of them."
            )
        if dummy is not None:
            # The product must be zero even if the dummy image overflows.
            total = torch.nan_to_num(torch.cat(list(dummy.pooler_output)), posinf=0.0, neginf=0.0).sum()
            inputs_embeds = inputs_embeds + (0 * total).to(inputs_embeds.device, inputs_embeds.dtype)
        elif not outputs:
            inputs_embeds = self._with_gradient(inputs_embeds)
        for modality, mask in masks.items():
            inputs_embeds = inputs_embeds.masked_scatter(mask, features[modality])
        if "image" in outputs:
            image_outputs, mask = outputs["image"], masks["image"]
            if self.placeholders_to_drop is not None and not isinstance(image_outputs, SeenImageFeatures):
                if cache is not None and cache.get_seq_length():
                    raise ValueError(_NO_CACHE)
                attention_mask, position_ids = self._drop_placeholders(
                    position_ids,
                    image_outputs=image_outputs,
                    inputs_embeds=inputs_embeds,
                    is_placeholder=mask.squeeze(-1),
                    attention_mask=attention_mask,
                    labels=labels,
                )
        arguments = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE_NAME: cache,
        }
        return arguments, features, outputs

    def _have_equal_rows(self, modalities: list[str]) -> bool:
        """Tell whether placeholders of several modalities have the same embedding, such as the mean of all others."""
        table = self.get_input_embeddings()
        ids = torch.tensor([self.config.placeholder_ids[modality] for modality in modalities])
        rows = table(ids.to(table.weight.device))
        return bool((rows == rows[:1]).all())

    def _check_modalities(self, modalities: list[str]) -> None:
        """Raise `ValueError` for inputs of a modality that the model does not have."""
        for modality in modalities:
            if modality not in self.config.placeholder_ids:
                name = _PIXELS.get(modality, "mm_encoder_outputs")
                raise ValueError(
                    f"`{name}` must be None for this model, which takes no inputs of modality {modality!r}: "
                    f"`config.{modality}_token_id` is not set. docs/video.md shows how to add videos to a model."
                )

    def embed_and_run(
        self, images: dict[str, Any], arguments: dict[str, Any], videos: dict[str, Any] | None = None, **kwargs
    ) -> ImageTextModelOutputWithPast:
        """Call `embed` with the first three, and the language model with its result and `kwargs`."""
        is_seen = isinstance((arguments["mm_encoder_outputs"] or {}).get("image"), SeenImageFeatures)
        if (given := arguments["inputs_embeds"]) is not None and not is_seen:
            embeds = self.without_placeholders_in_padding(given, arguments["attention_mask"])
            arguments = {**arguments, "inputs_embeds": embeds}
        inputs, features, encoded = self.embed(images, videos, **arguments)
        image_features, image_outputs = features.get("image"), encoded.get("image")
        if hasattr(inputs[CACHE_NAME], _SEEN):
            inputs |= _without_dropped_in_cache(inputs[CACHE_NAME], inputs)
        drops = self.placeholders_to_drop is not None and image_features is not None and not is_seen
        if drops and self._leaves_out(inputs, kwargs):
            outputs = self._run_without_masked(inputs, **kwargs)
        else:
            outputs = self.language_model(return_dict=True, **inputs, **kwargs)
        seen, hidden_states = {}, outputs.last_hidden_state
        if self.placeholders_to_drop is not None and image_features is not None:
            is_placeholder = self.find_placeholders(arguments["input_ids"], arguments["inputs_embeds"])
            if isinstance(mask := inputs["attention_mask"], torch.Tensor) and mask.shape == is_placeholder.shape:
                seen["kept_tokens"] = mask[is_placeholder].bool()
                hidden_states = _repeat_seen(hidden_states, mask.bool() | ~is_placeholder)
                if outputs.get(CACHE_NAME) is not None and not isinstance(image_outputs, SeenImageFeatures):
                    setattr(outputs[CACHE_NAME], _SEEN, mask)
        if "video" in encoded:
            seen |= {"video_hidden_states": features["video"], "video_outputs": encoded["video"]}
        return self.output_class(
            **seen,
            last_hidden_state=hidden_states,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            router_logits=outputs.get("router_logits"),
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _leaves_out(self, inputs: dict[str, Any], kwargs: dict[str, Any]) -> bool:
        """Tell whether the language model runs without the tokens that it does not see, instead of masking them."""
        config, use_cache, mask = self.config.text_config, kwargs.get("use_cache"), inputs["attention_mask"]
        counts_masked = self._counts_masked_tokens(mask.shape[1])
        if is_torchdynamo_compiling() and not counts_masked:
            return False  # the same result, and no shape depends on the images
        # Nobody continues from the cache of a training step.
        returns_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
        shows_all = inputs[CACHE_NAME] is not None or any(
            kwargs.get(name, getattr(config, name, None)) for name in _OUTPUTS_OF_ALL_TOKENS
        )
        if not shows_all and not returns_cache:
            return True
        if not counts_masked or bool((mask != 0).all()):
            return False
        leaves_out = not shows_all and use_cache is None
        logger.warning_once(
            f"A language model of type {config.model_type!r} counts masked tokens, in its windows or its state. "
            + (
                "So those that are dropped were left out, and no cache is returned. Pass `use_cache=False` to say so."
                if leaves_out
                else "Those that are dropped were masked all the same, because of a cache or of outputs that were "
                "asked for: the result differs from that of `generate`, which leaves them out."
            )
        )
        return leaves_out

    def _counts_masked_tokens(self, length: int) -> bool:
        """Tell whether a sequence is not computed as if masked tokens were absent, by the kinds of the layers."""
        config = self.config.text_config
        kinds = set(getattr(config, "layer_types", None) or ())
        if self.language_model._is_stateful or kinds - _MASKABLE_LAYERS - _WINDOWS.keys():
            return True
        names = [name for kind, name in _WINDOWS.items() if kind in kinds or not kinds]
        windows = [getattr(config, name, None) for name in names]
        return any(window is not None and window < length for window in windows)

    def _run_without_masked(self, inputs: dict[str, Any], **kwargs) -> BaseModelOutputWithPast:
        """Run the language model without the tokens that it does not see, which costs less than masking them."""
        embeds = inputs["inputs_embeds"]
        mask, positions = (inputs[name].to(embeds.device) for name in ("attention_mask", "position_ids"))
        counts = mask.long().cumsum(-1)
        order = (mask == 0).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(int(counts.max()), 1)]
        shortened = {
            **inputs,
            "inputs_embeds": embeds.gather(1, order.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])),
            "attention_mask": mask.gather(1, order),
            "position_ids": positions.gather(1, order),
        }
        outputs = self.language_model(return_dict=True, **shortened, **{**kwargs, "use_cache": False})
        # A token that was left out gets the state of the last one before it.
        states = outputs.last_hidden_state
        places = (counts - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        outputs.last_hidden_state = states.gather(1, places.to(states.device))
        return outputs

    def without_placeholders_in_padding(
        self, inputs_embeds: torch.FloatTensor, attention_mask: torch.Tensor | None
    ) -> torch.FloatTensor:
        """Change padding that has the embedding of the placeholder, such as zeros, so that it is not taken for one."""
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != inputs_embeds.shape[:2]:
            return inputs_embeds
        is_padding = attention_mask.to(inputs_embeds.device) == 0
        for modality in self.config.placeholder_ids:
            is_changed = is_padding & self.find_placeholders(None, inputs_embeds, modality)
            inputs_embeds = torch.where(is_changed.unsqueeze(-1), inputs_embeds + 1, inputs_embeds)
        return inputs_embeds

    def _drop_placeholders(
        self,
        position_ids: torch.LongTensor | None,
        *,
        is_placeholder: torch.BoolTensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """Mask the dropped placeholders, and number the other positions without gaps."""
        if attention_mask is None:
            attention_mask = torch.ones_like(is_placeholder, dtype=torch.long)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != is_placeholder.shape:
            given = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
            raise ValueError(
                f"`attention_mask` must have the shape of the prompts with their images, "
                f"{tuple(is_placeholder.shape)}, got {given}. Pass the whole prompt, without a cache of its beginning."
            )
        if position_ids is not None:
            count = attention_mask.long().cumsum(-1) - 1
            expected = (position_ids == count) | (attention_mask == 0)
            plain = position_ids == torch.arange(is_placeholder.shape[1], device=position_ids.device)
            torch_compilable_check(
                expected.all() | plain.all(),
                lambda: (
                    "`position_ids` must count the tokens of one prompt per row, got others. This model drops tokens "
                    "of images and counts again, which is impossible for packed prompts. Leave `position_ids` out, "
                    "and pad instead."
                ),
            )
        dropped = self.placeholders_to_drop(is_placeholder=is_placeholder, attention_mask=attention_mask, **arguments)
        attention_mask = attention_mask.masked_fill(dropped & is_placeholder, 0)
        return attention_mask, (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None, modality: str = "image"
    ) -> torch.BoolTensor:
        """Tell which positions are placeholders, `(batch_size, sequence_length)`; without ids, by their embeddings."""
        token_id = self.config.placeholder_ids[modality]
        if input_ids is not None:
            return input_ids == token_id
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token).to(inputs_embeds.device)).all(-1)

    def vision_modules(self) -> list[nn.Module]:
        """List the modules that images pass through, such as towers, fusion and projectors."""
        return [module for name, module in self.named_children() if name != "language_model"]

    def _with_gradient(self, inputs_embeds: torch.FloatTensor) -> torch.FloatTensor:
        """Give the loss of text alone a gradient of zero if only vision parameters are trained, as in stage 1."""
        if not self.training or not torch.is_grad_enabled():
            return inputs_embeds
        if any(parameter.requires_grad for parameter in self.language_model.parameters()):
            return inputs_embeds
        parameters = (parameter for module in self.vision_modules() for parameter in module.parameters())
        trained = next((parameter for parameter in parameters if parameter.requires_grad), None)
        if trained is None:
            return inputs_embeds
        zero = torch.zeros((), dtype=inputs_embeds.dtype, device=inputs_embeds.device)
        return inputs_embeds + zero * torch.nan_to_num(trained.flatten()[0]).to(inputs_embeds.device)

    def _check_no_placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, modality: str
    ) -> None:
        """Raise `ValueError` for placeholders that have no image or video."""
        if inputs_embeds.shape[1] == 1:
            return  # a step of generation, which never generates a placeholder
        mask = self.find_placeholders(input_ids, inputs_embeds, modality)
        torch_compilable_check(
            ~mask.any(),
            lambda: (
                f"The prompt holds {int(mask.sum())} {modality} placeholders, but no {modality}: "
                f"`{_PIXELS[modality]}` and `mm_encoder_outputs` are missing. Pass all that the processor returned, "
                f"or, if {modality}s are left out on purpose, write the prompt without `<{modality}>`. With a cache "
                "that holds them already, pass only the ids that follow (chunked prefill works from transformers "
                "5.24 on)."
            ),
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: list[torch.FloatTensor],
        modality: str = "image",
    ) -> torch.BoolTensor:
        """Find the placeholders, `(batch_size, sequence_length, 1)`; raise `ValueError` if their number is wrong.

        `image_features` holds the embeddings of each image or video, `(num_tokens, hidden_size)`.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds, modality)
        num_features = sum(len(features) for features in image_features)
        torch_compilable_check(
            mask.sum() == num_features,
            lambda: (
                f"The prompt holds {int(mask.sum())} {modality} placeholders, but its {len(image_features)} "
                f"{modality}(s) give {num_features} embeddings ({[len(features) for features in image_features]}). "
                f"Prepare text, {modality}s and boxes in one call of the processor, and do not truncate inside "
                f"{'an image' if modality == 'image' else f'a {modality}'}."
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)


class ImageTextForConditionalGeneration(ImageTextPreTrainedModel, GenerationMixin):
    """Model of a family with its head: logits, loss and generation.

    The class of a family sets `body_class`, and defines `get_image_features` and a `forward` that passes its arguments
    to `_score`.
    """

    body_class: type[ImageTextModel]
    output_class: type[ImageTextCausalLMOutputWithPast] = ImageTextCausalLMOutputWithPast
    # Arguments of `forward` that hold tensors of images, `pixel_values` first, and of videos.
    image_arguments: tuple[str, ...] = ("pixel_values",)
    video_arguments: tuple[str, ...] = ()
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self._head = load_language_model(config.text_config)
        language_model, lm_head = self._head.take_parts()
        self.model = self.body_class(config, language_model)
        self.lm_head = lm_head
        self._tied_weights_keys = self._head.tied_weights_keys
        self._is_stateful = self._head.rest._is_stateful
        self.post_init()
        self.generation_config.suppress_tokens = config.unused_token_ids

    def get_output_embeddings(self) -> nn.Module:
        """Return the language modeling head."""
        return self.lm_head

    def _score(
        self,
        images: dict[str, Any],
        arguments: dict[str, Any],
        logits_to_keep: int | torch.Tensor,
        **kwargs,
    ) -> ImageTextCausalLMOutputWithPast:
        """Run the body and the head with `arguments`, which every language model has; the body also with `images`.

        `images` may hold any other arguments of the body's `forward`.
        """
        labels, input_ids = arguments["labels"], arguments["input_ids"]
        if arguments["position_ids"] is not None and not self._head.takes_positions:
            raise ValueError(
                f"A language model of type {self.config.text_config.model_type!r} takes no `position_ids`: it "
                "computes positions from `attention_mask`. Leave the argument out."
            )
        loss_arguments = {name: kwargs.pop(name) for name in _LOSS_ARGUMENTS if name in kwargs}
        seen = []

        def body(input_ids: torch.LongTensor | None = None, **body_arguments) -> ImageTextModelOutputWithPast:
            outputs = self.model(input_ids=input_ids, **images, **{**body_arguments, "return_dict": True})
            seen.append(outputs)
            kept = _select_positions(outputs.last_hidden_state, logits_to_keep)
            return type(outputs)(**{**outputs, "last_hidden_state": kept})

        def loss_function(logits: torch.FloatTensor, *_, **__) -> torch.FloatTensor:
            return self._loss(logits, labels, input_ids, **loss_arguments)

        arguments = {name: value for name, value in arguments.items() if value is not None}
        scored = self._head.score(self, body, loss_function, **arguments, **kwargs, return_dict=True)
        outputs, logits = seen[0], scored.logits
        if (
            isinstance(logits_to_keep, torch.Tensor)
            and logits_to_keep.ndim == 2
            and logits_to_keep.dtype == torch.bool
        ):
            logits = logits[0]
        names = ("kept_tokens", "video_hidden_states", "video_outputs")
        seen = {name: outputs[name] for name in names if name in outputs}
        return self.output_class(
            **seen,
            loss=scored.loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            aux_loss=scored.get("aux_loss"),
            router_logits=outputs.router_logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _loss(
        self, logits: torch.FloatTensor, labels: torch.LongTensor, input_ids: torch.LongTensor | None, **kwargs
    ) -> torch.FloatTensor:
        """Compute the cross-entropy over the original vocabulary, without the positions of placeholders."""
        shifted = kwargs.get("shift_labels")
        for placeholder in self.config.placeholder_ids.values():
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == placeholder, -100)
            labels = labels.masked_fill(labels == placeholder, -100)
            if shifted is not None:
                shifted = shifted.masked_fill(shifted == placeholder, -100)
        # A trainer that splits sequences passes labels that it has shifted already; they replace `labels`.
        targets = labels
        if shifted is not None:
            targets = kwargs["shift_labels"] = shifted
        # Without any label the sum is 0, and the loss must be 0 too instead of 0 / 0.
        if (count := kwargs.get("num_items_in_batch")) is not None:
            kwargs["num_items_in_batch"] = torch.as_tensor(count).clamp(min=1)
        # The softmax leaves out the padding rows of the table, as the reference does.
        vocab_size = self.config.unpadded_vocab_size or self.config.text_config.vocab_size
        torch_compilable_check(
            ((targets < vocab_size) & (targets >= 0) | (targets == -100)).all(),
            lambda: (
                f"`labels` must be ids from 0 to {vocab_size - 1} or -100, got {int(targets.min())} to "
                f"{int(targets.max())}. Only the first {vocab_size} of the {self.config.text_config.vocab_size} rows "
                "of the embedding table are vocabulary. After adding tokens, call "
                "`model.resize_token_embeddings(len(tokenizer))`, even if the table has enough rows."
            ),
        )
        return self.loss_function(logits=logits[..., :vocab_size], labels=labels, vocab_size=vocab_size, **kwargs)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """Generate, but never the placeholder or the padding of the embedding table, whatever options are passed."""
        if missing := [name for name in _GENERATION_HOOKS if not hasattr(GenerationMixin, name)]:
            raise RuntimeError(
                f"The installed transformers has no `GenerationMixin.{missing[0]}`, which generation from images "
                "needs. Install an older transformers, or a newer mgllava."
            )
        rules, criteria = list(logits_processor or ()), list(stopping_criteria or ())
        kwargs |= dict(zip(_LATER_ARGUMENTS, args, strict=False))
        early_exit = _option("assistant_early_exit", kwargs, (generation_config, self.generation_config))
        if early_exit is not None:
            raise ValueError(
                f"`assistant_early_exit` must be None, got {early_exit}: transformers exits early from language "
                "models without images only. Pass `prompt_lookup_num_tokens`, or an `assistant_model`."
            )
        if kwargs.get("inputs_embeds") is not None:
            embeds = self.model.without_placeholders_in_padding(kwargs["inputs_embeds"], kwargs.get("attention_mask"))
            kwargs["inputs_embeds"] = embeds
        seen, prompts = {}, None
        if self.model.placeholders_to_drop is not None:
            inputs, kwargs, seen, prompts = self._without_dropped_placeholders(
                inputs, generation_config, [*rules, *criteria], kwargs
            )
        if prompts is not None:
            rules, criteria = ([prompts.give_to(rule) for rule in given] for given in (rules, criteria))
            if kwargs.get("streamer") is not None:
                kwargs["streamer"] = prompts.stream_to(kwargs["streamer"])
        processors = LogitsProcessorList([*rules, _UnusedTokens(self.config.unused_token_ids)])
        output = super().generate(inputs, generation_config, processors, StoppingCriteriaList(criteria), **kwargs)
        if isinstance(output, torch.Tensor):
            return output if prompts is None else prompts.restore(output)
        if prompts is not None:
            output.sequences = prompts.restore(output.sequences)
        for name, value in seen.items():
            output[name] = value
        return output

    @torch.no_grad()
    def _without_dropped_placeholders(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        rules: list[Callable[..., Any]],
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor | None, dict[str, Any], dict[str, Any], "_WholePrompts | None"]:
        """Encode the images, and remove dropped placeholders from the prompts for `generate`.

        If `generate` would depend on their removal, they stay and are only masked. Also returns the fields that are
        added to its output.
        """
        images = {name: kwargs[name] for name in self.image_arguments if kwargs.get(name) is not None}
        features = kwargs.get("mm_encoder_outputs")
        embeds = kwargs.get("inputs_embeds")
        given = [tensor for tensor in (inputs, kwargs.get("input_ids")) if tensor is not None]
        ids = given[0] if given and embeds is None else None
        # An assistant is given what the model that it assists sees.
        is_dropped = isinstance((features or {}).get("image"), SeenImageFeatures)
        if is_dropped or len(given) > 1 or (ids is None and embeds is None):
            return inputs, kwargs, {}, None
        cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
        if cache is not None and (cached := int(cache.get_seq_length())):
            self._check_cached(cached, ids, kwargs.get("attention_mask"))
        if not images and not features:
            return inputs, kwargs, {}, None
        configs = (generation_config, self.generation_config)
        if ids is not None and kwargs.get("attention_mask") is None:
            kwargs = {**kwargs, "attention_mask": _without_padding(ids, kwargs, configs)}
        given, _, encoded = self.model.embed(
            images,
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            mm_encoder_outputs=features,
        )
        image_outputs = encoded["image"]
        mask, tokens = given["attention_mask"], list(image_outputs.pooler_output)
        # Positions are counted without the dropped tokens.
        kwargs = {name: value for name, value in kwargs.items() if name not in (*images, "position_ids")}
        kept = mask[self.model.find_placeholders(ids, embeds)].bool()
        seen = {"kept_tokens": kept, "image_outputs": image_outputs}
        # A rule of transformers' own replaces the one that `generate` makes, if both have the same type.
        has_own_rules = any(type(rule).__module__.startswith("transformers.") for rule in rules)
        counts_prompt = has_own_rules or _counts_prompt(kwargs, configs)
        if ids is None or cache is not None or kwargs.get("prefix_allowed_tokens_fn") or counts_prompt:
            features = {"image": SeenImageFeatures(pooler_output=tokens)}
            kwargs |= {"attention_mask": mask, "mm_encoder_outputs": features}
            if not mask[:, -1].all():
                # `generate` would number the answer from the last position, which is masked.
                kwargs["position_ids"] = given["position_ids"]
            return inputs, kwargs, seen, None

        parts = zip(tokens, kept.split([len(rows) for rows in tokens]), strict=True)
        features = {"image": SeenImageFeatures(pooler_output=[rows[keep] for rows, keep in parts])}
        prompts = _WholePrompts(ids, mask.bool())
        for name in ("input_ids", "token_type_ids", "mm_token_type_ids"):
            kwargs.pop(name, None)
        inputs, mask = prompts.without_dropped(ids), prompts.without_dropped(mask)
        return inputs, {**kwargs, "attention_mask": mask, "mm_encoder_outputs": features}, seen, prompts

    def _check_cached(self, cached: int, ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """Refuse a cache of `cached` tokens that may hold images, or a part of one, of another prompt."""
        if ids is None:
            raise ValueError(_NO_CACHE)
        is_whole = ids.shape[1] > cached
        if (ids[:, :cached] if is_whole else ids).eq(self.config.image_token_id).any():
            raise ValueError(_NO_CACHE)
        if mask is not None and mask.shape[1] not in (ids.shape[1], cached + ids.shape[1]):
            raise ValueError(
                f"`attention_mask` must have one column for each of the {cached} tokens in the cache and of the "
                f"{ids.shape[1]} new ones, got {mask.shape[1]}. `generate` does not put tokens of images into the "
                "cache that the model does not see: pass the whole prompt with its images instead, without a cache."
            )

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs
    ) -> dict:
        """Prepare the arguments of `forward` for a step of generation, as the language model's own class does."""
        rest = self._head.rest
        if type(rest).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
            prepare = super().prepare_inputs_for_generation
        else:
            prepare = self._head.bind(self).prepare_inputs_for_generation
        inputs = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # transformers passes images to the first step only. But Phi-3 computes the whole prompt again when its
        # position embeddings change, and an assistant model has no first step.
        names = (*self.image_arguments, *self.video_arguments, "mm_encoder_outputs")
        images = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        ids = inputs.get("input_ids")
        is_left_out = ids is not None and ids.shape[1] > 1 and not images.keys() <= inputs.keys()
        if is_left_out and self._holds_placeholders(ids):
            inputs |= self._images_of_own_width(images)
        # Releases before 5.24 pass `mm_encoder_outputs` to every step, also where one checks several drafted tokens.
        is_later = ids is not None and not kwargs.get("is_first_iteration")
        if is_later and (ids.shape[1] == 1 or not self._holds_placeholders(ids)):
            inputs.pop("mm_encoder_outputs", None)
        if not self._head.takes_positions:
            inputs.pop("position_ids", None)
        return inputs

    def _holds_placeholders(self, ids: torch.LongTensor) -> bool:
        """Tell whether ids hold a placeholder of any modality."""
        return any(bool((ids == token_id).any()) for token_id in self.config.placeholder_ids.values())

    def _images_of_own_width(self, images: dict) -> dict:
        """Replace image features of another width by zeros: an assistant gets those of the model that it assists."""
        width = self.config.text_config.hidden_size
        own = {}
        for modality, features in (images.get("mm_encoder_outputs") or {}).items():
            given = width if features is None else features.pooler_output[0].shape[-1]
            own[modality] = features
            if given != width:
                logger.warning_once(
                    f"The {modality} features are {given} wide, but the layers of the assistant model are {width} "
                    f"wide. It drafts without the {modality}s: the answer is the same, but takes longer."
                )
                blank = [tokens.new_zeros(len(tokens), width) for tokens in features.pooler_output]
                own[modality] = type(features)(pooler_output=blank)
        return {**images, "mm_encoder_outputs": own} if own else images

    def create_masks_for_generate(self, *args, **kwargs) -> torch.Tensor | dict[str, torch.Tensor]:
        """Make attention masks for a static cache, as the language model's own class does."""
        make = getattr(self._head.rest, "create_masks_for_generate", create_masks_for_generate)
        return make(*args, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        return type(self._head.rest)._supports_default_dynamic_cache()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        # Releases that do not encode images before the prefill repeat every tensor row by row, and features not at
        # all. Images must be repeated prompt by prompt instead, since a prompt may have no image or several.
        images: dict[str, Any] = {}
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        if expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")  # with these, `input_ids` is empty
            ids = input_ids if embeds is None else None
            repeated = {}
            for modality in self.config.placeholder_ids:
                features, names = encoded.get(modality), self._arguments_of(modality)
                if features is None and model_kwargs.get(names[0] if names else "") is None:
                    continue
                is_placeholder = self.model.find_placeholders(ids, embeds, modality)
                given = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
                if features is None:
                    lengths = self._num_tokens(modality, given)
                    images |= self._take(modality, given, _repeated_groups(lengths, is_placeholder, expand_size))
                else:
                    tokens = list(features.pooler_output)
                    order = _repeated_groups(torch.tensor(list(map(len, tokens))), is_placeholder, expand_size)
                    repeated[modality] = type(features)(pooler_output=[tokens[index] for index in order])
            if repeated:
                images["mm_encoder_outputs"] = {**model_kwargs.pop("mm_encoder_outputs"), **repeated}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _arguments_of(self, modality: str) -> tuple[str, ...]:
        """Return the names of the arguments that hold the tensors of a modality."""
        return self.image_arguments if modality == "image" else self.video_arguments

    def _num_tokens(self, modality: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of placeholders of each image or video."""
        return self._num_image_tokens(given) if modality == "image" else self._num_video_tokens(given)

    def _take(self, modality: str, given: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
        """Put images or videos in another order."""
        return self._take_images(given, order) if modality == "image" else self._take_videos(given, order)

    def _num_image_tokens(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of placeholders of each image, `(num_images,)`."""
        raise NotImplementedError

    def _num_video_tokens(self, videos: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of placeholders of each video, `(num_videos,)`."""
        raise NotImplementedError

    def _take_images(self, images: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
        """Put images in another order. A family overrides this if an image has several rows in a tensor."""
        return {name: tensor[order] for name, tensor in images.items()}

    def _take_videos(self, videos: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
        """Put videos, of one or several rows each, in another order."""
        raise NotImplementedError


_Configs = tuple[GenerationConfig | None, ...]


def _option(name: str, kwargs: dict[str, Any], configs: _Configs) -> Any:
    """Return an option of `generate`: an argument, or a value of the first configuration that has it."""
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _counts_prompt(kwargs: dict[str, Any], configs: _Configs) -> bool:
    """Tell whether a limit on the length of answers counts the tokens of the prompt."""
    return any(
        _option(f"{end}_length", kwargs, configs) and not _option(f"{end}_new_tokens", kwargs, configs)
        for end in ("max", "min")
    )


def _without_padding(ids: torch.LongTensor, kwargs: dict[str, Any], configs: _Configs) -> torch.LongTensor:
    """Make an attention mask as `generate` does: padding is masked, if it is not the end of answers as well."""
    padding, ends = (_option(name, kwargs, configs) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    return torch.ones_like(ids) if padding is None or int(padding) in ends else (ids != int(padding)).long()


class _WholePrompts:
    """The whole prompts, of which `generate` gets only the tokens that are not dropped, padded on the left."""

    def __init__(self, ids: torch.LongTensor, mask: torch.BoolTensor):
        self.ids, self.mask = ids, mask
        self.width = int(mask.sum(-1).max())

    def without_dropped(self, values: torch.Tensor) -> torch.Tensor:
        """Remove dropped tokens from ids or their attention mask."""
        padding = values[:, :1].new_zeros(len(values), self.width)
        for row, (source, mask) in enumerate(zip(values, self.mask, strict=True)):
            seen = source[mask]
            padding[row, self.width - len(seen) :] = seen
        return padding

    def restore(self, sequences: torch.LongTensor) -> torch.LongTensor:
        """Replace the prompts in front of answers by the whole prompts."""
        prompts = self.ids.repeat_interleave(len(sequences) // len(self.ids), dim=0)
        return torch.cat([prompts.to(sequences.device), sequences[:, self.width :]], dim=1)

    def stream_to(self, streamer: Any) -> "_StreamOfWholePrompts":
        """Wrap a streamer, so that it gets the whole prompts first."""
        return _StreamOfWholePrompts(streamer, self.ids.cpu())

    def give_to(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a logits processor or stopping criterion, so that it sees the whole prompts."""
        return lambda ids, *args, **kwargs: rule(self.restore(ids), *args, **kwargs)


class _StreamOfWholePrompts:
    """A streamer that gets other ids first."""

    def __init__(self, streamer: Any, ids: torch.LongTensor):
        self.streamer, self.ids = streamer, ids

    def put(self, value: torch.Tensor) -> None:
        """Pass on ids, the first time those of the prompts."""
        value, self.ids = (value if self.ids is None else self.ids), None
        self.streamer.put(value)

    def end(self) -> None:
        """Pass on the end."""
        self.streamer.end()


def _repeated_groups(num_tokens: torch.Tensor, is_placeholder: torch.BoolTensor, expand_size: int) -> list[int]:
    """Return the indices of the images of all prompts, with those of each prompt repeated `expand_size` times."""
    ends = num_tokens.cumsum(0).tolist()
    prompt_ends = is_placeholder.sum(-1).cumsum(0).tolist()
    groups, first = [], 0
    for prompt_end in prompt_ends:
        last = sum(end <= prompt_end for end in ends)
        groups += list(range(first, last)) * expand_size
        first = last
    return groups


__all__ = [
    "ImageTextCausalLMOutputWithPast",
    "ImageTextForConditionalGeneration",
    "ImageTextModel",
    "ImageTextModelOutputWithPast",
    "LanguageModelHead",
    "SeenImageFeatures",
    "UnsupportedLanguageModelError",
    "language_model_class",
    "load_language_model",
    "must_be_touched",
]
