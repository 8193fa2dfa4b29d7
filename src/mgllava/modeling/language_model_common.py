"""Any causal language model of transformers: its body, and the scores of its own class."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from .pretrained_common import CACHE_NAME

# What `generate` calls on a model and a language model may do in a way of its own, without a loss here.
_DELEGATED_HOOKS = {"prepare_inputs_for_generation", "_supports_default_dynamic_cache"}
# What the class of a language model needs, to be given embeddings of images and to continue.
_ARGUMENTS = ("attention_mask", "inputs_embeds", CACHE_NAME)

_READS_IDS = "some of its layers read token ids, which images have not"
# Types whose classes look like all others, by what makes them different.
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
        "dbrx": "this release does not read back the configuration that it saves inside of another one",
        "inkling_text": "this release does not normalize embeddings that are given as it does those of ids",
    }
# Values of a configuration with which layers read ids.
_READS_IDS_IF = ("hidden_size_per_layer_input", "ple_layer_ids")


class UnsupportedLanguageModelError(ValueError):
    """A language model that cannot be part of a model for images without a change of what it computes."""

    def __init__(self, model_type: str, reason: str):
        super().__init__(
            f"`text_config`: a language model of type {model_type!r} cannot be used, since {reason}. "
            "docs/language_models.md lists the types that can."
        )


def language_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the class with a head for the configuration of a language model.

    Args:
        config (`PreTrainedConfig`): Its configuration.

    Returns:
        `type`: The class that `AutoModelForCausalLM` takes.

    Raises:
        UnsupportedLanguageModelError: If there is none, or it is known to compute something else here.
    """
    kind = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedLanguageModelError(
            kind,
            "this release of transformers has no causal language model for it (one from remote code is used after "
            "`AutoConfig.register` and `AutoModelForCausalLM.register`)",
        )
    if config.is_encoder_decoder:
        raise UnsupportedLanguageModelError(kind, "it is an encoder-decoder")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedLanguageModelError(
            kind, "it is the configuration of a multimodal model: pass that of its language model"
        )
    if kind in _REFUSED_TYPES:
        raise UnsupportedLanguageModelError(kind, _REFUSED_TYPES[kind])
    if read := [name for name in _READS_IDS_IF if getattr(config, name, None)]:
        raise UnsupportedLanguageModelError(kind, f"{_READS_IDS} (`{read[0]}`)")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not issubclass(model_class, GenerationMixin):
        raise UnsupportedLanguageModelError(kind, "it does not generate")
    arguments = _forward_arguments(model_class)
    if missing := [name for name in _ARGUMENTS if name not in arguments]:
        raise UnsupportedLanguageModelError(kind, f"its `forward` takes no {' and no '.join(missing)}")
    if own := [name for name in _own_hooks(model_class) if name not in _DELEGATED_HOOKS]:
        raise UnsupportedLanguageModelError(kind, f"it generates in a way of its own ({', '.join(own)})")
    return model_class


def _own_hooks(model_class: type) -> list[str]:
    """Methods of `GenerationMixin` that a class replaces."""
    hooks = [name for name, value in vars(GenerationMixin).items() if callable(getattr(value, "__func__", value))]
    return [
        name
        for name in hooks
        if not name.startswith("__")
        and inspect.getattr_static(model_class, name) is not inspect.getattr_static(GenerationMixin, name)
    ]


def _forward_arguments(model_class: type) -> list[str]:
    """Names of the arguments of `forward`; of the class above, if it hands on whatever it is given."""
    for kind in model_class.__mro__:
        if "forward" in vars(kind):
            arguments = inspect.signature(kind.forward).parameters
            if not any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in arguments.values()):
                return list(arguments)
    return []


class LanguageModelHead:
    """What the class of a language model computes around its body: scores, scales, caps, losses of experts.

    The class's own `forward` runs, with the body of the whole model instead of its own. It owns no weights: those of
    the head are `lm_head` of the whole model.

    Args:
        model (`PreTrainedModel`): A causal language model. It is taken apart: what holds weights is gone from it.

    Raises:
        UnsupportedLanguageModelError: If it has weights besides a body and one output layer.
    """

    def __init__(self, model: PreTrainedModel):
        kind = model.config.model_type
        try:
            body = _part_with(model, model.get_input_embeddings())
        except NotImplementedError:
            body = None
        head = model.get_output_embeddings()
        children = dict(model.named_children())
        names = [name for name, child in children.items() if child is head]
        if body is None or not isinstance(children[body], PreTrainedModel):
            raise UnsupportedLanguageModelError(kind, "it has no body apart from its head")
        if "inputs_embeds" not in _forward_arguments(type(children[body])):
            raise UnsupportedLanguageModelError(kind, "its body takes no inputs_embeds")
        with_weights = {name for name, child in children.items() if [*child.parameters(), *child.buffers()]}
        if not names or with_weights - {body, names[0]} or model._parameters or model._buffers:
            raise UnsupportedLanguageModelError(kind, "its head is not a single layer")
        width, hidden_size = model.get_input_embeddings().embedding_dim, model.config.hidden_size
        if width != hidden_size:
            raise UnsupportedLanguageModelError(
                kind, f"its token embeddings ({width}) are not as wide as its layers ({hidden_size})"
            )
        self.body_name, self.head_name = body, names[0]
        self.tied_weights_keys = {
            self._new_name(target): self._new_name(source)
            for target, source in (model._tied_weights_keys or {}).items()
        }
        self.takes_positions = "position_ids" in _forward_arguments(type(model))
        self.body, self.layer = children[body], head
        del model._modules[body], model._modules[self.head_name]
        self._rest = model

    def take_parts(self) -> tuple[PreTrainedModel, nn.Module]:
        """Hand over body and output layer, which is done once: a model registers them as modules of its own."""
        parts = self.body, self.layer
        del self.body, self.layer
        return parts

    def _new_name(self, name: str) -> str:
        """Name of a weight of the language model in the whole model."""
        for part, new in ((self.body_name, "model.language_model"), (self.head_name, "lm_head")):
            if name.startswith(f"{part}."):
                return new + name.removeprefix(part)
        return name

    @property
    def rest(self) -> PreTrainedModel:
        """The language model without what holds weights: its class, configuration and plain attributes."""
        return self._rest

    def score(self, owner: nn.Module, body: Callable[..., Any], loss_function: Callable[..., Any], **kwargs) -> Any:
        """Run the class's `forward`.

        Args:
            owner (`nn.Module`): The model with `lm_head`.
            body (`Callable`): Called in place of the body, with its arguments.
            loss_function (`Callable`): Called in place of the class's own.
            **kwargs: Arguments of `forward`.

        Returns:
            `ModelOutput`: Output of the class.
        """
        model = self.stand_in(owner)
        vars(model)[self.body_name] = _Body(body, owner.model.language_model)
        model.loss_function = loss_function
        return model.forward(**kwargs)

    def stand_in(self, owner: nn.Module) -> PreTrainedModel:
        """Make an instance of the class without body, for one call: threads and replicas of `owner` share nothing."""
        model = object.__new__(type(self._rest))
        parts = {**self._rest._modules, self.head_name: owner.lm_head}
        model.__dict__ = {**vars(self._rest), "_modules": parts, "training": owner.training}
        return model


def _part_with(model: nn.Module, wanted: nn.Module) -> str | None:
    """Name of the child of `model` that contains a module."""
    for name, child in model.named_children():
        if any(module is wanted for module in child.modules()):
            return name
    return None


class _Body:
    """A function in place of a model, whose values can be read; a part of it (`decoder` of OPT) is the same."""

    def __init__(self, function: Callable[..., Any], body: nn.Module):
        self.function, self.body = function, body

    def __call__(self, *args, **kwargs) -> Any:
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["body"], name)
        return self if isinstance(value, nn.Module) else value


def load_language_model(config: PreTrainedConfig) -> LanguageModelHead:
    """Build a language model with random weights, in parts.

    Args:
        config (`PreTrainedConfig`): Its configuration.

    Returns:
        `LanguageModelHead`: With `body` and `layer`.

    Raises:
        UnsupportedLanguageModelError: If it would compute something else here.
    """
    language_model_class(config)
    return LanguageModelHead(AutoModelForCausalLM.from_config(config))


__all__ = ["LanguageModelHead", "UnsupportedLanguageModelError", "language_model_class", "load_language_model"]
