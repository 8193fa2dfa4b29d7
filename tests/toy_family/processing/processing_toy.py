"""Image processors and processor of the toy family: one view of an image, no boxes."""

from transformers.models.clip import CLIPImageProcessor, CLIPImageProcessorPil

from .image_text_processor_common import ImageTextProcessor
from .images_common import fetch_upright
from .text_chunks_common import build_chat_template

TOY_CHAT_TEMPLATES = {
    "toy": build_chat_template(
        system=("", ""), user=("Q: ", ""), generation_prompt=" A:", separator=" ", closed_by_eos=True
    )
}


class ToyImageProcessor(CLIPImageProcessor):
    """Image processor on torchvision."""

    def fetch_images(self, images):
        """Open images as all families of this package do."""
        return fetch_upright(images)


class ToyImageProcessorPil(CLIPImageProcessorPil):
    """Image processor on PIL."""

    def fetch_images(self, images):
        """Open images as all families of this package do."""
        return fetch_upright(images)


class ToyProcessor(ImageTextProcessor):
    """Processor whose images take a fixed number of placeholders."""

    chat_templates = TOY_CHAT_TEMPLATES

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=4, chat_template=None):
        self.image_seq_length = image_seq_length
        super().__init__(image_processor, tokenizer, chat_template)

    def num_image_tokens(self, inputs):
        """Count the placeholders of each image."""
        return [self.image_seq_length] * self.count_images(inputs)


__all__ = ["TOY_CHAT_TEMPLATES", "ToyImageProcessor", "ToyImageProcessorPil", "ToyProcessor"]
