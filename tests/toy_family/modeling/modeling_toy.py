"""A family for tests: LLaVA under another name."""

from transformers import LlavaConfig, LlavaForConditionalGeneration


class ToyConfig(LlavaConfig):
    """Configuration of the toy family."""

    model_type = "toy"

    def save_pretrained(self, *args, **kwargs):
        """Save the configuration, with every Auto class in `auto_map`."""
        classes = ("AutoModel", "AutoModelForImageTextToText")
        self.auto_map = dict.fromkeys(classes, "modeling_toy.ToyForConditionalGeneration")
        super().save_pretrained(*args, **kwargs)


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    """Model of the toy family."""

    config: ToyConfig
    config_class = ToyConfig


__all__ = ["ToyConfig", "ToyForConditionalGeneration"]
