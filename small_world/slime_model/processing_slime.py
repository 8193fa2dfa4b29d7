"""Processor of SliME (arXiv 2406.08487): images and text to model inputs, and ids back to text."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from .image_text_processor_common import ImageTextProcessor, as_tensor
from .text_chunks_common import IMAGE_TOKEN, build_chat_template

# By the names that the original gives them.
SLIME_CHAT_TEMPLATES: dict[str, str] = {
    # Vicuna
    "v1": build_chat_template(
        system=("", " "),
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. "
        ),
        user=("USER: ", ""),
        generation_prompt=" ASSISTANT:",
        answer_start=" ",
        suffix="</s>",
        closes_empty_answers=False,
    ),
    # Llama-3-Instruct
    "llama3": build_chat_template(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        suffix="<|eot_id|>",
    ),
    # Captions without a conversation, for the first two stages of training: the text of questions is dropped.
    "plain": build_chat_template(
        system=("", ""), user=("", ""), generation_prompt="", suffix="\n", has_questions=False
    ),
}


class SlimeProcessor(ImageTextProcessor):
    r"""Prepares images and text for SliME.

    Each `<image>` in the text becomes one run of placeholders: those of the global view, a separator, and those of all
    tiles. Which of the tiles' tokens the language model sees is decided by the model, which knows the text. Text is
    encoded in chunks around the images, as in training.

    Example:
        ```python
        inputs = processor(image, "USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
        inputs["image_grids"]  # tensor([[2, 3]])
        inputs["input_ids"].shape  # (1, 576 + 1 + 2 * 3 * 144 + text)
        ```

    Args:
        image_processor ([`SlimeImageProcessor`]): Makes `pixel_values` and `image_grids`.
        tokenizer ([`PreTrainedTokenizerBase`]): Has `image_token` in its vocabulary.
        num_global_tokens (`int`, *optional*, defaults to 576): Tokens of a global view, from the model's config.
        num_local_tokens (`int`, *optional*, defaults to 144): Tokens of a tile, from the model's config.
        num_separators (`int`, *optional*, defaults to 1):
            Separators before the tokens of tiles: 1, or 0 for models that do not compress tiles.
        chat_template (`str`, *optional*): Jinja template.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, if the tokenizer does not name one.

    Raises:
        ValueError: If the tokenizer does not know `image_token`.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grids")
    chat_templates: ClassVar[Mapping[str, str]] = SLIME_CHAT_TEMPLATES
    cuts_at_answers = False

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_global_tokens: int = 576,
        num_local_tokens: int = 144,
        num_separators: int = 1,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
    ):
        self.num_global_tokens = num_global_tokens
        self.num_local_tokens = num_local_tokens
        self.num_separators = num_separators
        super().__init__(image_processor, tokenizer, chat_template, image_token)

    def num_image_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Count the placeholders of each image.

        Args:
            inputs (`Mapping`): Model inputs with `image_grids` of shape `(num_images, 2)`.

        Returns:
            `list[int]`: Their numbers, in the order of the images.
        """
        return [
            self.num_global_tokens + (self.num_separators + self.num_local_tokens * tiles if tiles else 0)
            for tiles in _num_tiles(inputs)
        ]

    def count_images(self, inputs: Mapping[str, Any]) -> int:
        """Count the images of a batch.

        Args:
            inputs (`Mapping`): Model inputs.

        Returns:
            `int`: The number of rows of `image_grids`.
        """
        return len(_num_tiles(inputs))

    def take_images(self, inputs: Mapping[str, Any], first: int, last: int | None = None) -> dict[str, torch.Tensor]:
        """Take images out of a batch.

        Args:
            inputs (`Mapping`): Model inputs.
            first (`int`): Index of the first image.
            last (`int`, *optional*): Index after the last one. All after `first` by default.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` and `image_grids`; empty if there are no images.
        """
        views = [1 + tiles for tiles in _num_tiles(inputs)]
        if not views[first:last]:
            return {}
        start = sum(views[:first])
        rows = {"pixel_values": slice(start, start + sum(views[first:last])), "image_grids": slice(first, last)}
        return {name: as_tensor(inputs[name][kept]) for name, kept in rows.items()}


def _num_tiles(inputs: Mapping[str, Any]) -> list[int]:
    """Number of tiles of each image."""
    grids = inputs.get("image_grids")
    return [] if grids is None else [int(rows) * int(columns) for rows, columns in grids]


__all__ = ["SLIME_CHAT_TEMPLATES", "SlimeProcessor"]
