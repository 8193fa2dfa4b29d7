"""Names of parameters in XTuner checkpoints and in model folders of MG-LLaVA."""

from mgllava.conversion.parts import LANGUAGE_MODEL_TO_MODEL, Rules, rename

XTUNER_TO_MODEL: Rules = (
    *((f"llm.{theirs}", ours) for theirs, ours in LANGUAGE_MODEL_TO_MODEL),
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

# Checkpoints have these only if they were saved with their frozen parameters.
XTUNER_TOWERS_TO_MODEL: Rules = (
    ("visual_encoder.vision_model.", "model.vision_tower."),
    ("visual_encoder_aux.vision_stem.", "model.high_res_vision_tower.stem."),
    ("visual_encoder_aux.vision_stages.", "model.high_res_vision_tower.stages."),
)


def to_xtuner(name: str) -> str | None:
    """Return XTuner's name of a parameter of the model; `None` for the towers, which its checkpoints lack."""
    return rename(name, tuple((ours, theirs) for theirs, ours in XTUNER_TO_MODEL))


__all__ = ["XTUNER_TOWERS_TO_MODEL", "XTUNER_TO_MODEL", "to_xtuner"]
