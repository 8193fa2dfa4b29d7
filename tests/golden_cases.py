"""Access to the golden numbers under `tests/golden` (see the README there)."""

import contextlib
import json
import re
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

# The id of the placeholder in the original, and here: the first id after the 420 of the vocabulary.
REFERENCE_IMAGE_ID, IMAGE_ID, VOCAB_SIZE = -200, 420, 420
NUM_FUSED_TOKENS = 576


@cache
def load_json(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def cases(kind: str) -> list[dict]:
    return [case for case in load_json("cases")["cases"] if case["kind"] == kind]


def case(name: str) -> dict:
    return next(case for case in load_json("cases")["cases"] if case["name"] == name)


def load_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def expand_placeholders(ids: list[int], num_boxes: int, fill: int = IMAGE_ID) -> list[int]:
    """Replace the single placeholder of the original by one per embedding of the image."""
    position = ids.index(REFERENCE_IMAGE_ID)
    return ids[:position] + [fill] * (NUM_FUSED_TOKENS + num_boxes) + ids[position + 1 :]


# Subsampling of the golden tensors, by their names. Tensors of tokens have no channels in front.
THINNED = {
    "pixel_values_aux_s16": lambda t: t[:, 8::16, 8::16],
    "pixel_values_s8": lambda t: t[:, 4::8, 4::8],
    "convnext_stage3_s2": lambda t: t[:, ::2, ::2],
}


def thinned(name, tensor):
    if name in THINNED:
        return THINNED[name](tensor)
    stem, _, suffix = name.rpartition("_")
    if stem and suffix.startswith("s") and suffix[1:].isdigit():
        return tensor[:: int(suffix[1:])]
    return tensor[-16:] if name.endswith("_last16") else tensor


def process(processor, golden, **kwargs):
    return processor(
        Image.open(GOLDEN / golden["image"]),
        golden["prompt"],
        boxes=[{"boxes": golden["raw_boxes"], "labels": golden["raw_labels"], "scores": golden["raw_scores"]}],
        box_limit_mode=golden["limit_mode"],
        box_limit=golden["limit_num"],
        iou_threshold=golden["iou_threshold"],
        do_pad=golden["pad_image_to_square"],
        return_tensors="pt",
        **kwargs,
    )


@contextlib.contextmanager
def recorded_stages(model):
    """Record the output of each stage for the first image, under the names of the golden set."""
    stages, parts = {}, model.model

    hooks = [
        parts.vision_tower.register_forward_pre_hook(lambda m, i: stages.update(pixel_values=i[0][0])),
        parts.vision_tower.register_forward_hook(
            lambda m, i, o: stages.update(clip_features=o.last_hidden_state[0, 1:])
        ),
        parts.high_res_vision_tower.register_forward_hook(
            lambda m, i, o: stages.update(convnext_stage3=o.feature_maps[-1][0], feature_maps=o.feature_maps)
        ),
        parts.fusion.register_forward_hook(lambda m, i, o: stages.update(fused=o[0])),
        parts.multi_modal_projector.register_forward_hook(lambda m, i, o: stages.update(projected=o[0])),
        parts.box_projector.linear_1.register_forward_pre_hook(lambda m, i: stages.update(box_features=i[0][0])),
        parts.box_projector.register_forward_hook(lambda m, i, o: stages.update(box_projected=o[0])),
        parts.language_model.register_forward_pre_hook(
            lambda m, i, kwargs: stages.update(inputs_embeds=kwargs["inputs_embeds"][0]), with_kwargs=True
        ),
    ]
    try:
        yield stages
    finally:
        for hook in hooks:
            hook.remove()


def run(model, inputs):
    with recorded_stages(model) as stages, torch.no_grad():
        stages["logits"] = model(**inputs).logits[0, :, :VOCAB_SIZE]
    stages["pixel_values_aux"] = inputs["pixel_values"][0]
    return stages


def stage_pairs(stages: dict, tensors: dict):
    """Yield name, output and expected output of every stage in the golden set."""
    for name, expected in tensors.items():
        names = (s for s in stages if name == s or re.fullmatch(rf"{s}_(s|last)\d+", name))
        stage = next(names, None)
        if stage is not None and expected.dtype == torch.float32:
            yield stage, thinned(name, stages[stage]), expected
