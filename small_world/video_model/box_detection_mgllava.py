"""The box detector: from an image to tags to boxes (MG-LLaVA, arXiv 2406.17770, section 3.1)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import PIL.Image
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .box_detector_files_mgllava import (
    BUNDLE_FOLDER,
    PARTS,
    PROMPT_EMBEDS_FILE,
    ProcessorRepository,
    bundled_name,
    check_revision,
    known_commit,
    locate,
    store_parts,
)
from .boxes_mgllava import read_boxes
from .image_text_processor_common import ProcessLock
from .images_common import as_rgb, load_upright, resize_like_pil
from .owlv2_detection_mgllava import GroundedDetector, Owlv2Detector

logger = logging.get_logger(__name__)

# The detector of the paper (section 3.1).
DEFAULT_DETECTOR = "google/owlv2-large-patch14-ensemble"

DetectionMode = Literal["faithful", "clean"]
CONFIG_KEYS = ("tagger", "tagger_revision", "detector", "detector_revision", "mode", "prompt_embeds")
# The 80 object categories of COCO, the fixed label list of the paper's ablation (section 4.3).
COCO_80: list[str] = [
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
    *("scissors", "teddy bear", "hair drier", "toothbrush"),
]
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


class BoxDetectorProtocol(Protocol):
    """The interface that the processor expects of a box detector.

    Any object with this method works. If the processor is used from several threads, so is the detector. A detector
    other than a [`BoxDetector`] is copied and pickled with the processor, but not saved.
    """

    def detect(self, images: list[PIL.Image.Image], *args: Any, **kwargs: Any) -> Sequence[Mapping[str, Any]]:
        """Find the objects of some images.

        Args:
            images (`list[PIL.Image.Image]`): Upright images in 8-bit RGB; a list even for a single image.
            *args: Options of the detector.
            **kwargs: Options of the detector.

        Returns:
            `list[Mapping]`: Per image `boxes` (`(num_boxes, 4)`, xyxy in pixels of that image), `labels` (one string
            per box) and `scores` (shape `(num_boxes,)`).
        """
        ...


class BoxDetector:
    r"""Finds the objects of images: a tagger names them, and an object detector locates them.

    Two modes, saved with the processor:

    - `"faithful"`: boxes as in the authors' box files, **which the published weights expect**. Corners are whole
      numbers, truncated towards zero and not clipped, so they may lie outside the image; tags are lower-cased; if no
      tag passes its threshold, OWLv2 looks for the prompt `"a photo of "` and its boxes have the label `""`.
    - `"clean"`: corners are fractions, clipped to the image; boxes without area are dropped, and an image without tags
      has no boxes.

    Both modes prepare images for OWLv2 as the authors did (gray padding, see `square_pixels`). For the tagger,
    faithful mode resizes them with Pillow's algorithm of 2024, and clean mode with the tagger's image
    processor. Boxes are in the order of OWLv2's patches; the processor applies non-maximum suppression to them. Images
    are turned upright by their EXIF orientation first, as everywhere in this package. The authors ignored it, so their
    box files agree only for images without an EXIF orientation.

    Example:
        ```python
        detector = BoxDetector(tagger="./ram_plus", detector="google/owlv2-large-patch14-ensemble")
        detector.detect(["photo.jpg"])  # [{"boxes": tensor of shape (n, 4), "labels": [...], "scores": tensor}]
        ```

    Args:
        tagger (`str`, `os.PathLike`, [`PreTrainedModel`], `list[str]` or `None`): Repository id, folder or model of an
            image tagger; or a fixed list of labels ([`COCO_80`] in the paper's ablation); or `None` if labels are
            given at each call.
        detector (`str`, `os.PathLike` or [`PreTrainedModel`]): Repository id, folder or model of a zero-shot object
            detector.
        mode (`str`, *optional*, defaults to `"faithful"`): `"faithful"` or `"clean"`.
        tagger_revision (`str`, *optional*): With a tagger on the Hub: branch, tag or commit.
        detector_revision (`str`, *optional*): With a detector on the Hub: branch, tag or commit.
        tagger_processor ([`BaseImageProcessor`], *optional*): With a tagger given as a model: its image processor.
        detector_processor ([`ProcessorMixin`], *optional*): With a detector given as a model: its processor.
        device (`str` or `torch.device`, *optional*): By default that of a detector given as a model, else the
            accelerator if there is one that this process can use (the CPU in a DataLoader worker, and in a process
            forked from one that uses the accelerator). Models that are given are moved there.
        dtype (`torch.dtype`, *optional*): Dtype of the tagger and of OWLv2's image tower; the layers that compute
            scores and boxes are always float32. By default, models that are given keep their dtype, and others are
            bfloat16 on an accelerator and float32 on the CPU. Detectors other than OWLv2 are float32 by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether custom code of the repositories may run.
        **hub_options: How repositories are read: `cache_dir`, `force_download`, `local_files_only`, `token`.

    [`~BoxDetector.detect`] may be called from several threads, which take turns batch by batch.

    Raises:
        OSError: If a repository or folder does not exist.
        TypeError: If the tagger is not a tagger, the detector not a zero-shot detector, labels are not strings, or an
            option is unknown.
        ValueError: If the mode is unknown, the label list empty, a model is given without its processor, or a
            revision is given with a part that is not on the Hub.
    """

    def __init__(
        self,
        tagger: Any = None,
        detector: Any = DEFAULT_DETECTOR,
        *,
        mode: DetectionMode = "faithful",
        tagger_revision: str | None = None,
        detector_revision: str | None = None,
        tagger_processor: Any = None,
        detector_processor: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **hub_options: Any,
    ):
        if mode not in get_args(DetectionMode):
            raise ValueError(f"`mode` must be one of 'faithful', 'clean', got {mode!r}.")
        if unknown := sorted(set(hub_options) - set(_HUB_OPTIONS)):
            raise TypeError(f"`BoxDetector` takes {', '.join(_HUB_OPTIONS)} as further options, got {unknown}.")
        self.mode = mode
        options = {"trust_remote_code": trust_remote_code, **hub_options}
        self._loading_options = {"device": device, "dtype": dtype, **options}
        self._revisions = {"tagger": tagger_revision, "detector": detector_revision}
        for part, revision in self._revisions.items():
            check_revision(f"{part}_revision", revision)
        self.device = _resolve_device(device, detector)
        # CUDA may be initialized in this process; processes forked from it cannot use it.
        self._process = os.getpid()
        self._lock = ProcessLock()

        self._config: dict[str, Any] = {"tagger": None, "detector": None, "mode": mode}
        self._objects: dict[str, tuple[Any, Any]] = {}
        self._labels: list[str] | None = None
        self._tagger: ImageTagger | None = None
        if tagger is None or isinstance(tagger, list | tuple):
            self._refuse_revision("tagger", tagger)
        if isinstance(tagger, list | tuple):
            self._labels = self._config["tagger"] = check_labels(tagger, "tagger")
        elif tagger is not None:
            model, processor = self._part("tagger", tagger, tagger_processor, options)
            tower_dtype = self._tower_dtype(tagger, dtype, model)
            self._tagger = ImageTagger(model, processor, self.device, tower_dtype, mode == "faithful")

        model, processor = self._part("detector", detector, detector_processor, options)
        self._detector: Owlv2Detector | GroundedDetector
        if model.config.model_type == "owlv2":
            tower = self._tower_dtype(detector, dtype, model)
            self._detector = Owlv2Detector(model, processor, self.device, tower)
        else:
            self._detector = GroundedDetector(model, processor, self.device, dtype or torch.float32)
        self._is_vocabulary_embedded = False

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        repository: ProcessorRepository | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool | None = None,
        **hub_options: Any,
    ) -> "BoxDetector":
        """Load a box detector from the plain values that a processor keeps.

        Args:
            config (`Mapping`): `tagger`, `tagger_revision`, `detector`, `detector_revision` and `mode` as in the
                constructor; `prompt_embeds`, a file of text embeddings.
            repository ([`ProcessorRepository`], *optional*): Where paths that start with `./` are, and how to read it.
            device (`str` or `torch.device`, *optional*): See the constructor.
            dtype (`torch.dtype`, *optional*): See the constructor.
            trust_remote_code (`bool`, *optional*): By default as the processor was loaded.
            **hub_options: See the constructor; by default as the processor was loaded.

        Raises:
            ValueError: If the configuration has unknown keys, or what comes from the repository's file names something
                outside it.
            FileNotFoundError: If the repository lacks a file that the configuration names.
        """
        unknown = sorted(set(config) - set(CONFIG_KEYS))
        if unknown:
            raise ValueError(
                f"`box_detector_config` may have {', '.join(CONFIG_KEYS)}, got also {', '.join(unknown)}."
            )
        for name, value in config.items():
            if not (value is None or isinstance(value, str) or (name == "tagger" and isinstance(value, list | tuple))):
                raise ValueError(
                    f"`box_detector_config` must have a string as {name!r}, got {value!r}. Labels are a list of "
                    "strings as 'tagger'."
                )
        parts = {name: value for name, value in config.items() if name != "prompt_embeds"}
        for part in PARTS:
            if isinstance(parts.get(part), str):
                parts[part] = locate(part, parts[part], repository)
        embeds = config.get("prompt_embeds")
        embeds = locate("prompt_embeds", embeds, repository) if embeds else None
        if trust_remote_code is None:
            trust_remote_code = repository is not None and repository.trust_remote_code
        hub_options = {**(repository.hub_options if repository is not None else {}), **hub_options}
        detector = cls(**parts, device=device, dtype=dtype, trust_remote_code=trust_remote_code, **hub_options)
        if embeds is not None and isinstance(detector._detector, Owlv2Detector):
            detector._detector.prompt_embeds.load(embeds, detector.device)
        return detector

    def _part(self, part: str, source: Any, processor: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """Load a part, unless it is given as an object."""
        if not isinstance(source, str | os.PathLike):
            model = source
            _check_kind(part, getattr(model, "config", None), type(model).__name__)
            if processor is None:
                raise ValueError(f"`{part}_processor` must be given with a `{part}` that is a model, got None.")
            self._refuse_revision(part, type(model).__name__)
            self._objects[part] = (model, processor)
            self._config[part] = bundled_name(part)
            return model, processor
        name = os.fspath(source)
        options = {**options, "revision": self._revisions[part]}
        if is_folder := os.path.isdir(name):
            self._refuse_revision(part, name)
            name = os.path.abspath(name)  # in a configuration, `./` is the processor's repository
        self._config[part] = name
        try:
            config = AutoConfig.from_pretrained(name, **options)
            _check_kind(part, config, name)
            if not is_folder:  # one commit for this load and for the saved configuration
                commit = known_commit(name, options["revision"], options.get("cache_dir")) or options["revision"]
                options["revision"] = commit
                if commit is not None:
                    self._config[f"{part}_revision"] = commit
            # Loaded in float32: some layers stay in it, and their weights must not be rounded.
            auto_model = AutoModel if part == "tagger" else AutoModelForZeroShotObjectDetection
            model = auto_model.from_pretrained(name, dtype=torch.float32, **options)
            auto_processor = AutoImageProcessor if part == "tagger" else AutoProcessor
            return model, auto_processor.from_pretrained(name, **options)
        except OSError as error:
            raise OSError(
                f"`{part}` must be a folder or a repository on the Hub with a model, got {name!r}, which cannot be "
                f"read: {error}"
            ) from error

    def _refuse_revision(self, part: str, source: Any) -> None:
        """Refuse a revision of a part that is not on the Hub."""
        if self._revisions[part] is not None:
            raise ValueError(
                f"`{part}_revision` must be None unless `{part}` is a repository on the Hub, got "
                f"{self._revisions[part]!r} with {source!r}."
            )

    def _tower_dtype(self, source: Any, dtype: torch.dtype | None, model: Any) -> torch.dtype:
        """Choose the dtype of a tower: bfloat16 on an accelerator, unless the user chose one."""
        if dtype is not None or not isinstance(source, str | os.PathLike):
            return dtype or model.dtype
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that describe this detector; `./box_detector/...` means a model given in memory."""
        return dict(self._config)

    @property
    def loading_options(self) -> dict[str, Any]:
        """The other arguments that this detector was created with: device, dtype, and how repositories are read."""
        return dict(self._loading_options)

    @property
    def is_named(self) -> bool:
        """Whether `config` and `loading_options` are all that is needed to load this detector again."""
        return not self._objects

    @property
    def is_usable_here(self) -> bool:
        """Whether this process can use the detector's device: a forked one cannot use its parent's accelerator."""
        return self.device.type == "cpu" or self._process == os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Note the process that unpickles it."""
        self.__dict__.update(state, _process=os.getpid())

    def save_pretrained(self, save_directory: str | os.PathLike) -> dict[str, Any]:
        """Save the models that are not on the Hub, and the text embeddings, in `save_directory/box_detector`.

        Args:
            save_directory (`str` or `os.PathLike`): The folder of a saved processor.

        Returns:
            `dict`: The configuration from which [`~BoxDetector.from_config`] loads them.

        Raises:
            FileNotFoundError: If a folder that the configuration names no longer exists.
            ValueError: If a path or a link leads out of the repository that the configuration was read from.
        """
        with self._lock:
            cache_dir = self._loading_options.get("cache_dir")
            config = store_parts(self._config, save_directory, None, self._objects, cache_dir)
            if isinstance(self._detector, Owlv2Detector) and len(self._detector.prompt_embeds):
                path = Path(save_directory) / BUNDLE_FOLDER / PROMPT_EMBEDS_FILE
                path.parent.mkdir(parents=True, exist_ok=True)
                self._detector.prompt_embeds.save(path)
                config["prompt_embeds"] = bundled_name(PROMPT_EMBEDS_FILE)
        return config

    def embed_vocabulary(self) -> None:
        """Embed the prompts of all labels that are known in advance, so that the text tower is not needed again.

        On an accelerator, the first detection does this. On a CPU, it takes minutes for thousands of tags, so prompts
        are embedded when they first occur; call this method before saving a processor to save all embeddings with it.
        """
        with self._lock:
            if isinstance(self._detector, Owlv2Detector):
                tags = self._labels or (self._tagger.vocabulary if self._tagger else [])
                labels = ["", *(label for tag in tags for label in self._as_labels([tag]))]
                self._detector.prompt_embeds.add([self._detector.prompt(label) for label in labels])
            self._is_vocabulary_embedded = True

    def detect(
        self,
        images: Any,
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        threshold: float = 0.2,
        batch_size: int = 8,
        input_data_format: str | None = None,
    ) -> list[dict[str, Any]]:
        """Find the objects of images.

        Args:
            images: A PIL image, array, tensor, path or URL, or a list of them. Read batch by batch.
            labels (`list[str]` or `list[list[str]]`, *optional*): What to look for, instead of the tagger's labels:
                one list for all images, or one list per image (empty for an image without tags).
            threshold (`float`, *optional*, defaults to 0.2): Boxes must have a greater score.
            batch_size (`int`, *optional*, defaults to 8): Number of images at a time. It is halved, with a warning,
                if the accelerator runs out of memory.
            input_data_format (`str`, *optional*): Channel order of arrays and tensors, `"channels_first"` or
                `"channels_last"`; inferred by default.

        Returns:
            `list[dict]`: Per image `boxes` of shape `(n, 4)` (xyxy in pixels of the upright original image; int64 in
            faithful mode, float32 in clean mode), `labels` (n strings, as given, or lower-case tags) and `scores`
            (float32 of shape `(n,)`), on the CPU. The processor accepts the list as `boxes`.

        Raises:
            TypeError: If labels are not strings, or something is not an image.
            ValueError: If there is nothing to look for, the numbers of images and lists of labels differ, or an image
                cannot be read.
            RuntimeError: If this process was forked from the one that put the detector on an accelerator.
            torch.OutOfMemoryError: If memory does not hold a single image.
        """
        is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        images = list(images) if is_batch else [images]
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        given = self._given_labels(labels, len(images))
        if not self.is_usable_here:
            raise RuntimeError(
                f"This detector was put on {self.device} before this process was forked, and forked processes cannot "
                "use the accelerator of their parent. Start workers with `multiprocessing_context='spawn'`, or load "
                "the detector in the worker (a processor with a `box_detector_config` does so, on the CPU), or find "
                "the boxes first and pass them as `boxes`."
            )
        if not self._is_vocabulary_embedded and given is None and self.device.type != "cpu":
            self.embed_vocabulary()

        results: list[dict[str, Any]] = []
        while len(results) < len(images):
            batch = slice(len(results), len(results) + batch_size)
            named = [(image, f"images[{batch.start + index}]") for index, image in enumerate(images[batch])]
            loaded = [as_rgb(load_upright(image, name), input_data_format, name) for image, name in named]
            # One thread at a time: models move between devices, and tokenizers and embeddings change.
            with self._lock:
                found = self._detect_if_it_fits(loaded, None if given is None else given[batch], threshold)
            if found is None:
                batch_size = len(loaded) // 2
                torch.accelerator.empty_cache()
                logger.warning(f"Out of memory with {len(loaded)} images at a time: continuing with {batch_size}.")
            else:
                results += found
        return results

    def _detect_if_it_fits(
        self, images: list[torch.Tensor], labels: list[list[str]] | None, threshold: float
    ) -> list[dict[str, Any]] | None:
        """Detect; return `None` if memory holds only fewer images. By then their tensors have been released."""
        try:
            # Under a caller's autocast the heads would round boxes and scores; towers have a dtype of their own.
            with maybe_autocast(self.device.type, enabled=False):
                return self._detect(images, labels, threshold)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
            return None

    def _detect(
        self, images: list[torch.Tensor], labels: list[list[str]] | None, threshold: float
    ) -> list[dict[str, Any]]:
        """Detect the objects of a batch."""
        images = [image.to(self.device) for image in images]  # in 8 bits, once for the tagger and the object detector
        if labels is None:
            labels = [self._as_labels(tags) for tags in self._tagger(images)]  # type: ignore[misc]
        elif self.mode == "faithful":
            labels = [of_image or [""] for of_image in labels]
        busy = [index for index, of_image in enumerate(labels) if of_image]
        results = self._detector.find([images[i] for i in busy], [labels[i] for i in busy], threshold) if busy else []
        found = dict(zip(busy, results, strict=True))
        nothing: tuple[torch.Tensor, list[str], torch.Tensor] = (torch.zeros(0, 4), [], torch.zeros(0))
        return [self._finish(*found.get(index, nothing), image.shape[1:]) for index, image in enumerate(images)]

    def _finish(
        self, boxes: torch.Tensor, labels: list[str], scores: torch.Tensor, image_size: Sequence[int]
    ) -> dict[str, Any]:
        """Convert the boxes of an image to the form of the mode."""
        if self.mode == "faithful":
            return {"boxes": boxes.to(torch.int64), "labels": labels, "scores": scores}  # truncates towards zero
        height, width = image_size
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        kept = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
        return {"boxes": boxes[kept], "labels": [labels[index] for index in kept.tolist()], "scores": scores[kept]}

    def _as_labels(self, tags: Sequence[str]) -> list[str]:
        """Turn the tags of an image into labels; fixed labels are kept."""
        if self._labels is not None:
            return list(tags)
        return tags_as_labels(tags) if self.mode == "faithful" else [tag.strip().lower() for tag in tags]

    def _given_labels(
        self, labels: Sequence[str] | Sequence[Sequence[str]] | None, num_images: int
    ) -> list[list[str]] | None:
        """List the labels of each image; return `None` if the tagger has to find them."""
        if labels is None:
            if self._labels is not None:
                return [self._labels] * num_images
            if self._tagger is None:
                raise ValueError(
                    "`labels` must be given, got None: this detector has no tagger. Pass labels, or create it "
                    "with `tagger=`."
                )
            return None
        nested = isinstance(labels, list | tuple) and any(isinstance(of_image, list | tuple) for of_image in labels)
        if not nested:
            return [check_labels(labels, "labels")] * num_images
        if len(labels) != num_images:
            raise ValueError(
                f"`labels` must have one list per image, got {len(labels)} lists for {num_images} images."
            )
        return [check_labels(of_image, f"labels[{index}]", may_be_empty=True) for index, of_image in enumerate(labels)]


def find_boxes(
    detector: Any, images: list[Any], input_data_format: str | None, options: Mapping[str, Any] | None = None
) -> list[Mapping[str, Any]]:
    """Find the boxes of upright images with any detector, and check what it returns."""
    pictures = [_as_picture(image, input_data_format) for image in images]
    found = detector.detect(pictures, **(options or {}))
    name = f"`{type(detector).__name__}.detect`"
    if isinstance(found, Mapping | str) or not hasattr(found, "__len__") or not hasattr(found, "__iter__"):
        raise TypeError(f"{name} must return a list with one mapping per image, got {type(found).__name__}.")
    if len(found) != len(images):
        raise ValueError(f"{name} must return one result per image, got {len(found)} for {len(images)} images.")
    for index, result in enumerate(found):
        if not isinstance(result, Mapping):
            raise TypeError(
                f"{name} must return mappings with 'boxes', 'labels' and 'scores', got {type(result).__name__} for "
                f"image {index}."
            )
        if absent := [key for key in ("boxes", "labels", "scores") if result.get(key) is None]:
            raise ValueError(
                f"{name} must return 'boxes', 'labels' and 'scores', got none of {absent} for image {index}, but "
                f"{sorted(map(str, result))}."
            )
        try:
            read_boxes(result)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{name} returned, for image {index}, what cannot be used as `boxes`: {error}"
            ) from error
    return list(found)


def _as_picture(image: Any, input_data_format: str | None) -> PIL.Image.Image:
    """Convert an upright image to an RGB image of PIL, the form that detectors are given."""
    if isinstance(image, PIL.Image.Image) and image.mode == "RGB":
        return image
    return PIL.Image.fromarray(as_rgb(image, input_data_format).permute(1, 2, 0).contiguous().cpu().numpy())


def check_labels(labels: Any, name: str, may_be_empty: bool = False) -> list[str]:
    """Check that labels are a list of strings, and return them."""
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        got = sorted({type(label).__name__ for label in labels}) if isinstance(labels, list | tuple) else repr(labels)
        raise TypeError(f"`{name}` must be a list of strings, got {got}.")
    if not labels and not may_be_empty:
        raise ValueError(f"`{name}` must have at least one label, got an empty list.")
    return list(labels)


def _check_kind(part: str, config: Any, name: str) -> None:
    """Refuse a model that is not a zero-shot detector, before its weights are read."""
    model_type = getattr(config, "model_type", None)
    known = MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
    has_own_code = AutoModelForZeroShotObjectDetection.__name__ in (getattr(config, "auto_map", None) or {})
    if part == "detector" and model_type not in known and not has_own_code:
        raise TypeError(
            f"`detector` must be a zero-shot object detector ({', '.join(known)}), got {name!r}, "
            f"{f'a model of type {model_type!r}' if model_type else 'which is not a model'}."
        )


def _resolve_device(device: str | torch.device | None, detector: Any) -> torch.device:
    """Choose the device of a detector."""
    if device is None and isinstance(detector, torch.nn.Module):
        device = getattr(detector, "device", None)
    if device is None:
        # Workers would each load a copy onto the accelerator of the training, and forked ones cannot use it.
        device = None if in_worker() else torch.accelerator.current_accelerator(check_available=True)
        try:
            torch.empty(1, device=device or "cpu")
        except torch.OutOfMemoryError:
            pass  # loading will raise the error
        except RuntimeError:
            logger.warning_once(
                f"The box detector is loaded on the CPU, since this process cannot use {device}, like all processes "
                "that are forked from one that uses it. Start processes with 'spawn' to use it there."
            )
            device = None
    return torch.device(device or "cpu")


def in_worker() -> bool:
    """Tell whether this process is a worker of a DataLoader."""
    return torch.utils.data.get_worker_info() is not None


class ImageTagger:
    """Names what is in images, with RAM++ or another model of the same interface.

    The model's output has `logits` of shape `(num_images, num_tags)`; the model or its image processor has
    `post_process_image_tagging(outputs)`, which returns the `labels` of each image. Models that are spread over
    devices or quantized are not moved. With `resizes_like_pil`, [`resize_like_pil`] replaces the image processor's
    resize if that is bilinear.
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        device: torch.device,
        dtype: torch.dtype | None,
        resizes_like_pil: bool,
    ):
        owner = next((part for part in (model, image_processor) if hasattr(part, "post_process_image_tagging")), None)
        if owner is None or image_processor is None:
            raise TypeError(
                "`tagger` must be an image tagging model whose `post_process_image_tagging` lists the labels of each "
                f"image (RamPlusForImageTagging is one), got {type(model).__name__}."
            )
        if not (getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)):
            model = model.to(device=device, dtype=dtype)
        self.model, self.image_processor, self._post_process = model.eval(), image_processor, owner
        is_bilinear = getattr(image_processor, "resample", None) == PIL.Image.Resampling.BILINEAR
        size = dict(getattr(image_processor, "size", None) or {})
        self._resize_to: tuple[int, int] | None = None
        if resizes_like_pil and is_bilinear and image_processor.do_resize and size.get("height") and size.get("width"):
            self._resize_to = (size["height"], size["width"])

    @property
    def vocabulary(self) -> list[str]:
        """All tags that the model knows, in its order; empty if its configuration does not list them."""
        id2label = getattr(self.model.config, "id2label", None) or {}
        return [id2label[index] for index in sorted(id2label)]

    def pixel_values(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the model's input of uint8 RGB images: float32 of shape `(num_images, 3, height, width)`."""
        options: dict[str, Any] = {"return_tensors": "pt"}
        given: list[Any] = list(images)
        if self._resize_to is not None:
            given = [resize_like_pil(image, self._resize_to) for image in given]
            options["do_resize"] = False
        if isinstance(self.image_processor, TorchvisionBackend):
            # Not inferred: a picture may be three pixels wide or high.
            options |= {"device": self.model.device, "input_data_format": ChannelDimension.FIRST}
        else:
            given = [PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in given]
        return self.image_processor(given, **options)["pixel_values"]

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> list[list[str]]:
        """Return the tags of each image, in the model's order."""
        pixels = self.pixel_values(images)
        outputs = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        outputs["logits"] = outputs["logits"].float()  # the sigmoid and the thresholds in float32
        results = self._post_process.post_process_image_tagging(outputs)
        return [list(result["labels"]) for result in results]


def tags_as_labels(tags: Sequence[str]) -> list[str]:
    """Turn the tags of an image into labels as for the published box files: joined, lower-cased, split again.

    So a tag with a comma becomes two labels, and no tag at all becomes the single label `""`.
    """
    joined = " | ".join(tags).replace(" |", ",").lower().strip()
    return [piece.strip() for piece in joined.split(",")]


__all__ = [
    "COCO_80",
    "CONFIG_KEYS",
    "DEFAULT_DETECTOR",
    "BoxDetector",
    "BoxDetectorProtocol",
    "DetectionMode",
    "ImageTagger",
    "find_boxes",
    "in_worker",
    "tags_as_labels",
]
