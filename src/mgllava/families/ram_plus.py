"""The family RAM++ (arXiv 2310.15200), an image tagger."""

from .family import Family

RAM_PLUS = Family(
    title="RAM++",
    config="mgllava.modeling:RamPlusConfig",
    model="mgllava.modeling:RamPlusForImageTagging",
    auto_classes=("AutoModel", "AutoModelForImageClassification"),
    image_processors={
        "torchvision": "mgllava.processing:RamPlusImageProcessor",
        "pil": "mgllava.processing:RamPlusImageProcessorPil",
    },
    source_formats=("mgllava.conversion.ram_plus:RAM_PLUS",),
    card="mgllava.hub.ram_plus_card:ram_plus_card",
)

__all__ = ["RAM_PLUS"]
