"""OWLv2 with everything left out that the image does not need: one tower, the class head, and boxes where they count.

Of the 6.2 TFLOP that tagging and detecting take at the released sizes, 93 % are the image tower; it alone runs in low
precision. Text embeddings come from a table, the objectness head has no reader, and boxes are predicted only for the
patches whose score passes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import box_convert
from transformers.utils import logging

from .detector_pixels_mgllava import square_pixels
from .prompt_embeds_mgllava import PromptEmbeds

logger = logging.get_logger(__name__)

_PROMPT = "a photo of "
_PROMPTS_AT_ONCE = 512


class Owlv2Detector:
    """Finds the objects of labels with an `Owlv2ForObjectDetection`.

    The model is taken over: its image tower goes to `device` in `dtype`, heads and final normalisations in fp32; the
    text tower stays on the CPU in fp32 and visits the device only for prompts without an embedding.

    Args:
        model ([`Owlv2ForObjectDetection`]): The detector.
        processor ([`Owlv2Processor`]): Its tokenizer, and the mean and deviation of its pixels.
        device (`torch.device`): Where to detect.
        dtype (`torch.dtype`): Of the image tower.
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
        """Tell text towers apart by the last weights that embeddings go through."""
        digest = hashlib.sha256()
        text_model, projection = self.model.owlv2.text_model, self.model.owlv2.text_projection
        for module in (text_model.embeddings.position_embedding, text_model.final_layer_norm, projection):
            digest.update(module.weight.detach().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def prompt(label: str) -> str:
        """Make the prompt of a label as in 2024."""
        return _PROMPT + label.lower()

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Run the text tower.

        Args:
            prompts (`list[str]`): Prompts.

        Returns:
            `torch.Tensor`: fp32 of shape `(num_prompts, width)`, of length 1 each, on the detector's device.
        """
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
        """Tokenize prompts. The tower is causal and read at the end token, so padding behind the longest is spared."""
        longest = self.model.config.text_config.max_position_embeddings
        encoded = self.processor.tokenizer(prompts, padding="longest", return_tensors="pt")
        if encoded["input_ids"].shape[1] > longest:
            logger.warning(f"Some labels are cut: the detector reads {longest} tokens per prompt.")
            cut = {"truncation": True, "max_length": longest}
            encoded = self.processor.tokenizer(prompts, padding="longest", return_tensors="pt", **cut)
        return encoded

    def pixel_values(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the tower's input.

        Args:
            images (`Sequence[torch.Tensor]`): uint8 RGB of shape `(3, height, width)` each.

        Returns:
            `torch.Tensor`: fp32 of shape `(num_images, 3, side, side)`.
        """
        side = self.model.config.vision_config.image_size
        mean, std = self.processor.image_processor.image_mean, self.processor.image_processor.image_std
        return torch.stack([square_pixels(image, (side, side), mean, std, self.device) for image in images])

    @torch.no_grad()
    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the image tower.

        Args:
            pixel_values (`torch.Tensor`): Shape `(num_images, 3, side, side)`.

        Returns:
            `torch.Tensor`: fp32 of shape `(num_images, num_patches, width)`, what the heads read.
        """
        vision = self.model.owlv2.vision_model
        embeddings = vision.embeddings(pixel_values.to(vision.embeddings.patch_embedding.weight.dtype))
        hidden = vision.encoder(inputs_embeds=vision.pre_layernorm(embeddings)).last_hidden_state
        hidden = vision.post_layernorm(hidden.float())
        return self.model.layer_norm(hidden[:, 1:] * hidden[:, :1])

    @torch.no_grad()
    def class_logits(self, features: torch.Tensor, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Compare each patch with the prompts of its image.

        Args:
            features (`torch.Tensor`): fp32 of shape `(num_images, num_patches, width)`.
            prompts (`Sequence[Sequence[str]]`): The prompts of each image.

        Returns:
            `torch.Tensor`: fp32 of shape `(num_images, num_patches, max_prompts)`, the lowest number where an image
            has fewer prompts than others. The model's own mask would let padding win: it takes the prompt `" "` for a
            real one.
        """
        return self.model.class_predictor(features, *self.prompt_embeds.get(prompts))[0]

    @torch.no_grad()
    def patch_boxes(self, features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Predict the boxes of some patches.

        Args:
            features (`torch.Tensor`): fp32 of shape `(num_selected, width)`.
            patches (`torch.Tensor`): int64 of shape `(num_selected,)`, the number of each patch in the grid.

        Returns:
            `torch.Tensor`: fp32 of shape `(num_selected, 4)`: centre and size, relative to the padded square.
        """
        return torch.sigmoid(self.model.box_head(features) + self.model.box_bias[patches])

    @torch.no_grad()
    def find(
        self, images: Sequence[torch.Tensor], labels: Sequence[Sequence[str]], threshold: float
    ) -> list[tuple[torch.Tensor, list[str], torch.Tensor]]:
        """Find the objects of some images, at most one per patch, in the order of the patches.

        Args:
            images (`Sequence[torch.Tensor]`): uint8 RGB of shape `(3, height, width)` each.
            labels (`Sequence[Sequence[str]]`): What to look for in each image, at least one label.
            threshold (`float`): Scores must be greater.

        Returns:
            `list[tuple]`: Per image fp32 boxes of shape `(n, 4)` (xyxy in pixels of the image, not clipped), n labels
            and fp32 scores of shape `(n,)`, on the CPU.
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
