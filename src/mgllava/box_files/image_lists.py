"""List the images in folders, image files, JSON lists of questions or conversations, and datasets."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from mgllava.extras import import_extra
from mgllava.processing.images_common import load_upright

from .errors import BoxFileError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Inputs: TypeAlias = "str | Path | Sequence[str | Path] | Dataset"

IMAGE_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_ID_NAMES = ("question_id", "id", "index")
# Files of `datasets.Dataset.save_to_disk`.
_DATASET_FILES = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class ImageEntry:
    """The ids (text or integers) of the records of an image, and its path, if it has one."""

    ids: tuple[Any, ...]
    image: str | None


@dataclass(frozen=True)
class ImageList:
    """Images in the order of the input, each one once.

    Attributes:
        entries (`list[ImageEntry]`): The images.
        open (`Callable[[int], Any]`): Returns an image by its index in `entries`: a path, or what a dataset stores.
        source (`str`): Origin of the images, which is part of the digest.
        samples_without_image (`int`): Samples of a JSON list that were left out: text only, or with a video.
    """

    entries: list[ImageEntry]
    open: Callable[[int], Any] = field(repr=False)
    source: str
    samples_without_image: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def digest(self) -> str:
        """SHA-256 of ids and paths, in hexadecimal. Pixels are not read."""
        content = hashlib.sha256(json.dumps([self.source, self.samples_without_image]).encode())
        for entry in self.entries:
            content.update(json.dumps([entry.ids, entry.image]).encode())
        return content.hexdigest()

    def load(self, number: int) -> Image.Image:
        """Read an image.

        Args:
            number (`int`): Index of the image in `entries`.

        Returns:
            `PIL.Image.Image`: RGB, upright (its EXIF orientation is applied).

        Raises:
            OSError: If the image cannot be opened.
            TypeError: If a dataset holds something that is not an image.
        """
        image: Image.Image = load_upright(self.open(number))
        return image


def list_images(
    inputs: Inputs, *, image_folder: str | Path | None = None, exclude: str | Path | None = None
) -> ImageList:
    """List the images of an input.

    The ids depend on the input:

    - a folder with its subfolders: the path inside the folder;
    - image files: the path as given;
    - JSON lines (`.jsonl`): `question_id`, `id` or `index`, unchanged;
    - LLaVA's JSON (`.json`, a list of samples): `id` as text, as in training;
    - a dataset (of the datasets library, its folder, or Parquet with an image column): the column `question_id`, `id`
      or `index`, or else the row number.

    An image with several ids in a JSON list is listed once. A sample with several images (`image` is a list) has a
    record for each of them, whose id is the path of the image.

    Args:
        inputs (`str`, `Path`, list of them or `datasets.Dataset`): One of the above.
        image_folder (`str` or `Path`, *optional*): Folder that the paths in a JSON list start from; by default the
            folder of the list.
        exclude (`str` or `Path`, *optional*): A folder to skip.

    Returns:
        `ImageList`: The images.

    Raises:
        BoxFileError: If there is no image, or the input is of another kind.
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
        found = _from_path(paths[0], image_folder, exclude)
    else:
        others = [str(path) for path in paths if not is_image(path)]
        if others:
            raise BoxFileError(f"Several inputs must all be images, got {', '.join(others[:3])}.")
        found = _from_files([str(path) for path in paths], Path(), "")
    if not found.entries:
        extensions = " ".join(sorted(IMAGE_EXTENSIONS))
        raise BoxFileError(f"No images in {', '.join(map(str, paths)) or 'an empty list'} (looked for {extensions}).")
    return found


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


def _from_path(path: Path, image_folder: str | Path | None, exclude: str | Path | None) -> ImageList:
    root = path.parent if image_folder is None else Path(image_folder)
    if path.is_dir():
        return _from_folder(path, exclude)
    if is_image(path):
        return _from_files([str(path)], Path(), "")
    if path.suffix == ".jsonl":
        return _from_samples(_json_lines(path), root, path, text_ids=False)
    if path.suffix == ".json":
        return _from_samples(_json_list(path), root, path, text_ids=True)
    if path.suffix == ".parquet":
        return _from_dataset(_load_parquet([path]), str(path))
    raise BoxFileError(f"{path} must be a folder, an image, .json, .jsonl or .parquet.")


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
            if is_image(path):
                images.append(path.relative_to(folder).as_posix())
            elif path.suffix == ".parquet":
                parquet.append(path)
    if not images and parquet:
        return _from_dataset(_load_parquet(sorted(parquet)), str(folder))
    return _from_files(sorted(images), folder, "")


def _from_files(names: Sequence[str], root: Path, source: str) -> ImageList:
    entries = [ImageEntry((name,), name) for name in dict.fromkeys(names)]
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


def _from_samples(samples: Iterable[Any], root: Path, path: Path, text_ids: bool) -> ImageList:
    ids_by_image: dict[str, dict[Any, None]] = {}
    without_image = 0
    for number, sample in enumerate(samples):
        where = f"{path}: sample {number}"
        if not isinstance(sample, dict):
            raise BoxFileError(f"{where} must be a dictionary, got {type(sample).__name__}.")
        image = sample.get("image")
        if not image:
            without_image += 1
            continue
        paths = image if isinstance(image, list) else [image]
        if not all(isinstance(name, str) and name for name in paths):
            raise BoxFileError(f"{where}: `image` must be a path or a list of paths, got {image!r}.")
        key = next((sample[name] for name in _ID_NAMES if name in sample), None)
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise BoxFileError(f"{where} must have {', '.join(_ID_NAMES)} as text or an integer, got {key!r}.")
        for name in paths:
            # Images of one sample would share its id, so each has its path as id.
            own = name if len(paths) > 1 else str(key) if text_ids else key
            ids_by_image.setdefault(name, {})[own] = None
    entries = [ImageEntry(tuple(ids), image) for image, ids in ids_by_image.items()]
    _report_ambiguous_ids(entries, str(path))
    return ImageList(entries, lambda number: root / str(entries[number].image), "", without_image)


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


__all__ = ["IMAGE_EXTENSIONS", "ImageEntry", "ImageList", "Inputs", "is_image", "list_images"]
