"""What the published models were trained from."""

_VISION_TOWER = "openai/clip-vit-large-patch14-336"

# Arguments of `convert_checkpoint` for each published model.
PRESETS: dict[str, dict[str, str]] = {
    "slime-vicuna-7b": {"vision_tower": _VISION_TOWER, "prompt_template": "v1"},
    "slime-llama3-8b": {"vision_tower": _VISION_TOWER, "prompt_template": "llama3"},
    "slime-vicuna-13b": {"vision_tower": _VISION_TOWER, "prompt_template": "v1"},
}
LORA_PRESETS: dict[str, dict[str, str]] = {
    "slime-llama3-70b": {
        "llm": "meta-llama/Meta-Llama-3-70B-Instruct",
        "vision_tower": _VISION_TOWER,
        "prompt_template": "llama3",
    },
}

__all__ = ["LORA_PRESETS", "PRESETS"]
