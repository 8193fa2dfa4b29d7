"""The video processor of MG-LLaVA (arXiv 2406.17770, section 4): frames and their boxes to the model's inputs.

Frames are made as in the original's evaluation of videos: sampled evenly, rescaled, padded to a square with the mean
color, normalized, and the short side resized to both resolutions directly, bilinear and without antialiasing. So the
low-resolution frames differ from what the model makes of high-resolution images. Boxes are transformed as for images,
see `boxes_mgllava.py`.
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from torch.nn import functional as F  # noqa: N812
from transformers import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .boxes_mgllava import BoxLimitMode, flatten_video_boxes, prepare_boxes, select_objects
from .image_processing_mgllava import box_options
from .images_common import make_findable
from .video_reading_mgllava import (
    NO_LIMITS,
    Clip,
    VideoLimits,
    count_per_prompt,
    flat_videos,
    number_at,
    read_video,
    uniform_indices,
)

# Boxes per label that the original keeps of a frame if a limit applies, whatever the limit is.
_PER_CATEGORY = 20


class MGLlavaVideoProcessorKwargs(VideosKwargs, total=False):
    r"""Options of the MG-LLaVA video processor beyond those of every video processor.

    Args:
        video_boxes (`list`, *optional*):
            One list per video with one entry for each *sampled* frame, like the entries of `boxes` of the image
            processor: xyxy in pixels of the upright original frame. A record of a box file (`{"frames": [...]}`) may
            stand for a list. May be nested per prompt like the videos; for a single video, its list is enough.
        low_res_size (`int`, *optional*, defaults to 336):
            Side of the low-resolution frames.
        iou_threshold (`float`, *optional*, defaults to 0.2):
            IoU from which the lower-scored of two detected boxes with one label is dropped.
        box_limit_mode (`str`, *optional*, defaults to `"per_category"`):
            `"per_category"` keeps at most 20 boxes per label once a frame has more than `box_limit`; `"per_image"`
            keeps the best `box_limit` of a frame.
        box_limit (`int`, *optional*, defaults to 100):
            Number of detected boxes of a frame above which the limit applies. `None`: no limit.
        close_to_max_length (`bool`, *optional*, defaults to `False`):
            For training: whether the text leaves little room, so that one box per label (or 20 per frame) is kept.
        return_box_labels (`bool`, *optional*, defaults to `False`):
            Whether to return `video_box_labels` too: of each video, the labels of the kept boxes of each frame.
        pad_boxes_to_multiple_of (`int`, *optional*):
            Add rows of zeros to `video_boxes` until their number is a multiple of this.
    """

    video_boxes: Any
    low_res_size: int | None
    iou_threshold: float | None
    box_limit_mode: str | None
    box_limit: int | None
    close_to_max_length: bool | None
    return_box_labels: bool | None
    pad_boxes_to_multiple_of: int | None


class MGLlavaVideoProcessor(BaseVideoProcessor):
    """Makes the model's inputs from videos and the boxes of their frames (MG-LLaVA, arXiv 2406.17770, section 4).

    Videos may be paths, http(s) URLs, data URLs, base64 strings, bytes, binary files, mappings that hold one of these,
    decoders of torchcodec, arrays or tensors of frames (4 dimensions, channels first or last), or lists of frames,
    alone or in (nested) lists. Files are decoded by torchcodec if it can be loaded, otherwise by PyAV; GIF, WebP and
    PNG animations by Pillow. Frames are counted by decoding and turned upright.

    Calling it with `return_tensors="pt"` gives, for all frames of all videos one after the other,

    - `pixel_values_videos`: float32 of shape `(total_frames, 3, height, width)`, the size of `crop_size`, normalized;
    - `low_res_pixel_values_videos`: float32 of shape `(total_frames, 3, low_res_size, low_res_size)`;
    - `video_boxes`: int64 of shape `(total_frames, max_boxes, 4)`, xyxy in pixels of `pixel_values_videos`,
      zero-padded;
    - `num_video_boxes`: int64 of shape `(total_frames,)`, at least 1 each: without boxes there is `[0, 0, 0, 0]`;
    - `num_video_frames`: int64 of shape `(num_videos,)`;
    - `video_box_labels` only with `return_box_labels=True`, and `video_metadata` only with `return_metadata=True`.

    `num_frames` frames (8 by default) are sampled evenly from the first to the last frame, truncated to whole indices;
    a video with fewer frames repeats some. With `fps` instead, their number is the length of the video times `fps`,
    at least 1. `do_sample_frames=False` takes all frames. Other options: see [`MGLlavaVideoProcessorKwargs`].
    """

    valid_kwargs = MGLlavaVideoProcessorKwargs  # type: ignore[assignment]
    model_input_names = [
        "pixel_values_videos",
        "low_res_pixel_values_videos",
        "video_boxes",
        "num_video_boxes",
        "num_video_frames",
    ]

    resample = PILImageResampling.BILINEAR
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 768}
    default_to_square = False
    crop_size = {"height": 768, "width": 768}
    low_res_size = 336
    do_pad = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 8
    fps = None
    iou_threshold = 0.2
    box_limit_mode: BoxLimitMode = "per_category"
    box_limit = 100

    def __init__(self, **kwargs: Unpack[MGLlavaVideoProcessorKwargs]):
        super().__init__(**kwargs)
        # The base class takes None for "not given"; here it means "no limit" and has to survive saving and loading.
        if "box_limit" in kwargs:
            self.box_limit = kwargs["box_limit"]

    @classmethod
    def like(cls, image_processor: Any, **kwargs: Any) -> "MGLlavaVideoProcessor":
        """Make a video processor with the sizes, statistics and box options of an image processor.

        Args:
            image_processor ([`MGLlavaImageProcessor`]): The image processor.
            **kwargs: Other options, such as `low_res_size`.

        Returns:
            [`MGLlavaVideoProcessor`]: The video processor.
        """
        names = ("size", "crop_size", "image_mean", "image_std", "iou_threshold", "box_limit_mode", "box_limit")
        shared = {name: getattr(image_processor, name) for name in names if hasattr(image_processor, name)}
        for name in ("size", "crop_size"):
            if name in shared:
                shared[name] = {side: pixels for side, pixels in dict(shared[name]).items() if pixels}
        return cls(**{**shared, **kwargs})

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Choose the frames of a video as the original does.

        Args:
            metadata (`VideoMetadata`): Properties of the video.
            num_frames (`int`, *optional*): Number of frames; by default that of the processor.
            fps (`float`, *optional*): Instead, the number of frames for each second of the video.
            **kwargs: Not used.

        Returns:
            `np.ndarray`: Indices of frames, evenly spaced from the first to the last frame.

        Raises:
            ValueError: If both numbers are given, or `fps` and the frame rate of the video is not known.
        """
        if num_frames is not None and fps is not None:
            raise ValueError(f"Pass either `num_frames` or `fps`, got {num_frames} and {fps}.")
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        if fps is not None:
            num_frames = number_at(fps, metadata)
        if num_frames is None or num_frames < 1:
            raise ValueError(f"`num_frames` must be a positive number, got {num_frames}.")
        return np.array(uniform_indices(metadata.total_num_frames, num_frames))

    def read_clips(
        self,
        videos: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
        input_data_format: Any = None,
        limits: VideoLimits = NO_LIMITS,
    ) -> list[Clip]:
        """Read videos and sample their frames. The results may be passed to this processor as videos.

        Args:
            videos: A video or a (nested) list of videos, in any form that this class takes.
            num_frames (`int`, *optional*): Number of frames to sample from each; by default that of the processor.
            fps (`float`, *optional*): Instead, the number of frames for each second of a video.
            do_sample_frames (`bool`, *optional*): Whether to sample; by default as the processor is set.
            video_metadata (*optional*): Known properties of videos that are given as frames, such as
                `{"fps": 25}`; for several videos a list.
            input_data_format (*optional*): Channel order of arrays and tensors; inferred by default.
            limits ([`VideoLimits`], *optional*): What is refused, for videos of strangers.

        Returns:
            `list[Clip]`: Of each video `frames` (uint8 RGB, `(num_frames, 3, height, width)`) and `metadata`.

        Raises:
            UnreadableVideoError: If a video cannot be read, or exceeds a limit. It is an `OSError` and a `ValueError`.
            ImportError: If a file needs a decoder that is not installed.
            TypeError: If something is not a video.
            ValueError: If options contradict each other.
        """
        is_asked = num_frames is not None or fps is not None
        if do_sample_frames is False and is_asked:
            raise ValueError(
                "`num_frames` and `fps` must be None with `do_sample_frames=False`, which takes all frames, got "
                f"{num_frames} and {fps}."
            )
        samples = is_asked or (self.do_sample_frames if do_sample_frames is None else do_sample_frames)
        given = flat_videos(videos)
        known = _flat_metadata(video_metadata, len(given))

        def sample(metadata: VideoMetadata) -> Sequence[int]:
            return self.sample_frames(metadata, num_frames=num_frames, fps=fps)  # type: ignore[return-value]

        return [
            video
            if isinstance(video, Clip)
            else read_video(
                video, sample if samples else None, f"videos[{index}]", limits, known[index], input_data_format
            )
            for index, video in enumerate(given)
        ]

    def fetch_videos(self, video_url_or_urls: Any, sample_indices_fn: Any = None) -> Any:
        """Read videos.

        Args:
            video_url_or_urls: A video, or a list of videos.
            sample_indices_fn (*optional*): Function that maps the metadata of a video to the indices of the frames.

        Returns:
            `tuple`: The frames (uint8 RGB, `(num_frames, 3, height, width)`) and the metadata of the video; for a list
            a list of each.

        Raises:
            UnreadableImageError: If a video cannot be read.
            TypeError: If something is not a video.
            ValueError: If the function returns indices that the video does not have.
        """
        if isinstance(video_url_or_urls, list):
            clips = [
                read_video(video, sample_indices_fn, f"videos[{index}]")
                for index, video in enumerate(flat_videos(video_url_or_urls))
            ]
            return [clip.frames for clip in clips], [clip.metadata for clip in clips]
        clip = read_video(video_url_or_urls, sample_indices_fn)
        return clip.frames, clip.metadata

    def objects(self, detections: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Select the objects of a frame that the model gets a token for, see [`MGLlavaProcessor.objects`]."""
        return select_objects(detections, image_size, **box_options(self), per_category=_PER_CATEGORY)[1]

    def preprocess(self, videos: Any, **kwargs: Unpack[MGLlavaVideoProcessorKwargs]) -> BatchFeature:
        """Make the model's inputs; see the class.

        Args:
            videos: A video, or a (nested) list of videos.
            **kwargs: Options, see [`MGLlavaVideoProcessorKwargs`].

        Returns:
            [`BatchFeature`]: The inputs that the class lists.

        Raises:
            UnreadableVideoError: If a video cannot be read.
            ImportError: If a file needs a decoder that is not installed.
            TypeError: If something is not a video, or an option has the wrong type.
            ValueError: If options contradict each other, or the boxes do not match the sampled frames.
        """
        given: dict[str, Any] = dict(kwargs)
        if unknown := sorted(set(given) - {*self.valid_kwargs.__annotations__, "return_tensors"}):
            raise TypeError(f"{type(self).__name__} got unknown options: {', '.join(map(repr, unknown))}.")
        validate_typed_dict(self.valid_kwargs, given)  # type: ignore[type-var]
        reading = ("num_frames", "fps", "do_sample_frames", "video_metadata", "input_data_format")
        groups = count_per_prompt(videos)
        clips = self.read_clips(videos, **{name: given.pop(name, None) for name in reading})
        if not clips:
            raise ValueError("`videos` must hold at least one video, got none.")
        for name in self.valid_kwargs.__annotations__:
            given.setdefault(name, getattr(self, name, None))
        options = SimpleNamespace(**given)
        _check_options(options)
        if (multiple := given["pad_boxes_to_multiple_of"]) is not None and multiple < 1:
            raise ValueError(f"`pad_boxes_to_multiple_of` must be a positive number, got {multiple}.")

        counts = [len(clip.frames) for clip in clips]
        entries = flatten_video_boxes(given["video_boxes"], counts, groups)
        selection = {**box_options(options), "per_category": _PER_CATEGORY}
        high, low, kept, labels = [], [], [], []
        for index, clip in enumerate(clips):
            prepared = [
                prepare_boxes(
                    entry,
                    (clip.frames.shape[2], clip.frames.shape[3]),
                    **selection,
                    close_to_max_length=bool(given["close_to_max_length"]),
                    name=f"video_boxes[{index}][{frame}]",
                )
                for frame, entry in enumerate(entries[index])
            ]
            kept += [boxes for boxes, _ in prepared]
            labels.append([names for _, names in prepared])
            for frame in clip.frames:  # one by one: frames are padded as float32
                pixels = prepare_frame(frame.to(given["device"] or frame.device), options)
                high.append(_resize(pixels, dict(given["size"])["shortest_edge"], dict(given["crop_size"])))
                side = given["low_res_size"]
                low.append(_resize(pixels, side, {"height": side, "width": side}))
        padded = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        if multiple is not None:
            padded = F.pad(padded, (0, 0, 0, -padded.shape[1] % multiple))
        data: dict[str, Any] = {
            "pixel_values_videos": high,
            "low_res_pixel_values_videos": low,
            "video_boxes": list(padded.numpy()),
            "num_video_boxes": [len(boxes) for boxes in kept],
            "num_video_frames": counts,
        }
        if given["return_box_labels"]:
            data["video_box_labels"] = labels
        if given["return_metadata"]:
            data["video_metadata"] = [clip.metadata for clip in clips]
        return BatchFeature(
            data,
            tensor_type=given["return_tensors"],
            skip_tensor_conversion=["video_box_labels", "video_metadata"],
        )


def _flat_metadata(metadata: Any, number: int) -> list[Any]:
    """List the metadata of each video."""
    if metadata is None:
        return [None] * number
    if isinstance(metadata, Mapping):
        metadata = [metadata]
    flat = [item for group in metadata for item in (group if isinstance(group, list | tuple) else [group])]
    if len(flat) != number:
        raise ValueError(f"`video_metadata` must have one entry per video, got {len(flat)} for {number} videos.")
    return flat


def _check_options(options: Any) -> None:
    """Refuse options that frames are not made with."""
    for name in ("do_resize", "do_center_crop"):
        if not getattr(options, name):
            raise ValueError(f"`{name}` must be True: frames of both sizes are made by resizing and cropping.")
    if options.resample != PILImageResampling.BILINEAR:
        raise ValueError(
            f"`resample` must be bilinear ({int(PILImageResampling.BILINEAR)}) for videos, as the model was trained, "
            f"got {options.resample}."
        )
    if options.do_normalize and not options.do_rescale:
        raise ValueError("`do_rescale` must be True when `do_normalize` is, got False.")


def prepare_frame(frame: torch.Tensor, options: Any) -> torch.Tensor:
    """Rescale, normalize and pad an 8-bit frame `(3, height, width)`: float32, of a square unless `do_pad` is off."""
    pixels = frame.float()
    if options.do_rescale:
        factor = options.rescale_factor
        pixels = pixels / 255 if math.isclose(factor, 1 / 255) else pixels * factor
    fill = torch.zeros(3, device=pixels.device)
    mean, std = (torch.tensor(values, device=pixels.device) for values in (options.image_mean, options.image_std))
    if options.do_normalize:
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    else:
        fill = mean if options.do_rescale else mean / options.rescale_factor
    if not options.do_pad:
        return pixels
    height, width = pixels.shape[1:]
    side = max(height, width)
    square = fill[:, None, None].expand(3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return square


def _resize(pixels: torch.Tensor, short_side: int, crop: Mapping[str, int]) -> torch.Tensor:
    """Resize the short side of a frame, and crop the center."""
    height, width = pixels.shape[1:]
    # The long side is rounded down, as in the original.
    if width < height:
        size = math.floor(height / width * short_side), short_side
    else:
        size = short_side, math.floor(width / height * short_side)
    resized = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    margins = [side - crop[name] for side, name in zip(size, ("height", "width"), strict=True)]
    if min(margins) < 0:
        raise ValueError(f"`crop_size` must not exceed the resized frame ({size[1]} x {size[0]}), got {dict(crop)}.")
    top, left = (round(margin / 2) for margin in margins)
    return resized[:, top : top + crop["height"], left : left + crop["width"]].contiguous()


make_findable(__name__)

__all__ = ["MGLlavaVideoProcessor", "MGLlavaVideoProcessorKwargs", "prepare_frame"]
