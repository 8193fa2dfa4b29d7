"""The model that vLLM runs: its Transformers backend with the image modules of a family."""

import copy
from functools import cache, cached_property
from typing import Any

import torch
from transformers import AutoModel

from mgllava.families import family_of, resolve

from .hooks import MULTIMODAL_REGISTRY, TransformersMultiModalForCausalLM, cached_processor_from_config
from .processing import ServedDummyInputs, ServedInfo, ServedProcessor
from .routing import EMBEDDINGS


@cache
def served_body(model_type: str) -> tuple[type, type]:
    """Make a configuration class and a body of a family, whose `forward` runs the language model alone.

    `AutoModel` maps the family's own configuration to the model with its head. vLLM has its own head, and puts the
    embeddings of images into those of the text itself.
    """
    family = next(family for family in _families() if resolve(family.config).model_type == model_type)
    assert family.base_model is not None  # every family that reads text has a body

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return self.language_model(input_ids=input_ids, **kwargs)

    config_class = type("ServedConfig", (resolve(family.config),), {})
    body = type("ServedBody", (resolve(family.base_model),), {"config_class": config_class, "forward": forward})
    AutoModel.register(config_class, body, exist_ok=True)
    return config_class, body


def _families() -> list[Any]:
    from mgllava.families import FAMILIES

    return [family for family in FAMILIES.values() if family.processor is not None]


@MULTIMODAL_REGISTRY.register_processor(ServedProcessor, info=ServedInfo, dummy_inputs=ServedDummyInputs)
class ServedModel(TransformersMultiModalForCausalLM):
    """A model of any family that reads images and text."""

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        """Name the body instead of the model with its head; nested configurations are shared, as vLLM changes them."""
        config = copy.copy(self.config)
        config.__class__ = served_body(family_key(self.config))[0]
        config.auto_map = {}  # the code of this package, not that in the model folder
        return {**super()._from_config_kwargs, "config": config}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return nothing: the plugin's renderer writes placeholders."""
        return None

    @cached_property
    def _processor(self) -> Any:
        return cached_processor_from_config(self.model_config)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Embed images, as `(num_tokens, hidden_size)` each; the arguments hold a tensor of each image."""
        if kwargs.get(EMBEDDINGS) is not None:
            return list(kwargs[EMBEDDINGS])
        names = self._processor.image_inputs
        if kwargs.get(names[0]) is None:
            return []
        rows = [
            dict(zip(names, values, strict=True)) for values in zip(*(kwargs[name] for name in names), strict=True)
        ]
        device = rows[0][names[0]].device
        images = {name: tensor.to(device) for name, tensor in self._processor.join_images(rows).items()}
        return list(self.model.get_image_features(**images, return_dict=True).pooler_output)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Compute logits in which the placeholder and the padding of the vocabulary are impossible."""
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        unused = torch.tensor(self.config.unused_token_ids, device=logits.device, dtype=torch.long)
        return logits.index_fill(-1, unused[unused < logits.shape[-1]], -torch.inf)


def family_key(config: Any) -> str:
    """Return the model type of a configuration; raise a `ValueError` if it is not of a family that reads text."""
    family_of(config)
    return str(config.model_type)


__all__ = ["ServedModel", "served_body"]
