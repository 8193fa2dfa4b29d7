"""The processor of a converted or newly built model."""

from collections.abc import Mapping
from typing import Any

from mgllava.processing import CHAT_TEMPLATES, MGLlavaImageProcessor, MGLlavaProcessor, MGLlavaVideoProcessor


def make_processor(
    config: Any, tokenizer: Any, image_settings: Mapping[str, Any], prompt_template: str
) -> MGLlavaProcessor:
    """Make the processor of a model, with the mean and standard deviation of CLIP's image processor."""
    side = config.high_res_vision_config.image_size
    statistics = {name: image_settings[name] for name in ("image_mean", "image_std") if name in image_settings}
    image_processor = MGLlavaImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **statistics
    )
    return MGLlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=MGLlavaVideoProcessor.like(image_processor, low_res_size=config.vision_config.image_size),
        image_seq_length=config.image_seq_length,
        num_tokens_per_box=config.num_tokens_per_box,
        chat_template=CHAT_TEMPLATES[prompt_template],
    )


__all__ = ["make_processor"]
