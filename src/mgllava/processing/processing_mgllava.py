"""Processor of MG-LLaVA (arXiv 2406.17770): images, boxes and text to model inputs, and ids back to text."""

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from huggingface_hub import HfApi
from transformers import BatchFeature, processing_utils
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import PROCESSOR_NAME, logging

from .box_detection_mgllava import BoxDetector, in_worker
from .box_detector_files_mgllava import (
    BUNDLE_FOLDER,
    PARTS,
    ProcessLock,
    ProcessorRepository,
    known_commit,
    links_out_of,
    locate,
    locate_revision,
    store_parts,
)
from .boxes_mgllava import (
    BOX_MARKS,
    as_lists,
    boxes_of_block,
    flatten_boxes,
    plain_boxes,
    read_boxes,
    take_boxes_from_text,
    write_boxes_into_text,
)
from .images_common import as_rgb, flat_images, group_sizes, image_block
from .text_chunks_common import (
    BOUNDARY_NAMES,
    PRIVATE_CHARACTERS,
    chat_formats,
    encode_chunks,
    protect_text,
    read_format,
    split_text,
    writes_boundaries,
)

logger = logging.get_logger(__name__)

# Newer transformers can mark control tokens in user text, which are then not placeholders.
_CAN_SANITIZE = "sanitize_control_tokens" in signature(ProcessorMixin.apply_chat_template).parameters
# Private: matches where no mark stands before a placeholder. Without it, sanitizing is refused.
_UNMARKED: str | None = getattr(processing_utils, "_UNMARKED", None)


# What uploads files in transformers. It is private, so it is checked before something relies on it.
_UPLOAD_HOOK = "_upload_modified_files"


class BoxDetectorProtocol(Protocol):
    """What the processor needs of a box detector.

    Any object with this method will do. If the processor is used from several threads, so is the detector. A
    detector other than a [`BoxDetector`] is copied and pickled with the processor, but not saved.
    """

    def detect(self, images: list[PIL.Image.Image], *args: Any, **kwargs: Any) -> Sequence[Mapping[str, Any]]:
        """Find the objects of some images.

        Args:
            images (`list[PIL.Image.Image]`): Upright images in 8-bit RGB, also where there is only one.
            *args: Options of the detector.
            **kwargs: Options of the detector.

        Returns:
            `list[Mapping]`: Per image `boxes` (`(num_boxes, 4)`, xyxy in pixels of that image), `labels` (one string
            per box) and `scores` (shape `(num_boxes,)`).
        """
        ...


class MGLlavaProcessor(ProcessorMixin):
    r"""Prepares images, boxes and text for MG-LLaVA.

    Each `<image>` in the text becomes `image_seq_length + num_tokens_per_box * num_boxes` placeholders in one run, and
    text is encoded in chunks around the images and between the pieces of a conversation, as in training (see
    `text_chunks_common.py`).

    Example:
        ```python
        boxes = [[[10, 20, 110, 70]]]  # one image, one box
        inputs = processor(image, "USER: <image>\nWhat is it? ASSISTANT:", boxes=boxes, return_tensors="pt")
        inputs["input_ids"].shape  # (1, 577 + text): 576 fused tokens and one box token
        ```

    Args:
        image_processor ([`MGLlavaImageProcessor`]): Makes `pixel_values`, `boxes` and `num_boxes`.
        tokenizer ([`PreTrainedTokenizerBase`]): Has `image_token` in its vocabulary.
        image_seq_length (`int`, *optional*, defaults to 576): Fused tokens per image, from the model's config.
        num_tokens_per_box (`int`, *optional*, defaults to 1): 0 for model variants that give no box tokens.
        chat_template (`str`, *optional*): Jinja template; see `text_chunks_common.py`.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, if the tokenizer does not name one.
        box_detector_config (`dict`, *optional*): What a [`BoxDetector`] is built from when boxes are first needed;
            plain values, saved with the processor: `tagger` and `detector` (repository ids, folders, or paths in the
            processor's own repository that start with `./`; `tagger` may be a list of labels or `None`),
            `tagger_revision` and `detector_revision` (commits of repository ids) and `mode`. In a file that is loaded,
            folders elsewhere are refused. Setting [`~MGLlavaProcessor.box_detector`] sets it; `None`: there is no
            detector that can be described.

    Attributes:
        packs_boxes (`bool`, defaults to `False`): Whether outputs have `image_position_ids` in place of `boxes` and
            `num_boxes`: the boxes and, where there are more rows than boxes, rows of -1. TRL's GRPO and RLOO trainers
            lose inputs whose names they do not know. Not saved.

    Raises:
        ValueError: If the tokenizer does not know `image_token`.
    """

    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "box_labels"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 576,
        num_tokens_per_box: int = 1,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        box_detector_config: dict[str, Any] | None = None,
    ):
        self.image_seq_length = image_seq_length
        self.num_tokens_per_box = num_tokens_per_box
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` must have {self.image_token!r} in its vocabulary, got one of {len(tokenizer)} tokens "
                f"without it. Use tokenizer.add_tokens([{self.image_token!r}], special_tokens=True)."
            )
        self._placeholder = re.compile((_UNMARKED or "") + re.escape(self.image_token))
        self._lock, self._tokenizer_lock = ProcessLock(), ProcessLock()
        self._repository: ProcessorRepository | None = None
        self.packs_boxes = False
        self.box_detector_config = box_detector_config
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> "MGLlavaProcessor":
        """Load a processor, and note where it came from: the box detector is read from there when it is needed.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or repository id.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept.
            force_download (`bool`, *optional*, defaults to `False`): Whether to download again.
            local_files_only (`bool`, *optional*, defaults to `False`): Whether to download nothing.
            token (`str` or `bool`, *optional*): For private repositories.
            revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit.
            **kwargs: See the base class, `subfolder` for example. `trust_remote_code`, like all of the above, holds
                for the box detector too; `revision` for what lies in the processor's own repository.

        Returns:
            [`MGLlavaProcessor`]: The processor.
        """
        access: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        processor = super().from_pretrained(
            pretrained_model_name_or_path, force_download=force_download, revision=revision, **access, **kwargs
        )
        name, subfolder = os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder") or ""
        if os.path.isdir(name):
            name = os.path.abspath(name)
            if linked := links_out_of(Path(name, subfolder), Path(name)):
                logger.warning(
                    f"In {name!r}, {', '.join(linked)} are links to files outside it. What those files hold is saved "
                    "and uploaded with this processor: make sure that you want that, or replace the links by copies."
                )
        elif os.path.isfile(name):
            name = os.path.abspath(os.path.dirname(name))
        else:
            # The detector is loaded later, when the branch may be somewhere else.
            file = str(PurePosixPath(subfolder) / PROCESSOR_NAME)
            revision = known_commit(name, revision, cache_dir, file) or revision
        processor._repository = ProcessorRepository(
            name,
            revision,
            {**access, "force_download": force_download},
            bool(kwargs.get("trust_remote_code")),
            subfolder,
            None if "box_detector_config" in kwargs else copy.deepcopy(processor.box_detector_config),
        )
        return processor

    @property
    def box_detector_config(self) -> dict[str, Any] | None:
        """What the box detector is loaded from; setting it takes the present detector away."""
        return self._box_detector_config

    @box_detector_config.setter
    def box_detector_config(self, config: dict[str, Any] | None) -> None:
        if config is not None and not isinstance(config, Mapping):
            raise TypeError(f"`box_detector_config` must be a dict or None, got {type(config).__name__}.")
        with self._lock:
            self._box_detector_config, self._seen_config = config, copy.deepcopy(config)
            self._box_detector: BoxDetectorProtocol | None = None
            self._is_box_detector_off = False
            self._loading_options: dict[str, Any] = {}
            if self._repository is not None:
                self._repository = dataclasses.replace(self._repository, written_config=None)

    @property
    def box_detector(self) -> BoxDetectorProtocol | None:
        """What finds boxes where none are given; loaded from `box_detector_config` at the first use, in one thread.

        Any object with the method of [`BoxDetectorProtocol`] may be set. Where a copy or a pickle of the processor
        needs it (in a DataLoader worker, for example), a [`BoxDetector`] made from names is loaded there; any other
        detector is copied and pickled with the processor, and it must support that. A [`BoxDetector`] is saved with
        the processor; for any other detector, a warning says that the saved processor has none.

        Set to `None`, it is switched off until [`~MGLlavaProcessor.load_box_detector`]; the configuration stays, and
        is saved.
        """
        with self._lock:
            detector: Any = self._present_detector()
            if detector is None:
                if self.box_detector_config is not None and not self._is_box_detector_off:
                    self._load_box_detector(**self._loading_options)
            elif self._is_described(detector) and not detector.is_usable_here:
                # What the parent process put on its accelerator cannot be used here; what is loaded here can.
                logger.warning_once(
                    f"The box detector was put on {detector.device} before this process was forked, and a forked "
                    "process cannot use it: it is loaded again, on the CPU."
                )
                self._load_box_detector(**{**self._loading_options, "device": "cpu"})
            return self._box_detector

    @box_detector.setter
    def box_detector(self, detector: BoxDetectorProtocol | None) -> None:
        if detector is not None and not callable(getattr(detector, "detect", None)):
            raise TypeError(
                f"`box_detector` must have a method `detect(images)`, got {type(detector).__name__}. See "
                "`BoxDetectorProtocol`."
            )
        with self._lock:
            if detector is not None:
                is_plain = self._is_plain(detector)
                # Also where it is None: another detector's configuration must not stand for this one.
                self.box_detector_config = detector.config if is_plain else None  # type: ignore[attr-defined]
                # Paths in a repository that this detector was not loaded from must not be looked up there.
                self._repository = None
                if is_plain:
                    self._loading_options = detector.loading_options  # type: ignore[attr-defined]
            self._box_detector, self._is_box_detector_off = detector, detector is None

    def _present_detector(self) -> BoxDetectorProtocol | None:
        """Give the detector that is loaded or set, unless its configuration was changed in place since."""
        if self._box_detector_config != self._seen_config:
            self._box_detector, self._seen_config = None, copy.deepcopy(self._box_detector_config)
        return self._box_detector

    @staticmethod
    def _is_plain(detector: Any) -> bool:
        """Tell whether a detector is a `BoxDetector`, and not of a derived class, which may find other boxes.

        By the name of its class: a processor with remote code has a `BoxDetector` of its own.
        """
        kind = type(detector)
        names = (kind.__module__.rpartition(".")[2], kind.__name__)
        return names == (BoxDetector.__module__.rpartition(".")[2], BoxDetector.__name__)

    def _is_described(self, detector: Any) -> bool:
        """Tell whether a detector can be loaded again from its configuration."""
        return self._is_plain(detector) and detector.is_named

    def load_box_detector(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool | None = None,
    ) -> BoxDetector:
        """Load the box detector that `box_detector_config` describes, in place of the present one.

        Args:
            device (`str` or `torch.device`, *optional*): By default the accelerator if there is one (the CPU in a
                DataLoader worker, and in a process that was forked from one that uses the accelerator).
            dtype (`torch.dtype`, *optional*): Of the tagger and the detector's image tower; by default bf16 on an
                accelerator and fp32 on the CPU.
            trust_remote_code (`bool`, *optional*): Whether code of their repositories may run; by default as this
                processor was loaded.

        Returns:
            [`BoxDetector`]: The detector, also found as [`~MGLlavaProcessor.box_detector`].

        Raises:
            ValueError: If there is no configuration, or it comes from a file and names something outside of its
                repository.
            OSError: If the repositories cannot be read.
        """
        with self._lock:
            if self.box_detector_config is None:
                raise ValueError(
                    "`box_detector_config` must say what to load, got None. Set `processor.box_detector` to a "
                    "BoxDetector."
                )
            options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
            given = {name: value for name, value in options.items() if value is not None}
            return self._load_box_detector(**{**self._loading_options, "device": None, "dtype": None, **given})

    def _load_box_detector(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool | None = None,
        **hub_options: Any,
    ) -> BoxDetector:
        """Load it; the options hold for copies of this processor too, but for the device in a DataLoader's worker."""
        assert self.box_detector_config is not None  # both callers asked
        detector = BoxDetector.from_config(
            self.box_detector_config,
            self._repository,
            device=None if in_worker() else device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **hub_options,
        )
        self._loading_options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        self._loading_options.update(hub_options)
        self._box_detector, self._is_box_detector_off = detector, False
        return detector

    def locate_box_detector(self) -> dict[str, Any] | None:
        """Tell what the box detector is built from, with the places of what lies in the processor's own repository.

        Returns:
            `dict`, *optional*: `box_detector_config` with folders and files in place of paths that start with `./`.

        Raises:
            ValueError: If such a path is in no repository, or leads out of it.
            OSError: If the repository cannot be read.
        """
        if self.box_detector_config is None:
            return None
        for part in PARTS:
            locate_revision(f"{part}_revision", self.box_detector_config.get(f"{part}_revision"))
        return {
            name: locate(name, value, self._repository)
            if isinstance(value, str) and name in (*PARTS, "prompt_embeds")
            else value
            for name, value in self.box_detector_config.items()
        }

    def detect(self, images: Any, *, input_data_format: str | None = None, **kwargs: Any) -> list[Mapping[str, Any]]:
        """Find the boxes of images, to look at them or to pass them as `boxes` later.

        Args:
            images: An image or a (nested) list of images, in any form that the processor takes.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, of arrays and tensors; by
                default found out.
            **kwargs: Options of the detector: `labels`, `threshold`, `batch_size`, see [`BoxDetector.detect`].

        Returns:
            `list[Mapping]`: Per image, also where there is only one, `boxes` `(num_boxes, 4)` (xyxy, pixels of the
            upright original image), `labels` and `scores`.

        Raises:
            ValueError: If the processor has no box detector, an image cannot be read, or what the detector returns is
                not one result per image with as many labels and scores as boxes.
            TypeError: If something is not an image, or the detector returns something other than mappings.
        """
        detector = self.box_detector
        if detector is None:
            raise ValueError(
                "`box_detector` must be set to find boxes, got None. Set `processor.box_detector` to a BoxDetector, "
                "or call `processor.load_box_detector()` if it was switched off."
            )
        loaded = flat_images(self.image_processor.fetch_images(images))
        return _find_boxes(detector, loaded, input_data_format, kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save the processor; a box detector's models that are not repository ids go to `box_detector/` next to it.

        Folders are copied unchanged; links that lead out of them are refused. Repository ids are saved with their
        commit if the local cache knows it. Text embeddings that were computed are stored too. A detector other than a
        [`BoxDetector`] cannot be saved, which a warning says.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload it.
            **kwargs: See the base class.

        Returns:
            `list[str]`: As the base class.

        Raises:
            ValueError: If the configuration that was loaded names something outside of its repository.
            FileNotFoundError: If a folder of the box detector is gone.
            RuntimeError: If this transformers uploads files in a way that this class does not know.
        """
        if push_to_hub:
            _check_upload_hook()
        with self._lock:
            detector, config = self._present_detector(), self.box_detector_config
            if self._is_plain(detector):
                config = detector.save_pretrained(save_directory)  # type: ignore[union-attr]
            elif detector is not None:
                logger.warning(
                    f"`box_detector` is of type {type(detector).__name__}, which cannot be saved with the processor: "
                    "the saved processor has no detector. Set `processor.box_detector` again after loading it."
                )
            elif config is not None:
                config = store_parts(config, save_directory, self._repository, {})
        saved = self._plain_copy(config)
        files = super(MGLlavaProcessor, saved).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if (auto_map := getattr(saved, "auto_map", None)) is not None:
            self.auto_map = auto_map
        return files

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the processor, box detector included, see [`ProcessorMixin.push_to_hub`].

        Args:
            *args: See the base class.
            **kwargs: See the base class.

        Returns:
            As the base class.

        Raises:
            RuntimeError: If this release of transformers uploads in another way than this class knows.
        """
        _check_upload_hook()
        return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(  # type: ignore[override]
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """Upload the box detector's folders, which the base class cannot: it knows one level of folders only."""
        bundle = Path(working_dir) / BUNDLE_FOLDER
        files_timestamps = {**files_timestamps, BUNDLE_FOLDER: float("inf")}
        uploaded = super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)
        if bundle.is_dir():
            options = {name: kwargs[name] for name in ("token", "revision") if kwargs.get(name)}
            if kwargs.get("create_pr"):  # the same one
                options["revision"] = uploaded.pr_revision
            HfApi().upload_folder(repo_id=repo_id, folder_path=bundle, path_in_repo=BUNDLE_FOLDER, **options)
        return uploaded

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: the base class would copy the detector's weights before leaving them out."""
        return super(MGLlavaProcessor, self._plain_copy(self.box_detector_config)).to_dict()

    def _plain_copy(self, config: dict[str, Any] | None) -> "MGLlavaProcessor":
        """Make what the base class saves: the parts of this processor, and a configuration of the detector."""
        plain = object.__new__(type(self))
        left_out = ("_box_detector", "_lock", "_tokenizer_lock", "_repository", "_loading_options")
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in left_out})
        # The base class looks for values in `__dict__`, and the property in `_box_detector_config`.
        plain.__dict__.update(box_detector_config=config, _box_detector_config=config, _box_detector=None)
        return plain

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a detector that its configuration describes: where a copy needs it, it is loaded there."""
        with self._lock:
            detector = self._present_detector()
            return {**self.__dict__, "_box_detector": None if self._is_described(detector) else detector}

    def __deepcopy__(self, memo: dict[int, Any]) -> "MGLlavaProcessor":
        """Copy everything, and a detector that cannot be loaded again with it."""
        state = self.__getstate__()
        detector = state.pop("_box_detector")
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(state, memo))
        try:
            copied._box_detector = copy.deepcopy(detector, memo)
        except Exception as error:
            raise TypeError(
                f"`box_detector` of type {type(detector).__name__} cannot be copied with the processor: {error}. Set "
                "`processor.box_detector` to None before, and to the detector after; or give the detector's class a "
                "`__deepcopy__`."
            ) from error
        return copied

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make the model's inputs.

        A string that the chat template rendered, by [`~MGLlavaProcessor.apply_chat_template`] or elsewhere, gives the
        ids that [`~MGLlavaProcessor.apply_chat_template`] gives with `tokenize=True`; so does each part of it, such as
        an answer alone. A hand-written one is taken apart in the same way: what follows the words that open an answer
        is encoded alone.

        Args:
            images: An image, a list of images in the order of their placeholders, or one list of images per text; in
                any form that the image processor takes.
            text (`str` or `list[str]`): One prompt or several, with one `<image>` per image. A leading BOS is taken
                once, whether it stands in the text or not; with `add_special_tokens=False` it must stand there.
            videos: Not supported; `None` or empty.
            audio: Not supported; `None` or empty.
            return_assistant_tokens_mask (`bool`): Whether to return `assistant_masks`, 1 for each token of an answer;
                needs a chat template of this package, or one that writes boundaries as they do.
            **kwargs: `boxes` (one entry per image, xyxy in pixels of the original image) and the other options of the
                image processor ([`MGLlavaImageProcessorKwargs`]); options of the tokenizer such as `padding`,
                `padding_side`, `truncation`, `max_length`, `return_offsets_mapping`; `return_tensors`,
                `return_mm_token_type_ids`, `return_text_replacement_offsets`; or `text_kwargs`, `images_kwargs`.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, length)` where text is given;
            `pixel_values` `(num_images, 3, height, width)`, `boxes` `(num_images, max_boxes, 4)` (int64, xyxy in
            pixels of `pixel_values`) and `num_boxes` `(num_images,)` where images are given.

        Raises:
            ValueError: If the numbers of placeholders, images and boxes differ, `text` is not text, truncation would
                cut an image, or answers cannot be told from the rest.
            NotImplementedError: If this transformers cannot sanitize, where `sanitize_control_tokens` is set.
        """
        if kwargs.get("sanitize_control_tokens") or (kwargs.get("text_kwargs") or {}).get("sanitize_control_tokens"):
            _check_sanitizing()
        text = _as_texts(images, text)
        if kwargs.get("boxes") is not None:
            kwargs["boxes"] = as_lists(kwargs["boxes"])  # generators are read once
        images, text, _, _ = self.prepare_inputs_layout(images=images, text=text, **kwargs)
        text, kwargs = self._take_boxes_of_text(text, kwargs)
        self.validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]  # transformers means the class
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        # 5.16 has these among the text options, newer releases beside them.
        mm_token_type_ids, replacement_offsets = (
            text_kwargs.pop(name, None) or merged.get(name, False)
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )

        features: dict[str, Any] = {}
        runs: list[str] = []
        targets = TrainingTargets(self)
        if flat_images(images):
            processed, runs = self._process_images(
                images, targets=targets, **{**images_kwargs, "return_tensors": None}
            )
            features.update(processed)
        encoded: dict[str, Any] = {}
        if text is not None:
            lengths = iter([(run, run.count(self.image_token)) for run in runs])
            chats = chat_formats(self.chat_template, self.tokenizer.special_tokens_map)
            knows_answers = bool(chats) or all(map(PRIVATE_CHARACTERS.search, text))
            if return_assistant_tokens_mask and not knows_answers:
                raise ValueError(
                    "`return_assistant_tokens_mask` needs a chat template that marks the answers for this processor. "
                    "Use one of mgllava.processing.CHAT_TEMPLATES, or leave it out."
                )
            chunks = [
                split_text(sample, self._placeholder, lengths, self.tokenizer.bos_token, chats) for sample in text
            ]
            with self._tokenizer_lock:  # fast tokenizers keep options of a call in an object that all threads share
                encoded = encode_chunks(
                    self.tokenizer,
                    chunks,
                    image_token_id=self.image_token_id,
                    return_assistant_tokens_mask=True,
                    **text_kwargs,
                )
            targets.read(encoded, knows_answers)
            if not return_assistant_tokens_mask:
                del encoded["assistant_masks"]
            if replacement_offsets:
                plain = [PRIVATE_CHARACTERS.sub("", sample) for sample in text]
                encoded["text_replacement_offsets"] = self.get_text_with_replacements(plain, runs)[1]
            if mm_token_type_ids:
                encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])

        return_tensors = (text_kwargs if text is not None else images_kwargs).get("return_tensors")
        if self.packs_boxes and features:
            counts = zip(features.pop("boxes"), features.pop("num_boxes"), strict=True)
            features["image_position_ids"] = [
                np.where(np.arange(len(rows))[:, None] < count, rows, -1) for rows, count in counts
            ]
        output = MGLlavaInputs({**encoded, **features}, return_tensors, self.skip_tensor_conversion)
        output.targets = targets
        return output

    def _take_boxes_of_text(self, text: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the boxes out of rendered conversations, and put them among the arguments."""
        if text is None or not any(isinstance(sample, str) and BOX_MARKS.search(sample) for sample in text):
            return text, kwargs
        taken = [take_boxes_from_text(sample, self._placeholder) for sample in text]
        texts, entries = [sample for sample, _ in taken], [entry for _, of_text in taken for entry in of_text]
        given = [options.get("boxes") for options in (kwargs, kwargs.get("images_kwargs") or {})]
        if all(boxes is None for boxes in given):
            return texts, {**kwargs, "boxes": entries}
        if any(boxes is not None and plain_boxes(flatten_boxes(boxes, len(entries))) != entries for boxes in given):
            raise ValueError(
                "`boxes` must be those of the image blocks that `text` was rendered from, or not given, got others. "
                "Leave them out of the blocks, or do not pass `boxes`."
            )
        return texts, kwargs

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check what was given against each other, before anything is computed.

        Args:
            images: Loaded images, flat or one list per text.
            text: List of texts.
            videos: Must be `None` or empty.
            audio: Must be `None` or empty.
            **kwargs: The other arguments of the call.

        Raises:
            ValueError: If nothing is given, or the numbers of placeholders and images differ.
        """
        if not (_is_empty(videos) and _is_empty(audio)):
            raise ValueError("`videos` and `audio` must be None or empty: MG-LLaVA takes images and text.")
        if images is None and text is None:
            raise ValueError("`images` or `text` must be given, got neither.")
        given = flat_images(images)
        if kwargs.get("boxes") is not None and not given:
            raise ValueError("`boxes` must come with images, got boxes without an image. Pass `images` too.")
        if text is None:
            return
        expected = [len(self._placeholder.findall(sample)) for sample in text]
        if sum(expected) != len(given):
            raise ValueError(
                f"`text` must have one {self.image_token!r} per image, got {sum(expected)} placeholders and "
                f"{len(given)} images."
            )
        is_nested = isinstance(images, list | tuple) and all(isinstance(group, list | tuple) for group in images)
        if images is not None and is_nested and len(images) == len(text):
            for index, (placeholders, group) in enumerate(zip(expected, images, strict=True)):
                if placeholders != len(group):
                    raise ValueError(
                        f"`text[{index}]` must have one {self.image_token!r} per image of `images[{index}]`, got "
                        f"{placeholders} placeholders and {len(group)} images."
                    )

    def _process_images(
        self, images: Any, targets: "TrainingTargets | None" = None, **kwargs: Any
    ) -> tuple[BatchFeature, list[str]]:
        """Find the boxes that are not given, then process the images and make their runs of placeholders."""
        groups, images = group_sizes(images), flat_images(images)
        boxes = kwargs.pop("boxes", None)
        entries = flatten_boxes(boxes, len(images), groups)
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if missing and (detector := self.box_detector) is not None:
            found = _find_boxes(detector, [images[index] for index in missing], kwargs.get("input_data_format"))
            for index, entry in zip(missing, found, strict=True):
                entries[index] = entry
            if targets is not None:
                targets.detected = missing
        elif missing:
            if targets is not None:
                targets.without_boxes = missing
            logger.warning_once(
                "`boxes` is not given and the processor has no `box_detector`: the model gets the single box "
                "[0, 0, 0, 0] per image, as in training for images without objects. Pass `boxes` for better answers, "
                "or [] for an image without objects."
            )
        return super()._process_images(images, boxes=entries, **kwargs)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Make the run of placeholders of one image.

        Args:
            image_inputs (`Mapping`): Output of the image processor.
            image_idx (`int`): Which image.
            **kwargs: Not used.

        Returns:
            `str`: One placeholder per fused token and box token.
        """
        num_boxes = int(image_inputs["num_boxes"][image_idx])
        return self.image_token * (self.image_seq_length + self.num_tokens_per_box * num_boxes)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Count the placeholders that images of these sizes may take, for serving engines to plan with.

        Args:
            image_sizes (`list`, *optional*): `(height, width)` per image.
            **kwargs: Not used.

        Returns:
            [`MultiModalData`]: The count with as many boxes as `box_limit`, which the boxes alone decide.
        """
        if image_sizes is None:
            return MultiModalData()
        most = self.image_seq_length + self.num_tokens_per_box * (self.image_processor.box_limit or 1)
        return MultiModalData(num_image_tokens=[most] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    def apply_chat_template(  # type: ignore[override]  # the options by name
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations and, with `tokenize=True`, make the model's inputs from them.

        Beyond the base class, image blocks may carry `boxes`, as in
        `{"type": "image", "url": ..., "boxes": [[10, 20, 110, 70]]}`. In a rendered string they stand after the
        placeholder, between two private-use characters, where the processor finds them again. And with the templates
        of this package every piece of the conversation is encoded alone, as in training; the mask of the assistant's
        tokens marks exactly the ones that the original trains on. A string that is passed to the processor later gives
        the same ids. Where a message holds what the template writes between messages, the string has an invisible
        character within it, which the processor takes out again, and a warning says so.

        Args:
            conversation: A list of messages, or a list of such lists.
            chat_template (`str`, *optional*): A template or the name of one; by default the processor's.
            tokenize (`bool`): Whether to return ids instead of a string.
            return_assistant_tokens_mask (`bool`): Whether to return `assistant_masks` too (with `return_dict=True`).
            sanitize_control_tokens (`bool`): Whether user text cannot write control tokens and placeholders; needs a
                newer transformers.
            processor_kwargs (`dict`, *optional*): Arguments of [`~MGLlavaProcessor.__call__`].
            **kwargs: The other arguments of the base class, and variables of the template.

        Returns:
            `str`, ids, or with `return_dict=True` a [`BatchFeature`].

        Raises:
            ValueError: If `boxes` are given both in the conversation and in `processor_kwargs`, or a string is
                rendered with boxes in image blocks and with images that have no block, `chat_template` is neither a
                template nor a name, a mask is asked for without `return_dict=True`, or a conversation is empty.
            NotImplementedError: If this transformers cannot sanitize.
            TypeError: If a message or a block has the wrong type.
        """
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = named.get(chat_template or "default", chat_template) or ""
        if chat_template is not None and template == chat_template and "{" not in template:
            raise ValueError(
                f"`chat_template` must be a Jinja template, or the name of one of the processor's "
                f"({', '.join(sorted(named))}), got {chat_template!r}."
            )
        if return_assistant_tokens_mask and tokenize and not kwargs.get("return_dict"):
            raise ValueError("`return_assistant_tokens_mask` needs `return_dict=True`, which returns the mask.")
        if isinstance(conversation, list | tuple) and not all([conversation, *conversation]):
            raise ValueError("`conversation` must have at least one message, got an empty list.")
        processor_kwargs = dict(processor_kwargs or {})
        boxes: list[Any] = []
        with_boxes = conversation
        conversation = _take_boxes(conversation, boxes)
        if has_boxes := any(entry is not None for entry in boxes):
            if processor_kwargs.get("boxes") is not None:
                raise ValueError("`boxes` must be in the conversation or in `processor_kwargs`, got both.")
            if tokenize:
                processor_kwargs["boxes"] = boxes
        if sanitize_control_tokens:
            _check_sanitizing()
            kwargs["sanitize_control_tokens"] = True

        # A caller that passes the boundaries itself gets them.
        has_boundaries = writes_boundaries(template) and not kwargs.keys() & BOUNDARY_NAMES.keys()
        if has_boundaries:
            kwargs.update(BOUNDARY_NAMES)
        if has_boundaries and tokenize:
            if sanitize_control_tokens:
                kwargs["literal_image_token"] = False
            # The boundaries tell the answers exactly; the base class would compare character offsets.
            processor_kwargs["return_assistant_tokens_mask"] = return_assistant_tokens_mask
            return_assistant_tokens_mask = False
        output = super().apply_chat_template(
            conversation,
            chat_template,
            tokenize=tokenize,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )
        if tokenize:
            return output
        texts: list[str] = [output] if isinstance(output, str) else output
        if has_boundaries:
            bos_token, special_tokens = self.tokenizer.bos_token, self.tokenizer.special_tokens_map
            chats, chat = chat_formats(self.chat_template, special_tokens), read_format(template, special_tokens)
            texts = [protect_text(text, bos_token, chat, chats) for text in texts]
        if has_boxes:
            # Who renders a string passes it and the images on, often by other people's code, which knows no boxes.
            entries: list[list[Any]] = [[] for _ in texts]
            for of_text, messages in zip(
                entries, [with_boxes] if isinstance(output, str) else with_boxes, strict=True
            ):
                _take_boxes(messages, of_text)
            texts = [
                write_boxes_into_text(text, self._placeholder, of_text)
                for text, of_text in zip(texts, entries, strict=True)
            ]
        return texts[0] if isinstance(output, str) else texts

    def answer_ending(self) -> tuple[list[int], list[int]]:
        """Tell how the chat template ends an answer.

        Returns:
            `tuple[list[int], list[int]]`: The learned ids that end every answer (EOS, or a suffix), and the ids of the
            separator that follows them; both empty where the chat template does not mark answers.
        """
        if "generation" not in str(self.chat_template or ""):
            return [], []
        question = {"role": "user", "content": [{"type": "text", "text": "1"}]}
        answers = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("2", "a b")]
        encoded = self.apply_chat_template(
            [[question, answer] for answer in answers],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False},
        )
        learned, separators = [], []
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            last = max((index for index, is_learned in enumerate(mask) if is_learned), default=len(ids) - 1)
            learned.append([token for token, is_learned in zip(ids, mask, strict=True) if is_learned])
            separators.append(list(ids[last + 1 :]))
        shared = 0
        while shared < min(map(len, learned)) and learned[0][-1 - shared] == learned[1][-1 - shared]:
            shared += 1
        return learned[0][len(learned[0]) - shared :], separators[0]


class MGLlavaInputs(BatchFeature):
    """A [`BatchFeature`] in which a collator may set labels; see [`TrainingTargets`].

    Attributes:
        targets ([`TrainingTargets`], *optional*): Checks what is set. Lost where the object is copied or pickled.
    """

    targets: "TrainingTargets | None" = None

    def __setitem__(self, key: str, item: Any) -> None:
        if self.targets is not None:
            item = self.targets.check(key, item, self.data)
        super().__setitem__(key, item)


class TrainingTargets:
    """Checks what a collator that knows nothing of MG-LLaVA makes of the processor's output.

    TRL's collators render, tokenize and pad, and then set `labels` or `completion_mask` in the output; its trainers
    take the loss from these alone. Here they are made right: images need boxes, placeholders and separators are never
    learned, and labels that are a mere copy of the ids become those of the answers.

    Args:
        processor ([`MGLlavaProcessor`]): Whose output it is.
    """

    # What is checked, and the ids and mask that it belongs to.
    _IDS = {
        "labels": ("input_ids", "attention_mask", -100),
        "completion_mask": ("input_ids", "attention_mask", 0),
        "KL_completion_mask": ("KL_input_ids", "KL_attention_mask", 0),
    }

    def __init__(self, processor: MGLlavaProcessor):
        self.processor = processor
        # Indices of images whose boxes are not known, and of those whose boxes the detector found.
        self.without_boxes: list[int] = []
        self.detected: list[int] = []
        # The ids of each text without padding and, where they are known, which of them answers are.
        self.rows: list[list[int]] = []
        self.answers: list[list[bool]] | None = None

    def read(self, encoded: Mapping[str, Any], knows_answers: bool) -> None:
        """Note ids and answers of encoded texts."""
        masks = encoded.get("attention_mask") or [[1] * len(ids) for ids in encoded["input_ids"]]

        def without_padding(rows: Any) -> list[list[Any]]:
            return [
                [value for value, kept in zip(row, mask, strict=True) if kept]
                for row, mask in zip(rows, masks, strict=True)
            ]

        self.rows = without_padding(encoded["input_ids"])
        self.answers = without_padding(encoded["assistant_masks"]) if knows_answers else None

    def check(self, name: str, value: Any, features: Mapping[str, Any]) -> Any:
        """Check a value before it is stored.

        Args:
            name (`str`): The key.
            value: What is to be stored.
            features (`Mapping`): What is stored already.

        Returns:
            What to store instead.

        Raises:
            ValueError: If an image has no boxes, or a completion has several turns.
        """
        if name not in self._IDS:
            return value
        if self.without_boxes:
            raise ValueError(
                f"`boxes` must be given for training, got none for the image(s) {self.without_boxes} of the batch. "
                'Put them into the image blocks of the conversation, `{"type": "image", "boxes": [[x1, y1, x2, y2]]}` '
                "([] for an image without objects): a column `boxes` is not read by TRL's collators. Or use "
                "mgllava.training.MGLlavaDataCollator, or set `processor.box_detector`."
            )
        if self.detected:
            logger.warning_once(
                "The boxes of this training batch are those that the processor's detector finds now. To train on "
                "yours, put them into the image blocks of the conversation; a column `boxes` is not read by TRL's "
                "collators."
            )
        ids_name, mask_name, nothing = self._IDS[name]
        ids, mask = features.get(ids_name), features.get(mask_name)
        if not isinstance(value, torch.Tensor) or not isinstance(ids, torch.Tensor) or value.shape != ids.shape:
            return value
        is_text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        is_learned = (value != nothing) & is_text
        is_placeholder = ids == self.processor.image_token_id
        # Who chose what is learned left out the images at least.
        is_copy = bool((is_learned & is_placeholder).any()) or bool(is_learned[is_text].all())
        ending = self.processor.answer_ending()
        allowed = ~is_placeholder
        for index, row in enumerate(ids):
            places = is_text[index].nonzero().flatten()
            may_learn = self._may_learn(index, row[places].tolist(), is_copy, ending)
            allowed[index, places] &= torch.tensor(may_learn, dtype=torch.bool, device=ids.device)
        if is_copy and bool((is_learned & ~allowed & ~is_placeholder).any()):
            logger.warning_once(
                "The labels of a conversation were a copy of its ids: now only its answers are learned, as MG-LLaVA "
                "is trained. With TRL, pass `assistant_only_loss=True`, which says the same."
            )
        return value.masked_fill(~allowed, nothing)

    def _may_learn(self, index: int, ids: list[int], is_copy: bool, ending: tuple[list[int], list[int]]) -> list[bool]:
        """Tell which ids of a row may be learned: of the text that was encoded, and of a completion after it."""
        known = self.rows[index] if index < len(self.rows) else []
        if ids[: len(known)] != known[: len(ids)]:
            return [True] * len(ids)
        answers = self.answers[index] if self.answers is not None else []
        completion = ids[len(known) :]
        # A text without an answer, in itself or after it, is learned as the collator says.
        front = answers if is_copy and (any(answers) or (answers and completion)) else [True] * len(known)
        return [*front[: len(ids)], *self._of_completion(completion, *ending)]

    @staticmethod
    def _of_completion(ids: list[int], ending: list[int], separator: list[int]) -> list[bool]:
        """Tell which ids of a completion may be learned: not the separator after the answer."""
        width = len(ending)
        ends = [end for end in range(width, len(ids) + 1) if ending and ids[end - width : end] == ending]
        if len(ends) > 1:
            raise ValueError(
                f"`completion` must hold one answer, got {len(ends)}: a completion is learned whole, with the "
                "questions between its answers. Put earlier turns into the prompt, or use `messages` with "
                "`assistant_only_loss=True`."
            )
        is_separator = bool(ends) and bool(separator) and ids[ends[0] :] == separator[: len(ids) - ends[0]]
        kept = ends[0] if is_separator else len(ids)
        return [True] * kept + [False] * (len(ids) - kept)


def _check_sanitizing() -> None:
    """Refuse to sanitize where what marks user text is not known: its placeholders would stand for images."""
    if not _CAN_SANITIZE:
        raise NotImplementedError("`sanitize_control_tokens` needs a newer transformers. Upgrade it.")
    if _UNMARKED is None:
        raise NotImplementedError(
            "`sanitize_control_tokens` is not supported with this release of transformers: its mark of user text is "
            "not known. Upgrade mgllava, or leave it out and break control tokens in user text yourself."
        )


def _as_texts(images: Any, text: Any) -> list[str] | None:
    """Make a list of strings, or say what was given instead."""
    if text is None or isinstance(text, str):
        return text if text is None else [text]
    is_list = isinstance(text, Iterable) and not isinstance(text, bytes | Mapping)
    texts = list(text) if is_list else [text]
    if is_list and all(isinstance(sample, str) for sample in texts):
        return texts
    kinds = sorted({type(sample).__name__ for sample in texts})
    given = f"a {type(text).__name__} of {', '.join(kinds)}" if is_list else kinds[0]
    first = images[0] if isinstance(images, list | tuple) and images else images
    advice = ""
    if isinstance(first, str):
        advice = " `images` and `text` seem to be swapped: the order is `processor(images, text)`."
    elif "dict" in kinds:
        advice = " Use `apply_chat_template` for conversations."
    raise ValueError(f"`text` must be a string or a list of strings, got {given}.{advice}")


def _is_empty(value: Any) -> bool:
    """Tell whether nothing is given: `None`, or a list of nothing."""
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return value is None or (hasattr(value, "shape") and 0 in value.shape)


def _find_boxes(
    detector: Any, images: list[Any], input_data_format: str | None, options: Mapping[str, Any] | None = None
) -> list[Mapping[str, Any]]:
    """Let a detector find the boxes of upright images, and check what it returns."""
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
        if isinstance(result["labels"], str):
            raise TypeError(f"{name} must return a list of labels, got {result['labels']!r} for image {index}.")
        try:
            read_boxes(result)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{name} returned, for image {index}, what cannot be used as `boxes`: {error}"
            ) from error
    return list(found)


def _as_picture(image: Any, input_data_format: str | None) -> PIL.Image.Image:
    """Bring an upright image into the one form that every detector can read."""
    if isinstance(image, PIL.Image.Image) and image.mode == "RGB":
        return image
    return PIL.Image.fromarray(as_rgb(image, input_data_format).permute(1, 2, 0).contiguous().cpu().numpy())


def _check_upload_hook() -> None:
    """Refuse to upload where transformers would not call what uploads the box detector."""
    if not hasattr(ProcessorMixin, _UPLOAD_HOOK):
        raise RuntimeError(
            f"This release of transformers has no `ProcessorMixin.{_UPLOAD_HOOK}`, so the box detector would not be "
            "uploaded. Call `save_pretrained` and upload the folder with `huggingface_hub.upload_folder`, or install "
            "another release."
        )


def _take_boxes(value: Any, boxes: list[Any]) -> Any:
    """Copy a conversation without the `boxes` of its images, which go to the list, and without private characters."""
    if isinstance(value, str):
        return BOX_MARKS.sub("", PRIVATE_CHARACTERS.sub("", value))
    if isinstance(value, Mapping):
        if value.get("type") in ("image", "image_url"):
            boxes.append(boxes_of_block(value.get("boxes")))
            value = image_block({key: item for key, item in value.items() if key != "boxes"})
        elif value.get("boxes") is not None and ("role" in value or "type" in value):
            where = f"a message of role {value['role']!r}" if "role" in value else f"a block of type {value['type']!r}"
            raise ValueError(f"`boxes` must be in image blocks, got them in {where}. Move them to the image's block.")
        return {key: _take_boxes(item, boxes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_boxes(item, boxes) for item in value]
    return value


__all__ = ["BoxDetectorProtocol", "MGLlavaProcessor"]
