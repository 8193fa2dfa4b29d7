"""List the images and videos in folders, files, JSON lists of questions or conversations, and datasets."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from mgllava.extras import import_extra
from mgllava.processing.images_common import load_upright
from mgllava.processing.video_reading_mgllava import read_video, uniform_indices

from .errors import BoxFileError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Inputs: TypeAlias = "str | Path | Sequence[str | Path] | Dataset"

IMAGE_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
VIDEO_EXTENSIONS = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
)
# Frames that are sampled from a video, as in the paper.
DEFAULT_NUM_FRAMES = 8
_ID_NAMES = ("question_id", "id", "index")
# Files of `datasets.Dataset.save_to_disk`.
_DATASET_FILES = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class ImageEntry:
    """The ids (text or integers) of the records of an image or a video, and its path, if it has one."""

    ids: tuple[Any, ...]
    image: str | None
    is_video: bool = False


@dataclass(frozen=True)
class ImageList:
    """Images and videos in the order of the input, each one once.

    Attributes:
        entries (`list[ImageEntry]`): The images and videos.
        open (`Callable[[int], Any]`): Returns an image by its index in `entries`: a path, or what a dataset stores.
        source (`str`): Origin of the images, which is part of the digest.
        samples_without_image (`int`): Samples of a JSON list that were left out: text only.
        num_frames (`int`): Frames that are sampled from each video.
    """

    entries: list[ImageEntry]
    open: Callable[[int], Any] = field(repr=False)
    source: str
    samples_without_image: int = 0
    num_frames: int = DEFAULT_NUM_FRAMES

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def digest(self) -> str:
        """SHA-256 of ids and paths, in hexadecimal. Pixels are not read."""
        content = hashlib.sha256(json.dumps([self.source, self.samples_without_image]).encode())
        for entry in self.entries:
            content.update(json.dumps([entry.ids, entry.image]).encode())
        return content.hexdigest()

    @property
    def has_videos(self) -> bool:
        """Whether there are videos."""
        return any(entry.is_video for entry in self.entries)

    def load(self, number: int) -> Image.Image | list[Image.Image]:
        """Read an image, or the frames that are sampled from a video.

        Args:
            number (`int`): Index of the image or video in `entries`.

        Returns:
            `PIL.Image.Image` or `list[PIL.Image.Image]`: RGB, upright (its orientation is applied). A frame that is
            sampled several times is one object.

        Raises:
            OSError: If the image or video cannot be read.
            ValueError: If `num_frames` is not at least 1.
            TypeError: If a dataset holds something that is not an image.
            ImportError: If a video needs a decoder that is not installed.
        """
        if not self.entries[number].is_video:
            image: Image.Image = load_upright(self.open(number))
            return image
        path = str(self.open(number))
        clip = read_video(path, lambda metadata: uniform_indices(metadata.total_num_frames, self.num_frames))
        indices = clip.metadata.frames_indices or ()
        pictures = {index: to_pil_image(frame) for index, frame in zip(indices, clip.frames, strict=True)}
        return [pictures[index] for index in indices]


def list_images(
    inputs: Inputs,
    *,
    image_folder: str | Path | None = None,
    exclude: str | Path | None = None,
    video_folder: str | Path | None = None,
    num_frames: int = DEFAULT_NUM_FRAMES,
) -> ImageList:
    """List the images and videos of an input.

    The ids depend on the input:

    - a folder with its subfolders: the path inside the folder;
    - image and video files: the path as given;
    - JSON lines (`.jsonl`): `question_id`, `id` or `index`, unchanged;
    - LLaVA's JSON (`.json`, a list of samples): `id` as text, as in training;
    - a dataset (of the datasets library, its folder, or Parquet with an image column): the column `question_id`, `id`
      or `index`, or else the row number.

    An image or video (`video`) with several ids in a JSON list is listed once. A sample with several (`image` or
    `video` is a list, or both are given) has a record for each of them, whose id is its path.

    Args:
        inputs (`str`, `Path`, list of them or `datasets.Dataset`): One of the above.
        image_folder (`str` or `Path`, *optional*): Folder that the paths in a JSON list start from; by default the
            folder of the list.
        exclude (`str` or `Path`, *optional*): A folder to skip.
        video_folder (`str` or `Path`, *optional*): Folder that the paths of videos in a JSON list start from; by
            default that of the images.
        num_frames (`int`, *optional*, defaults to 8): Frames that are sampled from each video: evenly spaced from the
            first to the last, as in the processor.

    Returns:
        `ImageList`: The images and videos.

    Raises:
        BoxFileError: If there is no image or video, or the input is of another kind.
        ImportError: If a dataset is given and the datasets library is not installed.
        OSError: If the input cannot be read.
    """
    if not isinstance(inputs, (str, Path, list, tuple)):
        return _from_dataset(inputs, "dataset")
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise BoxFileError(
            f"No such file or folder: {', '.join(absent[:3])}. Give a folder, images, JSON or a dataset."
        )
    if len(paths) == 1:
        found = _from_path(paths[0], image_folder, video_folder, exclude)
    else:
        others = [str(path) for path in paths if not (is_image(path) or is_video(path))]
        if others:
            raise BoxFileError(f"Several inputs must all be images or videos, got {', '.join(others[:3])}.")
        found = _from_files([str(path) for path in paths], Path(), "")
    if not found.entries:
        images, videos = (" ".join(sorted(extensions)) for extensions in (IMAGE_EXTENSIONS, VIDEO_EXTENSIONS))
        where = ", ".join(map(str, paths)) or "an empty list"
        raise BoxFileError(f"No images in {where} (looked for {images}), and no videos (looked for {videos}).")
    return replace(found, num_frames=num_frames)


def is_text(value: Any) -> bool:
    """Tell whether UTF-8 can encode a value: strings from file names and JSON may have lone surrogates."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image(path: Path) -> bool:
    """Tell whether a path has the extension of an image."""
    return path.suffix.lower() in IMAGE_EXTENSIONS


def is_video(path: Path) -> bool:
    """Tell whether a path has the extension of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS


def _from_path(
    path: Path, image_folder: str | Path | None, video_folder: str | Path | None, exclude: str | Path | None
) -> ImageList:
    images = path.parent if image_folder is None else Path(image_folder)
    roots = {False: images, True: images if video_folder is None else Path(video_folder)}
    if path.is_dir():
        return _from_folder(path, exclude)
    if is_image(path) or is_video(path):
        return _from_files([str(path)], Path(), "")
    if path.suffix == ".jsonl":
        return _from_samples(_json_lines(path), roots, path, text_ids=False)
    if path.suffix == ".json":
        return _from_samples(_json_list(path), roots, path, text_ids=True)
    if path.suffix == ".parquet":
        return _from_dataset(_load_parquet([path]), str(path))
    raise BoxFileError(f"{path} must be a folder, an image, a video, .json, .jsonl or .parquet.")


def _from_folder(folder: Path, exclude: str | Path | None) -> ImageList:
    if any((folder / name).is_file() for name in _DATASET_FILES):
        return _from_dataset(_load_from_disk(folder), str(folder))
    excluded = None if exclude is None else Path(exclude).resolve()
    images: list[str] = []
    parquet: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Skip the drawings of an earlier run, and links that would lead in circles.
        inside = Path(parent).resolve()
        targets = {name: (Path(parent) / name).resolve() for name in folders}
        loops = [name for name, target in targets.items() if target == inside or target in inside.parents]
        if loops:
            logger.warning("Skipped %s: it is a link to a folder that it is in.", Path(parent) / loops[0])
        folders[:] = sorted(name for name, target in targets.items() if name not in loops and target != excluded)
        for name in names:
            path = Path(parent) / name
            if is_image(path) or is_video(path):
                images.append(path.relative_to(folder).as_posix())
            elif path.suffix == ".parquet":
                parquet.append(path)
    if not images and parquet:
        return _from_dataset(_load_parquet(sorted(parquet)), str(folder))
    return _from_files(sorted(images), folder, "")


def _from_files(names: Sequence[str], root: Path, source: str) -> ImageList:
    entries = [ImageEntry((name,), name, is_video(Path(name))) for name in dict.fromkeys(names)]
    return ImageList(entries, lambda number: root / str(entries[number].image), source)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise BoxFileError(f"{path}, line {number} is not JSON ({error}).") from error


def _json_list(path: Path) -> list[Any]:
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BoxFileError(f"{path} is not JSON ({error}). If it has one sample per line, name it .jsonl.") from error
    if not isinstance(samples, list):
        raise BoxFileError(f"{path} must hold a list of samples, got {type(samples).__name__}.")
    return samples


def _from_samples(samples: Iterable[Any], roots: Mapping[bool, Path], path: Path, text_ids: bool) -> ImageList:
    """List images and videos of samples; `roots` are the folders of images (`False`) and of videos (`True`)."""
    ids_by_file: dict[tuple[bool, str], dict[Any, None]] = {}
    without_image = 0
    for number, sample in enumerate(samples):
        where = f"{path}: sample {number}"
        if not isinstance(sample, dict):
            raise BoxFileError(f"{where} must be a dictionary, got {type(sample).__name__}.")
        files: list[tuple[bool, str]] = []
        for kind in ("image", "video"):
            value = sample.get(kind) or []
            names = value if isinstance(value, list) else [value]
            if not all(isinstance(name, str) and name for name in names):
                raise BoxFileError(f"{where}: `{kind}` must be a path or a list of paths, got {value!r}.")
            files += [(kind == "video", name) for name in names]
        if not files:
            without_image += 1
            continue
        key = next((sample[name] for name in _ID_NAMES if name in sample), None)
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise BoxFileError(f"{where} must have {', '.join(_ID_NAMES)} as text or an integer, got {key!r}.")
        for file in files:
            # Images of one sample would share its id, so each has its path as id.
            own = file[1] if len(files) > 1 else str(key) if text_ids else key
            ids_by_file.setdefault(file, {})[own] = None
    entries = [ImageEntry(tuple(ids), name, video) for (video, name), ids in ids_by_file.items()]
    _report_ambiguous_ids(entries, str(path))

    def path_of(number: int) -> Path:
        return roots[entries[number].is_video] / str(entries[number].image)

    return ImageList(entries, path_of, "", without_image)


def _report_ambiguous_ids(entries: Sequence[ImageEntry], source: str) -> None:
    """Warn of ids that name several images."""
    seen: set[Any] = set()
    twice: dict[Any, None] = {}
    for entry in entries:
        for key in entry.ids:
            if key in seen:
                twice[key] = None
            seen.add(key)
    if twice:
        logger.warning(
            "%s: %d ids name several different images, such as %s. Looking up such an id returns the boxes of "
            "the last of its images; give each image an id of its own.",
            source,
            len(twice),
            ", ".join(repr(key) for key in list(twice)[:3]),
        )


def _import_datasets() -> Any:
    return import_extra("datasets", "datasets", "Reading a dataset")


def _load_from_disk(folder: Path) -> Any:
    datasets = _import_datasets()
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise BoxFileError(
            f"{folder} holds the splits {', '.join(splits)}; give one of them, such as {folder / splits[0]}."
        )
    return datasets.load_from_disk(str(folder))


def _load_parquet(paths: list[Path]) -> Any:
    files = [str(path) for path in paths]
    return _import_datasets().load_dataset("parquet", data_files=files, split="train")


def _from_dataset(dataset: Any, source: str) -> ImageList:
    datasets = _import_datasets()
    if not isinstance(dataset, datasets.Dataset):
        raise BoxFileError(f"`inputs` must be paths or a datasets.Dataset (one split), got {type(dataset).__name__}.")
    features = dataset.features
    column = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
    if column is None:
        raise BoxFileError(
            f"{source} has no column of images, only {', '.join(features)}. Cast one: "
            'dataset.cast_column("image", datasets.Image()).'
        )
    # Not decoded here, but where damaged images are caught and skipped.
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
    id_column = next((name for name in _ID_NAMES if name in features), None)
    ids = range(len(dataset)) if id_column is None else dataset[id_column][:]
    bad = [key for key in ids if isinstance(key, bool) or not isinstance(key, (str, int))]
    if bad:
        raise BoxFileError(f"{source}: the column {id_column} must hold text or integers, got {bad[0]!r}.")
    entries = [ImageEntry((key,), None) for key in ids]
    _report_ambiguous_ids(entries, source)

    def open_image(number: int) -> Any:
        stored = dataset[number][column]
        if stored is None:
            raise OSError("the row holds no image")
        return stored

    return ImageList(entries, open_image, source)


__all__ = [
    "DEFAULT_NUM_FRAMES",
    "IMAGE_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "ImageEntry",
    "ImageList",
    "Inputs",
    "is_image",
    "is_video",
    "list_images",
]
