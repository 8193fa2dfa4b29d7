"""Names of parameters: in XTuner checkpoints, CLIP and open_clip repositories, and in MG-LLaVA's own repositories."""

import re

# Prefixes, tried in order. Each ends at a dot, so that no name matches two of them.
XTUNER_TO_MODEL: tuple[tuple[str, str], ...] = (
    ("llm.model.", "model.language_model."),
    ("llm.lm_head.", "lm_head."),
    ("projector.model.0.", "model.multi_modal_projector.linear_1."),
    ("projector.model.2.", "model.multi_modal_projector.linear_2."),
    ("bbox_projector.model.0.", "model.box_projector.linear_1."),
    ("bbox_projector.model.2.", "model.box_projector.linear_2."),
    ("multi_level_linear.", "model.box_projector.level_projections."),
    ("fuse_module.slow_conv.", "model.fusion.high_res_conv."),
    ("fuse_module.slow_proj.", "model.fusion.high_res_proj."),
    ("fuse_module.fast_conv.", "model.fusion.low_res_conv."),
    ("fuse_module.fast_proj.", "model.fusion.low_res_proj."),
    ("fuse_module.gate.", "model.fusion.gate."),
)

# Towers are frozen in training, so checkpoints lack them, unless they were saved with frozen parameters.
XTUNER_TOWERS_TO_MODEL: tuple[tuple[str, str], ...] = (
    ("visual_encoder.vision_model.", "model.vision_tower."),
    ("visual_encoder_aux.vision_stem.", "model.high_res_vision_tower.stem."),
    ("visual_encoder_aux.vision_stages.", "model.high_res_vision_tower.stages."),
)

# transformers 5 writes CLIPVisionModel without the prefix, 4 with it.
CLIP_TO_MODEL: tuple[tuple[str, str], ...] = (
    ("vision_model.embeddings.", "model.vision_tower.embeddings."),
    ("vision_model.pre_layrnorm.", "model.vision_tower.pre_layrnorm."),
    ("vision_model.encoder.", "model.vision_tower.encoder."),
    ("vision_model.post_layernorm.", "model.vision_tower.post_layernorm."),
    ("embeddings.", "model.vision_tower.embeddings."),
    ("pre_layrnorm.", "model.vision_tower.pre_layrnorm."),
    ("encoder.", "model.vision_tower.encoder."),
    ("post_layernorm.", "model.vision_tower.post_layernorm."),
)

OPEN_CLIP_TO_MODEL: tuple[tuple[str, str], ...] = (
    ("visual.trunk.stem.", "model.high_res_vision_tower.stem."),
    ("visual.trunk.stages.", "model.high_res_vision_tower.stages."),
)

# Parts of the repositories that the model has no use for: pattern of the source's name, and why.
CLIP_DROPS: tuple[tuple[str, str], ...] = (
    (r"text_model\.", "text tower of CLIP"),
    (r"(text|visual)_projection\.|logit_scale$", "contrastive head of CLIP"),
)
OPEN_CLIP_DROPS: tuple[tuple[str, str], ...] = (
    (r"visual\.trunk\.(head|norm_pre|norm)\.|visual\.head\.", "head of the ConvNeXt"),
    (
        r"(text\.)?(transformer|token_embedding|ln_final)\.|(text\.)?(positional_embedding|text_projection)$",
        "text tower of open_clip",
    ),
    (r"text\.|attn_mask$", "text tower of open_clip"),
    (r"logit_(scale|bias)$", "contrastive head of open_clip"),
)

# The same after renaming.
_BUFFERS = (
    (r"model\.vision_tower\.embeddings\.position_ids$", "buffer, computed from the config"),
    (r"model\.language_model\..*rotary_emb\.inv_freq$", "buffer, computed from the config"),
)
_POST_LAYER_NORM = (r"model\.vision_tower\.post_layernorm\.", "not used: it follows the last layer of CLIP")


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    """Rename by the first prefix that fits.

    Args:
        name (`str`): A parameter's name.
        rules (`tuple[tuple[str, str], ...]`): Prefixes and what replaces them.

    Returns:
        `str | None`: The new name; `None` if no rule fits.
    """
    for prefix, replacement in rules:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return None


def to_xtuner(name: str) -> str | None:
    """Rename a parameter of the model as XTuner does.

    Args:
        name (`str`): Name in the model.

    Returns:
        `str | None`: Name in an XTuner checkpoint; `None` for what XTuner's checkpoints do not hold (the towers).
    """
    return rename(name, tuple((ours, theirs) for theirs, ours in XTUNER_TO_MODEL))


def drop_reason(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    """Say why a source's tensor is not used, by its own name.

    Args:
        name (`str`): Name in the source.
        rules (`tuple[tuple[str, str], ...]`): Patterns and reasons.

    Returns:
        `str | None`: The reason; `None` if it is to be used.
    """
    return next((reason for pattern, reason in rules if re.match(pattern, name)), None)


def model_drop_reason(name: str, stored_clip_layers: int) -> str | None:
    """Say why a renamed tensor has no place in the model.

    Args:
        name (`str`): Name as the model would have it.
        stored_clip_layers (`int`): Layers that the stored CLIP tower has: the published number less the unused last.

    Returns:
        `str | None`: The reason; `None` if it is to be used.
    """
    last_layer = rf"model\.vision_tower\.encoder\.layers\.{stored_clip_layers}\."
    rules = (*_BUFFERS, _POST_LAYER_NORM, (last_layer, "not used: features are taken before the last layer of CLIP"))
    return drop_reason(name, rules)


__all__ = [
    "CLIP_DROPS",
    "CLIP_TO_MODEL",
    "OPEN_CLIP_DROPS",
    "OPEN_CLIP_TO_MODEL",
    "XTUNER_TOWERS_TO_MODEL",
    "XTUNER_TO_MODEL",
    "drop_reason",
    "model_drop_reason",
    "rename",
    "to_xtuner",
]
