"""Videos from untrusted clients: from bytes to the sampled frames."""

import time
from dataclasses import dataclass
from typing import Any

from mgllava.errors import MGLlavaError
from mgllava.processing.video_reading_mgllava import Clip, UnreadableVideoError, VideoLimits

from .errors import RequestError
from .limits import ServingLimits


class _TooLargeError(MGLlavaError, UnreadableVideoError):
    """A video that exceeds a limit of the server."""


@dataclass(frozen=True)
class _RequestLimits(VideoLimits):
    """Limits of a request, whose errors name the server's options.

    Attributes:
        seconds_to_decode: Seconds that decoding may take.
        deadline: When they end, by the clock of `time.monotonic`.
    """

    seconds_to_decode: float = 0.0
    deadline: float = 0.0

    def check(self, name: str, **found: float) -> None:
        """Compare quantities with their limits; called before and while a video is decoded."""
        for kind, value in found.items():
            try:
                super().check(name, **{kind: value})
            except UnreadableVideoError as error:
                raise _TooLargeError(f"{error} The limit is the server's `--max-video-{kind}`.") from None
        if time.monotonic() > self.deadline:
            raise _TooLargeError(
                f"`{name}` must be decoded within {self.seconds_to_decode:g} seconds (`--video-timeout`), which it "
                "was not. Pass a shorter or smaller video, or a part of it."
            )


def decode_video(data: bytes, param: str, limits: ServingLimits, video_processor: Any, num_frames: int) -> Clip:
    """Decode a video file, keeping only the sampled frames; `param` is the field of the request that held it."""
    checked = _RequestLimits(
        max_bytes=limits.video_bytes,
        max_seconds=limits.video_seconds,
        max_frames=limits.video_frames,
        max_side=limits.video_side,
        seconds_to_decode=limits.video_timeout,
        deadline=time.monotonic() + limits.video_timeout,
    )
    try:
        (clip,) = video_processor.read_clips([data], num_frames=num_frames, limits=checked)
    except (OSError, TypeError, ValueError) as error:
        code = "video_too_large" if isinstance(error, _TooLargeError) else "invalid_video"
        raise RequestError(str(error).replace("videos[0]", param), param, code) from None
    return clip


__all__ = ["decode_video"]
