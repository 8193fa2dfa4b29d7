"""Train the small OWLv2, which finds the shapes of the small world by their names."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import CLIPTokenizer, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

from small_world.frames import cells_of_centers
from small_world.scenes import ANY_SHAPE, SHAPES

from .architecture import DETECTOR_IMAGE_SIZE, detector_config
from .objectives import count_right
from .towers import Normalize

_PAD, _START, _END = "!", "<|startoftext|>", "<|endoftext|>"
# A box is found if its score and its IoU are greater than this; the authors' box files have the same threshold.
_SCORE = 0.2
_OVERLAP = 0.5


def prompts() -> list[str]:
    """Return the prompts of the box detector: one for each shape, then one for any shape."""
    return [f"a photo of {tag}" for tag in (*SHAPES, ANY_SHAPE)]


def make_tokenizer() -> CLIPTokenizer:
    """Train a tokenizer of CLIP's type on the prompts; other words are split into characters.

    The end token has the highest id, by which OWLv2 finds it.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(prompts()[:-1], trainer)
    learned = bpe.get_vocab()
    # Any character can be the last one of a word.
    words = sorted({*learned, *(character + "</w>" for character in alphabet)} - {_PAD})
    vocabulary = {word: index for index, word in enumerate([_PAD, *words, _START, _END])}
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=_PAD)


class DetectorTraining(nn.Module):
    """Trains OWLv2: each object is assigned to the patch that contains its center; all other patches are negatives.

    This is simpler than the matching of the paper (arXiv 2306.09683), and suits OWLv2, whose boxes are offsets from
    patches.
    """

    def __init__(self):
        super().__init__()
        self.tokenizer = make_tokenizer()
        vocabulary = {name: getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        self.model = Owlv2ForObjectDetection(detector_config({"size": len(self.tokenizer), **vocabulary}))
        self._initialize_heads()
        self.normalize = Normalize()
        encoded = self.tokenizer(prompts(), padding=True, return_tensors="pt")
        self.register_buffer("input_ids", encoded["input_ids"], persistent=False)
        self.register_buffer("attention_mask", encoded["attention_mask"], persistent=False)

    def _initialize_heads(self) -> None:
        """Start with small weights; transformers starts with a standard deviation of 1, as if they were loaded."""
        heads = (self.model.class_head, self.model.box_head, self.model.objectness_head)
        for linear in (module for head in heads for module in head.modules() if isinstance(module, nn.Linear)):
            linear.reset_parameters()
        # Logits start at about 10 * (cosine - 0.5), a low score, because nearly all patches are negatives.
        for linear, bias in (
            (self.model.class_head.logit_scale, 9.0),
            (self.model.class_head.logit_shift, -0.5),
            (self.model.objectness_head.dense2, -4.0),
        ):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, bias)

    def forward(self, pixel_values: torch.Tensor, boxes: torch.Tensor, attributes: torch.Tensor) -> dict[str, Any]:
        """Compute the loss of a batch of `Pictures`."""
        text = self.model.owlv2.text_model(self.input_ids, attention_mask=self.attention_mask).pooler_output
        queries = F.normalize(self.model.owlv2.text_projection(text), dim=-1)
        feature_map = self.model.image_embedder(self.normalize(pixel_values))[0]
        grid = feature_map.shape[1]
        features = feature_map.flatten(1, 2)
        logits = self.model.class_predictor(features, queries.expand(len(features), -1, -1))[0]
        objectness = self.model.objectness_predictor(features)

        images, objects = (attributes[..., 0] >= 0).nonzero(as_tuple=True)
        patches = cells_of_centers(boxes, grid, DETECTOR_IMAGE_SIZE)[images, objects]
        shapes = attributes[images, objects, 0]
        wanted = torch.zeros_like(logits)
        wanted[images, patches, shapes] = 1
        wanted[images, patches, -1] = 1
        class_loss = sigmoid_focal_loss(logits, wanted, alpha=0.25, reduction="sum")
        object_loss = sigmoid_focal_loss(objectness, wanted.amax(-1), alpha=0.25, reduction="sum")

        # Only the boxes of patches with an object are learned.
        predicted = box_convert(self.model.box_predictor(features, feature_map)[images, patches], "cxcywh", "xyxy")
        true = boxes[images, objects] / DETECTOR_IMAGE_SIZE
        box_loss = 5 * F.l1_loss(predicted, true, reduction="sum")
        box_loss = box_loss + 2 * generalized_box_iou_loss(predicted, true, reduction="sum")

        overlaps = box_iou(predicted, true).diagonal() > _OVERLAP
        scores = logits.sigmoid()
        seen = (scores[images, patches].amax(-1) > _SCORE) & overlaps
        reported = scores.amax(-1) > _SCORE
        named = logits[images, patches, :-1].argmax(-1) == shapes
        counts = {
            "recall": count_right(seen, torch.ones_like(seen)),
            "precision": count_right(reported & (wanted.amax(-1) > 0), reported),
            "right shapes": count_right(named, torch.ones_like(named)),
        }
        return {"loss": (class_loss + object_loss + box_loss) / max(len(images), 1), "counts": counts}

    def save(self, folder: Path) -> None:
        """Save model and processor as transformers does."""
        self.model.save_pretrained(folder)
        side = {"height": DETECTOR_IMAGE_SIZE, "width": DETECTOR_IMAGE_SIZE}
        Owlv2Processor(Owlv2ImageProcessor(size=side), self.tokenizer).save_pretrained(folder)


__all__ = ["DetectorTraining", "make_tokenizer", "prompts"]
