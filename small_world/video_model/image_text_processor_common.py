"""The base class of processors whose images become runs of placeholders in text that is encoded in chunks.

A family's processor derives from [`ImageTextProcessor`] and says how many placeholders an image takes and which model
inputs belong to images. Chat, serving and training use nothing else of a processor, so they know no family.
"""

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import repeat
from typing import Any, ClassVar

import torch
from transformers import BatchFeature, processing_utils
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .images_common import flat_images, image_block, is_image_block
from .text_chunks_common import (
    BOUNDARY_NAMES,
    IMAGE_TOKEN,
    PRIVATE_CHARACTERS,
    ChatFormat,
    TextChunk,
    chat_formats,
    encode_chunks,
    join_text,
    protect_text,
    read_format,
    split_text,
    writes_boundaries,
)

logger = logging.get_logger(__name__)

# Newer releases of transformers can mark control tokens in user text, so that they are encoded as plain text.
_CAN_SANITIZE = "sanitize_control_tokens" in signature(ProcessorMixin.apply_chat_template).parameters
# Private: a pattern that matches where user text is not marked. If it is missing, sanitizing is refused.
_UNMARKED: str | None = getattr(processing_utils, "_UNMARKED", None)


class ImageTextProcessor(ProcessorMixin):
    """Prepares images, videos and text for a model that reads a run of embeddings for each image or video.

    A model input that belongs to images holds those of all images of a batch, one after the other, regardless of the
    text that each image is in. By default, each image has one row in it. A family for videos defines `video_inputs`,
    and the methods for videos next to those for images.

    Attributes:
        image_inputs: Names of the model inputs that belong to images.
        video_inputs: Names of the model inputs that belong to videos; empty if the family takes none.
        chat_templates: Chat templates whose strings are recognized in addition to those of the processor's own.
        cuts_at_answers: Whether the answers of a conversation are encoded apart from the text around them.
        private_characters: Characters that a processor writes into rendered strings, and removes from user text.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    video_inputs: ClassVar[tuple[str, ...]] = ()
    # A family for videos sets both, if its tokenizer has the placeholder.
    video_token: str | None = None
    video_token_id: int | None = None
    chat_templates: ClassVar[Mapping[str, str]] = {}
    cuts_at_answers: ClassVar[bool] = True
    private_characters: ClassVar[re.Pattern[str]] = PRIVATE_CHARACTERS

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
        **parts: Any,
    ):
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` must have {self.image_token!r} in its vocabulary, got one of {len(tokenizer)} tokens "
                f"without it. Use tokenizer.add_tokens([{self.image_token!r}], special_tokens=True)."
            )
        self._tokenizer_lock = ProcessLock()
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **parts)

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Id of the placeholder of each modality that the tokenizer has: `"image"` and, perhaps, `"video"`."""
        videos = {} if self.video_token_id is None else {"video": self.video_token_id}
        return {"image": self.image_token_id, **videos}

    @property
    def takes_videos(self) -> bool:
        """Whether videos can be processed: the family takes them, and the tokenizer has their placeholder."""
        return bool(self.video_inputs) and self.video_token_id is not None

    def placeholder_pattern(self, modality: str | None = None) -> re.Pattern[str]:
        """Compile a pattern that finds the placeholders of one modality, or of all, in text."""
        tokens = {"image": self.image_token, "video": self.video_token}
        wanted = [tokens[name] for name in ([modality] if modality else self.placeholder_ids)]
        return re.compile((_UNMARKED or "") + f"(?:{'|'.join(re.escape(token or '') for token in wanted)})")

    def num_image_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Count the placeholders of each image, in order."""
        raise NotImplementedError

    def count_images(self, inputs: Mapping[str, Any]) -> int:
        """Count the images of a batch."""
        return len(_given(self._unpack(inputs), self.image_inputs[0]))

    def num_video_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Count the placeholders of each video, in order."""
        return []

    def count_videos(self, inputs: Mapping[str, Any]) -> int:
        """Count the videos of a batch."""
        return len(self.num_video_tokens(inputs))

    def take_videos(self, inputs: Mapping[str, Any], first: int, last: int | None = None) -> dict[str, torch.Tensor]:
        """Take the inputs of the videos `first` to `last` out of a batch, like [`~ImageTextProcessor.take_images`]."""
        return {}

    def join_videos(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Concatenate what [`~ImageTextProcessor.take_videos`] took out of several batches."""
        rows = [row for row in rows if row]
        return {name: torch.cat([row[name] for row in rows]) for name in self.video_inputs} if rows else {}

    def take_images(self, inputs: Mapping[str, Any], first: int, last: int | None = None) -> dict[str, torch.Tensor]:
        """Take the inputs of the images `first` to `last` (by default all after it) out of a batch, as tensors.

        Empty if there are none: the model takes text alone without any of these names.
        """
        inputs = self._unpack(inputs)
        taken = {name: _given(inputs, name)[first:last] for name in self.image_inputs}
        return {name: as_tensor(values) for name, values in taken.items() if len(values)}

    def join_images(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Concatenate what [`~ImageTextProcessor.take_images`] took out of several batches."""
        rows = [row for row in rows if row]
        return {name: torch.cat([row[name] for row in rows]) for name in self.image_inputs} if rows else {}

    def encode_text(
        self, conversation: list[dict[str, Any]] | str, *, add_special_tokens: bool = True, **kwargs: Any
    ) -> tuple[list[int], list[int] | None]:
        """Tokenize a conversation or a string without processing its images: each is one placeholder.

        `kwargs` are those of [`~ImageTextProcessor.apply_chat_template`]. Also returns a mask of the ids that are
        learned; `None` for a string, or if the chat template does not write boundaries.
        """
        text, knows_answers = conversation, False
        if not isinstance(text, str):
            knows_answers = writes_boundaries(self._find_template(kwargs.get("chat_template")))
            boundaries: dict[str, Any] = BOUNDARY_NAMES if knows_answers else {}
            text = self.apply_chat_template(text, **boundaries, **kwargs)
        chunks = self._split(text, self._runs(repeat(1), repeat(1)), self._chat_formats())
        with self._tokenizer_lock:
            encoded = encode_chunks(
                self.tokenizer, [chunks], self.placeholder_ids, add_special_tokens=add_special_tokens
            )
        return encoded["input_ids"][0], encoded["assistant_masks"][0] if knows_answers else None

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
        """Make the model's inputs; `processed_images` and `processed_videos` are inputs of an earlier call."""
        if kwargs.get("sanitize_control_tokens") or (kwargs.get("text_kwargs") or {}).get("sanitize_control_tokens"):
            _check_sanitizing()
        images, texts, _, _ = self.prepare_inputs_layout(images=images, text=as_texts(images, text), **kwargs)
        self.validate_inputs(
            images=images,
            text=texts,
            videos=videos,
            audio=audio,
            processed_images=processed_images,
            processed_videos=processed_videos,
            **kwargs,
        )
        merged = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]  # transformers means the class
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        # transformers 5.16 has these among the text options, newer releases outside of them.
        mm_token_type_ids, replacement_offsets = (
            text_kwargs.pop(name, None) or merged.get(name, False)
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )

        features: Mapping[str, Any] = self.take_images(processed_images or {}, 0)
        targets = TrainingTargets(self)
        if flat_images(images):
            features = self._process(images, targets, **{**images_kwargs, "return_tensors": None})
        video_features: Mapping[str, Any] = self.take_videos(processed_videos or {}, 0)
        if not is_empty(videos):
            video_features = self._process_clips(
                videos, targets, **{**merged["videos_kwargs"], "return_tensors": None}
            )
        encoded: dict[str, Any] = {}
        if texts is not None:
            lengths, video_lengths = self.num_image_tokens(features), self.num_video_tokens(video_features)
            encoded = self._encode(texts, lengths, video_lengths, targets, return_assistant_tokens_mask, **text_kwargs)
            if replacement_offsets:
                plain = [PRIVATE_CHARACTERS.sub("", sample) for sample in texts]
                runs = [self.image_token * length for length in lengths]
                video_runs = [(self.video_token or "") * length for length in video_lengths]
                encoded["text_replacement_offsets"] = self.get_text_with_replacements(plain, runs, video_runs)[1]
            if mm_token_type_ids:
                encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])

        visual_kwargs = images_kwargs if features else merged["videos_kwargs"]
        return_tensors = (text_kwargs if texts is not None else visual_kwargs).get("return_tensors")
        data = {**encoded, **self._pack(features), **video_features}
        output = ImageTextInputs(data, return_tensors, self.skip_tensor_conversion)
        output.targets = targets
        return output

    def _process(self, images: Any, targets: "TrainingTargets", **kwargs: Any) -> Mapping[str, Any]:
        """Make the inputs of opened images, and note in `targets` what prevents training on them."""
        return self.image_processor(flat_images(images), **kwargs)

    def _process_clips(self, videos: Any, targets: "TrainingTargets", **kwargs: Any) -> Mapping[str, Any]:
        """Make the inputs of videos, and note in `targets` what prevents training on them."""
        raise NotImplementedError

    def _pack(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert image inputs to the form in which the processor returns them."""
        return features

    def _unpack(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Undo `_pack`; inputs that are not packed stay."""
        return inputs

    def _encode(
        self,
        text: list[str],
        lengths: list[int],
        video_lengths: list[int],
        targets: "TrainingTargets",
        return_mask: bool,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Encode texts; `lengths` are the numbers of placeholders of their images, in order, and of their videos."""
        chats = self._chat_formats()
        knows_answers = bool(chats) or all(map(PRIVATE_CHARACTERS.search, text))
        if return_mask and not knows_answers:
            raise ValueError(
                "`return_assistant_tokens_mask` needs a chat template that marks answers for this processor. Use one "
                "of mgllava.processing.CHAT_TEMPLATES, or do not request the mask."
            )
        runs = self._runs(iter(lengths), iter(video_lengths))
        chunks = [self._split(sample, runs, chats) for sample in text]
        with self._tokenizer_lock:  # fast tokenizers keep options of a call in an object that all threads share
            encoded = encode_chunks(self.tokenizer, chunks, self.placeholder_ids, **kwargs)
        targets.read(encoded, knows_answers)
        if not return_mask:
            del encoded["assistant_masks"]
        return encoded

    def _runs(self, images: Iterator[int], videos: Iterator[int]) -> dict[str, tuple[int, Iterator[int]]]:
        """Return id and numbers of placeholders of each token that stands for an image or a video."""
        runs = {self.image_token: (self.image_token_id, images)}
        if self.video_token is not None and self.video_token_id is not None:
            runs[self.video_token] = (self.video_token_id, videos)
        return runs

    def _split(
        self, text: str, runs: Mapping[str, tuple[int, Iterator[int]]], chats: Sequence[ChatFormat] = ()
    ) -> list[TextChunk]:
        """Cut a text into what is encoded apart; `runs` are those of [`~ImageTextProcessor._runs`]."""
        placeholder, bos_token, joins = self.placeholder_pattern(), self.tokenizer.bos_token, not self.cuts_at_answers
        chunks = split_text(text, placeholder, runs, bos_token, chats, in_context=joins)
        return join_text(chunks) if joins else chunks

    def _chat_formats(self) -> tuple[ChatFormat, ...]:
        special_tokens = self.tokenizer.special_tokens_map
        return chat_formats(self.chat_template, self.chat_templates.values(), special_tokens)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that the arguments fit together, before anything is computed; raise a `ValueError` if not."""
        if not is_empty(audio) or (not is_empty(videos) and not self.video_inputs):
            names = "`videos` and `audio`" if not self.video_inputs else "`audio`"
            kinds = "images and text" if not self.video_inputs else "images, videos and text"
            raise ValueError(f"{names} must be None or empty: {type(self).__name__} takes {kinds}.")
        processed = kwargs.get("processed_images") or {}
        has_videos = not is_empty(videos) or bool(kwargs.get("processed_videos"))
        if images is None and text is None and not processed and not has_videos:
            raise ValueError("`images` or `text` must be given, got neither.")
        num_images = len(flat_images(images))
        if processed:
            if num_images:
                raise ValueError("`processed_images` must be None where `images` are given, got both.")
            num_images = self.count_images(processed)
            if absent := [name for name in self.image_inputs if not len(_given(processed, name))]:
                raise ValueError(
                    f"`processed_images` must have {', '.join(self.image_inputs)}, got none of {', '.join(absent)}."
                )
        if text is None:
            return
        is_nested = isinstance(images, list | tuple) and all(isinstance(group, list | tuple) for group in images)
        groups = [len(group) for group in images] if is_nested else None
        self.check_placeholders(text, "image", self.image_token, num_images, groups)

    def check_placeholders(
        self, text: Sequence[str], modality: str, token: str | None, total: int, groups: Sequence[int] | None
    ) -> None:
        """Check that texts have a placeholder for each image or video; `groups` are their numbers per prompt."""
        placeholder = self.placeholder_pattern(modality)
        expected = [len(placeholder.findall(sample)) for sample in text]
        if sum(expected) != total:
            raise ValueError(
                f"`text` must have one {token!r} per {modality}, got {sum(expected)} placeholders and "
                f"{total} {modality}s."
            )
        if groups is not None and len(groups) == len(text):
            for index, (placeholders, count) in enumerate(zip(expected, groups, strict=True)):
                if placeholders != count:
                    raise ValueError(
                        f"`text[{index}]` must have one {token!r} per {modality} of `{modality}s[{index}]`, got "
                        f"{placeholders} placeholders and {count} {modality}s."
                    )

    def replace_video_token(self, video_inputs: Mapping[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Make the run of placeholders of one video, for engines that expand text themselves."""
        return (self.video_token or "") * self.num_video_tokens(video_inputs)[video_idx]

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Make the run of placeholders of one image, for engines that expand text themselves."""
        return self.image_token * self.num_image_tokens(image_inputs)[image_idx]

    def _find_template(self, name: str | None) -> str:
        """Return a chat template by its name, or the template itself; empty if there is none."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = named.get(name or "default", name) or ""
        if name is not None and template == name and "{" not in template:
            raise ValueError(
                f"`chat_template` must be a Jinja template, or the name of one of the processor's "
                f"({', '.join(sorted(named))}), got {name!r}."
            )
        return template

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
        """Render conversations and, with `tokenize=True`, make the model's inputs from them."""
        template = self._find_template(chat_template)
        if return_assistant_tokens_mask and tokenize and not kwargs.get("return_dict"):
            raise ValueError("`return_assistant_tokens_mask` needs `return_dict=True`, which returns the mask.")
        if isinstance(conversation, list | tuple) and not all([conversation, *conversation]):
            raise ValueError("`conversation` must have at least one message, got an empty list.")
        processor_kwargs = dict(processor_kwargs or {})
        if sanitize_control_tokens:
            _check_sanitizing()
            kwargs["sanitize_control_tokens"] = True

        # If the caller passes the boundary characters, they stay in the string.
        has_boundaries = writes_boundaries(template) and not kwargs.keys() & BOUNDARY_NAMES.keys()
        if has_boundaries:
            kwargs.update(BOUNDARY_NAMES)
        if has_boundaries and tokenize:
            if sanitize_control_tokens:
                kwargs["literal_image_token"] = False
            # The boundaries mark the answers exactly; the base class would compare character offsets.
            processor_kwargs["return_assistant_tokens_mask"] = return_assistant_tokens_mask
            return_assistant_tokens_mask = False
        output = super().apply_chat_template(
            self._clean(conversation),
            chat_template,
            tokenize=tokenize,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )
        if tokenize or not has_boundaries:
            return output
        bos_token, chats = self.tokenizer.bos_token, self._chat_formats()
        chat = read_format(template, self.tokenizer.special_tokens_map)
        texts = [protect_text(text, bos_token, chat, chats) for text in as_texts(None, output) or []]
        return texts[0] if isinstance(output, str) else texts

    def _clean(self, value: Any) -> Any:
        """Copy a conversation without private characters, and with image blocks as transformers reads them."""
        if isinstance(value, str):
            return self.private_characters.sub("", value)
        if isinstance(value, Mapping):
            block = self._plain_block(value)
            if block.get("boxes") is not None and is_image_block(value):
                raise ValueError(f"`boxes` of an image block must be left out: {type(self).__name__} takes no boxes.")
            return {key: self._clean(item) for key, item in block.items()}
        return [self._clean(item) for item in value] if isinstance(value, list | tuple) else value

    def _plain_block(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert a part of a conversation to the form that transformers reads."""
        return image_block(block) if is_image_block(block) else block

    def answer_ending(self) -> tuple[list[int], list[int]]:
        """Return how the chat template ends an answer: the learned ids (EOS, or a suffix), and the separator's ids.

        Both are empty if the chat template does not mark answers.
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


class ImageTextInputs(BatchFeature):
    """A [`BatchFeature`] in which a collator may set labels; see [`TrainingTargets`].

    Attributes:
        targets ([`TrainingTargets`], *optional*): Corrects labels that are set. Copies and pickles have none.
    """

    targets: "TrainingTargets | None" = None

    def __setitem__(self, key: str, item: Any) -> None:
        if self.targets is not None:
            item = self.targets.check(key, item, self.data)
        super().__setitem__(key, item)


class TrainingTargets:
    """Corrects the labels that a collator sets without knowing this processor.

    TRL's collators render, tokenize and pad, and then set `labels` or `completion_mask` in the output; its trainers
    compute the loss from these alone. Here, placeholders and separators are excluded from them, and labels that are a
    mere copy of the ids are reduced to the answers.
    """

    # The inputs that are corrected: the names of their ids and mask, and the value of a token that is not learned.
    _IDS = {
        "labels": ("input_ids", "attention_mask", -100),
        "completion_mask": ("input_ids", "attention_mask", 0),
        "KL_completion_mask": ("KL_input_ids", "KL_attention_mask", 0),
    }

    def __init__(self, processor: ImageTextProcessor):
        self.processor = processor
        # An error that is raised, and a warning that is given, when labels are set.
        self.problem: str | None = None
        self.remark: str | None = None
        # The ids of each text without padding, and, if it is known, which of them are part of an answer.
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
        """Return a corrected value to store."""
        if name not in self._IDS:
            return value
        if self.problem is not None:
            raise ValueError(self.problem)
        if self.remark is not None:
            logger.warning_once(self.remark)
        ids_name, mask_name, nothing = self._IDS[name]
        ids, mask = features.get(ids_name), features.get(mask_name)
        if not isinstance(value, torch.Tensor) or not isinstance(ids, torch.Tensor) or value.shape != ids.shape:
            return value
        is_text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        is_learned = (value != nothing) & is_text
        is_placeholder = torch.isin(ids, torch.tensor([*self.processor.placeholder_ids.values()], device=ids.device))
        # A collator that selects what is learned leaves out at least the images.
        is_copy = bool((is_learned & is_placeholder).any()) or bool(is_learned[is_text].all())
        ending = self.processor.answer_ending()
        allowed = ~is_placeholder
        for index, row in enumerate(ids):
            places = is_text[index].nonzero().flatten()
            may_learn = self._may_learn(index, row[places].tolist(), is_copy, ending)
            allowed[index, places] &= torch.tensor(may_learn, dtype=torch.bool, device=ids.device)
        if is_copy and bool((is_learned & ~allowed & ~is_placeholder).any()):
            logger.warning_once(
                "The labels of a conversation were a copy of its ids: now only its answers are learned, as this model "
                "was trained. With TRL, pass `assistant_only_loss=True` to do the same."
            )
        return value.masked_fill(~allowed, nothing)

    def _may_learn(self, index: int, ids: list[int], is_copy: bool, ending: tuple[list[int], list[int]]) -> list[bool]:
        """Tell which ids of a row may be learned: of the text that was encoded, and of a completion after it."""
        known = self.rows[index] if index < len(self.rows) else []
        if ids[: len(known)] != known[: len(ids)]:
            return [True] * len(ids)
        answers = self.answers[index] if self.answers is not None else []
        completion = ids[len(known) :]
        # If there is no answer in the text or after it, the collator decides what is learned.
        front = answers if is_copy and (any(answers) or (answers and completion)) else [True] * len(known)
        return [*front[: len(ids)], *self._of_completion(completion, *ending)]

    @staticmethod
    def _of_completion(ids: list[int], ending: list[int], separator: list[int]) -> list[bool]:
        """Tell which ids of a completion may be learned: all but the separator after the answer."""
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
    """Refuse to sanitize if the mark of user text is not known: its placeholders would be taken for images."""
    if not _CAN_SANITIZE:
        raise NotImplementedError("`sanitize_control_tokens` needs a newer transformers. Upgrade it.")
    if _UNMARKED is None:
        raise NotImplementedError(
            "`sanitize_control_tokens` is not supported with this release of transformers: its mark of user text is "
            "not known. Upgrade mgllava, or do not set it and remove control tokens from user text yourself."
        )


def as_texts(images: Any, text: Any) -> list[str] | None:
    """Return a list of strings; raise a `ValueError` for anything else."""
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


def is_empty(value: Any) -> bool:
    """Tell whether nothing is given: `None`, or a list without values."""
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or (hasattr(value, "shape") and 0 in value.shape)


class ProcessLock:
    """A reentrant lock that copies, pickles and forked processes do not share: each gets a free lock."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():  # a thread that does not exist here may have held it
            self._renew()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["ProcessLock"], tuple[()]]:
        return type(self), ()


def _given(inputs: Mapping[str, Any], name: str) -> Any:
    """Return the rows of an input; an empty tuple if it is absent."""
    return () if inputs.get(name) is None else inputs[name]


def as_tensor(rows: Any) -> torch.Tensor:
    """Stack rows, unless they are a tensor already."""
    return rows if isinstance(rows, torch.Tensor) else torch.stack([torch.as_tensor(row) for row in rows])


__all__ = [
    "ImageTextInputs",
    "ImageTextProcessor",
    "ProcessLock",
    "TrainingTargets",
    "as_tensor",
    "as_texts",
    "is_empty",
]
