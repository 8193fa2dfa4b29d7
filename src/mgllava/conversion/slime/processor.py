"""The processor of a converted or newly built model."""

from collections.abc import Mapping
from typing import Any

from mgllava.model_files.errors import ConversionError
from mgllava.processing import SLIME_CHAT_TEMPLATES, SlimeImageProcessor, SlimeProcessor

_SEPARATOR = ","


def make_processor(
    config: Any, tokenizer: Any, image_settings: Mapping[str, Any], prompt_template: str, do_tile: bool = True
) -> SlimeProcessor:
    """Make the processor of a model; of CLIP's image processor it takes mean and standard deviation."""
    side = config.vision_config.image_size
    statistics = {name: image_settings[name] for name in ("image_mean", "image_std") if name in image_settings}
    return SlimeProcessor(
        image_processor=SlimeImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_tile=do_tile, **statistics
        ),
        tokenizer=tokenizer,
        num_global_tokens=config.num_global_tokens,
        num_local_tokens=config.num_local_tokens,
        num_separators=0 if config.num_local_queries is None else 1,
        chat_template=SLIME_CHAT_TEMPLATES[prompt_template],
    )


def separator_of(tokenizer: Any) -> int:
    """Return the id of the separator: the last token of a comma, which may start with one for a space."""
    ids = tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConversionError(
            "`llm`: its tokenizer has no token for a comma, which separates global and local tokens."
        )
    return int(ids[-1])


__all__ = ["make_processor", "separator_of"]
