"""Box detection for many images and videos, in one or many processes, which can be interrupted and resumed."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mgllava.atomic_files import replacing
from mgllava.folder_lock import FolderLock, FolderLockedError, lock_owner
from mgllava.visualization import draw_boxes, draw_frames

from .box_file import Record, describe_differences, settings_digest
from .detectors import Detector, detection_settings
from .errors import BoxFileError
from .formats import check_extension, check_record, has_integer_boxes, read_metadata, require_pyarrow, write_boxes
from .image_lists import DEFAULT_NUM_FRAMES, ImageEntry, ImageList, Inputs, is_text, list_images
from .slices import Batch, SliceFolder, processes, read_ahead

logger = logging.getLogger(__name__)

# Called with the number of images just done (those of an earlier run together) and the number of all.
Progress = Callable[[int, int], None]
_Detect = Callable[[list[Image.Image]], Sequence[Mapping[str, Any]]]

DEFAULT_SHARD_SIZE = 512
# Batches that are read ahead of the detector; more would only take memory.
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class DetectionSummary:
    """Result of a detection job.

    Attributes:
        output (`Path`): The box file.
        records (`int`): Number of its records.
        boxes (`int`): Number of its boxes.
        unreadable (`int`): Number of images that could not be read and have no record.
        unreadable_list (`Path`): JSON lines with ids, path and reason for each of these; no file if there are none.
        samples_without_image (`int`): Number of samples of a JSON list that have neither image nor video.
    """

    output: Path
    records: int
    boxes: int
    unreadable: int
    unreadable_list: Path
    samples_without_image: int

    def __str__(self) -> str:
        said = f"Wrote {self.output}: {self.records:,} records, {self.boxes:,} boxes."
        if self.unreadable:
            said += f" Unreadable images: {self.unreadable:,}, see {self.unreadable_list}."
        if self.samples_without_image:
            said += f" Samples without an image: {self.samples_without_image:,}."
        return said


@dataclass(frozen=True)
class _Work:
    """A batch of images and videos that are being read."""

    slice_number: int
    start: int
    images: list[Future[Image.Image | list[Image.Image]]]


def detect_images(
    inputs: Inputs,
    output: str | Path,
    detector: Detector,
    *,
    labels: Sequence[str] | None = None,
    threshold: float = 0.2,
    batch_size: int = 8,
    image_folder: str | Path | None = None,
    video_folder: str | Path | None = None,
    num_frames: int = DEFAULT_NUM_FRAMES,
    resume: bool = False,
    overwrite: bool = False,
    array_task: tuple[int, int] = (0, 1),
    shard_size: int = DEFAULT_SHARD_SIZE,
    show: str | Path | None = None,
    workers: int = 4,
    progress: Progress | None = None,
) -> DetectionSummary | None:
    """Find the boxes of many images, and of the frames of videos, and write them to a box file.

    Under `accelerate launch` every process calls this with a detector on its own device and works on every n-th slice
    of the input; the main process merges. The result does not depend on the number of processes or interruptions: it
    has one record per id, in the order of the input; that of a video has `frames`, with one entry for each sampled
    frame. Images and videos that cannot be read are logged, listed in a file next to the output and skipped.

    Args:
        inputs (`str`, `Path`, list of them or `datasets.Dataset`): See [`list_images`].
        output (`str` or `Path`): The box file, `.json` or `.parquet`.
        detector (`Detector`): The box detector.
        labels (`Sequence[str]`, *optional*): Labels to look for, instead of those that the tagger finds.
        threshold (`float`): Scores of boxes must be greater.
        batch_size (`int`): Images or frames per call of the detector; all frames of a video are in one call.
        image_folder (`str` or `Path`, *optional*): Folder that the paths in a JSON list start from; by default the
            folder of the list.
        video_folder (`str` or `Path`, *optional*): Folder that the paths of videos in a JSON list start from; by
            default that of the images.
        num_frames (`int`, *optional*, defaults to 8): Frames that are sampled from each video: evenly spaced from the
            first to the last, as in the processor.
        resume (`bool`): Whether to resume an interrupted job; without one, a job is started.
        overwrite (`bool`): Whether to start over, and to replace the output at the end.
        array_task (`tuple[int, int]`): `(i, n)`: work as array task i (from 0) of n, and do not merge. A last call
            without it, with `resume`, merges.
        shard_size (`int`): Images per slice. Processes work on one slice after another.
        show (`str` or `Path`, *optional*): Folder for drawings of all images with their boxes.
        workers (`int`): Threads that read images.
        progress (`Progress`, *optional*): Called repeatedly with the number of images just done, and of all images of
            this process.

    Returns:
        `DetectionSummary`, *optional*: What was written; `None` in processes that do not merge, and if the output was
        complete before.

    Raises:
        BoxFileError: If there are no images or none can be read, the output exists and neither `resume` nor
            `overwrite` is set, another job was interrupted there, the detector has no name, or an argument is wrong.
        FolderLockedError: If another run writes to the output.
        ImportError: If Parquet, a dataset or a video needs a library that is not installed.
        OSError: If something cannot be read or written.
    """
    output = Path(output)
    part, parts = array_task
    sizes = {"batch_size": batch_size, "num_frames": num_frames, "shard_size": shard_size, "workers": workers}
    _check_arguments(output, sizes, part, parts, resume, overwrite)
    images = list_images(
        inputs, image_folder=image_folder, exclude=show, video_folder=video_folder, num_frames=num_frames
    )
    if output.suffix.lower() == ".parquet":
        require_pyarrow()
        _check_ids(images)
    settings = detection_settings(detector, labels, threshold, num_frames=num_frames if images.has_videos else None)
    manifest = {
        "settings": settings,
        "inputs_digest": images.digest,
        "images": len(images),
        "shard_size": shard_size,
    }

    state = processes()
    folder = SliceFolder(output)
    with ExitStack() as stack:
        # The main process holds the lock for the other processes, which end with it.
        lock = stack.enter_context(_lock(output, part, parts)) if state.is_main_process else None
        if state.is_main_process:
            _prepare(output, folder, manifest, resume, overwrite, is_shared=_has_other_tasks(output, part, parts))
        state.wait_for_everyone()
        if folder.read_manifest() is None:
            logger.info("%s is complete.", output)
            return None
        share = range(part * state.num_processes + state.process_index, folder.num_slices, parts * state.num_processes)
        if folder.num_slices < parts * state.num_processes:
            logger.warning(
                "%d slices for %d processes: some have nothing to do. A smaller `shard_size` keeps all busy.",
                folder.num_slices,
                parts * state.num_processes,
            )

        def detect(batch: list[Image.Image]) -> Sequence[Mapping[str, Any]]:
            if lock is not None:
                lock.check()
            return detector.detect(batch, labels=labels, threshold=threshold, batch_size=batch_size)

        _run(images, folder, share, detect, batch_size, workers, None if show is None else Path(show), progress)
        state.wait_for_everyone()
        if parts > 1 or lock is None:
            return None
        lock.check()
        summary = _merge(output, folder, settings, images)
        folder.remove()
        return summary


def _lock(output: Path, part: int, parts: int) -> FolderLock:
    """Return the lock of a job or of an array task; the tasks of an array write to the same folder."""
    if parts == 1:
        return FolderLock(output, "detecting boxes")
    return FolderLock(output.with_name(f"{output.name}.task-{part}-of-{parts}"), f"detecting part {part} of {parts}")


def _has_other_tasks(output: Path, part: int, parts: int) -> bool:
    """Tell whether other array tasks are running; raise if one of them would write the same slices.

    The caller holds its lock, so that of two runs that start at the same time at least one sees the other.
    """
    pattern = re.compile(re.escape(output.name) + r"\.task-(\d+)-of-(\d+)\.lock")
    found = False
    for name in os.listdir(output.parent):
        task = pattern.fullmatch(name)
        if task is None or (parts > 1 and (int(task[1]), int(task[2])) == (part, parts)):
            continue
        owner = lock_owner(output.with_name(name.removesuffix(".lock")))
        if owner is None:
            continue
        if parts == 1 or int(task[2]) != parts:
            raise FolderLockedError(
                f"{output} is being written by array tasks: {owner}. Wait until they have finished"
                + (", then run this to merge." if parts == 1 else f"; their array has {task[2]} tasks, not {parts}.")
            )
        found = True
    if parts > 1 and (owner := lock_owner(output)) is not None:
        raise FolderLockedError(f"{output} is being written by another run: {owner}. Wait until it has finished.")
    return found


def _check_arguments(
    output: Path, sizes: Mapping[str, int], part: int, parts: int, resume: bool, overwrite: bool
) -> None:
    check_extension(output)
    for name, value in sizes.items():
        if value < 1:
            raise BoxFileError(f"`{name}` must be at least 1, got {value}.")
    if not 0 <= part < parts:
        raise BoxFileError(f"`array_task` must be (i, n) with 0 <= i < n, got ({part}, {parts}).")
    if parts > 1 and overwrite:
        raise BoxFileError("Array tasks cannot pass `overwrite`, which would delete the work of the others.")
    if resume and overwrite:
        raise BoxFileError("`resume` continues a job and `overwrite` starts over: pass one of them.")


def _check_ids(images: ImageList) -> None:
    """Check that Parquet can hold the ids, before the work of days."""
    kinds = {type(key).__name__ for entry in images.entries for key in entry.ids}
    if len(kinds) > 1:
        raise BoxFileError(
            f"Parquet needs ids of one type, but the input has {' and '.join(sorted(kinds))}. Choose a .json output, "
            "or turn all ids into text."
        )
    numbers = (key for entry in images.entries for key in entry.ids if isinstance(key, int))
    if too_large := [key for key in numbers if not -(2**63) <= key < 2**63]:
        raise BoxFileError(
            f"Parquet holds integers of 64 bits, but {len(too_large)} ids are larger, such as {too_large[0]}. Choose "
            "a .json output, or turn all ids into text."
        )


def _prepare(
    output: Path, folder: SliceFolder, manifest: dict[str, Any], resume: bool, overwrite: bool, is_shared: bool
) -> None:
    """Start or resume a job, or raise. Afterwards there is a manifest, unless the output is complete."""
    if not is_shared:
        folder.clean()
    if overwrite:
        folder.remove()
    begun = folder.has_begun()
    if begun and not resume:
        raise BoxFileError(
            f"{folder.path} holds a job that was interrupted. Pass `resume=True` to continue it, or "
            "`overwrite=True` to start again."
        )
    if output.exists() and not begun and not overwrite:
        if not resume:
            raise BoxFileError(f"{output} exists. Choose another output, or pass `overwrite=True` to replace it.")
        made = read_metadata(output)
        wanted = {name: manifest[name] for name in made}
        if settings_digest(made) != settings_digest(wanted):
            raise BoxFileError(
                f"{output} exists, and another job made it: {describe_differences(made, wanted)}. Choose another "
                "output, or pass `overwrite=True` to replace it."
            )
        folder.remove()
        return
    folder.begin(manifest, is_shared)


def _run(
    images: ImageList,
    folder: SliceFolder,
    share: range,
    detect: _Detect,
    batch_size: int,
    workers: int,
    show: Path | None,
    progress: Progress | None,
) -> None:
    """Detect the boxes of the slices of this process."""
    total = sum(stop - start for start, stop in map(folder.bounds, share))

    def report(done: int) -> None:
        if progress is not None and done:
            progress(done, total)

    with ThreadPoolExecutor(workers) as pool:

        def upcoming() -> Iterator[_Work]:
            for slice_number in share:
                start, stop = folder.bounds(slice_number)
                position = folder.next_image(slice_number)
                report(position - start)
                for numbers in _batches(images, range(position, stop), batch_size):
                    yield _Work(slice_number, numbers[0], [pool.submit(images.load, number) for number in numbers])

        try:
            for work in read_ahead(upcoming(), _BATCHES_AHEAD):
                batch = _detect_batch(images, work, detect, show, pool)
                folder.append(work.slice_number, batch)
                report(batch.stop - batch.start)
        except BaseException:
            # Raise the error without reading the images ahead.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _batches(images: ImageList, numbers: range, batch_size: int) -> Iterator[range]:
    """Divide images and videos into batches of at most `batch_size` images and frames, or of a single video."""
    first, size = numbers.start, 0
    for number in numbers:
        frames = images.num_frames if images.entries[number].is_video else 1
        if size and size + frames > batch_size:
            yield range(first, number)
            first, size = number, 0
        size += frames
    if size:
        yield range(first, numbers.stop)


def _detect_batch(
    images: ImageList,
    work: _Work,
    detect: _Detect,
    show: Path | None,
    pool: ThreadPoolExecutor,
) -> Batch:
    batch = Batch(work.start, work.start + len(work.images))
    readable: list[tuple[int, Image.Image | list[Image.Image]]] = []
    for number, future in enumerate(work.images, start=work.start):
        entry = images.entries[number]
        # Decoders raise errors of any type for damaged files, which must not end the job.
        error = future.exception()
        if isinstance(error, ImportError):  # a decoder is missing, which another file would not change
            raise error
        if error is not None:
            batch.unreadable.append(_unreadable(entry.ids, entry.image, f"{type(error).__name__}: {error}"))
            continue
        readable.append((number, future.result()))
        if nameless := [key for key in entry.ids if not is_text(key)]:
            reason = "the id is not valid Unicode text, so no box file can hold it: rename the file or the id"
            batch.unreadable.append(_unreadable(nameless, entry.image, reason))
    detections = _detect_all([image for _, image in readable], detect)
    for (number, image), detection in zip(readable, detections, strict=True):
        for record in _records(images.entries[number], image, detection):
            batch.records.append(check_record(record, f"The detector's result for {record['id']!r}"))
    if show is not None:
        # Before the batch counts as done, so that a kill loses no drawings.
        drawn = [
            pool.submit(_draw, show / _picture_name(number, images.entries[number]), image, detection)
            for (number, image), detection in zip(readable, detections, strict=True)
        ]
        for picture in drawn:
            picture.result()
    return batch


def _detect_all(images: Sequence[Image.Image | list[Image.Image]], detect: _Detect) -> list[Any]:
    """Return the detection of each image, and a list of those of the frames of each video, from one call."""
    # A frame that was sampled several times is one object.
    frames = {id(frame): frame for image in images for frame in (image if isinstance(image, list) else [image])}
    results = detect(list(frames.values())) if frames else []
    if len(results) != len(frames):
        raise BoxFileError(f"The detector gave {len(results)} results for {len(frames)} images.")
    found = dict(zip(frames, results, strict=True))
    return [[found[id(frame)] for frame in image] if isinstance(image, list) else found[id(image)] for image in images]


def _unreadable(ids: Sequence[Any], image: str | None, reason: str) -> dict[str, Any]:
    logger.warning("Skipped %s (%s).", ascii(image if image is not None else ids[0]).strip("'"), reason)
    return {"ids": list(ids), "image": image, "reason": reason}


def _records(entry: ImageEntry, image: Image.Image | list[Image.Image], detection: Any) -> Iterator[Record]:
    def plain(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _plain(found[name]) for name in ("boxes", "labels", "scores")}

    content = {"frames": [plain(found) for found in detection]} if isinstance(image, list) else plain(detection)
    width, height = (image[0] if isinstance(image, list) else image).size
    for key in filter(is_text, entry.ids):
        path = entry.image if is_text(entry.image) else None
        yield {"id": key, "image": path, "width": width, "height": height, **content}


def _plain(values: Iterable[Any]) -> list[Any]:
    """Turn tensors, arrays and their items into plain values."""
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _picture_name(number: int, entry: ImageEntry) -> str:
    """Name the drawing of an image: unique, and sorted like the input."""
    stem = Path(entry.image).stem if entry.image is not None else str(entry.ids[0])
    letters = "".join(letter if letter.isalnum() or letter in ".-_" else "_" for letter in stem)
    # File systems allow 255 bytes, and the name while the file is written is longer.
    return f"{number:06d}_{letters.encode('utf-8', 'replace')[:200].decode('utf-8', 'ignore')}.jpg"


def _draw(path: Path, image: Image.Image | list[Image.Image], detection: Any) -> None:
    drawn = draw_frames(image, detection) if isinstance(image, list) else draw_boxes(image, detection)
    with replacing(path) as partial:
        # Without chroma subsampling, which blurs thin lines and small letters.
        drawn.save(partial, format="JPEG", quality=92, subsampling=0)


def _merge(output: Path, folder: SliceFolder, settings: dict[str, Any], images: ImageList) -> DetectionSummary:
    """Write the output from all slices."""
    records = boxes = 0
    unreadable: list[dict[str, Any]] = []

    def all_records() -> Iterator[Record]:
        nonlocal records, boxes
        for batch in folder.batches():
            unreadable.extend(batch.unreadable)
            for record in batch.records:
                records += 1
                boxes += sum(len(found["boxes"]) for found in record.get("frames", [record]))
                yield record
        if records == 0:
            raise BoxFileError(
                f"None of the {len(images)} images can be read; the first one: {unreadable[0]['image']} "
                f"({unreadable[0]['reason']}). If they can be read now, pass `overwrite=True` to start over."
            )

    integer_boxes = None
    if output.suffix.lower() == ".parquet":
        # The type of a column must be known before its first row.
        integer_boxes = all(has_integer_boxes(record) for batch in folder.batches() for record in batch.records)
    write_boxes(
        output,
        all_records(),
        settings,
        inputs_digest=images.digest,
        integer_boxes=integer_boxes,
        has_frames=images.has_videos,
    )

    unreadable_list = output.with_suffix(".unreadable.jsonl")
    unreadable_list.unlink(missing_ok=True)
    if unreadable:
        with replacing(unreadable_list) as partial:
            # Only names that are not valid Unicode are escaped.
            lines = (
                json.dumps(entry, ensure_ascii=not is_text(json.dumps(entry, ensure_ascii=False)))
                for entry in unreadable
            )
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return DetectionSummary(output, records, boxes, len(unreadable), unreadable_list, images.samples_without_image)


__all__ = ["DEFAULT_SHARD_SIZE", "DetectionSummary", "detect_images"]
