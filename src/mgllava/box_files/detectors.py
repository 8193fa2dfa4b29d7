"""The box detector of a job: its settings, and loading at the first image."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoProcessor

from mgllava.families import takes_boxes
from mgllava.processing import COCO_80, BoxDetector
from mgllava.processing.box_detection_mgllava import DEFAULT_DETECTOR
from mgllava.processing.image_text_processor_common import ProcessLock

from .errors import BoxFileError

# Name of the fixed list of labels of the paper's ablation, as a tagger.
COCO_TAGGER = "coco80"
# How frames are sampled from videos: evenly from the first to the last, with truncated indices.
SAMPLING = "linspace"

_PARTS = ("tagger", "detector")
# Only samples of large files are read: different weights differ almost everywhere, and the digest is needed often.
_SAMPLES, _SAMPLE_SIZE = 64, 65_536


class Detector(Protocol):
    """Protocol of box detectors: [`BoxDetector`], or any class with these members."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration as plain values."""

    def detect(
        self, images: Any, labels: Any = None, threshold: float = 0.2, batch_size: int = 8
    ) -> Sequence[Mapping[str, Any]]:
        """Return `{"boxes", "labels", "scores"}` for each image, xyxy in pixels of the image."""


class LazyDetector:
    """A [`BoxDetector`] that is loaded at the first image, on the device of this process.

    Args:
        config (`Mapping`): Its configuration, see [`BoxDetector.from_config`]; without paths that start with `./`.
        trust_remote_code (`bool`): Whether code from the repositories of its parts may run.
    """

    def __init__(self, config: Mapping[str, Any], trust_remote_code: bool = False):
        self.config = dict(config)
        self._trust_remote_code = trust_remote_code
        self._loaded: BoxDetector | None = None
        self._lock = ProcessLock()

    def detect(
        self, images: Any, labels: Any = None, threshold: float = 0.2, batch_size: int = 8
    ) -> Sequence[Mapping[str, Any]]:
        """Find the objects of images, see [`BoxDetector.detect`].

        Args:
            images: The images.
            labels (`list[str]`, *optional*): Labels to look for, instead of those that the tagger finds.
            threshold (`float`): Scores must be greater.
            batch_size (`int`): Images at a time.

        Returns:
            `list[Mapping]`: Per image `boxes` (xyxy, pixels of the image), `labels` and `scores`.

        Raises:
            BoxFileError: If there is nothing to look for, or the detector cannot be built from its configuration.
            OSError: If there is no such model.
        """
        if labels is None and self.config["tagger"] is None:
            raise BoxFileError("Nothing says what to look for: pass `labels` or a `tagger`.")
        with self._lock:
            if self._loaded is None:
                from accelerate import PartialState

                try:
                    self._loaded = BoxDetector.from_config(
                        self.config, device=PartialState().device, trust_remote_code=self._trust_remote_code
                    )
                except (TypeError, ValueError) as error:
                    raise BoxFileError(f"The detector cannot be loaded: {error}") from error
        return self._loaded.detect(images, labels=labels, threshold=threshold, batch_size=batch_size)


def open_detector(
    processor: str | None = None,
    detector: str | None = None,
    tagger: str | None = None,
    mode: str | None = None,
    trust_remote_code: bool = False,
) -> LazyDetector:
    """Return the box detector of a model, or one of a tagger and a zero-shot object detector.

    Args:
        processor (`str`, *optional*): Folder or Hub id of a model with a box detector.
        detector (`str`, *optional*): Folder or Hub id of a zero-shot object detector; OWLv2-L by default.
        tagger (`str`, *optional*): Folder or Hub id of an image tagger, or `"coco80"` for the 80 labels of COCO.
        mode (`str`, *optional*): `"faithful"` or `"clean"`; by default that of the model, else `"faithful"`.
        trust_remote_code (`bool`): Whether code from the models' repositories may run.

    Returns:
        `LazyDetector`: The detector; no weights are read yet.

    Raises:
        BoxFileError: If `processor` is given together with `detector` or `tagger`, or if the model has no box
            detector, or one outside its folder.
        OSError: If the model cannot be read.
    """
    if processor is None:
        config: dict[str, Any] = {
            "tagger": COCO_80 if tagger == COCO_TAGGER else _absolute(tagger),
            "detector": _absolute(detector or DEFAULT_DETECTOR),
            "mode": mode or "faithful",
        }
        return LazyDetector(config, trust_remote_code)
    if detector is not None or tagger is not None:
        raise BoxFileError("`processor` brings its own detector: pass it, or `detector` and `tagger`, not both.")
    loaded = AutoProcessor.from_pretrained(processor, trust_remote_code=trust_remote_code)
    try:
        located = loaded.locate_box_detector() if takes_boxes(loaded) else None
    except ValueError as error:
        raise BoxFileError(f"`processor`: {error}") from error
    if located is None:
        raise BoxFileError(f"`processor`: {processor} has no box detector. Pass `detector` and `tagger` instead.")
    if mode is not None:
        located["mode"] = mode
    return LazyDetector(located, trust_remote_code)


def _absolute(name: str | None) -> str | None:
    """Make the path of a folder absolute, so that it is not taken for a path inside a processor's folder."""
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name


def check_detector(detector: Any) -> None:
    """Refuse a detector that does not follow the protocol."""
    kind = type(detector).__name__
    if not isinstance(getattr(detector, "config", None), Mapping):
        raise BoxFileError(
            f"`detector` must have `config`, a mapping of plain values that tell what made the boxes, got {kind} "
            "without one. Put the settings into it that its boxes depend on, such as name and version of its model."
        )
    options = ("labels", "threshold", "batch_size")
    parameters = inspect.signature(detector.detect).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_all and (absent := [name for name in options if name not in parameters]):
        raise BoxFileError(
            f"`detector` must have `detect(images, labels, threshold, batch_size)`, but that of {kind} does not take "
            f"{', '.join(absent)}. Add these parameters, or `**kwargs`."
        )


def detection_settings(
    detector: Detector | Mapping[str, Any],
    labels: Sequence[str] | None = None,
    threshold: float = 0.2,
    repository: str | Path | None = None,
    num_frames: int | None = None,
) -> dict[str, Any]:
    """Return the settings that boxes depend on, for box files and [`BoxFile.check_settings`].

    Models in folders are identified by their contents, so that a folder may be moved or copied.

    Args:
        detector (`Detector` or `Mapping`): The detector, or its configuration (`box_detector_config`).
        labels (`Sequence[str]`, *optional*): Labels to look for, instead of those that the tagger finds.
        threshold (`float`): Scores must be greater.
        repository (`str` or `Path`, *optional*): The processor's folder, which paths such as `./box_detector` in the
            configuration are in.
        num_frames (`int`, *optional*): Frames that are sampled from each video, if there are videos.

    Returns:
        `dict`: Plain values.

    Raises:
        BoxFileError: If the detector consists of models in memory, which have no name, or does not follow the
            protocol [`Detector`].
    """
    if not isinstance(detector, Mapping):
        check_detector(detector)
    config = dict(detector if isinstance(detector, Mapping) else detector.config)
    # A cache of the text tower's results, which does not change the boxes.
    config.pop("prompt_embeds", None)
    for part in _PARTS:
        source = config.get(part)
        if not isinstance(source, str):
            continue
        if source.startswith("./"):
            if repository is None:
                raise BoxFileError(
                    f"`detector`: its {part} has no name, so a box file could not say what made it. Save the model, "
                    "and create the detector from its folder."
                )
            source = str(Path(repository) / source)
        if os.path.isdir(source):
            config[part] = folder_digest(source)
    settings = {"detector": config, "labels": None if labels is None else list(labels), "threshold": threshold}
    if num_frames is not None:
        settings["frames"] = {"sampling": SAMPLING, "num_frames": num_frames}
    # As they are read from a file, so that both compare equal.
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def folder_digest(folder: str | Path) -> str:
    """Identify a model by names, sizes and contents of its JSON and weight files; large files are sampled."""
    content = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in (".json", ".safetensors", ".bin", ".txt"):
            continue
        size = path.stat().st_size
        content.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _SAMPLES * _SAMPLE_SIZE:
                content.update(file.read())
                continue
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE_SIZE) * number // (_SAMPLES - 1))
                content.update(file.read(_SAMPLE_SIZE))
    return f"sha256:{content.hexdigest()}"


__all__ = [
    "COCO_TAGGER",
    "SAMPLING",
    "Detector",
    "LazyDetector",
    "detection_settings",
    "folder_digest",
    "open_detector",
]
