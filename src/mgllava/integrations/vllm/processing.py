"""From images with boxes to the model's inputs and placeholders, image by image, as vLLM caches them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from typing import Any

import PIL.Image
import torch

from mgllava.families import family_of, takes_boxes

from .boxed_images import BoxedImage, boxed_images, run_lengths
from .hooks import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    MediaWithBytes,
    MultiModalDataParser,
    MultiModalFieldConfig,
    ProcessorBatchItems,
    PromptReplacement,
    open_image,
)
from .options import MAX_BOXES, ROUTER_DEVICE, PluginOptions
from .routing import EMBEDDINGS, ImageRouter
from .support import drops_tokens

# Views side by side, with which an image takes the most placeholders: those of SliME; MG-LLaVA has one view.
_MOST_VIEWS = 7


class BoxedImageItems(ProcessorBatchItems):
    """The images of a prompt with what belongs to them."""

    def __init__(self, data: Sequence[BoxedImage]):
        super().__init__(data, "image")

    def get_item_for_hash(self, index: int) -> object:
        """Return what the caches of vLLM know an image by: the image or its file, its boxes, and the text."""
        item = self.data[index]
        return {"image": item.image, "company": item.company()}


class BoxedImageParser(MultiModalDataParser):
    """Reads images with boxes, and leaves the images as they are: the processor opens them in its own way."""

    def _parse_image_data(self, data: Any) -> BoxedImageItems | None:
        return None if data is None else BoxedImageItems(boxed_images(data))


class ServedInfo(BaseProcessingInfo):
    """Limits of a model."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        """Accept any number of images."""
        return {"image": None}

    def get_data_parser(self) -> BoxedImageParser:
        """Return the parser of images with boxes."""
        return BoxedImageParser()

    @cached_property
    def router(self) -> ImageRouter:
        """Embeds images whose tokens depend on the text. Loaded where requests are read, at the first one."""
        return ImageRouter(self.ctx.model_config, getattr(self.ctx.model_config.hf_config, ROUTER_DEVICE, None))

    @cached_property
    def has_router(self) -> bool:
        """Whether the tokens of an image depend on the text."""
        config = self.ctx.model_config.hf_config
        return drops_tokens(config, family_of(config))

    @cached_property
    def largest_image(self) -> tuple[BoxedImage, int]:
        """An image with the most placeholders, and their number."""
        return self._image(self.most_boxes)

    @cached_property
    def most_boxes(self) -> int:
        """Most boxes of an image: as many as fit into the context of the model, and 0 if it takes none."""
        if not takes_boxes(self.get_hf_processor()):
            return 0
        config = self.ctx.model_config
        left = config.max_model_len - self._image(1)[1] - 1
        return max(1, min(getattr(config.hf_config, MAX_BOXES, PluginOptions.max_boxes), left))

    def _image(self, num_boxes: int) -> tuple[BoxedImage, int]:
        """Return an image with the most views, and the number of its placeholders."""
        processor = self.get_hf_processor()
        size = processor.image_processor.crop_size
        image = PIL.Image.new("RGB", (_MOST_VIEWS * size["width"], size["height"]))
        item = BoxedImage(image, [[0, 0, 1, 1]] * num_boxes or None)
        return item, processor.num_image_tokens(image_features(processor, item, {}))[0]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Return the number of placeholders for which memory is reserved."""
        return {"image": self.largest_image[1]}


class ServedDummyInputs(BaseDummyInputsBuilder):
    """Makes the inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a prompt of placeholders."""
        return str(self.info.get_hf_processor().image_token) * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Return the images of that prompt."""
        return {"image": [self.info.largest_image[0]] * mm_counts.get("image", 0)}


class ServedProcessor(BaseMultiModalProcessor):
    """Processes each image alone, so that nothing of it depends on its neighbors."""

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Let names that users give to images stand for the image with these boxes."""
        names, items = (inputs.mm_uuid_items or {}).get("image"), inputs.mm_data_items.get("image")
        if names and items is not None:
            names = [
                None if name is None else f"{name} {item.company()}" for name, item in zip(names, items, strict=True)
            ]
            inputs = replace(inputs, mm_uuid_items={**inputs.mm_uuid_items, "image": names})
        return super()._get_mm_hashes(inputs)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        from transformers import BatchFeature

        processor = self.info.get_hf_processor()
        options = image_options(processor, hf_kwargs)
        most = self.info.most_boxes
        rows = []
        for index, item in enumerate(hf_data["images"]):
            features = image_features(processor, item, options, f"image {index}")
            if item.boxes is not None and processor.num_image_tokens(features)[0] > self.info.largest_image[1]:
                raise ValueError(
                    f"`boxes` of image {index} must be at most {most}, got more. The operator sets "
                    "`additional_config['mgllava']['max_boxes']`."
                )
            if self.info.has_router:
                features = {EMBEDDINGS: self._embeddings(item, features)}
            rows.append(features)
        return BatchFeature({name: [row[name] for row in rows] for name in self._input_names})

    @property
    def _input_names(self) -> Sequence[str]:
        """Names of what the model gets of each image."""
        return (EMBEDDINGS,) if self.info.has_router else self.info.get_hf_processor().image_inputs

    def _embeddings(self, item: BoxedImage, features: Mapping[str, Any]) -> Any:
        """Return the tokens of an image that the language model sees; all, as zeros, of the largest image."""
        if item is self.info.largest_image[0]:
            config = self.info.ctx.model_config
            width = config.hf_config.get_text_config().hidden_size
            return torch.zeros(self.info.largest_image[1], width, dtype=config.dtype)
        if item.text_ids is None:
            raise RuntimeError("An image came without the text of its prompt, by which its tokens are chosen.")
        return self.info.router(features, item.text_ids)

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("image") for name in self._input_names}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        processor = self.info.get_hf_processor()
        token = processor.image_token_id
        runs = []
        for item in out_mm_kwargs.get("image", []):
            row = {name: item[name].data for name in self._input_names}
            count = len(row[EMBEDDINGS]) if self.info.has_router else processor.num_image_tokens(row)[0]
            runs.append([token] * count)
        return [PromptReplacement(modality="image", target=[token], replacement=runs.__getitem__)]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        """Write runs of placeholders, also into prompts that have them already."""
        lengths = [len(updates[0].content.full) for updates in mm_prompt_updates.get("image", [])]
        ids = run_lengths(token_ids, self.info.get_hf_processor().image_token_id, lengths)
        return super()._apply_prompt_updates(ids, mm_prompt_updates)


def image_options(processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the image processor in `mm_processor_kwargs`; raise a `ValueError` for others."""
    merged = {**options, **(options.get("images_kwargs") or {})}
    merged.pop("images_kwargs", None)
    known = set(processor.image_processor.valid_kwargs.__annotations__) - {"boxes", "return_tensors"}
    if unknown := sorted(set(merged) - known):
        raise ValueError(
            f"`mm_processor_kwargs` must be options of the image processor, got {', '.join(unknown)}. It has "
            f"{', '.join(sorted(known))}."
        )
    return merged


def open_item(image: Any) -> Any:
    """Return an image as the processor takes it: vLLM composes transparent files with white, which it does not."""
    return open_image(BytesIO(image.original_bytes)) if isinstance(image, MediaWithBytes) else image


def image_features(processor: Any, item: BoxedImage, options: Mapping[str, Any], name: str = "image") -> Any:
    """Make the model's inputs of one image."""
    if item.image is None:
        raise ValueError(f"{name} must be given: it is no longer in the cache.")
    image = open_item(item.image)
    boxes = {"boxes": [item.boxes]} if takes_boxes(processor) else {}
    if item.boxes is not None and not boxes:
        raise ValueError(f"`boxes` of {name} must be left out: this model takes no boxes.")
    features = processor.image_processor(images=[image], return_tensors="pt", **boxes, **options)
    return processor.take_images(features, 0)


__all__ = ["ServedDummyInputs", "ServedInfo", "ServedProcessor", "image_features", "image_options", "open_item"]
