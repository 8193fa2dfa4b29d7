"""Image tagging: which words to look for in an image."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension

from .pil_resize_mgllava import resize_like_pil


class ImageTagger:
    """Names what is in images, with RAM++ or another model of its interface.

    Args:
        model ([`PreTrainedModel`]): Its output has `logits` of shape `(num_images, num_tags)`; it, or its image
            processor, has `post_process_image_tagging(outputs)` that lists per image the `labels`.
        image_processor ([`BaseImageProcessor`]): Makes `pixel_values`.
        device (`torch.device`): Where to compute; models that are spread over devices or quantized stay as they are.
        dtype (`torch.dtype`, *optional*): Of the model; by default it stays as it is.
        pixels_of_2024 (`bool`): Whether images are resized as Pillow did, where the processor's resize is bilinear.

    Raises:
        TypeError: If the model is no tagger.
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        device: torch.device,
        dtype: torch.dtype | None,
        pixels_of_2024: bool,
    ):
        owner = next((part for part in (model, image_processor) if hasattr(part, "post_process_image_tagging")), None)
        if owner is None or image_processor is None:
            raise TypeError(
                "`tagger` must be an image tagging model whose `post_process_image_tagging` lists the labels of each "
                f"image (RamPlusForImageTagging is one), got {type(model).__name__}."
            )
        if not (getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)):
            model = model.to(device=device, dtype=dtype)
        self.model, self.image_processor, self._post_process = model.eval(), image_processor, owner
        is_bilinear = getattr(image_processor, "resample", None) == PIL.Image.Resampling.BILINEAR
        size = dict(getattr(image_processor, "size", None) or {})
        self._resize_to: tuple[int, int] | None = None
        if pixels_of_2024 and is_bilinear and image_processor.do_resize and size.get("height") and size.get("width"):
            self._resize_to = (size["height"], size["width"])

    @property
    def vocabulary(self) -> list[str]:
        """All tags that the model knows, in its order; empty if its configuration does not list them."""
        id2label = getattr(self.model.config, "id2label", None) or {}
        return [id2label[index] for index in sorted(id2label)]

    def pixel_values(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the model's input.

        Args:
            images (`Sequence[torch.Tensor]`): uint8 RGB of shape `(3, height, width)` each.

        Returns:
            `torch.Tensor`: fp32 of shape `(num_images, 3, height, width)`.
        """
        options: dict[str, Any] = {"return_tensors": "pt"}
        given: list[Any] = list(images)
        if self._resize_to is not None:
            given = [resize_like_pil(image, self._resize_to) for image in given]
            options["do_resize"] = False
        if isinstance(self.image_processor, TorchvisionBackend):
            # Named, since nothing tells the channels of a picture that is three pixels wide or high.
            options |= {"device": self.model.device, "input_data_format": ChannelDimension.FIRST}
        else:
            given = [PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in given]
        return self.image_processor(given, **options)["pixel_values"]

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> list[list[str]]:
        """Tag some images.

        Args:
            images (`Sequence[torch.Tensor]`): uint8 RGB of shape `(3, height, width)` each.

        Returns:
            `list[list[str]]`: Per image its tags, in the model's order.
        """
        pixels = self.pixel_values(images)
        outputs = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        outputs["logits"] = outputs["logits"].float()  # the sigmoid and the thresholds in fp32
        results = self._post_process.post_process_image_tagging(outputs)
        return [list(result["labels"]) for result in results]


def tags_as_labels(tags: Sequence[str]) -> list[str]:
    """Turn the tags of an image into labels as in 2024: joined, lower-cased, split again.

    So a tag with a comma becomes two labels, and no tag at all becomes the single label `""`.

    Args:
        tags (`Sequence[str]`): Tags of one image.

    Returns:
        `list[str]`: At least one label.
    """
    joined = " | ".join(tags).replace(" |", ",").lower().strip()
    return [piece.strip() for piece in joined.split(",")]
