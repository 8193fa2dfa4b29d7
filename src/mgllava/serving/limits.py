"""What a request may cost."""

from dataclasses import dataclass, fields

# Texts: far more than the context of any language model that MG-LLaVA has; the exact check counts tokens.
MAX_TEXT_CHARACTERS = 400_000
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 100
MAX_BEAMS = 8
# Seconds until a request has arrived.
BODY_TIMEOUT = 60.0


@dataclass(frozen=True)
class ServingLimits:
    """Limits that the operator sets.

    Attributes:
        request_bytes (`int`): Size of a request, images in it included.
        images (`int`): Images in a request, over all turns.
        image_bytes (`int`): Size of an image file.
        image_side (`int`): Pixels of an image's longer side. The processor pads images to a square, so the longer
            side decides about memory.
        boxes (`int`): Boxes of an image.
        image_timeout (`float`): Seconds until an image has been downloaded.
        concurrent_requests (`int`): Requests that are being read, waiting or answered.

    Raises:
        ValueError: If a limit is not positive.
    """

    request_bytes: int = 32 * 2**20
    images: int = 8
    image_bytes: int = 10 * 2**20
    image_side: int = 8192
    boxes: int = 1000
    image_timeout: float = 10.0
    concurrent_requests: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"`{field.name}` must be greater than 0, got {getattr(self, field.name)}.")
