"""Videos from any source, as the frames that are sampled from them.

Decoders trust what a file says about itself, and each counts in its own way. Here, frames are counted by decoding, and
a frame that is sampled twice is returned twice, so that there are always as many frames as indices.
"""

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .images_common import UnreadableImageError, as_rgb, binary_file, load_upright, open_images, shown

logger = logging.get_logger(__name__)

# Where a block of a conversation may hold a video.
VIDEO_KEYS = ("video", "bytes", "base64", "url", "path", "video_url")
# Containers that FFmpeg may read; those of sound are for the error that there is no video. Playlists are not among
# them: they name other files, also of this machine.
_CONTAINERS = (
    "3g2,3gp,aac,asf,av1,avi,dv,flac,flv,gxf,h261,h263,h264,hevc,ivf,m4a,m4v,matroska,mj2,mjpeg,mov,mp3,mp4,mpeg,"
    "mpegts,mpegvideo,mxf,nut,obu,ogg,rm,swf,vc1,wav,webm,wtv,yuv4mpegpipe"
)
_IMAGE_STARTS = (b"GIF8", b"\x89PNG")
_MATROSKA = b"\x1a\x45\xdf\xa3"
# Containers whose writers note the length when they are done, and by how much of it a file may be shorter.
_FINISHED_CONTAINERS = ("matroska", "mp4")
_MISSING_PART, _MISSING_FRAMES = 0.1, 2.5
# Pixels by which the buffers of decoders may be wider and higher than the frames.
_DECODER_MARGIN = 256


class UnreadableVideoError(UnreadableImageError):
    """A video that cannot be read. Code that skips images that cannot be read skips it, too."""


@dataclass(frozen=True)
class VideoLimits:
    """Limits for videos of strangers, which are checked before and while a video is decoded. `None`: no limit.

    Attributes:
        max_bytes: Size of the file.
        max_seconds: Length of the video.
        max_frames: Number of frames in the file.
        max_side: Longer side of a frame in pixels.
    """

    max_bytes: int | None = None
    max_seconds: float | None = None
    max_frames: int | None = None
    max_side: int | None = None

    def check(self, name: str, **found: float) -> None:
        """Compare quantities with their limits.

        Args:
            name (`str`): Name of the video in the error.
            **found: What was found: `bytes`, `seconds`, `frames` or `side`.

        Raises:
            UnreadableVideoError: If one is above its limit.
        """
        units = {"bytes": "bytes", "seconds": "seconds", "frames": "frames", "side": "pixels on its longer side"}
        for kind, value in found.items():
            limit = getattr(self, f"max_{kind}")
            if limit is not None and value > limit:
                raise UnreadableVideoError(
                    f"`{name}` must have at most {limit:,} {units[kind]}, got {value:,.10g} or more. Pass a shorter "
                    "or smaller video, or a part of it."
                )


NO_LIMITS = VideoLimits()
# Chooses frames: maps the properties of a video to indices of its frames; `None` keeps all frames.
Sampler = Callable[[VideoMetadata], Sequence[int]]


@dataclass
class Clip:
    """The frames that were sampled from a video.

    Attributes:
        frames: uint8 RGB of shape `(num_frames, 3, height, width)`, upright.
        metadata: Properties of the whole video; `frames_indices` are the indices of the frames.
    """

    frames: torch.Tensor
    metadata: VideoMetadata


def read_video(
    video: Any,
    sample: Sampler | None = None,
    name: str = "video",
    limits: VideoLimits = NO_LIMITS,
    metadata: Any = None,
    input_data_format: Any = None,
) -> Clip:
    """Read a video, decoding it at most twice and keeping only sampled frames.

    It may be a path, http(s) URL, data URL, base64 string, bytes, binary file, a mapping that holds one of these, a
    decoder of torchcodec, an array or tensor of frames (4 dimensions), or a list of frames. `metadata` are the known
    properties of frames that are decoded already, such as `fps`.
    """
    if isinstance(video, Mapping) and not isinstance(video, VideoMetadata):
        given = {key: video[key] for key in VIDEO_KEYS if video.get(key) is not None}
        if len(given) != 1 and set(given) != {"bytes", "path"}:  # of these two, the path names the bytes' source
            raise TypeError(
                f"`{name}` must have one video, under {', '.join(map(repr, VIDEO_KEYS))}, got "
                f"{', '.join(given) or f'none under the keys {sorted(map(str, video))}'}."
            )
        return read_video(next(iter(given.values())), sample, name, limits, metadata, input_data_format)
    if is_decoder(video):
        return _read_decoder(video, sample, name, limits)
    if _is_frames(video):
        return _take_frames(video, sample, name, limits, metadata, input_data_format)
    if isinstance(video, str | os.PathLike) and os.path.isdir(video):
        raise UnreadableVideoError(f"`{name}` must be a video file, got the folder {shown(video)}. Pass its files.")
    if not (hasattr(video, "read") or isinstance(video, str | bytes | bytearray | memoryview | os.PathLike)):
        raise TypeError(
            f"`{name}` must be a path, URL, data URL, base64 string, bytes, binary file, array, tensor or list of "
            f"frames, got {type(video).__name__}."
        )
    described = shown(video)
    with binary_file(video, name, limits.max_bytes) as file:
        limits.check(name, bytes=_length_of(file))
        start = file.read(64)
        file.seek(0)
        if start.startswith(_IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
            return _read_with_pillow(file, sample, name, described, limits)
        if start.lstrip()[:7].lower() in (b"#extm3u", b"ffconca") or start.lstrip()[:4] in (b"<MPD", b"<?xm"):
            raise UnreadableVideoError(
                f"`{name}` must be a video file, got {described}, which is a playlist. Pass one of its videos."
            )
        decoder = None if limits != NO_LIMITS else _torchcodec_decoder()
        # torchcodec does not say how long a Matroska or WebM file claims to be, and fails for some that PyAV reads.
        has_pyav = find_spec("av") is not None
        if decoder is not None and not (has_pyav and start.startswith(_MATROSKA)):
            try:
                return _read_with_torchcodec(decoder, file, sample, name, described, start)
            except UnreadableVideoError:
                if not has_pyav:
                    raise
                file.seek(0)
        if not start.startswith(b"\xff\xd8\xff"):
            return _read_with_pyav(file, sample, name, described, limits)
        try:  # either frames of JPEG one after the other, or an image
            return _read_with_pyav(file, sample, name, described, limits)
        except UnreadableVideoError:
            file.seek(0)
            if b"\xff\xd9\xff\xd8" in file.read():
                raise
            file.seek(0)
            return _read_with_pillow(file, sample, name, described, limits)


def _length_of(file: BinaryIO) -> int:
    """Return the number of bytes of a file."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    return length


def _choose(sample: Sampler | None, metadata: VideoMetadata) -> list[int]:
    """Call the sampler, and check its indices."""
    total = metadata.total_num_frames
    indices = range(total) if sample is None else sample(metadata)
    indices = [int(index) for index in indices]
    if not indices or min(indices) < 0 or max(indices) >= total:
        raise ValueError(f"Frames must be sampled from the {total} of a video, got the indices {indices}.")
    return indices


def _missing_decoder() -> ImportError:
    """Make an error that says what to install."""
    return ImportError(
        "Video files are decoded by PyAV or torchcodec, and neither can be imported. Install one: pip install av. "
        "Or pass the frames: an array of shape (num_frames, height, width, 3), or a list of images."
    )


@contextmanager
def _errors_named(name: str, described: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an error that names the video."""
    try:
        yield
    except (MemoryError, UnreadableVideoError, ImportError):
        raise
    except Exception as error:  # decoders raise anything for broken files
        raise _undecodable(name, described, str(error).rstrip(".") or type(error).__name__) from error


def _undecodable(name: str, described: str, problem: str) -> UnreadableVideoError:
    """Make an error for a file that cannot be decoded."""
    return UnreadableVideoError(
        f"`{name}` must be a video that can be decoded, got {described}: {problem}. The file may be incomplete or "
        "damaged, or not a video: replace it, or leave it out."
    )


@dataclass
class _Length:
    """What is known about the length of a video: number of frames, seconds, and what the file claims."""

    frames: int = 0
    seconds: float | None = None
    claimed_seconds: float | None = None


def _read_with_pyav(file: BinaryIO, sample: Sampler | None, name: str, described: str, limits: VideoLimits) -> Clip:
    """Decode a video with PyAV."""
    try:
        av = import_module("av")
    except Exception as error:  # a broken installation raises anything
        raise _missing_decoder() from error

    def refuse(url: str, *_: Any) -> Any:
        raise UnreadableVideoError(f"`{name}` must be one file, got {described}, which names another one, {url!r}.")

    @contextmanager
    def opened() -> Iterator[tuple[Any, Any]]:
        file.seek(0)
        options = {"format_whitelist": _CONTAINERS}
        with av.open(file, metadata_errors="replace", container_options=options, io_open=refuse) as container:
            covers = [stream for stream in container.streams.video if _is_cover(av, stream)]
            streams = [stream for stream in container.streams.video if stream not in covers]
            if not streams:
                raise _undecodable(name, described, "it has no video stream")
            best = container.streams.best("video")
            stream = best if best in streams else streams[0]
            stream.thread_type = "AUTO"
            if limits.max_side is not None:  # frames may be larger than the header says
                stream.codec_context.options = {"max_pixels": str((limits.max_side + _DECODER_MARGIN) ** 2)}
            yield container, stream

    with _errors_named(name, described):
        with opened() as (container, stream):
            length = _measure_packets(container, stream, name, described, limits)
            rate = float(stream.average_rate or 0) or None
        # Usually each packet holds a frame. If not, the frames are sampled again, when their number is known.
        for _ in range(3):
            counted = length.frames
            metadata = _metadata(length, rate, "pyav")
            indices = _choose(sample, metadata) if counted else []
            with opened() as (container, stream):
                frames, length.frames = _decode(container, stream, set(indices), name, described, limits)
            if length.frames == counted:
                break
    if not frames:
        raise _undecodable(name, described, "it has no frames")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise _undecodable(name, described, "its frames change their size")
    _check_end(length, metadata.fps, name, described)
    return _clip([frames[index] for index in indices], metadata, indices)


def _check_end(length: _Length, fps: float | None, name: str, described: str) -> None:
    """Refuse a file that ends before its header says so: other frames would be sampled than from the whole video."""
    if length.claimed_seconds and length.seconds and fps:
        missing = length.claimed_seconds - length.seconds
        if missing > max(_MISSING_PART * length.claimed_seconds, _MISSING_FRAMES / fps):
            problem = f"it ends after {length.seconds:.3g} of {length.claimed_seconds:.3g} seconds"
            raise _undecodable(name, described, problem)


def _is_cover(av: Any, stream: Any) -> bool:
    """Tell whether a video stream is a picture that belongs to music."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _measure_packets(container: Any, stream: Any, name: str, described: str, limits: VideoLimits) -> _Length:
    """Count the packets of a video without decoding them, and measure its length."""
    codec = stream.codec_context
    limits.check(name, side=max(codec.width, codec.height))
    times: list[float] = []
    count = 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.is_corrupt:
            raise _undecodable(name, described, f"it breaks off within frame {count}")
        count += 1
        if packet.pts is not None and packet.time_base is not None:
            times += [float(packet.pts * packet.time_base)]
            times += [float((packet.pts + (packet.duration or 0)) * packet.time_base)]
        seconds = max(times) - min(times) if times else 0.0
        times = [min(times), max(times)] if times else []
        limits.check(name, frames=count, seconds=seconds)
    claimed = None
    if any(name in container.format.name for name in _FINISHED_CONTAINERS):
        if stream.duration and stream.time_base:
            claimed = float(stream.duration * stream.time_base)
        elif container.duration and len(container.streams) == 1:  # it is that of the longest stream
            claimed = container.duration / 1e6
    return _Length(count, times[1] - times[0] if times else None, claimed)


def _decode(
    container: Any, stream: Any, wanted: set[int], name: str, described: str, limits: VideoLimits
) -> tuple[dict[int, torch.Tensor], int]:
    """Decode all frames, and return those that are wanted and the number of all."""
    kept: dict[int, torch.Tensor] = {}
    count = 0
    for packet in container.demux(stream):
        try:
            decoded = packet.decode()
        except MemoryError as error:
            if limits.max_side is None:
                raise
            problem = f"frame {count} needs more memory than one of {limits.max_side:,} x {limits.max_side:,} pixels"
            raise _undecodable(name, described, problem) from error
        for frame in decoded:
            limits.check(name, frames=count + 1, side=max(frame.width, frame.height))
            if count in wanted:
                if frame.is_corrupt:
                    raise _undecodable(name, described, f"frame {count} is damaged")
                kept[count] = _frame_to_rgb(frame)
            count += 1
    return kept, count


def _frame_to_rgb(frame: Any) -> torch.Tensor:
    """Convert a frame of PyAV to upright 8-bit RGB."""
    pixels = frame.to_ndarray(format="rgb24")
    turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)


def _metadata(length: _Length, rate: float | None, backend: str) -> VideoMetadata:
    """Describe a whole video. The frame rate is the mean one, as frames may last for different times."""
    seconds = length.seconds if length.seconds else None
    fps = length.frames / seconds if seconds else rate
    if seconds is None and fps:
        seconds = length.frames / fps
    return VideoMetadata(total_num_frames=length.frames, fps=fps, duration=seconds, video_backend=backend)


def _clip(frames: Iterable[torch.Tensor], metadata: VideoMetadata, indices: Sequence[int]) -> Clip:
    """Stack frames, and complete what is known about the video."""
    stacked = torch.stack(list(frames))
    metadata.height, metadata.width = stacked.shape[2:]
    metadata.frames_indices = list(indices)
    return Clip(stacked, metadata)


def _torchcodec_decoder() -> Any:
    """Return the decoder class of torchcodec if it can be used: it may be there without the libraries it needs."""
    try:
        return import_module("torchcodec.decoders").VideoDecoder
    except Exception:  # missing shared libraries raise anything
        return None


def _read_with_torchcodec(
    decoder_class: Any, file: BinaryIO, sample: Sampler | None, name: str, described: str, start: bytes
) -> Clip:
    """Decode a video with torchcodec, which scans the file for its frames."""
    with _errors_named(name, described):
        decoder = decoder_class(file.read(), seek_mode="exact")
    clip = _read_decoder(decoder, sample, name, NO_LIMITS, described)
    if start[4:8] == b"ftyp":  # MP4; for Matroska, the duration is None
        claimed = getattr(decoder.metadata, "duration_seconds_from_header", None)
        length = _Length(clip.metadata.total_num_frames, clip.metadata.duration, claimed)
        _check_end(length, clip.metadata.fps, name, described)
    elif start.startswith(_MATROSKA):
        logger.warning_once(
            "Without PyAV, it is not noticed if a Matroska or WebM file breaks off: fewer frames are taken for all. "
            "Install it: pip install av."
        )
    return clip


def is_decoder(video: Any) -> bool:
    """Tell whether a video is a decoder of torchcodec, as the datasets library returns it."""
    return hasattr(video, "get_frames_at") and hasattr(video, "metadata")


def _read_decoder(
    decoder: Any, sample: Sampler | None, name: str, limits: VideoLimits, described: str = "a decoder of torchcodec"
) -> Clip:
    """Take frames from a decoder of torchcodec."""
    with _errors_named(name, described):
        known = decoder.metadata
        total = int(known.num_frames or 0)
        if not total:
            raise _undecodable(name, described, "it has no frames")
        length = _Length(total, getattr(known, "duration_seconds", None))
        limits.check(name, frames=total, seconds=length.seconds or 0)
        metadata = _metadata(length, getattr(known, "average_fps", None), "torchcodec")
    indices = _choose(sample, metadata)
    with _errors_named(name, described):
        frames = decoder.get_frames_at(indices=indices).data
    return _clip(frames, metadata, indices)


def _read_with_pillow(file: BinaryIO, sample: Sampler | None, name: str, described: str, limits: VideoLimits) -> Clip:
    """Read an animation, or an image as a video of one frame. FFmpeg does not read animated WebP files."""
    with _errors_named(name, described), PIL.Image.open(file) as image:
        limits.check(name, side=max(image.size))
        total, seconds = 0, 0.0
        while True:
            try:
                image.seek(total)
            except EOFError:
                break
            image.load()  # some formats know how long a frame lasts only then
            total, seconds = total + 1, seconds + float(image.info.get("duration") or 0) / 1000
            limits.check(name, frames=total, seconds=seconds)
        metadata = _metadata(_Length(total, seconds or None), None, "pillow")
        indices = _choose(sample, metadata)
        kept = {}
        for index in sorted(set(indices)):
            image.seek(index)
            kept[index] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return _clip([kept[index] for index in indices], metadata, indices)


def _is_frame(value: Any) -> bool:
    """Tell whether a value is one frame that is decoded: an image, or an array of two or three dimensions."""
    return isinstance(value, PIL.Image.Image) or (hasattr(value, "shape") and len(value.shape) in (2, 3))


def _is_frames(video: Any) -> bool:
    """Tell whether a video is given as its frames."""
    if isinstance(video, list | tuple):
        return True
    return isinstance(video, PIL.Image.Image) or (hasattr(video, "shape") and len(video.shape) in (3, 4))


def _take_frames(
    video: Any, sample: Sampler | None, name: str, limits: VideoLimits, metadata: Any, input_data_format: Any
) -> Clip:
    """Sample from frames that are there already."""
    if isinstance(video, PIL.Image.Image) or (not isinstance(video, list | tuple) and video.ndim == 3):
        video = [video]
    if len(video) == 0:
        raise UnreadableVideoError(f"`{name}` must have at least one frame, got none.")
    known = dict(metadata or {})
    length = _Length(len(video), known.get("duration"))
    described = _metadata(length, known.get("fps"), "frames")
    if known.get("fps"):
        described.fps = known["fps"]
    limits.check(name, frames=len(video), seconds=described.duration or 0)
    indices = _choose(sample, described)
    if isinstance(video, list | tuple):
        frames = [
            as_rgb(load_upright(video[index], f"{name}[{index}]"), input_data_format, f"{name}[{index}]").cpu()
            for index in indices
        ]
        if len({frame.shape for frame in frames}) > 1:
            sizes = sorted({f"{frame.shape[2]} x {frame.shape[1]}" for frame in frames})
            raise UnreadableVideoError(f"`{name}` must have frames of one size, got {', '.join(sizes)}.")
    else:
        # All frames have one range: a dark frame of values up to 1 must not be taken for one of 0 to 1.
        array = torch.as_tensor(np.asarray(video) if not isinstance(video, torch.Tensor) else video).cpu()
        batch = open_images(array, name)
        frames = [as_rgb(batch[index], input_data_format, f"{name}[{index}]") for index in indices]
    limits.check(name, side=max(frames[0].shape[1:]))
    clip = _clip(frames, described, indices)
    if sample is None and known.get("frames_indices") is not None:
        clip.metadata.frames_indices = list(known["frames_indices"])
    if known.get("total_num_frames") and sample is None:
        clip.metadata.total_num_frames = known["total_num_frames"]
    return clip


def is_video_block(value: Any) -> bool:
    """Tell whether a part of a conversation is a video."""
    return isinstance(value, Mapping) and value.get("type") in ("video", "video_url")


def video_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a video block of a conversation to the form that transformers reads.

    Keys that are `None`, which the datasets library adds, are left out.
    """
    given = {key: block[key] for key in VIDEO_KEYS if block.get(key) is not None}
    rest = {key: value for key, value in block.items() if key not in VIDEO_KEYS}
    if set(given) == {"bytes", "path"}:
        given.pop("path")  # where the bytes come from
    if len(given) > 1:
        raise ValueError(f"A video block must have one video, got {', '.join(map(repr, given))}.")
    for value in given.values():
        if block["type"] == "video_url" and isinstance(value, Mapping):
            value = value.get("url")
        rest["video"] = value
    return {**rest, "type": "video"}


def flat_videos(videos: Any, depth: int = 0) -> list[Any]:
    """List the videos of a video, a batch, or a (nested) list; `None` has none.

    A list of images or arrays of three dimensions is one video, as is a list of strings three levels down (the paths
    of frames); other lists hold videos.
    """
    if videos is None:
        return []
    if hasattr(videos, "ndim") and getattr(videos, "ndim", 0) == 5:
        return list(videos)
    if isinstance(videos, str | bytes | bytearray | memoryview | os.PathLike | Mapping) or hasattr(videos, "ndim"):
        return [videos]
    if hasattr(videos, "read") or is_decoder(videos) or isinstance(videos, PIL.Image.Image):
        return [videos]
    if not isinstance(videos, Iterable) or isinstance(videos, Set):
        return [videos]  # reading it names its type
    items = list(videos)
    is_paths = depth >= 2 and bool(items) and all(isinstance(item, str | os.PathLike) for item in items)
    if is_paths or (items and all(map(_is_frame, items))):
        return [items]
    return [video for item in items for video in flat_videos(item, depth + 1)]


def count_per_prompt(videos: Any) -> list[int] | None:
    """Count the videos of each prompt; `None` if the videos are not nested per prompt."""
    if not isinstance(videos, list | tuple) or not videos:
        return None
    if not all(isinstance(group, list | tuple) for group in videos):
        return None
    counts = [len(flat_videos(group, 1)) for group in videos]
    is_nested = any(not (group and all(map(_is_frame, group))) for group in videos)
    return counts if is_nested else None


def uniform_indices(total: int, number: int) -> list[int]:
    """Choose frames as the original does: evenly spaced from the first to the last; short videos repeat frames."""
    return np.linspace(0, total - 1, number, dtype=int).tolist()


def number_at(fps: float, metadata: VideoMetadata) -> int:
    """Return the number of frames that a video gives at `fps` frames per second, at least 1."""
    if not metadata.fps:
        raise ValueError(
            "`fps` needs the frame rate of the video, which frames alone do not have. Pass "
            "`video_metadata={'fps': ...}`, or `num_frames` instead."
        )
    return max(1, math.floor(metadata.total_num_frames / metadata.fps * fps + 1e-6))


__all__ = [
    "NO_LIMITS",
    "VIDEO_KEYS",
    "Clip",
    "UnreadableVideoError",
    "VideoLimits",
    "count_per_prompt",
    "flat_videos",
    "is_video_block",
    "number_at",
    "read_video",
    "uniform_indices",
    "video_block",
]
