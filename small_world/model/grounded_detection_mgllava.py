"""Any zero-shot detector of transformers, through its own processor and its own post-processing."""

import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch


class GroundedDetector:
    """Finds the objects of labels with any `AutoModelForZeroShotObjectDetection`.

    Images are batched where they have one size and one list of labels, for then nothing is padded and the results are
    those of one image at a time. Grounding DINO reports the words of the prompt that it found, which may be a part of
    a label, or parts of several: the box gets the label that is most like them, or is dropped if there is no word.

    Args:
        model ([`PreTrainedModel`]): The detector; it goes to `device`.
        processor ([`ProcessorMixin`]): Its processor.
        device (`torch.device`): Where to detect.
        dtype (`torch.dtype`): If not fp32, the model computes under autocast in it.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device, dtype: torch.dtype):
        self.model, self.processor, self.device, self.dtype = model.eval().to(device), processor, device, dtype
        post_process = processor.post_process_grounded_object_detection
        self._options = inspect.signature(post_process).parameters

    @torch.no_grad()
    def find(
        self, images: Sequence[torch.Tensor], labels: Sequence[Sequence[str]], threshold: float
    ) -> list[tuple[torch.Tensor, list[str], torch.Tensor]]:
        """Find the objects of some images, in the order of the detector.

        Args:
            images (`Sequence[torch.Tensor]`): uint8 RGB of shape `(3, height, width)` each.
            labels (`Sequence[Sequence[str]]`): What to look for in each image.
            threshold (`float`): Scores must be greater.

        Returns:
            `list[tuple]`: Per image fp32 boxes of shape `(n, 4)` (xyxy in pixels of the image, not clipped), n labels
            and fp32 scores of shape `(n,)`, on the CPU.
        """
        groups: dict[Any, list[int]] = {}
        for index, (image, of_image) in enumerate(zip(images, labels, strict=True)):
            groups.setdefault((image.shape, tuple(of_image)), []).append(index)
        found: dict[int, tuple[torch.Tensor, list[str], torch.Tensor]] = {}
        for (_, of_group), indices in groups.items():
            results = self._find([images[index] for index in indices], list(of_group), threshold)
            found.update(zip(indices, results, strict=True))
        return [found[index] for index in range(len(images))]

    def _find(
        self, images: list[torch.Tensor], labels: list[str], threshold: float
    ) -> list[tuple[torch.Tensor, list[str], torch.Tensor]]:
        """Find the objects of images that have one size and one list of labels."""
        if not any(labels):  # the empty prompt of 2024 is a habit of OWLv2 alone
            return [(torch.zeros(0, 4), [], torch.zeros(0)) for _ in images]
        text = [list(labels) for _ in images]
        inputs = self.processor(images=images, text=text, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.model(**inputs)
        for name, value in outputs.items():  # scores and thresholds in fp32
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                outputs[name] = value.float()
        options: dict[str, Any] = {
            "threshold": threshold,
            "target_sizes": [tuple(image.shape[1:]) for image in images],
        }
        # A box whose best word is just above the threshold would otherwise have no label.
        available = {"text_labels": text, "text_threshold": threshold}
        options.update({name: value for name, value in available.items() if name in self._options})
        results = self.processor.post_process_grounded_object_detection(outputs, **options)
        return [self._named(found, labels) for found in results]

    @staticmethod
    def _named(found: dict[str, Any], labels: list[str]) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Give each box of an image one of the labels."""
        names = [_closest_label(phrase, labels) for phrase in found["text_labels"]]
        kept = [index for index, name in enumerate(names) if name is not None]
        return found["boxes"].cpu()[kept], [name for name in names if name is not None], found["scores"].cpu()[kept]


def _closest_label(phrase: str, labels: list[str]) -> str | None:
    """Find the label that a detector's phrase is most like; `None` if the phrase has no word."""
    if phrase in labels:
        return phrase
    words = " ".join(re.findall(r"\w+", re.sub(r"\[\w+\]", " ", phrase)))  # special tokens are in brackets
    by_lower_case = {label.lower(): label for label in reversed(labels)}
    closest = difflib.get_close_matches(words, by_lower_case, n=1, cutoff=0.0) if words else []
    return by_lower_case[closest[0]] if closest else None
