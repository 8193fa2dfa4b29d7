"""Zero-shot object detectors: OWLv2 without the parts whose output is unused, and any other one of transformers.

OWLv2's image tower takes 93 % of the 6.2 TFLOP of tagging and detecting at the released sizes; it is the only part of
OWLv2 that runs in low precision. Text embeddings are looked up in a table, the objectness head never runs, and boxes
are predicted only for patches whose score exceeds the threshold.
"""

import difflib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.ops import box_convert
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PROMPT = "a photo of "
_PROMPTS_AT_ONCE = 512
_PADDING = 0.5  # of pixels between 0 and 1, before they are normalized


class Owlv2Detector:
    """Finds the objects of labels with an `Owlv2ForObjectDetection`.

    The model is moved: its image tower to `device` in `dtype`, its heads and final normalizations in float32. The text
    tower stays on the CPU in float32, and is on the device only while prompts without an embedding are embedded.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device, dtype: torch.dtype):
        self.model, self.processor, self.device = model.eval(), processor, device
        owlv2 = model.owlv2
        for module in (owlv2.text_model, owlv2.text_projection):
            module.to("cpu", torch.float32)
        vision = owlv2.vision_model
        for module in (vision.embeddings, vision.pre_layernorm, vision.encoder):
            module.to(device, dtype)
        for module in (vision.post_layernorm, model.layer_norm, model.class_head, model.box_head):
            module.to(device, torch.float32)
        model.box_bias = model.box_bias.to(device, torch.float32)
        self.prompt_embeds = PromptEmbeds(self.embed_prompts, self._fingerprint())

    def _fingerprint(self) -> str:
        """Hash weights of the text tower, to recognize the embeddings that it made."""
        digest = hashlib.sha256()
        text_model, projection = self.model.owlv2.text_model, self.model.owlv2.text_projection
        for module in (text_model.embeddings.position_embedding, text_model.final_layer_norm, projection):
            digest.update(module.weight.detach().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def prompt(label: str) -> str:
        """Make the prompt of a label, as for the published box files."""
        return _PROMPT + label.lower()

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Run the text tower: float32 of shape `(num_prompts, width)`, of length 1 each, on the detector's device."""
        tower = (self.model.owlv2.text_model, self.model.owlv2.text_projection)
        try:
            text_model, projection = (module.to(self.device) for module in tower)
            embeds = []
            for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
                encoded = self._encode(prompts[start : start + _PROMPTS_AT_ONCE]).to(self.device)
                pooled = text_model(encoded["input_ids"], attention_mask=encoded["attention_mask"]).pooler_output
                embeds.append(projection(pooled))
        finally:
            for module in tower:
                module.to("cpu")
        return torch.nn.functional.normalize(torch.cat(embeds), dim=-1)

    def _encode(self, prompts: list[str]) -> Any:
        """Tokenize prompts. The tower is causal and read at the end token, so padding to the longest is enough."""
        longest = self.model.config.text_config.max_position_embeddings
        encoded = self.processor.tokenizer(prompts, padding="longest", return_tensors="pt")
        if encoded["input_ids"].shape[1] > longest:
            logger.warning(f"Some labels are cut: the detector reads {longest} tokens per prompt.")
            cut = {"truncation": True, "max_length": longest}
            encoded = self.processor.tokenizer(prompts, padding="longest", return_tensors="pt", **cut)
        return encoded

    def pixel_values(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the tower's input, float32 of shape `(num_images, 3, side, side)`, of uint8 RGB images."""
        side = self.model.config.vision_config.image_size
        mean, std = self.processor.image_processor.image_mean, self.processor.image_processor.image_std
        return torch.stack([square_pixels(image, (side, side), mean, std, self.device) for image in images])

    @torch.no_grad()
    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the image tower: float32 of shape `(num_images, num_patches, width)`, the input of the heads."""
        vision = self.model.owlv2.vision_model
        embeddings = vision.embeddings(pixel_values.to(vision.embeddings.patch_embedding.weight.dtype))
        hidden = vision.encoder(inputs_embeds=vision.pre_layernorm(embeddings)).last_hidden_state
        hidden = vision.post_layernorm(hidden.float())
        return self.model.layer_norm(hidden[:, 1:] * hidden[:, :1])

    @torch.no_grad()
    def class_logits(self, features: torch.Tensor, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Compare each patch with the prompts of its image: float32 of shape `(num_images, num_patches, max_prompts)`.

        Where an image has fewer prompts than others, logits are the lowest float. The model's own mask is not used: it
        treats padding, the prompt `" "`, as a real prompt.
        """
        return self.model.class_predictor(features, *self.prompt_embeds.get(prompts))[0]

    @torch.no_grad()
    def patch_boxes(self, features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Predict the boxes of some patches from their features and their numbers in the grid.

        Returns float32 of shape `(num_selected, 4)`: center and size, relative to the padded square.
        """
        return torch.sigmoid(self.model.box_head(features) + self.model.box_bias[patches])

    @torch.no_grad()
    def find(
        self, images: Sequence[torch.Tensor], labels: Sequence[Sequence[str]], threshold: float
    ) -> list[tuple[torch.Tensor, list[str], torch.Tensor]]:
        """Find the objects of some uint8 RGB images, at most one per patch, in the order of the patches.

        Per image it takes at least one label, and returns float32 boxes of shape `(n, 4)` (xyxy in pixels of the
        image, not clipped), n labels and float32 scores of shape `(n,)` above the threshold, on the CPU.
        """
        features = self.image_features(self.pixel_values(images))
        best = self.class_logits(features, [[self.prompt(label) for label in of] for of in labels]).max(dim=-1)
        scores = torch.sigmoid(best.values)
        image_of, patch_of = torch.where(scores > threshold)
        relative = box_convert(self.patch_boxes(features[image_of, patch_of], patch_of), "cxcywh", "xyxy")
        sides = torch.tensor([max(image.shape[1:]) for image in images], device=self.device)
        boxes = (relative * sides[image_of, None]).cpu()
        chosen, scores = best.indices[image_of, patch_of].cpu(), scores[image_of, patch_of].cpu()

        counts = torch.bincount(image_of, minlength=len(images)).tolist()
        split = zip(boxes.split(counts), chosen.split(counts), scores.split(counts), labels, strict=True)
        return [(box, [of_image[row] for row in rows.tolist()], score) for box, rows, score, of_image in split]


class PromptEmbeds:
    """A table of prompts and their embeddings, to which new prompts are added when they occur.

    `embed` returns float32 embeddings of shape `(num_prompts, width)`; the fingerprint identifies the text tower, and
    saved embeddings of another one are not used.
    """

    def __init__(self, embed: Callable[[list[str]], torch.Tensor], fingerprint: str):
        self._embed = embed
        self._fingerprint = fingerprint
        self._rows: dict[str, int] = {}
        self._table: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, prompts: Sequence[str]) -> None:
        """Embed the prompts that are not in the table."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if missing:
            self._append(missing, self._embed(missing))

    def get(self, prompts: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the prompts of several images, at least one in all.

        Returns float32 embeddings of shape `(num_images, max_prompts, width)` and a bool mask of shape `(num_images,
        max_prompts)` that is `False` where an image has fewer prompts than others.
        """
        self.add([prompt for of_image in prompts for prompt in of_image])
        assert self._table is not None  # there is a prompt
        rows = [torch.tensor([self._rows[prompt] for prompt in of_image]) for of_image in prompts]
        # -1 is not the number of a row, so it marks the padding.
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(self._table.device)
        return self._table[padded.clamp(min=0)], padded >= 0

    def _append(self, prompts: list[str], embeds: torch.Tensor) -> None:
        """Add rows to the table."""
        self._table = embeds if self._table is None else torch.cat([self._table, embeds.to(self._table.device)])
        for prompt in prompts:
            self._rows[prompt] = len(self._rows)

    def save(self, path: str | os.PathLike) -> None:
        """Write all embeddings to a safetensors file, with the prompts in its metadata, atomically."""
        metadata = {"prompts": json.dumps(list(self._rows)), "text_tower": self._fingerprint}
        temporary = f"{os.fspath(path)}.incomplete"
        assert self._table is not None  # callers check `len(self)` first
        save_file({"prompt_embeds": self._table.cpu().contiguous()}, temporary, metadata=metadata)
        os.replace(temporary, path)

    def load(self, path: str | os.PathLike, device: torch.device) -> None:
        """Add the embeddings of a file that [`~PromptEmbeds.save`] wrote, unless another text tower made them."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("text_tower") != self._fingerprint:
                logger.warning(f"Ignoring {os.fspath(path)!r}: another text tower made these embeddings.")
                return
            embeds = file.get_tensor("prompt_embeds")
        prompts = json.loads(metadata.get("prompts", "[]"))
        if embeds.ndim != 2 or len(prompts) != len(embeds) or len(set(prompts)) != len(prompts):
            raise ValueError(
                f"{os.fspath(path)!r} must hold one embedding for each prompt, got {len(prompts)} prompts for a "
                f"tensor of shape {tuple(embeds.shape)}. Remove the file: prompts are then embedded again."
            )
        new = [row for row, prompt in enumerate(prompts) if prompt not in self._rows]
        if new:
            self._append([prompts[row] for row in new], embeds[new].to(device))


@lru_cache(maxsize=8)
def resize_matrix(length: int, new_length: int, device: torch.device) -> torch.Tensor:
    """Make the matrix that resizes one axis: float32 of shape `(new_length, length)`; each row sums to one."""
    # The weights are computed in float64, which not every accelerator has.
    computed_on = device if device.type == "cuda" else torch.device("cpu")
    factor, last = length / new_length, length - 1
    centers = ((torch.arange(new_length, dtype=torch.float64, device=computed_on) + 0.5) * factor - 0.5).abs()
    centers = torch.where(centers > last, 2 * last - centers, centers).clamp(min=0)
    left = centers.floor().clamp(max=max(last - 1, 0))
    right_weight = centers - left

    sigma = max((factor - 1) / 2, 0.0)
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device=computed_on)
    blur = torch.exp(-offsets.square() / (2 * sigma**2)) if radius else torch.ones_like(offsets)
    blur = blur / blur.sum()

    matrix = torch.zeros(new_length, length, dtype=torch.float64, device=computed_on)
    for samples, weights in ((left, 1 - right_weight), ((left + 1).clamp(max=last), right_weight)):
        columns = _mirror((samples[:, None] + offsets).long(), last)
        matrix.scatter_add_(1, columns, weights[:, None] * blur)
    return matrix.to(device=device, dtype=torch.float32)


def _mirror(index: torch.Tensor, last: int) -> torch.Tensor:
    """Fold indices back into `0..last`, without repeating the first and the last sample."""
    index = index.abs() % max(2 * last, 1)
    return torch.where(index > last, 2 * last - index, index)


def square_pixels(
    image: torch.Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> torch.Tensor:
    """Pad an image to a gray square at its right and bottom, blur it, and resize it linearly with mirrored edges.

    The published box files were made in this way. transformers 5 pads with black and clamps the edges, which changes
    the boxes of every image that is not square. The resize is linear and separable, so it is one matrix product per
    axis, on the detector's device.

    Takes uint8 RGB of shape `(3, height, width)`, and the mean and standard deviation per channel of pixels between 0
    and 1; returns normalized float32 of shape `(3, *size)` on `device`.
    """
    height, width = image.shape[1:]
    side = max(height, width)
    # Rows of the matrices sum to one, so the gray part is an offset, and the products leave it out.
    rows = resize_matrix(side, size[0], device)[:, :height]
    columns = resize_matrix(side, size[1], device)[:, :width].T
    pixels = image.to(device).float().mul_(1 / 255).sub_(_PADDING)
    pixels = rows @ (pixels @ columns) if width >= height else (rows @ pixels) @ columns
    scale = pixels.new_tensor(std).reciprocal()[:, None, None]
    shift = (_PADDING - pixels.new_tensor(mean))[:, None, None]
    return pixels.add_(shift).mul_(scale)


class GroundedDetector:
    """Finds the objects of labels with any `AutoModelForZeroShotObjectDetection` and its own processor, on `device`.

    Images are batched if they have one size and one list of labels, because then nothing is padded and the results are
    those of one image at a time. Grounding DINO reports the words of the prompt that it found, which may be a part of
    a label, or parts of several: the box gets the label that is most like them, or is dropped if there is no word. If
    `dtype` is not float32, the model computes under autocast in it.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device, dtype: torch.dtype):
        self.model, self.processor, self.device, self.dtype = model.eval().to(device), processor, device, dtype
        post_process = processor.post_process_grounded_object_detection
        self._options = inspect.signature(post_process).parameters

    @torch.no_grad()
    def find(
        self, images: Sequence[torch.Tensor], labels: Sequence[Sequence[str]], threshold: float
    ) -> list[tuple[torch.Tensor, list[str], torch.Tensor]]:
        """Find the objects of some images, in the order of the detector; see [`Owlv2Detector.find`]."""
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
        if not any(labels):  # only OWLv2 looks for the empty prompt
            return [(torch.zeros(0, 4), [], torch.zeros(0)) for _ in images]
        text = [list(labels) for _ in images]
        inputs = self.processor(images=images, text=text, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.model(**inputs)
        for name, value in outputs.items():  # scores and thresholds in float32
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                outputs[name] = value.float()
        options: dict[str, Any] = {
            "threshold": threshold,
            "target_sizes": [tuple(image.shape[1:]) for image in images],
        }
        # With a higher `text_threshold`, a box whose best word is just above the threshold would have no label.
        available = {"text_labels": text, "text_threshold": threshold}
        options.update({name: value for name, value in available.items() if name in self._options})
        results = self.processor.post_process_grounded_object_detection(outputs, **options)
        return [self._named(found, labels) for found in results]

    @staticmethod
    def _named(found: dict[str, Any], labels: list[str]) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Choose one of the labels for each box of an image."""
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


__all__ = ["GroundedDetector", "Owlv2Detector", "PromptEmbeds", "resize_matrix", "square_pixels"]
