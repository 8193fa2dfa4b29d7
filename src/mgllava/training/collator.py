"""From samples to batches: what the original's dataset and collate function make of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mgllava.families import takes_boxes

from .errors import SampleError
from .samples import (
    BadSamples,
    MissingBoxes,
    longest_text,
    sample_id,
    sample_images,
    to_conversation,
)

logger = logging.getLogger(__name__)

# A text that ends fewer than this many tokens before its limit leaves little room for boxes.
_NEAR_LIMIT = 50
_IGNORED = -100


@dataclass
class _Row:
    """A sample as tensors; `images` are the image processor's outputs, or `None`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: dict[str, torch.Tensor] | None = None


class MGLlavaDataCollator:
    r"""Makes batches for training from conversations with images and boxes.

    Works with `Trainer` and with TRL's `SFTTrainer`; both need `remove_unused_columns=False`. Text-only samples and
    samples with several images may be mixed. Rows are padded on the right.

    A text is cut at `max_text_length` tokens, an image counting as one. One that comes within 50 tokens of that keeps
    only one box per label, as in the original.

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
        processor ([`MGLlavaProcessor`]): Its chat template must mark the answers (`{% generation %}`).
        max_text_length (`int`, *optional*, defaults to 1472): Tokens of a text, an image counting as one.
        on_bad_sample (`str`, *optional*, defaults to `"error"`): What to do with a sample that cannot be read:
            `"error"`, or `"skip"`: leave it out of its batch, with a warning that names it.
        missing_boxes (`str`, *optional*, defaults to `"error"`): What an image without boxes is: `"error"`, a bad
            sample, or `"empty"`, an image without objects. No detector runs here.
        pad_to_multiple_of (`int`, *optional*): Length of the rows.
        return_sample_ids (`bool`, *optional*, defaults to `False`): Whether batches have `sample_ids` and
            `skipped_samples` (a number) too. [`MGLlavaTrainer`] takes them out again.

    Raises:
        ValueError: If the chat template does not mark answers.
    """

    def __init__(
        self,
        processor: Any,
        max_text_length: int | None = None,
        on_bad_sample: BadSamples = "error",
        missing_boxes: MissingBoxes = "error",
        pad_to_multiple_of: int | None = None,
        return_sample_ids: bool = False,
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
        self._has_seen_boxes = self._has_warned = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples (`Sequence[Mapping]`): Samples as [`to_conversation`] takes them.

        Returns:
            `dict`: `input_ids`, `labels` (-100 where nothing is learnt), `attention_mask` and `position_ids` of shape
            `(batch_size, length)`; where there are images, `pixel_values` `(num_images, 3, height, width)`, `boxes`
            `(num_images, max_boxes, 4)` (int64, xyxy in pixels of `pixel_values`) and `num_boxes` `(num_images,)`.

        Raises:
            SampleError: If a sample cannot be read, unless such samples are skipped.
        """
        rows, ids = [], []
        for sample in samples:
            try:
                rows.append(self._encode(sample))
                ids.append(sample_id(sample))
            except Exception as error:  # whatever a decoder raises
                problem = error
                if not isinstance(error, SampleError):
                    files = [str(image) for image in sample_images(sample) if isinstance(image, str)]
                    where = f" ({', '.join(files)})" if files else ""
                    problem = SampleError(f"Sample {sample_id(sample)}{where}: {error} ({type(error).__name__})")
                if self.on_bad_sample == "error":
                    raise problem from error
                logger.warning("Skipped. %s", problem)
        if not rows:
            # Other processes have a batch; this one takes part with a row that weighs nothing.
            rows = [_Row(torch.tensor([self._pad_id]), torch.tensor([_IGNORED]))]
        batch: dict[str, Any] = self._pad(rows)
        batch |= _join([row.images for row in rows if row.images is not None])
        if self.return_sample_ids:
            batch |= {"sample_ids": ids, "skipped_samples": len(samples) - len(ids)}
        return batch

    @property
    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def _encode(self, sample: Mapping[str, Any]) -> _Row:
        if self.missing_boxes == "empty" and not self._has_seen_boxes and sample_images(sample):
            self._has_seen_boxes = "boxes" in sample
            if not self._has_seen_boxes and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "No sample has had a key `boxes` yet, so its images count as images without objects. If the "
                    "dataset has them, the trainer dropped them: pass it `remove_unused_columns=False`."
                )
        conversation = to_conversation(sample, self.missing_boxes)
        encoded = self._process(conversation)
        ids, learnt = encoded["input_ids"][0], encoded["assistant_masks"][0]
        num_boxes = torch.as_tensor(encoded.get("num_boxes", []), dtype=torch.long)
        runs = self._run_lengths(num_boxes)
        text_length = len(ids) - sum(runs) + len(runs)
        if runs and text_length >= self.max_text_length - _NEAR_LIMIT:
            encoded = self._process(conversation, close_to_max_length=True)
            ids, learnt = encoded["input_ids"][0], encoded["assistant_masks"][0]
            num_boxes = torch.as_tensor(encoded["num_boxes"], dtype=torch.long)
            runs = self._run_lengths(num_boxes)

        kept, num_images = self._cut(ids, runs)
        input_ids = torch.tensor(ids[:kept])
        labels = input_ids.masked_fill(~torch.tensor(learnt[:kept]).bool(), _IGNORED)
        if not bool((labels != _IGNORED).any()):
            raise SampleError(
                f"Sample {sample_id(sample)} has no answer to learn within {self.max_text_length} tokens of text."
            )
        images = None
        if num_images:
            images = {
                "pixel_values": torch.stack([torch.as_tensor(x) for x in encoded["pixel_values"][:num_images]]),
                "boxes": torch.stack([torch.as_tensor(x) for x in encoded["boxes"][:num_images]]),
                "num_boxes": num_boxes[:num_images],
            }
        return _Row(input_ids, labels, images)

    def _process(self, conversation: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
        encoded: Mapping[str, Any] = self.processor.apply_chat_template(
            [conversation],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False, "truncation": False, **options},
        )
        return encoded

    def _run_lengths(self, num_boxes: torch.Tensor) -> list[int]:
        fused, per_box = self.processor.image_seq_length, self.processor.num_tokens_per_box
        return [fused + per_box * count for count in num_boxes.tolist()]

    def _cut(self, ids: Sequence[int], runs: Sequence[int]) -> tuple[int, int]:
        """Find how many ids and images the limit leaves; an image counts as one token and is never cut."""
        position = images = 0
        for _ in range(self.max_text_length):
            if position >= len(ids):
                break
            if ids[position] == self.processor.image_token_id:
                position += runs[images]
                images += 1
            else:
                position += 1
        return position, images

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


def _join(images: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the images of all rows one after the other."""
    if not images:
        return {}
    boxes = [row for of_sample in images for row in of_sample["boxes"]]
    return {
        "pixel_values": torch.cat([of_sample["pixel_values"] for of_sample in images]),
        "boxes": pad_sequence(boxes, batch_first=True),
        "num_boxes": torch.cat([of_sample["num_boxes"] for of_sample in images]),
    }


__all__ = ["MGLlavaDataCollator"]
