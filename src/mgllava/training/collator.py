"""Collate samples into batches, as the original's dataset and collate function do together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mgllava.families import takes_boxes

from .errors import SampleError
from .samples import (
    BadSamples,
    MissingBoxes,
    ends_with_question,
    labels_of,
    longest_text,
    sample_id,
    sample_images,
    sample_videos,
    to_conversation,
    video_token_of,
)

logger = logging.getLogger(__name__)

# A text that comes this close to the limit, in tokens, leaves little room for boxes.
_NEAR_LIMIT = 50
_IGNORED = -100


@dataclass
class _Row:
    """A sample as tensors; `images` and `videos` have the model inputs of those, and are empty if there are none."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    videos: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # Whether the original loses its labels.
    is_lost: bool = False


class MGLlavaDataCollator:
    r"""Makes batches for training from conversations with images and, if the model takes them, videos and boxes.

    Works with `Trainer` and with TRL's `SFTTrainer`; both need `remove_unused_columns=False`. Samples with several
    images, videos or text only may be mixed. Rows are padded on the right.

    A text is truncated to `max_text_length` tokens, where an image counts as one, and so does a video. If the text
    comes within 50 tokens of that limit, images and frames keep only one box per label, as in the original.

    Example:
        ```python
        sample = {
            "id": "1",
            "image": "cup.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cup."}],
            "boxes": {"boxes": [[10, 20, 110, 70]], "labels": ["cup"], "scores": [0.9]},
        }
        batch = MGLlavaDataCollator(processor)([sample])
        model(**batch).loss
        ```

    Args:
        processor ([`MGLlavaProcessor`]): Processor of the model, of any family of this package. Its chat template must
            mark the answers (`{% generation %}`).
        max_text_length (`int`, *optional*): Longest text in tokens, where an image or a video counts as one; by
            default that of the model family (1472 for MG-LLaVA).
        on_bad_sample (`str`, *optional*, defaults to `"error"`): What to do with a sample that cannot be read: raise
            an `"error"`, or `"skip"` it with a warning that names it.
        missing_boxes (`str`, *optional*, defaults to `"error"`): How to treat an image or a video without boxes: raise
            an `"error"`, or take it for one without objects (`"empty"`). The box detector does not run here.
            Ignored for models that take no boxes.
        pad_to_multiple_of (`int`, *optional*): Pad the rows to a multiple of this length.
        return_sample_ids (`bool`, *optional*, defaults to `False`): Whether to add `sample_ids`, `skipped_samples`
            and `lost_samples` (numbers) to a batch. [`MGLlavaTrainer`] removes them before it calls the model.
        original_labels (`bool`, *optional*, defaults to `False`): For SliME, whether nothing is learned from the
            samples whose labels the original loses: a text holds the end token or the words that open an answer, an
            unknown character, or no answer. By default their answers are learned.
        max_length (`int`, *optional*): Positions of the model, `config.get_text_config().max_position_embeddings`. A
            longer sample, all tokens of its images and videos included, cannot be read. By default there is no limit.

    Raises:
        ValueError: If the chat template does not mark answers, the family of the processor is not known and
            `max_text_length` is not given, or `original_labels` does not apply to this family or chat template.
    """

    def __init__(
        self,
        processor: Any,
        max_text_length: int | None = None,
        on_bad_sample: BadSamples = "error",
        missing_boxes: MissingBoxes = "error",
        pad_to_multiple_of: int | None = None,
        return_sample_ids: bool = False,
        original_labels: bool = False,
        max_length: int | None = None,
    ):
        if "generation" not in str(processor.chat_template or ""):
            raise ValueError(
                "`processor` must have a chat template that marks the answers with {% generation %}, got "
                f"{'one without' if processor.chat_template else 'none'}. See mgllava.processing.CHAT_TEMPLATES."
            )
        self.processor = processor
        self.max_text_length = longest_text(processor) if max_text_length is None else max_text_length
        self.on_bad_sample = on_bad_sample
        self.missing_boxes: MissingBoxes | None = missing_boxes if takes_boxes(processor) else None
        self.pad_to_multiple_of = pad_to_multiple_of
        self.return_sample_ids = return_sample_ids
        self.original_labels = original_labels
        self.max_length = max_length
        self._video_token = video_token_of(processor)
        self._labels = labels_of(processor, must_be_known=original_labels)
        self._has_seen_boxes = self._has_warned = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples (`Sequence[Mapping]`): Samples in LLaVA's form, or with TRL's `messages`; see docs/training.md.

        Returns:
            `dict`: `input_ids`, `labels` (-100 where nothing is learned), `attention_mask` and `position_ids` of shape
            `(batch_size, length)`, and the model inputs of all images and videos. For MG-LLaVA these are
            `pixel_values` `(num_images, 3, height, width)`, `boxes` `(num_images, max_boxes, 4)` (int64, xyxy in
            pixels of `pixel_values`) and `num_boxes` `(num_images,)`, and those of [`MGLlavaVideoProcessor`].

        Raises:
            SampleError: If a sample cannot be read, unless such samples are skipped.
            ImportError: If videos need a decoder that is not installed.
        """
        rows, ids = [], []
        for sample in samples:
            try:
                rows.append(self._encode(sample))
                ids.append(sample_id(sample))
            except ImportError:  # a decoder is missing, which no other sample would change
                raise
            except Exception as error:  # decoders raise errors of any type
                problem = error
                if not isinstance(error, SampleError):
                    sources = [*sample_images(sample), *sample_videos(sample)]
                    files = [str(source) for source in sources if isinstance(source, str)]
                    where = f" ({', '.join(files)})" if files else ""
                    problem = SampleError(f"Sample {sample_id(sample)}{where}: {error} ({type(error).__name__})")
                if self.on_bad_sample == "error":
                    raise problem from error
                logger.warning("Skipped. %s", problem)
        if not rows:
            # This process must take part in the step of the others, with a row that has no weight.
            rows = [_Row(torch.tensor([self._pad_id]), torch.tensor([_IGNORED]))]
        batch: dict[str, Any] = {**self._pad(rows), **self.processor.join_images([row.images for row in rows])}
        if self._video_token is not None:
            batch |= self.processor.join_videos([row.videos for row in rows])
        if self.return_sample_ids:
            batch |= {
                "sample_ids": ids,
                "skipped_samples": len(samples) - len(ids),
                "lost_samples": sum(row.is_lost for row in rows),
            }
        return batch

    @property
    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def _encode(self, sample: Mapping[str, Any]) -> _Row:
        sources = [*sample_images(sample), *sample_videos(sample)]
        if self.missing_boxes == "empty" and not self._has_seen_boxes and sources:
            self._has_seen_boxes = "boxes" in sample or "video_boxes" in sample
            if not self._has_seen_boxes and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "No sample so far has the key `boxes`, so all images are treated as images without objects. If "
                    "the dataset has boxes, the trainer dropped them: pass it `remove_unused_columns=False`."
                )
        conversation = given = to_conversation(sample, self.missing_boxes, self._video_token)
        if self._labels is not None:
            conversation = self._labels.clean(given)
        encoded = self._process(conversation)
        runs = self._runs(encoded)
        lengths = [length for of_token in runs.values() for length in of_token]
        text_length = len(encoded["input_ids"][0]) - sum(lengths) + len(lengths)
        if lengths and self.missing_boxes is not None and text_length >= self.max_text_length - _NEAR_LIMIT:
            encoded = self._process(conversation, close_to_max_length=True)
            runs = self._runs(encoded)

        ids, learned = encoded["input_ids"][0], encoded["assistant_masks"][0]
        kept, numbers = self._cut(ids, runs)
        if self.max_length is not None and kept > self.max_length:
            raise SampleError(self._too_long(sample, kept, runs))
        input_ids = torch.tensor(ids[:kept])
        labels = input_ids.masked_fill(~torch.tensor(learned[:kept]).bool(), _IGNORED)
        is_empty = not bool((labels != _IGNORED).any())
        images = self.processor.take_images(encoded, 0, numbers[self.processor.image_token_id])
        videos = {}
        if self._video_token is not None:
            videos = self.processor.take_videos(encoded, 0, numbers[self.processor.video_token_id])
        if self.original_labels:
            text_ids, _ = self.processor.encode_text(conversation)
            is_lost = ends_with_question(sample) or self._labels.are_lost(given, text_ids, self.max_text_length)
            if is_lost or is_empty:
                return _Row(input_ids, torch.full_like(labels, _IGNORED), images, videos, is_lost=True)
        if is_empty:
            raise SampleError(
                f"Sample {sample_id(sample)} has no answer to learn within {self.max_text_length} tokens of text."
            )
        return _Row(input_ids, labels, images, videos)

    def _process(self, conversation: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
        encoded: Mapping[str, Any] = self.processor.apply_chat_template(
            [conversation],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False, "truncation": False, **options},
        )
        return encoded

    def _runs(self, encoded: Mapping[str, Any]) -> dict[int, list[int]]:
        """Return the numbers of placeholders of each image and each video, by the ids of the placeholders."""
        runs = {self.processor.image_token_id: self.processor.num_image_tokens(encoded)}
        if self._video_token is not None:
            runs[self.processor.video_token_id] = self.processor.num_video_tokens(encoded)
        return runs

    def _cut(self, ids: Sequence[int], runs: Mapping[int, Sequence[int]]) -> tuple[int, dict[int, int]]:
        """Return how many ids are within the limit, and how many images and videos by the ids of their placeholders.

        An image or a video counts as one token and is kept whole.
        """
        position, numbers = 0, dict.fromkeys(runs, 0)
        for _ in range(self.max_text_length):
            if position >= len(ids):
                break
            if (token := ids[position]) in runs:
                position += runs[token][numbers[token]]
                numbers[token] += 1
            else:
                position += 1
        return position, numbers

    def _too_long(self, sample: Mapping[str, Any], length: int, runs: Mapping[int, Sequence[int]]) -> str:
        images = sum(runs[self.processor.image_token_id])
        parts = {"images": images, "videos": sum(map(sum, runs.values())) - images}
        said = ", ".join(f"{number} of them of {name}" for name, number in parts.items() if number)
        advice = "fewer frames (`num_frames`)" if parts["videos"] else "fewer images" if said else "a shorter text"
        return (
            f"Sample {sample_id(sample)} has {length} tokens{f' ({said})' if said else ''}, but the model has "
            f"{self.max_length} positions (`max_position_embeddings`). Use {advice}, set `max_text_length`, or start "
            "from a model with more positions (`mgllava convert --max-positions`)."
        )

    def _pad(self, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
        input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=self._pad_id)
        labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=_IGNORED)
        if self.pad_to_multiple_of:
            missing = -input_ids.shape[1] % self.pad_to_multiple_of
            input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=self._pad_id)
            labels = torch.nn.functional.pad(labels, (0, missing), value=_IGNORED)
        lengths = torch.tensor([len(row.input_ids) for row in rows]).unsqueeze(1)
        positions = torch.arange(input_ids.shape[1]).expand(len(rows), -1)
        mask = positions < lengths
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": mask.long(),
            "position_ids": positions * mask,
        }


__all__ = ["MGLlavaDataCollator"]
