"""The plugin's own options, in vLLM's `additional_config` under the name `mgllava`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mgllava.serving.limits import ServingLimits

from . import NAME

# The option `max_boxes`, which all processes of vLLM need, as an attribute of the model's configuration.
MAX_BOXES = "mgllava_max_boxes"
# The option `router_device` in the same place.
ROUTER_DEVICE = "mgllava_router_device"


@dataclass(frozen=True)
class PluginOptions:
    """Options of the plugin.

    Attributes:
        box_detector: Whether the processor's box detector finds the boxes of images that come without.
        box_detector_device: Where it runs; by default the accelerator that torch finds.
        router_device: Where images are embedded whose tokens depend on the text; by default the accelerator that torch
            finds.
        box_detector_batch_size: How many images it processes at once, also of different requests.
        remembered_images: For how many images its boxes are remembered.
        max_boxes: Most boxes of an image; memory is reserved for images with so many.
        allowed_image_hosts: If set, requests are read as by `mgllava serve`, with this option and `limits`.
        limits: Limits of such requests.
    """

    box_detector: bool = True
    box_detector_device: str | None = None
    router_device: str | None = None
    box_detector_batch_size: int = 8
    remembered_images: int = 10_000
    max_boxes: int = 300
    allowed_image_hosts: str | None = None
    limits: ServingLimits = field(default_factory=ServingLimits)

    @classmethod
    def read(cls, additional_config: Any) -> "PluginOptions":
        """Read the options; raise a `ValueError` for unknown names and wrong values."""
        given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"`additional_config[{NAME!r}]` must be a dict of options, got {given!r}.")
        known = {option.name: option for option in fields(cls)}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                f"`additional_config[{NAME!r}]` must have options among {', '.join(known)}, got {', '.join(unknown)}."
            )
        values = dict(given)
        for name in ("box_detector_batch_size", "remembered_images", "max_boxes"):
            value = values.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"`additional_config[{NAME!r}][{name!r}]` must be a whole number, at least 1, got {value!r}."
                )
        if not isinstance(values.get("box_detector", True), bool):
            raise ValueError(
                f"`additional_config[{NAME!r}]['box_detector']` must be true or false, got {values['box_detector']!r}."
            )
        for name in ("box_detector_device", "router_device", "allowed_image_hosts"):
            if not isinstance(values.get(name), str | None):
                raise ValueError(f"`additional_config[{NAME!r}][{name!r}]` must be a string, got {values[name]!r}.")
        if "limits" in values:
            values["limits"] = ServingLimits(**values["limits"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that [`~PluginOptions.read`] reads."""
        return asdict(self)


__all__ = ["MAX_BOXES", "ROUTER_DEVICE", "PluginOptions"]
