"""The family RAM++ (arXiv 2310.15200), an image tagger."""

from .family import Family

RAM_PLUS = Family(
    title="RAM++",
    config="mgllava.ram_plus:RamPlusConfig",
    model="mgllava.ram_plus:RamPlusForImageTagging",
    auto_classes=("AutoModel", "AutoModelForImageClassification"),
    image_processors={
        "torchvision": "mgllava.ram_plus:RamPlusImageProcessor",
        "pil": "mgllava.ram_plus:RamPlusImageProcessorPil",
    },
    source_formats=("mgllava.conversion.ram_plus:RAM_PLUS",),
    card="mgllava.hub.ram_plus_card:ram_plus_card",
)

__all__ = ["RAM_PLUS"]
