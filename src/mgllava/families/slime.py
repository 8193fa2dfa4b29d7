"""The family SliME (arXiv 2406.08487)."""

from .family import Family

SLIME = Family(
    title="SliME",
    config="mgllava.modeling:SlimeConfig",
    model="mgllava.modeling:SlimeForConditionalGeneration",
    auto_classes=("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    image_processors={
        "torchvision": "mgllava.processing:SlimeImageProcessor",
        "pil": "mgllava.processing:SlimeImageProcessorPil",
    },
    base_model="mgllava.modeling:SlimeModel",
    processor="mgllava.processing:SlimeProcessor",
    chat_templates="mgllava.processing:SLIME_CHAT_TEMPLATES",
    source_formats=(
        "mgllava.conversion.slime:SLIME",
        "mgllava.conversion.slime:SLIME_LORA",
        "mgllava.conversion.slime:SLIME_STAGE",
    ),
    card="mgllava.hub.slime_card:slime_card",
    parts=("llm", "vision_tower"),
    build="mgllava.conversion.build:build_slime",
    trained_whole=("multi_modal_projector", "local_compressor"),
    # 2,048 tokens less those of a global view.
    max_text_length=1472,
    original_labels="mgllava.training.slime_labels:SlimeLabels",
    images_depend_on_text=True,
    values_without_text={"router_top_p": 1.0, "branch": "both"},
)

__all__ = ["SLIME"]
