"""Limits on what a request may cost."""

from dataclasses import dataclass, fields

# Texts: far more than the context of any language model that MG-LLaVA has; the exact check counts tokens.
MAX_TEXT_CHARACTERS = 400_000
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 100
MAX_BEAMS = 8
MAX_PROMPTS = 32
# Messages, and the parts of all messages together: each of them costs time in the template, however empty it is.
MAX_MESSAGES, MAX_PARTS = 1000, 2000
# JSON: values that the parser would have to make, escapes that it would have to resolve, and their nesting.
MAX_JSON_VALUES, MAX_JSON_ESCAPES, MAX_JSON_DEPTH = 500_000, 1_000_000, 50
# Requests whose images are processed or wait for generation with their pixels (7 MB an image) in memory.
MAX_REQUESTS_WITH_PIXELS = 4
# Names that are resolved at the same time; the resolver cannot be interrupted.
MAX_LOOKUPS = 64
# Seconds until the head of a request has arrived, between two pieces of its body, and until all of it is there.
HEAD_TIMEOUT, BODY_PAUSE, BODY_TIMEOUT = 10.0, 10.0, 60.0
# Seconds for which a client may leave a piece of its answer unread.
SEND_TIMEOUT = 60.0


@dataclass(frozen=True)
class ServingLimits:
    """Limits that the operator sets.

    Attributes:
        request_bytes (`int`): Size of a request, images in it included; also of all images that it has downloaded.
        images (`int`): Images in a request, over all turns.
        image_bytes (`int`): Size of an image file.
        image_side (`int`): Pixels of an image's longer side. The processor pads images to a square, so the longer
            side decides about memory.
        pixels (`int`): Pixels of all images of a request together, each counted as the square of its longer side.
        boxes (`int`): Boxes of an image.
        image_timeout (`float`): Seconds until an image has been downloaded.
        concurrent_requests (`int`): Requests that are waiting or being answered.

    Raises:
        ValueError: If a limit is not positive.
    """

    request_bytes: int = 32 * 2**20
    images: int = 8
    image_bytes: int = 10 * 2**20
    image_side: int = 8192
    pixels: int = 2**27
    boxes: int = 1000
    image_timeout: float = 10.0
    concurrent_requests: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise ValueError(f"`{field.name}` must be greater than 0, got {getattr(self, field.name)}.")
