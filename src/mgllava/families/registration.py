"""Registration of a family with transformers."""

import transformers

from .family import Family, resolve


def register(family: Family) -> None:
    """Register a family with the Auto classes, and make `save_pretrained` copy the code of its classes.

    Args:
        family ([`Family`]): The family.
    """
    config, model = resolve(family.config), resolve(family.model)
    image_processors = {backend: resolve(name) for backend, name in family.image_processors.items()}
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in family.auto_classes:
        getattr(transformers, name).register(config, model, exist_ok=True)
    transformers.AutoImageProcessor.register(config, image_processor_classes=image_processors, exist_ok=True)

    config.register_for_auto_class()
    for model_class in (model, *([resolve(family.base_model)] if family.base_model else [])):
        model_class.register_for_auto_class("AutoModel")
    for image_processor in image_processors.values():
        image_processor.register_for_auto_class()
    if family.video_processor:
        video_processor = resolve(family.video_processor)
        transformers.AutoVideoProcessor.register(config, video_processor, exist_ok=True)
        video_processor.register_for_auto_class()
    if family.processor:
        processor = resolve(family.processor)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        processor.register_for_auto_class()


__all__ = ["register"]
