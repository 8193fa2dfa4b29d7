"""Sizes of the parts.

Both towers give a grid of 8x8: 112 / 14 and 256 / 32. A character of nine pixels at 256 has four left at 112, which is
too few to tell it from others.
"""

from transformers import CLIPConfig, LlamaConfig

IMAGE_SIZE = 256
LOW_RES_IMAGE_SIZE = 112
# One less than a multiple of 64: the placeholder takes the last row.
VOCABULARY_SIZE = 511
CAPTION_LENGTH = 256

HIGH_RES_ARCHITECTURE = "convnext_tiny"
HIGH_RES_DEPTHS = [1, 1, 4, 2]
HIGH_RES_HIDDEN_SIZES = [24, 48, 96, 192]

_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def clip_config() -> CLIPConfig:
    """Describe CLIP, whose vision model is the low-resolution tower. As in the paper its last layer is not used."""
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


def language_model_config() -> LlamaConfig:
    """Describe the language model: a Llama of five layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        **_SPECIAL_TOKENS,
    )


__all__ = [
    "CAPTION_LENGTH",
    "IMAGE_SIZE",
    "LOW_RES_IMAGE_SIZE",
    "VOCABULARY_SIZE",
    "clip_config",
    "language_model_config",
]
