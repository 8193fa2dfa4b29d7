"""The toy family."""

from .family import Family

TOY = Family(
    title="Toy",
    config="mgllava.modeling.modeling_toy:ToyConfig",
    model="mgllava.modeling.modeling_toy:ToyForConditionalGeneration",
    auto_classes=("AutoModel", "AutoModelForImageTextToText"),
    image_processors={
        "torchvision": "mgllava.processing.processing_toy:ToyImageProcessor",
        "pil": "mgllava.processing.processing_toy:ToyImageProcessorPil",
    },
    processor="mgllava.processing.processing_toy:ToyProcessor",
    chat_templates="mgllava.processing.processing_toy:TOY_CHAT_TEMPLATES",
    source_formats=("mgllava.conversion.toy:SOURCE_FORMAT",),
    trained_whole=("multi_modal_projector",),
    max_text_length=512,
)

__all__ = ["TOY"]
