"""Configurations of the parts.

Both towers have a grid of 8x8 cells: 112 / 14 and 256 / 32. A character of twelve pixels at 256 has only five at 112,
too few to recognize it.
"""

from transformers import CLIPConfig, LlamaConfig, Owlv2Config

from mgllava import RamPlusConfig
from small_world.pictures import CAPTION_LENGTH
from small_world.scenes import SHAPES

IMAGE_SIZE = 256
LOW_RES_IMAGE_SIZE = 112
DETECTOR_IMAGE_SIZE = 256
TAGGER_IMAGE_SIZE = 192
# One less than a multiple of 64: the placeholder takes the last row.
VOCABULARY_SIZE = 511

# Low, because a wrong tag costs little (the detector finds nothing for it), but an object without its tag is lost.
TAG_THRESHOLD = 0.1

HIGH_RES_ARCHITECTURE = "convnext_tiny"
HIGH_RES_DEPTHS = [1, 1, 4, 2]
HIGH_RES_HIDDEN_SIZES = [24, 48, 96, 192]

_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def clip_config() -> CLIPConfig:
    """Return the configuration of CLIP, whose vision model, without its last layer, is the low-resolution tower."""
    return CLIPConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": LOW_RES_IMAGE_SIZE,
            "patch_size": 14,
        },
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CAPTION_LENGTH,
            "vocab_size": VOCABULARY_SIZE,
            **_SPECIAL_TOKENS,
        },
        projection_dim=128,
    )


def detector_config(vocabulary: dict[str, int]) -> Owlv2Config:
    """Return the configuration of OWLv2; `vocabulary` has the ids `pad`, `bos` and `eos`, and the `size`."""
    return Owlv2Config(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": DETECTOR_IMAGE_SIZE,
            "patch_size": 16,
        },
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "vocab_size": vocabulary["size"],
            "pad_token_id": vocabulary["pad"],
            "bos_token_id": vocabulary["bos"],
            "eos_token_id": vocabulary["eos"],
        },
        projection_dim=64,
    )


def tagger_config(num_descriptions: int) -> RamPlusConfig:
    """Return the configuration of RAM++, whose tags are the shapes, each with `num_descriptions`."""
    return RamPlusConfig(
        image_size=TAGGER_IMAGE_SIZE,
        embed_dim=24,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=6,
        drop_path_rate=0.0,
        projection_dim=language_model_config().hidden_size,
        num_descriptions=num_descriptions,
        hidden_size=96,
        num_hidden_layers=1,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(SHAPES)),
        thresholds=[TAG_THRESHOLD] * len(SHAPES),
    )


def language_model_config() -> LlamaConfig:
    """Return the configuration of the language model, a Llama of four layers."""
    hidden_size = 128
    # The standard deviation 1 / sqrt(width) keeps the variance of activations. The usual 0.02 fits a width of 2,500;
    # at 128 it makes attention uniform, and the model does not learn to look things up for thousands of steps.
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=hidden_size**-0.5,
        **_SPECIAL_TOKENS,
    )


__all__ = [
    "DETECTOR_IMAGE_SIZE",
    "IMAGE_SIZE",
    "LOW_RES_IMAGE_SIZE",
    "TAGGER_IMAGE_SIZE",
    "VOCABULARY_SIZE",
    "clip_config",
    "detector_config",
    "language_model_config",
    "tagger_config",
]
