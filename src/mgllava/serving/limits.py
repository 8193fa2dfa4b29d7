"""Limits on what a request may cost."""

from dataclasses import dataclass, fields

# Far more than the context of the language models holds; the exact check counts tokens.
MAX_TEXT_CHARACTERS = 400_000
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 100
MAX_BEAMS = 8
MAX_PROMPTS = 32
# Messages, and the parts of all messages together: each takes time in the chat template, even if it is empty.
MAX_MESSAGES, MAX_PARTS = 1000, 2000
# JSON: values to create, escapes to resolve, and nesting.
MAX_JSON_VALUES, MAX_JSON_ESCAPES, MAX_JSON_DEPTH = 500_000, 1_000_000, 50
# Requests whose processed images (with MG-LLaVA 7 MB each) may be in memory at a time.
MAX_REQUESTS_WITH_PIXELS = 4
# Names that are resolved at a time: the system's resolver cannot be interrupted.
MAX_LOOKUPS = 64
# Seconds until the head of a request has arrived, between two pieces of its body, and until all of it has arrived.
HEAD_TIMEOUT, BODY_PAUSE, BODY_TIMEOUT = 10.0, 10.0, 60.0
# Seconds for which a client may leave a piece of its answer unread.
SEND_TIMEOUT = 60.0


@dataclass(frozen=True)
class ServingLimits:
    """Limits that the operator sets.

    Attributes:
        request_bytes: Size of a request with its embedded images; also the size of all images that it has downloaded.
        images: Images in a request, over all turns.
        image_bytes: Size of an image file.
        image_side: Pixels of an image's longer side, which decides about memory, as images may be padded to a square.
        pixels: Pixels of all images of a request together, each counted as the square of its longer side.
        boxes: Boxes of an image.
        image_timeout: Seconds until an image has been downloaded.
        videos: Videos in a request, over all turns; 0: none are taken.
        video_bytes: Size of a video file.
        video_seconds: Length of a video.
        video_frames: Frames of a video file, all of which are decoded to find the sampled ones.
        video_side: Pixels of the longer side of a frame.
        video_timeout: Seconds until a video has been downloaded, and until it has been decoded.
        concurrent_requests: Requests that are waiting or being answered.
    """

    request_bytes: int = 32 * 2**20
    images: int = 8
    image_bytes: int = 10 * 2**20
    image_side: int = 8192
    pixels: int = 2**27
    boxes: int = 1000
    image_timeout: float = 10.0
    videos: int = 0
    video_bytes: int = 20 * 2**20
    video_seconds: float = 300.0
    video_frames: int = 10_000
    video_side: int = 1920
    video_timeout: float = 30.0
    concurrent_requests: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf") or (value == 0 and field.name != "videos"):
                least = "at least 0" if field.name == "videos" else "greater than 0"
                raise ValueError(f"`{field.name}` must be {least}, got {value}.")


__all__ = [
    "BODY_PAUSE",
    "BODY_TIMEOUT",
    "HEAD_TIMEOUT",
    "MAX_BEAMS",
    "MAX_JSON_DEPTH",
    "MAX_JSON_ESCAPES",
    "MAX_JSON_VALUES",
    "MAX_LOOKUPS",
    "MAX_MESSAGES",
    "MAX_PARTS",
    "MAX_PROMPTS",
    "MAX_REQUESTS_WITH_PIXELS",
    "MAX_STOP_CHARACTERS",
    "MAX_STOP_STRINGS",
    "MAX_TEXT_CHARACTERS",
    "SEND_TIMEOUT",
    "ServingLimits",
]
