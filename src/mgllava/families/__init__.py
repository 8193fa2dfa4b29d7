"""The registry of model families. A new family adds a file to this folder and a line to `FAMILIES`."""

from typing import Any

from .family import Family, resolve, takes_boxes, takes_videos
from .mgllava import MGLLAVA
from .ram_plus import RAM_PLUS
from .registration import register
from .slime import SLIME

# By `config.model_type` instead of by class, since remote code has classes of its own.
FAMILIES: dict[str, Family] = {
    "mgllava": MGLLAVA,
    "ram_plus": RAM_PLUS,
    "slime": SLIME,
}


def family_of(config: Any, has_text: bool = True) -> Family:
    """Return the family of a configuration.

    Args:
        config (`PreTrainedConfig`): Configuration of a model.
        has_text (`bool`, *optional*, defaults to `True`): Whether to accept only families that read and write text.

    Returns:
        [`Family`]: The family.

    Raises:
        ValueError: If the configuration does not belong to such a family.
    """
    accepted = {name: family for name, family in FAMILIES.items() if family.processor or not has_text}
    if config.model_type not in accepted:
        expected = " or ".join(f"{family.title} ({name!r})" for name, family in accepted.items())
        raise ValueError(f"The model type must be {expected}, got {config.model_type!r}.")
    return accepted[config.model_type]


__all__ = ["FAMILIES", "Family", "family_of", "register", "resolve", "takes_boxes", "takes_videos"]
