"""The family MG-LLaVA (arXiv 2406.17770)."""

from .family import Family

MGLLAVA = Family(
    title="MG-LLaVA",
    config="mgllava.modeling:MGLlavaConfig",
    model="mgllava.modeling:MGLlavaForConditionalGeneration",
    auto_classes=("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    image_processors={
        "torchvision": "mgllava.processing:MGLlavaImageProcessor",
        "pil": "mgllava.processing:MGLlavaImageProcessorPil",
    },
    video_processor="mgllava.processing:MGLlavaVideoProcessor",
    base_model="mgllava.modeling:MGLlavaModel",
    processor="mgllava.processing:MGLlavaProcessor",
    chat_templates="mgllava.processing:CHAT_TEMPLATES",
    source_formats=("mgllava.conversion.xtuner:XTUNER",),
    card="mgllava.hub.mgllava_card:mgllava_card",
    parts=("llm", "vision_tower", "high_res_tower"),
    build="mgllava.conversion.build:build_mgllava",
    trained_whole=("fusion", "multi_modal_projector", "box_projector", "object_attention"),
    # 2,048 tokens minus the 576 of an image.
    max_text_length=1472,
)

__all__ = ["MGLLAVA"]
