"""The processor of MG-LLaVA (arXiv 2406.17770): turns images, boxes and text into model inputs, and ids into text."""

import copy
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import AutoImageProcessor, AutoTokenizer, AutoVideoProcessor, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import PROCESSOR_NAME, logging

from .box_detection_mgllava import BoxDetector, BoxDetectorProtocol, find_boxes, in_worker
from .box_detector_files_mgllava import (
    BUNDLE_FOLDER,
    PARTS,
    ProcessorRepository,
    check_revision,
    known_commit,
    links_out_of,
    locate,
    store_parts,
)
from .boxes_mgllava import (
    BOX_MARKS,
    as_lists,
    boxes_of_block,
    boxes_of_video_block,
    flatten_boxes,
    flatten_video_boxes,
    plain_boxes,
    take_boxes_from_text,
    write_boxes_into_text,
)
from .image_text_processor_common import (
    ImageTextProcessor,
    ProcessLock,
    TrainingTargets,
    as_tensor,
    as_texts,
    is_empty,
)
from .images_common import flat_images, group_sizes, is_image_block, make_findable
from .text_chunks_common import IMAGE_TOKEN, PRIVATE_CHARACTERS, VIDEO_TOKEN, build_chat_template
from .video_processing_mgllava import MGLlavaVideoProcessor
from .video_reading_mgllava import Clip, count_per_prompt, flat_videos, is_video_block, video_block

logger = logging.get_logger(__name__)

# The method of transformers that uploads files. It is private, so uploading checks first that it exists.
_UPLOAD_HOOK = "_upload_modified_files"

_READING_OPTIONS = ("num_frames", "fps", "do_sample_frames", "video_metadata")
_NO_VIDEOS = (
    "This model takes no videos yet: its tokenizer has no {token!r}. Call `mgllava.add_videos(model, processor)` and "
    "save both again; no weights change. Models that this release converts can take videos. See docs/video.md."
)

# The chat templates of the language models that MG-LLaVA was trained with (arXiv 2406.17770, section 4.1).
CHAT_TEMPLATES: dict[str, str] = {
    # Vicuna-1.5
    "vicuna": build_chat_template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. ",
            "\n ",
        ),
        user=("USER: ", ""),
        generation_prompt=" ASSISTANT:",
        separator="\n",
        closed_by_eos=True,
        has_videos=True,
    ),
    # Llama-3-Instruct
    "llama3": build_chat_template(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        suffix="<|eot_id|>",
        has_videos=True,
    ),
    # Phi-3-mini
    "phi3": build_chat_template(
        system=("<|system|>", "<|end|>\n"),
        user=("<|user|>", "<|end|>\n"),
        generation_prompt="<|assistant|>\n",
        suffix="<|end|>",
        separator="\n",
        has_videos=True,
    ),
    # Yi-1.5-Chat (ChatML; the original calls it `qwen_chat`)
    "yi": build_chat_template(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        generation_prompt="<|im_start|>assistant\n",
        suffix="<|im_end|>",
        separator="\n",
        has_videos=True,
    ),
}


class MGLlavaProcessor(ImageTextProcessor):
    r"""Prepares images, videos, boxes and text for MG-LLaVA.

    Each `<image>` in the text becomes `image_seq_length + num_tokens_per_box * num_boxes` placeholders in one run,
    each `<video>` the sum of these numbers over its frames. Text is encoded in chunks around them and between the
    pieces of a conversation, as in training (see `text_chunks_common.py`).

    Example:
        ```python
        boxes = [[[10, 20, 110, 70]]]  # one image, one box
        inputs = processor(image, "USER: <image>\nWhat is it? ASSISTANT:", boxes=boxes, return_tensors="pt")
        inputs["input_ids"].shape  # (1, 577 + text): 576 fused tokens and one box token
        ```

    Args:
        image_processor ([`MGLlavaImageProcessor`]): Makes `pixel_values`, `boxes` and `num_boxes`.
        tokenizer ([`PreTrainedTokenizerBase`]): Has `image_token` in its vocabulary, and `video_token` if the model
            takes videos.
        video_processor ([`MGLlavaVideoProcessor`], *optional*): Makes the inputs of videos. By default one with the
            sizes and options of the image processor.
        image_seq_length (`int`, *optional*, defaults to 576): Fused tokens per image, from the model's config.
        num_tokens_per_box (`int`, *optional*, defaults to 1): 0 for model variants without box tokens.
        chat_template (`str`, *optional*): Jinja template; see `text_chunks_common.py`.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, if the tokenizer does not name one.
        box_detector_config (`dict`, *optional*): Plain values from which a [`BoxDetector`] is loaded when boxes are
            first needed, saved with the processor: `tagger` and `detector` (repository ids, folders, or paths in the
            processor's own repository that start with `./`; `tagger` may be a list of labels or `None`),
            `tagger_revision` and `detector_revision` (commits of repository ids) and `mode`. A saved file must not
            name folders outside its repository. Setting [`~MGLlavaProcessor.box_detector`] sets the configuration
            too; it is `None` if there is no detector, or if plain values cannot describe it.
        video_token (`str`, *optional*, defaults to `"<video>"`): The placeholder of videos, if the tokenizer does not
            name one. It is `None` after loading if the tokenizer does not have it; then videos are refused.

    Attributes:
        packs_boxes (`bool`, defaults to `False`): Whether outputs have `image_position_ids` (the boxes, padded with
            rows of -1) instead of `boxes` and `num_boxes`: TRL's GRPO and RLOO trainers drop inputs whose names they
            do not know. Not saved.

    Raises:
        ValueError: If the tokenizer does not know `image_token`.
    """

    image_inputs = ("pixel_values", "boxes", "num_boxes")
    video_inputs = (
        "pixel_values_videos",
        "low_res_pixel_values_videos",
        "video_boxes",
        "num_video_boxes",
        "num_video_frames",
    )
    chat_templates = CHAT_TEMPLATES
    private_characters = re.compile(f"{PRIVATE_CHARACTERS.pattern}|{BOX_MARKS.pattern}")
    skip_tensor_conversion = [
        *ProcessorMixin.skip_tensor_conversion,
        "box_labels",
        "video_box_labels",
        "video_metadata",
    ]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        image_seq_length: int = 576,
        num_tokens_per_box: int = 1,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
        box_detector_config: dict[str, Any] | None = None,
        video_token: str | None = VIDEO_TOKEN,
    ):
        self.image_seq_length = image_seq_length
        self.num_tokens_per_box = num_tokens_per_box
        self._lock = ProcessLock()
        self._repository: ProcessorRepository | None = None
        self.packs_boxes = False
        self.box_detector_config = box_detector_config
        if video_processor is None:
            video_processor = MGLlavaVideoProcessor.like(image_processor)
        super().__init__(image_processor, tokenizer, chat_template, image_token, video_processor=video_processor)
        self.find_video_token(video_token)

    def find_video_token(self, video_token: str | None = None) -> None:
        """Set `video_token` and `video_token_id`, if the tokenizer has the placeholder.

        Args:
            video_token (`str`, *optional*): The placeholder; by default the tokenizer's, or `"<video>"`.
        """
        token = getattr(self.tokenizer, "video_token", None) or video_token or VIDEO_TOKEN
        token_id = self.tokenizer.get_vocab().get(token)
        self.video_token, self.video_token_id = (token, token_id) if token_id is not None else (None, None)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Load the parts. Models that were saved before this class read videos have no video processor."""
        parts = [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)]
        parts.append(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs))
        kwargs.pop("backend", None)  # of the image processor: frames are always made by PyTorch
        if "video_processor" in (processor_dict or {}):
            return [*parts, AutoVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)]
        names = MGLlavaVideoProcessor.valid_kwargs.__annotations__
        options = {name: value for name, value in kwargs.items() if name in names and value is not None}
        return [*parts, MGLlavaVideoProcessor.like(parts[0], **options)]

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
        """Load a processor. Its box detector is loaded from the same place when it is first needed.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or repository id.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept.
            force_download (`bool`, *optional*, defaults to `False`): Whether to download cached files again.
            local_files_only (`bool`, *optional*, defaults to `False`): Whether to use cached files only.
            token (`str` or `bool`, *optional*): Access token for private repositories.
            revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit.
            **kwargs: Arguments of the base class, such as `subfolder`. `trust_remote_code` and all arguments above
                apply to the box detector too (`revision` only to files in the processor's own repository).

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
                    f"In {name!r}, {', '.join(linked)} are links to files outside it. Their contents are saved and "
                    "uploaded with this processor: make sure that you want that, or replace the links by copies."
                )
        elif os.path.isfile(name):
            name = os.path.abspath(os.path.dirname(name))
        else:
            # A commit, since the branch may move before the detector is loaded.
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
        """Plain values from which the box detector is loaded; setting them discards the present detector."""
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
        """The object that finds boxes if none are given; loaded from `box_detector_config` at the first use.

        Any object with the method of [`BoxDetectorProtocol`] may be set. Copies and pickles of the processor (in a
        DataLoader worker, for example) load a [`BoxDetector`] that was made from names again when they need it; any
        other detector is copied and pickled with the processor, and must support that. A [`BoxDetector`] is saved
        with the processor; for any other detector, a warning says that the saved processor has none.

        `None` switches the detector off until [`~MGLlavaProcessor.load_box_detector`] is called; the configuration is
        kept and saved.
        """
        with self._lock:
            detector: Any = self._present_detector()
            if detector is None:
                if self.box_detector_config is not None and not self._is_box_detector_off:
                    self._load_box_detector(**self._loading_options)
            elif self._is_described(detector) and not detector.is_usable_here:
                # A forked process can use the CPU, but not its parent's accelerator.
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
                # Also None: a configuration that was kept would describe another detector.
                self.box_detector_config = detector.config if is_plain else None  # type: ignore[attr-defined]
                # This detector was not loaded from the processor's repository, so its paths are not in there.
                self._repository = None
                if is_plain:
                    self._loading_options = detector.loading_options  # type: ignore[attr-defined]
            self._box_detector, self._is_box_detector_off = detector, detector is None

    def _present_detector(self) -> BoxDetectorProtocol | None:
        """Return the detector that is loaded or set, unless its configuration was changed in place since."""
        if self._box_detector_config != self._seen_config:
            self._box_detector, self._seen_config = None, copy.deepcopy(self._box_detector_config)
        return self._box_detector

    @staticmethod
    def _is_plain(detector: Any) -> bool:
        """Tell whether a detector is a `BoxDetector` itself; a derived class may find other boxes.

        Classes are compared by name: with remote code, `BoxDetector` is a different class object.
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
        """Load the box detector that `box_detector_config` describes, and replace the present one.

        Args:
            device (`str` or `torch.device`, *optional*): By default the accelerator if there is one (the CPU in a
                DataLoader worker, and in a process that was forked from one that uses the accelerator).
            dtype (`torch.dtype`, *optional*): Dtype of the tagger and the detector's image tower; by default bfloat16
                on an accelerator and float32 on the CPU.
            trust_remote_code (`bool`, *optional*): Whether custom code of their repositories may run; by default as
                this processor was loaded.

        Returns:
            [`BoxDetector`]: The detector, also found as [`~MGLlavaProcessor.box_detector`].

        Raises:
            ValueError: If there is no configuration, or it was read from a file and names something outside its
                repository.
            OSError: If the repositories cannot be read.
        """
        with self._lock:
            if self.box_detector_config is None:
                raise ValueError(
                    "`box_detector_config` must say what to load, got None. Set `processor.box_detector` to a "
                    "BoxDetector."
                )
            options = {**self._loading_options, "device": device, "dtype": dtype}
            if trust_remote_code is not None:
                options["trust_remote_code"] = trust_remote_code
            return self._load_box_detector(**options)

    def _load_box_detector(self, **options: Any) -> BoxDetector:
        """Load the detector; copies of this processor use the same options, except for the device in a worker."""
        assert self.box_detector_config is not None  # checked by both callers
        here = {**options, "device": None} if in_worker() else options
        detector = BoxDetector.from_config(self.box_detector_config, self._repository, **here)
        self._loading_options = options
        self._box_detector, self._is_box_detector_off = detector, False
        return detector

    def locate_box_detector(self) -> dict[str, Any] | None:
        """Return `box_detector_config` with full paths instead of those that start with `./`.

        Returns:
            `dict`, *optional*: The configuration; `None` if there is none.

        Raises:
            ValueError: If the processor has no repository, or a path leads out of it.
            OSError: If the repository cannot be read.
        """
        if self.box_detector_config is None:
            return None
        for part in PARTS:
            check_revision(f"{part}_revision", self.box_detector_config.get(f"{part}_revision"))
        return {
            name: locate(name, value, self._repository)
            if isinstance(value, str) and name in (*PARTS, "prompt_embeds")
            else value
            for name, value in self.box_detector_config.items()
        }

    def detect(
        self,
        images: Any = None,
        *,
        videos: Any = None,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Find the boxes of images, or of the frames of videos, to look at them or to pass them later.

        Args:
            images: An image or a (nested) list of images, in any form that the processor takes.
            videos: Instead, a video or a (nested) list of videos.
            num_frames (`int`, *optional*): Number of frames that are sampled from each video, as in a call.
            fps (`float`, *optional*): Instead, the number of frames for each second of a video.
            do_sample_frames (`bool`, *optional*): Whether frames are sampled; by default as in a call.
            video_metadata (*optional*): See [`MGLlavaVideoProcessor.read_clips`].
            input_data_format (`str`, *optional*): Channel order of arrays and tensors, `"channels_first"` or
                `"channels_last"`; inferred by default.
            **kwargs: Options of the detector: `labels`, `threshold`, `batch_size`, see [`BoxDetector.detect`].

        Returns:
            `list[Mapping]`: One mapping per image, even for a single image: `boxes` `(num_boxes, 4)` (xyxy, pixels of
            the upright original image), `labels` and `scores`, to pass as `boxes`. For videos, a list of such mappings
            per video, one for each sampled frame, to pass as `video_boxes`.

        Raises:
            ValueError: If the processor has no box detector, both or neither of images and videos are given, one
                cannot be read, or what the detector returns is not one result per image with as many labels and scores
                as boxes.
            TypeError: If something is not an image, or the detector returns something other than mappings.
        """
        detector = self.box_detector
        if detector is None:
            raise ValueError(
                "`box_detector` must be set to find boxes, got None. Set `processor.box_detector` to a BoxDetector, "
                "or call `processor.load_box_detector()` if it was switched off."
            )
        if (images is None) == (videos is None):
            raise ValueError("Pass either `images` or `videos`.")
        sampling = {
            "num_frames": num_frames,
            "fps": fps,
            "do_sample_frames": do_sample_frames,
            "video_metadata": video_metadata,
        }
        if videos is None:
            if given := [name for name, value in sampling.items() if value is not None]:
                raise ValueError(f"`{given[0]}` must be None for images, got {sampling[given[0]]!r}.")
            loaded = flat_images(self.image_processor.fetch_images(images))
            return find_boxes(detector, loaded, input_data_format, kwargs)
        clips = self.video_processor.read_clips(videos, **sampling, input_data_format=input_data_format)
        return [find_boxes_of_frames(detector, clip, range(len(clip.frames)), kwargs) for clip in clips]

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save the processor, and in its subfolder `box_detector` the detector's models that are not on the Hub.

        Folders are copied unchanged; links that lead out of them are refused. Repository ids are saved with their
        commit if the local cache knows it. Text embeddings that were computed are saved too. A detector other than a
        [`BoxDetector`] cannot be saved, and a warning says so.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload it.
            **kwargs: See the base class.

        Returns:
            `list[str]`: As the base class.

        Raises:
            ValueError: If a loaded configuration names something outside its repository.
            FileNotFoundError: If a folder of the box detector no longer exists.
            RuntimeError: If this release of transformers has no hook by which the box detector is uploaded.
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
        """Upload the processor with its box detector, see [`ProcessorMixin.push_to_hub`].

        Raises:
            RuntimeError: If this release of transformers has no hook by which the box detector is uploaded.
        """
        _check_upload_hook()
        return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(  # type: ignore[override]
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """Upload the box detector's folders too; the base class uploads one level of folders only."""
        bundle = Path(working_dir) / BUNDLE_FOLDER
        files_timestamps = {**files_timestamps, BUNDLE_FOLDER: float("inf")}
        uploaded = super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)
        if bundle.is_dir():
            options = {name: kwargs[name] for name in ("token", "revision") if kwargs.get(name)}
            if kwargs.get("create_pr"):  # the same pull request
                options["revision"] = uploaded.pr_revision
            HfApi().upload_folder(repo_id=repo_id, folder_path=bundle, path_in_repo=BUNDLE_FOLDER, **options)
        return uploaded

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; the base class would copy the detector's weights before leaving them out."""
        return super(MGLlavaProcessor, self._plain_copy(self.box_detector_config)).to_dict()

    def _plain_copy(self, config: dict[str, Any] | None) -> "MGLlavaProcessor":
        """Make a copy for the base class to save, with a configuration of the detector instead of the detector."""
        plain = object.__new__(type(self))
        left_out = ("_box_detector", "_lock", "_tokenizer_lock", "_repository", "_loading_options")
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in left_out})
        # The base class looks for values in `__dict__`, and the property in `_box_detector_config`.
        plain.__dict__.update(box_detector_config=config, _box_detector_config=config, _box_detector=None)
        return plain

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a detector that its configuration describes; a copy loads it again at its first use."""
        with self._lock:
            detector = self._present_detector()
            return {**self.__dict__, "_box_detector": None if self._is_described(detector) else detector}

    def __deepcopy__(self, memo: dict[int, Any]) -> "MGLlavaProcessor":
        """Copy the processor, and also a detector that cannot be loaded from its configuration."""
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
                "`processor.box_detector` to None before copying, and to the detector after; or give its class a "
                "`__deepcopy__`."
            ) from error
        return copied

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        processed_images: Mapping[str, Any] | None = None,
        processed_videos: Mapping[str, Any] | None = None,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make the model's inputs.

        A string that the chat template rendered, by [`~MGLlavaProcessor.apply_chat_template`] or elsewhere, gives the
        ids that [`~MGLlavaProcessor.apply_chat_template`] gives with `tokenize=True`; so does each part of it, such as
        an answer alone. A hand-written string is split in the same way: the text after the words that open an answer
        is encoded alone.

        Args:
            images: An image, a list of images in the order of their placeholders, or one list of images per text; in
                any form that the image processor takes.
            text (`str` or `list[str]`): One prompt or several, with one `<image>` per image and one `<video>` per
                video. The ids start with one BOS, whether the text has it or not; with `add_special_tokens=False`,
                only if the text has it.
            videos: A video, a list of videos in the order of their placeholders, or one list of videos per text; in
                any form that the video processor takes.
            audio: Not supported; `None` or empty.
            processed_images (`Mapping`, *optional*): Instead of `images`: `pixel_values`, `boxes` and `num_boxes` that
                an earlier call returned for them.
            processed_videos (`Mapping`, *optional*): Instead of `videos`: the inputs of videos that an earlier call
                returned for them.
            return_assistant_tokens_mask (`bool`): Whether to return `assistant_masks`, 1 for each token of an answer;
                needs a chat template of this package, or one that writes boundaries as they do.
            **kwargs: `boxes` (one entry per image, xyxy in pixels of the original image) and the other options of the
                image processor ([`MGLlavaImageProcessorKwargs`]); `video_boxes` (per video one entry for each sampled
                frame), `num_frames`, `fps`, `do_sample_frames`, `video_metadata` and the other options of the video
                processor ([`MGLlavaVideoProcessorKwargs`]); options of the tokenizer such as `padding`,
                `padding_side`, `truncation`, `max_length`, `return_offsets_mapping`; `return_tensors`,
                `return_mm_token_type_ids`, `return_text_replacement_offsets`; or `text_kwargs`, `images_kwargs`,
                `videos_kwargs`. Options that images and videos share, such as `do_pad`, apply to both.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, length)` where text is given;
            `pixel_values` `(num_images, 3, height, width)`, `boxes` `(num_images, max_boxes, 4)` (int64, xyxy in
            pixels of `pixel_values`) and `num_boxes` `(num_images,)` where images are given; `pixel_values_videos`,
            `low_res_pixel_values_videos`, `video_boxes`, `num_video_boxes` and `num_video_frames` where videos are
            given, see [`MGLlavaVideoProcessor`].

        Raises:
            ValueError: If the numbers of placeholders, images, videos, frames and boxes differ, `text` is not text,
                truncation would cut an image or a video, the answers cannot be located, or videos are given and the
                tokenizer has no placeholder for them.
            NotImplementedError: If `sanitize_control_tokens` is set, and this release of transformers cannot do it.
        """
        text = as_texts(images, text)
        if kwargs.get("boxes") is not None:
            kwargs["boxes"] = as_lists(kwargs["boxes"])  # generators are read once
        if kwargs.get("video_boxes") is not None:
            kwargs["video_boxes"] = as_lists(kwargs["video_boxes"])
        if isinstance(videos, Iterator) and not hasattr(videos, "read"):
            videos = list(videos)
        text, kwargs = self._take_boxes_of_text(text, kwargs)
        return super().__call__(
            images,
            text,
            videos,
            audio,
            processed_images=processed_images,
            processed_videos=processed_videos,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **kwargs,
        )

    def _take_boxes_of_text(self, text: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Move the boxes in rendered conversations to the arguments."""
        if text is None or not any(isinstance(sample, str) and BOX_MARKS.search(sample) for sample in text):
            return text, kwargs
        for modality in self.placeholder_ids:
            name, options_name = (
                ("boxes", "images_kwargs") if modality == "image" else ("video_boxes", "videos_kwargs")
            )
            taken = [take_boxes_from_text(sample, self.placeholder_pattern(modality)) for sample in text]
            text, entries = [sample for sample, _ in taken], [entry for _, of_text in taken for entry in of_text]
            if all(entry is None for entry in entries):
                continue
            given = [options.get(name) for options in (kwargs, kwargs.get(options_name) or {})]
            if all(boxes is None for boxes in given):
                kwargs = {**kwargs, name: entries}
            elif any(boxes is not None and not _are_entries(boxes, entries, modality) for boxes in given):
                raise ValueError(
                    f"`{name}` must be those of the {modality} blocks that `text` was rendered from, or not given, "
                    f"got others. Leave them out of the blocks, or do not pass `{name}`."
                )
        return text, kwargs

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Check that the arguments fit together, before anything is computed; see [`ImageTextProcessor`]."""
        if kwargs.get("boxes") is not None and not flat_images(images):
            raise ValueError("`boxes` must come with images, got boxes without an image. Pass `images` too.")
        super().validate_inputs(images, text, videos, *args, **kwargs)
        if kwargs.get("video_boxes") is not None and is_empty(videos):
            raise ValueError("`video_boxes` must come with videos, got boxes without a video. Pass `videos` too.")
        processed = kwargs.get("processed_videos") or {}
        if not self.takes_videos:
            if processed or not is_empty(videos):
                raise ValueError(_NO_VIDEOS.format(token=VIDEO_TOKEN))
            return
        num_videos = 0 if is_empty(videos) else len(flat_videos(videos))
        if processed:
            if num_videos:
                raise ValueError("`processed_videos` must be None where `videos` are given, got both.")
            if absent := [name for name in self.video_inputs if processed.get(name) is None]:
                raise ValueError(
                    f"`processed_videos` must have {', '.join(self.video_inputs)}, got none of {', '.join(absent)}."
                )
            num_videos = self.count_videos(processed)
        if num_videos and self.packs_boxes:
            raise ValueError(
                "`packs_boxes` must be False for videos: their inputs are not known to TRL's GRPO and RLOO trainers, "
                "which would drop them."
            )
        if text is not None:
            self.check_placeholders(text, "video", self.video_token, num_videos, count_per_prompt(videos))

    def _process(self, images: Any, targets: TrainingTargets, **kwargs: Any) -> Mapping[str, Any]:
        """Find the boxes that are not given, then process the images."""
        groups, images = group_sizes(images), flat_images(images)
        entries = flatten_boxes(kwargs.pop("boxes", None), len(images), groups)
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if missing and (detector := self.box_detector) is not None:
            found = find_boxes(detector, [images[index] for index in missing], kwargs.get("input_data_format"))
            for index, entry in zip(missing, found, strict=True):
                entries[index] = entry
            targets.remark = (
                "The boxes of this training batch are those that the processor's detector finds now. To train on "
                "your own, put them into the image blocks of the conversation; a column `boxes` is not read by TRL's "
                "collators."
            )
        elif missing:
            targets.problem = (
                f"`boxes` must be given for training, got none for the image(s) {missing} of the batch. Put them into "
                'the image blocks of the conversation, `{"type": "image", "boxes": [[x1, y1, x2, y2]]}` ([] for an '
                "image without objects): a column `boxes` is not read by TRL's collators. Or use "
                "mgllava.training.MGLlavaDataCollator, or set `processor.box_detector`."
            )
            logger.warning_once(
                "`boxes` is not given and the processor has no `box_detector`: the model gets the single box "
                "[0, 0, 0, 0] per image, as in training for images without objects. Pass `boxes` for better answers, "
                "or [] for an image without objects."
            )
        return self.image_processor(images, boxes=entries, **kwargs)

    def _process_clips(self, videos: Any, targets: TrainingTargets, **kwargs: Any) -> Mapping[str, Any]:
        """Sample frames, find the boxes that are not given, then make the inputs of the videos."""
        groups = count_per_prompt(videos)
        reading = {name: kwargs.pop(name, None) for name in _READING_OPTIONS}
        clips = self.video_processor.read_clips(
            videos, **reading, input_data_format=kwargs.pop("input_data_format", None)
        )
        counts = [len(clip.frames) for clip in clips]
        entries = flatten_video_boxes(kwargs.pop("video_boxes", None), counts, groups)
        missing = {
            index: [frame for frame, entry in enumerate(of_video) if entry is None]
            for index, of_video in enumerate(entries)
            if any(entry is None for entry in of_video)
        }
        if missing and (detector := self.box_detector) is not None:
            for index, frames in missing.items():
                found = find_boxes_of_frames(detector, clips[index], frames, {})
                for frame, entry in zip(frames, found, strict=True):
                    entries[index][frame] = entry
            targets.remark = (
                "The boxes of this training batch are those that the processor's detector finds now. To train on "
                "your own, put them into the video blocks of the conversation."
            )
        elif missing:
            targets.problem = (
                f"`video_boxes` must be given for training, got none for the video(s) {list(missing)} of the batch. "
                'Put them into the video blocks of the conversation, `{"type": "video", "boxes": [entry per frame]}` '
                "([] for a frame without objects), or set `processor.box_detector`."
            )
            logger.warning_once(
                "`video_boxes` is not given and the processor has no `box_detector`: the model gets the single box "
                "[0, 0, 0, 0] per frame, as in training for frames without objects. Pass `video_boxes` for better "
                "answers, or [] for a frame without objects."
            )
        return self.video_processor(clips, video_boxes=entries, **kwargs)

    def _pack(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put boxes and their counts into one input, if `packs_boxes` is set."""
        if not self.packs_boxes or not features:
            return features
        packed = {name: value for name, value in features.items() if name not in ("boxes", "num_boxes")}
        counts = zip(features["boxes"], features["num_boxes"], strict=True)
        packed["image_position_ids"] = [
            np.where(np.arange(len(rows))[:, None] < count, rows, -1) for rows, count in counts
        ]
        return packed

    def _unpack(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give boxes and counts that are in one input, see `packs_boxes`, their usual form."""
        if inputs.get("image_position_ids") is None:
            return inputs
        rows = [torch.as_tensor(row) for row in inputs["image_position_ids"]]
        counts = [int((row[:, 0] >= 0).sum()) for row in rows]
        return {**inputs, "boxes": [row.clamp(min=0) for row in rows], "num_boxes": counts}

    def num_image_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Count the placeholders of each image, see [`ImageTextProcessor.num_image_tokens`]."""
        counts = self._unpack(inputs).get("num_boxes")
        counts = [] if counts is None else torch.as_tensor(counts).tolist()
        return [self.image_seq_length + self.num_tokens_per_box * count for count in counts]

    def num_video_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Count the placeholders of each video, in order.

        Args:
            inputs (`Mapping`): Model inputs with `num_video_boxes` and `num_video_frames`.

        Returns:
            `list[int]`: Their numbers.
        """
        if inputs.get("num_video_frames") is None:
            return []
        boxes = torch.as_tensor(inputs["num_video_boxes"]).tolist()
        counts, first = [], 0
        for frames in torch.as_tensor(inputs["num_video_frames"]).tolist():
            of_video = boxes[first : first + frames]
            counts.append(self.image_seq_length * frames + self.num_tokens_per_box * sum(of_video))
            first += frames
        return counts

    def take_videos(self, inputs: Mapping[str, Any], first: int, last: int | None = None) -> dict[str, torch.Tensor]:
        """Take videos out of a batch.

        Args:
            inputs (`Mapping`): Model inputs.
            first (`int`): Index of the first video.
            last (`int`, *optional*): Index after the last one. All after `first` by default.

        Returns:
            `dict[str, torch.Tensor]`: The inputs of these videos; empty if there are none.
        """
        if inputs.get("num_video_frames") is None:
            return {}
        frames = torch.as_tensor(inputs["num_video_frames"]).tolist()
        if not frames[first:last]:
            return {}
        start = sum(frames[:first])
        rows = slice(start, start + sum(frames[first:last]))
        return {
            name: as_tensor(inputs[name][slice(first, last) if name == "num_video_frames" else rows])
            for name in self.video_inputs
        }

    def join_videos(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Join videos with `video_boxes` padded to the greatest number, see [`ImageTextProcessor.join_videos`]."""
        return super().join_videos(_with_equal_rows(rows, "video_boxes"))

    def join_images(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Join images with `boxes` padded to the greatest number, see [`ImageTextProcessor.join_images`]."""
        return super().join_images(_with_equal_rows(rows, "boxes"))

    def objects(self, detections: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Select the objects that the model gets a token for, in the order of these tokens.

        Args:
            detections: The boxes of one image, as in `boxes`.
            image_size (`tuple[int, int]`): `(height, width)` of the upright image.

        Returns:
            `dict`: `boxes` (float32 of shape `(n, 4)`, xyxy in pixels of that image) and, if they were given, n
            `labels` and `scores` (float32 of shape `(n,)`).

        Raises:
            TypeError: If `detections` are not boxes.
            ValueError: If shapes, values or lengths are wrong.
        """
        return self.image_processor.objects(detections, image_size)

    def encode_text(
        self, conversation: list[dict[str, Any]] | str, **kwargs: Any
    ) -> tuple[list[int], list[int] | None]:
        """Tokenize a conversation or a string without processing its images or their boxes.

        Args:
            conversation (`list[dict]` or `str`): Messages, or a text.
            **kwargs: `add_special_tokens`; for messages also the options of
                [`~MGLlavaProcessor.apply_chat_template`].

        Returns:
            `tuple`: Ids, with one placeholder for each image, and a mask of those that are learned; `None` instead of
            the mask for a string, or if the chat template does not mark them.

        Raises:
            TypeError: If boxes in an image block are not boxes.
            ValueError: If a message has boxes outside of an image block, or holds what the chat template would drop.
        """
        if isinstance(conversation, str):
            for modality in self.placeholder_ids:
                conversation, _ = take_boxes_from_text(conversation, self.placeholder_pattern(modality))
            return super().encode_text(conversation, **kwargs)
        return super().encode_text(_take_boxes(conversation, [], []), **kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """Return the number of placeholders that serving engines plan with for each image and video.

        It does not depend on heights and widths, but on the numbers of boxes and frames: `box_limit` and `num_frames`
        are assumed, or all frames of a video if there is no `num_frames`.
        """
        counts: dict[str, Any] = {}
        if image_sizes is not None:
            most = self.image_seq_length + self.num_tokens_per_box * (self.image_processor.box_limit or 1)
            counts |= {"num_image_tokens": [most] * len(image_sizes), "num_image_patches": [1] * len(image_sizes)}
        if video_sizes is not None:
            of_frame = self.image_seq_length + self.num_tokens_per_box * (self.video_processor.box_limit or 1)
            frames = kwargs.get("num_frames") or self.video_processor.num_frames
            counts["num_video_tokens"] = [of_frame * (frames or size[0]) for size in video_sizes]
        return MultiModalData(**counts)

    def apply_chat_template(  # type: ignore[override]  # the options by name
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations and, with `tokenize=True`, make the model's inputs from them.

        In addition to what the base class supports, image blocks may have `boxes`, as in
        `{"type": "image", "url": ..., "boxes": [[10, 20, 110, 70]]}`, and video blocks one entry for each sampled
        frame, as in `{"type": "video", "path": ..., "boxes": [[[10, 20, 110, 70]], [], ...]}`. A rendered string holds
        them after the placeholder, between two private-use characters, and the processor reads them from there.

        With the templates of this package, every piece of a conversation is encoded alone, as in training, and
        `assistant_masks` marks exactly the tokens that the original trains on. Passing the rendered string to the
        processor gives the same ids. If a message contains a string that the template writes between messages, an
        invisible character is put into it, with a warning; the processor removes that character again.

        Args:
            conversation: A list of messages, or a list of such lists.
            chat_template (`str`, *optional*): A template or the name of one; by default the processor's.
            tokenize (`bool`): Whether to return ids instead of a string.
            return_assistant_tokens_mask (`bool`): Whether to return `assistant_masks` too (with `return_dict=True`).
            sanitize_control_tokens (`bool`): Whether control tokens and placeholders in user text are encoded as
                plain text; needs a newer transformers.
            processor_kwargs (`dict`, *optional*): Arguments of [`~MGLlavaProcessor.__call__`].
            **kwargs: The other arguments of the base class, and variables of the template.

        Returns:
            `str`, ids, or with `return_dict=True` a [`BatchFeature`].

        Raises:
            ValueError: If `boxes` are given both in the conversation and in `processor_kwargs`, a string is rendered
                of image blocks with boxes and of images without a block, `chat_template` is neither a template nor a
                name, a mask is requested without `return_dict=True`, or a conversation is empty.
            NotImplementedError: If this release of transformers cannot sanitize.
            TypeError: If a message or a block has the wrong type.
        """
        boxes: dict[str, list[Any]] = {"boxes": [], "video_boxes": []}
        plain = _take_boxes(conversation, *boxes.values())
        if boxes["video_boxes"] and not self.takes_videos:
            raise ValueError(_NO_VIDEOS.format(token=VIDEO_TOKEN))
        has_boxes = False
        for name, entries in boxes.items():
            if all(entry is None for entry in entries):
                continue
            has_boxes = True
            if (processor_kwargs or {}).get(name) is not None:
                raise ValueError(f"`{name}` must be in the conversation or in `processor_kwargs`, got both.")
            if tokenize:
                processor_kwargs = {**(processor_kwargs or {}), name: entries}
        output = super().apply_chat_template(
            plain, chat_template, tokenize=tokenize, processor_kwargs=processor_kwargs, **kwargs
        )
        if tokenize or not has_boxes:
            return output
        # Code that passes on only the string and the images, such as a trainer's, would lose the boxes.
        is_single = isinstance(output, str)
        texts = []
        for text, messages in zip(*([output], [conversation]) if is_single else (output, conversation), strict=True):
            of_images: list[Any] = []
            of_videos: list[Any] = []
            _take_boxes(messages, of_images, of_videos)
            if any(entry is not None for entry in of_images):
                text = write_boxes_into_text(text, self.placeholder_pattern("image"), of_images)
            if any(entry is not None for entry in of_videos):
                text = write_boxes_into_text(text, self.placeholder_pattern("video"), of_videos)
            texts.append(text)
        return texts[0] if is_single else texts

    def _plain_block(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        return video_block(block) if is_video_block(block) else super()._plain_block(block)


def _check_upload_hook() -> None:
    """Refuse to upload if transformers would not call the method that uploads the box detector."""
    if not hasattr(ProcessorMixin, _UPLOAD_HOOK):
        raise RuntimeError(
            f"This release of transformers has no `ProcessorMixin.{_UPLOAD_HOOK}`, so the box detector would not be "
            "uploaded. Call `save_pretrained` and upload the folder with `huggingface_hub.upload_folder`, or install "
            "another release."
        )


def _take_boxes(value: Any, boxes: list[Any], video_boxes: list[Any]) -> Any:
    """Copy a conversation without the `boxes` of its images and videos, which are appended to the lists."""
    if is_image_block(value) or is_video_block(value):
        of_block = value.get("boxes")
        if is_image_block(value):
            boxes.append(boxes_of_block(of_block))
        else:
            video_boxes.append(boxes_of_video_block(of_block))
        return {key: item for key, item in value.items() if key != "boxes"}
    if isinstance(value, Mapping):
        if value.get("boxes") is not None and ("role" in value or "type" in value):
            where = f"a message of role {value['role']!r}" if "role" in value else f"a block of type {value['type']!r}"
            raise ValueError(
                f"`boxes` must be in image or video blocks, got them in {where}. Move them to the image's block."
            )
        return {key: _take_boxes(item, boxes, video_boxes) for key, item in value.items()}
    return [_take_boxes(item, boxes, video_boxes) for item in value] if isinstance(value, list | tuple) else value


def _are_entries(boxes: Any, entries: list[Any], modality: str) -> bool:
    """Tell whether boxes are the same as the entries of blocks."""
    if modality == "image":
        return plain_boxes(flatten_boxes(boxes, len(entries))) == entries
    counts = [len(entry) if entry is not None else 0 for entry in entries]
    try:
        given = flatten_video_boxes(boxes, counts)
    except ValueError:
        return False
    return plain_boxes(given) == [entry if entry is not None else [] for entry in entries]


def _with_equal_rows(rows: Sequence[Mapping[str, torch.Tensor]], name: str) -> list[dict[str, torch.Tensor]]:
    """Pad the boxes of several batches to the greatest number."""
    given = [row for row in rows if row]
    most = max((row[name].shape[1] for row in given), default=0)
    pad = torch.nn.functional.pad
    return [{**row, name: pad(row[name], (0, 0, 0, most - row[name].shape[1]))} for row in given]


def find_boxes_of_frames(
    detector: BoxDetectorProtocol, clip: Clip, frames: Sequence[int], options: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Find the boxes of frames of a video in one call; a frame that was sampled several times is processed once."""
    indices = list(clip.metadata.frames_indices or range(len(clip.frames)))
    first_of = {indices[frame]: frame for frame in reversed(frames)}
    found = find_boxes(detector, [clip.frames[frame] for frame in first_of.values()], "channels_first", options)
    by_index = dict(zip(first_of, found, strict=True))
    return [by_index[indices[frame]] for frame in frames]


make_findable(__name__)

__all__ = ["CHAT_TEMPLATES", "MGLlavaProcessor", "find_boxes_of_frames"]
