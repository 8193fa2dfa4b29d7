"""Read training samples from LLaVA's JSON and box files with the datasets library."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from mgllava.box_files import BoxFile, read_boxes
from mgllava.extras import import_extra
from mgllava.families import takes_boxes

from .errors import SampleError, TrainingError
from .samples import (
    BadSamples,
    MissingBoxes,
    frames_of_a_video,
    has_boxes,
    labels_of,
    longest_text,
    sample_images,
    sample_videos,
    to_conversation,
    video_token_of,
)

logger = logging.getLogger(__name__)

# How many bad samples a message names.
_NAMED = 5
# Part of the keys of cached rows; raised when their columns change.
_CACHE_VERSION = 3
# Threads that check whether images exist, which is slow on network file systems.
_THREADS = 16


@dataclass(frozen=True)
class SampleSource:
    """A file of samples, with its images, videos and boxes.

    Attributes:
        samples: LLaVA's JSON: a list (`.json`) or one sample per line (`.jsonl`).
        images: Folder that image paths are relative to; by default the folder of `samples`.
        boxes: The boxes of the images, by the ids of the samples or by the paths of the images as in the samples.
            Boxes in a sample come first, then the record of its id (for several images one that has a list, `frames`,
            with one entry for each of them), then the records of its images' paths. For a video, the record of the
            sample's id (if it is the only one), of the path, or of the file name without extension, with `frames`.
            `None`: all boxes are in the samples, or there are none.
        videos: Folder that video paths are relative to; by default that of the images.
    """

    samples: Path
    images: Path | None = None
    boxes: BoxFile | None = None
    videos: Path | None = None

    @property
    def image_folder(self) -> Path:
        """Folder that image paths are relative to."""
        return self.samples.parent if self.images is None else self.images

    @property
    def video_folder(self) -> Path:
        """Folder that video paths are relative to."""
        return self.image_folder if self.videos is None else self.videos


class ConversationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples for [`MGLlavaDataCollator`], with the length of each.

    The datasets library keeps the rows in its cache on disk; only the collator opens images and decodes videos.
    Everything that can be checked without opening them is checked here: paths, boxes, turns, and whether an answer is
    left within the limit. For this, and for the lengths, all texts are tokenized once. The ids are not kept, because
    they would multiply the size of the cache: the collator tokenizes again.

    Args:
        sources (`Sequence[SampleSource]`): The samples.
        processor ([`MGLlavaProcessor`]): Processor of the model, whose tokenizer gives the lengths.
        max_text_length (`int`, *optional*): Longest text in tokens, where an image or a video counts as one; by
            default that of the model family (1472 for MG-LLaVA).
        on_bad_sample (`str`, *optional*, defaults to `"error"`): What to do with bad samples: raise an `"error"`, or
            `"skip"` them with a warning.
        missing_boxes (`str`, *optional*, defaults to `"error"`): How to treat an image or a video without boxes: raise
            an `"error"`, or take it for one without objects (`"empty"`). Ignored for models that take no boxes.
        processes (`int`, *optional*): Number of processes that tokenize; by default only this one.
        original_labels (`bool`, *optional*, defaults to `False`): See [`MGLlavaDataCollator`].

    Attributes:
        lengths (`list[int]`): Tokens of each text, where an image or a video counts as one; negative for text only.
        modalities (`list[str]`): `"image"`, `"video"` (perhaps with images) or `"text"`, for each sample.
        skipped (`int`): Number of bad samples that were skipped.

    Raises:
        TrainingError: If there are no samples, a sample is bad and `on_bad_sample` is `"error"`, or there are boxes
            for a model that takes none.
        ValueError: If the family of the processor is not known and `max_text_length` is not given.
        ImportError: If the datasets library is not installed.
        OSError: If a file cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        processor: Any,
        max_text_length: int | None = None,
        on_bad_sample: BadSamples = "error",
        missing_boxes: MissingBoxes = "error",
        processes: int | None = None,
        original_labels: bool = False,
    ):
        datasets = import_extra("datasets", "train", "Training")
        self.sources = list(sources)
        self._missing_boxes = missing_boxes if takes_boxes(processor) else None
        self._num_frames = frames_of_a_video(processor)
        if self._missing_boxes is None and (
            given := [source.boxes for source in self.sources if source.boxes is not None]
        ):
            raise TrainingError(f"`boxes` must not be given for a model that takes none, got {given[0].name}.")
        stamps = [_stamp(source.samples) for source in self.sources]
        rows = _generate(
            datasets,
            features=datasets.Features(
                {
                    "id": datasets.Value("string"),
                    "source": datasets.Value("int32"),
                    "image": datasets.List(datasets.Value("string")),
                    "video": datasets.List(datasets.Value("string")),
                    # As JSON, because samples of one file may differ in form, and an Arrow column has a single type.
                    "turns": datasets.Value("string"),
                }
            ),
            gen_kwargs={
                "files": [str(source.samples) for source in self.sources],
                "numbers": list(range(len(self.sources))),
                "stamps": stamps,
            },
        )
        longest = longest_text(processor) if max_text_length is None else max_text_length
        measure = _Measure(processor, longest, original_labels)
        rows = rows.map(
            measure,
            num_proc=processes,
            # By default the library hashes the pickled tokenizer, which differs from process to process.
            new_fingerprint=hashlib.sha256(f"{stamps}{measure.fingerprint}".encode()).hexdigest()[:16],
            desc="Measuring samples",
        )
        problems = list(self._problems(rows))
        self.skipped = len(problems)
        if problems:
            kinds = "; ".join(f"{count} {kind}" for kind, count in Counter(kind for _, kind, _ in problems).items())
            named = " ".join(text for _, _, text in problems[:_NAMED])
            message = f"{len(problems)} of {len(rows)} samples cannot be learned from ({kinds}): {named}"
            if on_bad_sample == "error":
                raise TrainingError(f"{message} Fix these samples, or set `on_bad_sample` to skip.")
            logger.warning("Skipped: %s", message)
            bad = {row for row, _, _ in problems}
            rows = rows.select([row for row in range(len(rows)) if row not in bad])
            if len(rows) == 0:
                raise TrainingError(f"No sample is left. {message}")
        self._rows = rows
        self.lengths: list[int] = list(rows["length"])
        self.modalities: list[str] = [
            "video" if videos else "image" if images else "text"
            for images, videos in zip(rows["image"], rows["video"], strict=True)
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of the ids, paths and lengths of the samples, in hexadecimal, without their folders."""
        content = hashlib.sha256()
        columns = (self._rows[name] for name in ("id", "image", "video"))
        for key, images, videos, length in zip(*columns, self.lengths, strict=True):
            row = (key, images, length, videos) if videos else (key, images, length)
            content.update(json.dumps(row).encode())
        return content.hexdigest()

    def _problems(self, rows: Any) -> Iterator[tuple[int, str, str]]:
        """Yield row, kind and message of each bad sample; images may be gone since the rows were cached."""
        names = ("id", "source", "image", "video", "kind", "problem", "boxes")
        columns = [rows[name] for name in names]
        pictures: dict[tuple[int, str], tuple[list[str], list[str]]] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            absent = list(pool.map(self._absent_file, *columns[1:4]))
        for row, (key, source, images, videos, kind, problem, given) in enumerate(zip(*columns, strict=True)):
            boxes = self.sources[source].boxes
            if kind:
                yield row, kind, problem
            elif absent[row]:
                is_video = any(absent[row] == self.sources[source].video_folder / name for name in videos)
                what = "a video" if is_video else "an image"
                yield row, f"without {what}", f"Sample {key}: there is no {what.split()[1]} {absent[row]}."
            elif given == "some" and self._missing_boxes == "error":
                problem = f"Sample {key} has boxes for some of its images only: give each an entry, [] for no objects."
                yield row, "without boxes", problem
            elif not (images or videos) or given:
                continue
            elif (
                boxes is not None
                and _shares_id(key, images, videos, boxes)
                and (pictures.setdefault((source, key), (images, videos)) != (images, videos))
            ):
                problem = f"has another {'video' if videos else 'image'} than an earlier sample of this id"
                yield (
                    row,
                    "with the id of another image",
                    f"Sample {key} {problem}; {boxes.name} has boxes by id only.",
                )
            elif problem := _box_problem(key, images, videos, boxes, self._missing_boxes, self._num_frames):
                yield row, "without boxes", f"Sample {key} {problem}."

    def _absent_file(self, source: int, images: list[str], videos: list[str]) -> Path | None:
        folders = self.sources[source]
        paths = [folders.image_folder / image for image in images] + [folders.video_folder / name for name in videos]
        return next((path for path in paths if not path.is_file()), None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        sample = complete_row(row, self.sources[row["source"]])
        if self._missing_boxes == "empty" and not has_boxes(sample):
            for name, sources in (("boxes", row["image"]), ("video_boxes", row["video"])):
                if sources:
                    sample[name] = [[]] * len(sources)
        return sample


def stream_samples(sources: Sequence[SampleSource], num_frames: int | None = None) -> Any:
    """Read samples on demand, without checking them in advance.

    Args:
        sources (`Sequence[SampleSource]`): The samples.
        num_frames (`int`, *optional*): Frames that are sampled from each video, which box files must have boxes for.

    Returns:
        `datasets.IterableDataset`: Samples for [`MGLlavaDataCollator`]; their lengths are not known.

    Raises:
        ImportError: If the datasets library is not installed.
    """
    datasets = import_extra("datasets", "train", "Training")
    # The library divides a list in `gen_kwargs` among the workers of a DataLoader.
    return datasets.IterableDataset.from_generator(
        _stream, gen_kwargs={"sources": list(sources), "num_frames": num_frames}
    )


def _stream(sources: list[SampleSource], num_frames: int | None = None) -> Iterator[dict[str, Any]]:
    for source in sources:
        for row in read_samples([str(source.samples)], [0]):
            yield complete_row(row, source, num_frames)


def complete_row(row: Mapping[str, Any], source: SampleSource, num_frames: int | None = None) -> dict[str, Any]:
    """Turn a row of [`read_samples`] into a sample with full paths and the boxes of each image and video."""
    sample: dict[str, Any] = {"id": row["id"], **json.loads(row["turns"])}
    key, images, videos = row["id"], row["image"], row["video"]
    if images:
        sample["images"] = [str(source.image_folder / image) for image in images]
    if videos:
        sample["videos"] = [str(source.video_folder / video) for video in videos]
    if (images or videos) and source.boxes is not None and not has_boxes(sample):
        # Streamed samples have not been checked yet.
        if problem := _box_problem(key, images, videos, source.boxes, "empty", num_frames):
            raise SampleError(f"Sample {key} {problem}.")
        for name, records in _records(key, images, videos, source.boxes).items():
            if any(record is not None for record in records):
                sample[name] = records
    return sample


def _shares_id(key: str, images: Sequence[str], videos: Sequence[str], boxes: BoxFile) -> bool:
    """Tell whether a record of a sample's id holds the boxes of its images, or of its only video."""
    if videos:
        return len(videos) == 1 and boxes.holds_frames(key)
    return key in boxes and (len(images) == 1 or boxes.holds_frames(key))


def _video_key(key: str, videos: Sequence[str], video: str, boxes: BoxFile) -> str | None:
    """Return the id of a video's record: that of the sample, the path, or the file name without extension."""
    keys = [*([key] if len(videos) == 1 else []), video, PurePath(video).stem]
    return next(
        (name for name in keys if boxes.holds_frames(name)), next((name for name in keys if name in boxes), None)
    )


def _records(key: str, images: Sequence[str], videos: Sequence[str], boxes: BoxFile) -> dict[str, list[Any]]:
    """Return the boxes of each image and each video of a sample, `None` where the file has none.

    The record of the sample's id comes first: for one image or video its boxes, for several images its list with an
    entry for each. Otherwise, each has the record of its path.
    """
    found = [_video_key(key, videos, video, boxes) for video in videos]
    of_videos = [None if name is None else list(boxes[name]["frames"]) for name in found]
    if not videos and _shares_id(key, images, videos, boxes):
        of_images = [boxes[key]] if len(images) == 1 else list(boxes[key]["frames"])
    else:
        of_images = [boxes.get(image) for image in images]
    return {"boxes": of_images, "video_boxes": of_videos}


def _box_problem(
    key: str,
    images: Sequence[str],
    videos: Sequence[str],
    boxes: BoxFile | None,
    missing_boxes: MissingBoxes | None,
    num_frames: int | None,
) -> str:
    """Return what is wrong with the boxes of a sample's images and videos, or an empty string."""
    if boxes is None:
        return "has no boxes: no box file is given" if missing_boxes == "error" else ""
    problem = _video_box_problem(key, videos, boxes, missing_boxes, num_frames)
    if problem or not images:
        return problem
    by_id = not videos and _shares_id(key, images, videos, boxes)
    keys = [key] if by_id else list(images)
    if twice := [name for name in keys if name in boxes.duplicates]:
        return f"has two records in {boxes.name} ({twice[0]})"
    if by_id and len(images) > 1:
        number = len(boxes[key]["frames"])
        return "" if number == len(images) else f"has {len(images)} images, and {boxes.name} boxes of {number} for it"
    if key in boxes and not videos and not all(name in boxes for name in keys):
        return (
            f"has {len(images)} images, and {boxes.name} one record for all of them. Give the sample `boxes`, a list "
            "with one entry for each image, or run the detector on the folder of images, which names records by path"
        )
    if of_videos := [name for name in keys if boxes.holds_frames(name)]:
        return f"is of images, but {boxes.name} has boxes of the frames of a video for it ({of_videos[0]})"
    absent = [name for name in keys if name not in boxes]
    if absent and missing_boxes == "error":
        return f"has no boxes: {boxes.name} has none for " + (
            absent[0] if len(images) > 1 else f"{key} or {absent[0]}"
        )
    return ""


def _video_box_problem(
    key: str, videos: Sequence[str], boxes: BoxFile, missing_boxes: MissingBoxes | None, num_frames: int | None
) -> str:
    """Return what is wrong with the boxes of a sample's videos, or an empty string."""
    for video in videos:
        name = _video_key(key, videos, video, boxes)
        if name is None:
            if missing_boxes == "error":
                return f"has no boxes: {boxes.name} has none for {video}" + f" or {key}" * (len(videos) == 1)
        elif name in boxes.duplicates:
            return f"has two records in {boxes.name} ({name})"
        elif not boxes.holds_frames(name):
            return f"is of a video, but {boxes.name} has boxes of one image for it ({name})"
        elif num_frames is not None and (number := len(boxes[name]["frames"])) != num_frames:
            return (
                f"needs boxes for {num_frames} frames of {video}, as many as are sampled, but {boxes.name} has boxes "
                f"for {number} ({name}). Find boxes on {num_frames} frames, or set `num_frames` to {number}"
            )
    return ""


def read_samples(files: Iterable[str], numbers: Iterable[int], stamps: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Read files of JSON or JSON lines as rows of `id`, `source`, `image` and `video` (paths), and `turns` (JSON).

    `numbers` has the `source` of each file. `stamps` is not read: it is part of the cache key of the datasets library,
    so that a changed file is read again.
    """
    for number, file in zip(numbers, files, strict=True):
        row = -1
        for row, sample in enumerate(_read_json(Path(file))):
            if not isinstance(sample, dict):
                raise TrainingError(f"{file}: sample {row} must be a dictionary, got {type(sample).__name__}.")
            paths = {"image": sample_images(sample), "video": sample_videos(sample)}
            paths = {name: [str(path) for path in of_kind] for name, of_kind in paths.items()}
            kept = ("conversations", "messages", "boxes", "video_boxes")
            rest = {name: sample[name] for name in kept if sample.get(name) is not None}
            key = str(sample.get("id", f"{Path(file).name}:{row}"))
            yield {"id": key, "source": number, **paths, "turns": json.dumps(rest, ensure_ascii=False)}
        if row < 0:
            raise TrainingError(f"{file} has no samples.")


def _read_json(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
                return
            samples = json.load(file)
    except ValueError as error:
        raise TrainingError(
            f"{path} is not JSON ({error}). Files with one sample per line must end in .jsonl, lists in .json."
        ) from error
    if not isinstance(samples, list):
        raise TrainingError(f"{path} must contain a list of samples, got {type(samples).__name__}.")
    yield from samples


def _generate(datasets: Any, **options: Any) -> Any:
    """Read samples into a cache on disk; for a bad file, raise our error instead of the library's."""
    try:
        return datasets.Dataset.from_generator(read_samples, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{_CACHE_VERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}"


class _Measure:
    """Return the `length` of a row, which `boxes` it has, and `kind` and `problem` of a bad sample (else empty)."""

    def __init__(self, processor: Any, max_text_length: int, original_labels: bool):
        self.processor, self.max_text_length = processor, max_text_length
        self.original_labels = original_labels
        self._labels = labels_of(processor, must_be_known=original_labels)
        self._missing_boxes: MissingBoxes | None = "empty" if takes_boxes(processor) else None
        self._video_token, self._num_frames = video_token_of(processor), frames_of_a_video(processor)

    @property
    def fingerprint(self) -> str:
        tokenizer = self.processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
        options = (
            f"{self.max_text_length}{self._missing_boxes}{self.original_labels}{self._video_token}{self._num_frames}"
        )
        return f"{words}{self.processor.chat_template}{options}"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sample = {"id": row["id"], **json.loads(row["turns"]), "images": row["image"], "videos": row["video"]}
        length, kind, problem = 1, "", ""
        try:
            conversation = to_conversation(sample, self._missing_boxes, self._video_token)
            kind, problem = self._other_frames(row["id"], conversation)
            if self._labels is not None:
                conversation = self._labels.clean(conversation)
            ids, learned = self.processor.encode_text(conversation)
            length = min(len(ids), self.max_text_length)
            # In the original, samples without an answer take part, and nothing is learned from them.
            has_answer = self.original_labels or learned is None or any(learned[: self.max_text_length])
            if not has_answer and not kind:
                kind = "without an answer"
                problem = f"Sample {row['id']} has no answer to learn within {self.max_text_length} tokens of text."
        except SampleError as error:
            kind, problem = "of another form", str(error)
        except Exception as error:  # chat templates raise errors of their own
            kind, problem = "of another form", f"Sample {row['id']}: {error}"
        is_text = not (row["image"] or row["video"])
        measured = {"length": -length if is_text else length, "kind": kind, "problem": problem}
        return {**measured, "boxes": ("all" if self._is_complete(sample) else "some") if has_boxes(sample) else ""}

    def _other_frames(self, key: str, conversation: list[dict[str, Any]]) -> tuple[str, str]:
        """Return kind and problem of a sample that has boxes for another number of frames than are sampled."""
        for block in (block for message in conversation for block in message["content"] if block["type"] == "video"):
            boxes = block.get("boxes") or ()
            number = len(boxes["frames"] if isinstance(boxes, Mapping) else boxes)
            if self._num_frames is not None and number not in (0, self._num_frames):
                return "without boxes", (
                    f"Sample {key} needs boxes for {self._num_frames} frames, as many as are sampled, but has boxes "
                    f"for {number}."
                )
        return "", ""

    def _is_complete(self, sample: Mapping[str, Any]) -> bool:
        """Tell whether a sample has boxes for each image."""
        try:
            to_conversation(sample, "error", self._video_token)
        except SampleError:
            return False
        return True


def open_source(
    samples: str | Path,
    images: str | Path | None,
    boxes: str | Path | None,
    videos: str | Path | None = None,
    *,
    section: str = "",
) -> SampleSource:
    """Check that the files of samples exist, and read their boxes.

    Args:
        samples (`str` or `Path`): JSON or JSON lines.
        images (`str` or `Path`, *optional*): Folder that image paths are relative to; by default that of `samples`.
        boxes (`str` or `Path`, *optional*): Box file.
        videos (`str` or `Path`, *optional*): Folder that video paths are relative to; by default that of the images.
        section (`str`, *optional*, defaults to `""`): Section of the recipe with these keys, for error messages.

    Returns:
        `SampleSource`: The source.

    Raises:
        TrainingError: If a file or folder does not exist.
        BoxFileError: If the box file cannot be read.
        ImportError: If the box file is Parquet and pyarrow is not installed.
    """
    for argument, path in (("samples", samples), ("images", images), ("boxes", boxes), ("videos", videos)):
        if path is not None and not Path(path).exists():
            raise TrainingError(f"`{section and section + '.'}{argument}`: {path} does not exist.")
    opened = None if boxes is None else read_boxes(boxes)
    image_folder, video_folder = (None if folder is None else Path(folder) for folder in (images, videos))
    return SampleSource(Path(samples), image_folder, opened, video_folder)


__all__ = ["ConversationDataset", "SampleSource", "open_source", "stream_samples"]
