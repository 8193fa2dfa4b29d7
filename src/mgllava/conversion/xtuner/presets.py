"""The parts that the authors' models were trained from."""

_TOWERS = {
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "high_res_tower": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
}

# Arguments of `convert_checkpoint` for each model of the paper. Their repository seems to have no Yi checkpoint.
PRESETS: dict[str, dict[str, str]] = {
    "phi3-mini": {"llm": "microsoft/Phi-3-mini-4k-instruct", "prompt_template": "phi3", **_TOWERS},
    "vicuna-7b": {"llm": "lmsys/vicuna-7b-v1.5", "prompt_template": "vicuna", **_TOWERS},
    "vicuna-13b": {"llm": "lmsys/vicuna-13b-v1.5", "prompt_template": "vicuna", **_TOWERS},
    "llama3-8b": {"llm": "meta-llama/Meta-Llama-3-8B-Instruct", "prompt_template": "llama3", **_TOWERS},
    "yi-34b": {"llm": "01-ai/Yi-1.5-34B-Chat", "prompt_template": "yi", **_TOWERS},
}


__all__ = ["PRESETS"]
