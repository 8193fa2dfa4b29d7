"""Images whose tokens depend on the text of the prompt: they are embedded before vLLM counts their tokens."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mgllava.families import family_of, resolve

# The name of what vLLM gets of an image in place of its pixels.
EMBEDDINGS = "image_embeddings"


class ImageRouter:
    """The modules of a model that embed images and text, and its choice of the tokens that the language model sees.

    Args:
        model_config (`Any`): vLLM's description of the model.
        device (`str`, *optional*): Where the modules run; by default the accelerator that torch finds.

    Raises:
        ValueError: If the model folder lacks weights of these modules.
    """

    def __init__(self, model_config: Any, device: str | None = None):
        self.device = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
        self.model = _load_without_layers(model_config).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Mapping[str, torch.Tensor], text_ids: Sequence[int]) -> torch.Tensor:
        """Embed an image.

        Args:
            images (`Mapping[str, torch.Tensor]`): The model's inputs of one image.
            text_ids (`Sequence[int]`): All ids of its prompt that are not placeholders.

        Returns:
            `torch.FloatTensor` of shape `(num_kept_tokens, hidden_size)`: The tokens that the language model sees.
        """
        outputs = self.model.get_image_features(**{name: value.to(self.device) for name, value in images.items()})
        tokens = outputs.pooler_output[0]
        ids = torch.tensor(text_ids, dtype=torch.int64, device=self.device)
        embeds = torch.cat([self.model.get_input_embeddings()(ids), tokens])[None]
        is_placeholder = torch.arange(embeds.shape[1], device=self.device)[None] >= len(ids)
        dropped = self.model.placeholders_to_drop(
            image_outputs=outputs,
            inputs_embeds=embeds,
            is_placeholder=is_placeholder,
            attention_mask=torch.ones_like(is_placeholder),
            labels=None,
        )
        return tokens[~dropped[0, len(ids) :]].cpu()


class _TextEmbeddings(nn.Module):
    """The embedding table of a language model, under its usual name."""

    def __init__(self, config: Any):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the table as it is: it is loaded."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


class _WithoutLayers:
    """Part of a model: it has the embedding table of the language model, and neither its layers nor its head."""

    # transformers would list these weights as not used.
    _keys_to_ignore_on_load_unexpected = (r"language_model\.", r"^lm_head\.")

    def add_language_model(self: Any, language_model: None) -> None:
        self.language_model = _TextEmbeddings(self.config.get_text_config())
        self.post_init()


def _load_without_layers(model_config: Any) -> Any:
    """Load a model without the layers of its language model; vLLM changes their classes in its process."""
    config = copy.deepcopy(model_config.hf_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the layers
    body = resolve(str(family_of(config).base_model))
    model, info = type("Embedder", (_WithoutLayers, body), {}).from_pretrained(  # type: ignore[attr-defined]
        model_config.model,
        revision=model_config.revision,
        config=config,
        dtype=model_config.dtype,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{model_config.model!r} must have all weights that embed images and text, but these are missing: "
            f"{', '.join(sorted(info['missing_keys']))}."
        )
    return model.eval()


__all__ = ["EMBEDDINGS", "ImageRouter"]
