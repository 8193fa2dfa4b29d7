"""Description of a model family by the names of its classes and functions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model architecture, described by import strings such as `"mgllava.modeling:MGLlavaConfig"`.

    A description imports nothing, so that it can name modules on higher floors. [`resolve`] imports the object that a
    field names.

    Attributes:
        title: Name in messages and model cards.
        config: Configuration class; its `model_type` is the key of `FAMILIES`.
        model: Model class with all heads, which the Auto classes load.
        auto_classes: Names of the Auto classes of transformers that load `model`, `AutoModel` among them.
        image_processors: Image processor class per backend, `torchvision` and `pil`.
        video_processor: Video processor class, if the family takes videos.
        base_model: Model class without heads, if it can be saved on its own.
        processor: Processor class; `None` for models that read no text, which have an image processor only.
        chat_templates: Mapping from the names of prompt templates to chat templates.
        source_formats: Source formats, the checkpoint layouts that `mgllava convert` reads for this family.
        card: Function that writes the parts of the model card that depend on the family.
        parts: Names of the pretrained parts that a new model is built from.
        build: Function that builds a new model. Its keyword arguments are the names in `parts`, `prompt_template`,
            `dtype` and arguments of the configuration; it returns the model and its processor.
        trained_whole: Children of the base model that are trained completely when LoRA trains the language model.
        max_text_length: Longest training text in tokens, where an image counts as one token.
        original_labels: Class that tells from which samples the original learns nothing, if there are such.
        images_depend_on_text: Whether the embeddings of an image depend on the text of the prompt. The KV cache
            after the first image can then not be used for another prompt.
        values_without_text: Values of the configuration with which they do not depend on it.
    """

    title: str
    config: str
    model: str
    auto_classes: tuple[str, ...]
    image_processors: Mapping[str, str]
    video_processor: str | None = None
    base_model: str | None = None
    processor: str | None = None
    chat_templates: str | None = None
    source_formats: tuple[str, ...] = ()
    card: str | None = None
    parts: tuple[str, ...] = ()
    build: str | None = None
    trained_whole: tuple[str, ...] = ()
    max_text_length: int | None = None
    original_labels: str | None = None
    images_depend_on_text: bool = False
    values_without_text: Mapping[str, Any] = field(default_factory=dict)


def resolve(name: str) -> Any:
    """Import the object that an import string names.

    Args:
        name (`str`): Module and attribute, such as `"mgllava.modeling:MGLlavaConfig"`.

    Returns:
        The object.
    """
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def takes_boxes(processor: Any) -> bool:
    """Tell whether images of a processor come with boxes.

    Args:
        processor ([`ImageTextProcessor`]): The processor.

    Returns:
        `bool`: Whether it has the property `box_detector`.
    """
    # The class is asked, since reading the property of an object loads the box detector.
    return hasattr(type(processor), "box_detector")


def takes_videos(processor: Any) -> bool:
    """Tell whether a processor takes videos.

    Args:
        processor ([`ImageTextProcessor`]): The processor.

    Returns:
        `bool`: Whether its family takes videos, and its tokenizer has their placeholder.
    """
    # Code of models that were saved before does not have the attribute.
    return bool(getattr(processor, "takes_videos", False))


__all__ = ["Family", "resolve", "takes_boxes", "takes_videos"]
