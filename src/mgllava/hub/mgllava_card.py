"""The model card of MG-LLaVA."""

from huggingface_hub import ModelCardData

from .card_sections import (
    LICENSES,
    Contents,
    License,
    checks,
    citation,
    hub_ids,
    license_section,
    memory_note,
    parameter_table,
    place,
    table,
    terms,
    usage,
)

# Arguments of the conversion, and the names of these parts on the card.
_ORIGINS = {"llm": "language model", "vision_tower": "CLIP", "high_res_tower": "ConvNeXt"}
_MODULES = {
    "language_model": "language model",
    "lm_head": "language model",
    "vision_tower": "CLIP",
    "high_res_vision_tower": "ConvNeXt",
}
_BENCHMARKS = (
    "MMBench-dev",
    "MMBench-test",
    "SEED-I",
    "MMStar",
    "TextVQA",
    "DocVQA",
    "SQA-I",
    "AI2D",
    "VQAv2",
    "MM-Vet",
    "LLaVA-W",
)
# As arXiv 2406.17770 reports them, by language model.
_PAPER_RESULTS = {
    "microsoft/Phi-3-mini-4k-instruct": (73.4, 72.9, 70.2, 35.5, 65.3, 49.3, 73.9, 75.1, 77.9, 47.3, 75.4),
    "lmsys/vicuna-7b-v1.5": (72.1, 71.9, 69.4, 35.1, 67.3, 47.9, 70.8, 69.3, 80.2, 41.0, 75.5),
    "meta-llama/Meta-Llama-3-8B-Instruct": (76.5, 76.6, 71.5, 36.9, 68.1, 49.0, 76.3, 75.6, 80.7, 46.9, 75.5),
    "lmsys/vicuna-13b-v1.5": (72.2, 73.5, 70.8, 34.1, 69.6, 52.1, 74.7, 73.4, 81.2, 46.7, 82.0),
    "01-ai/Yi-1.5-34B-Chat": (80.1, 79.1, 73.7, 47.9, 70.0, 56.1, 77.0, 81.1, 82.0, 48.4, 80.5),
}
# The variant that those results belong to.
_PAPER_VARIANT = {"fusion_type": "conv_gate", "object_merging": "concat", "box_feature_type": "pyramid"}

_CITATION = """\
@article{zhao2024mgllava,
  title   = {MG-LLaVA: Towards Multi-Granularity Visual Instruction Tuning},
  author  = {Zhao, Xiangyu and Li, Xiangtai and Duan, Haodong and Huang, Haian and Li, Yining and Chen, Kai and
             Yang, Hua},
  journal = {arXiv preprint arXiv:2406.17770},
  year    = {2024}
}"""


def mgllava_card(contents: Contents) -> tuple[ModelCardData, list[str]]:
    """Return the metadata and the sections of a card."""
    origins = [contents.argument(argument) for argument in _ORIGINS]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=hub_ids([*origins, contents.argument("checkpoint")]),
        license=LICENSES.get(contents.argument("llm") or "", License("")).identifier,
        tags=["mgllava", "custom_code", "arxiv:2406.17770"],
    )
    return data, [
        f"# {contents.title}",
        "MG-LLaVA ([arXiv 2406.17770](https://arxiv.org/abs/2406.17770)) for transformers: a vision-language model "
        "that reads an image at low resolution with a CLIP ViT, at high resolution with a ConvNeXt, and box by box: "
        "each box becomes a token of its own.",
        _use(contents),
        _numbers(contents),
        *_paper_results(contents),
        _licenses(contents),
        _limits(contents),
        checks(contents),
        citation(_CITATION),
    ]


def _use(contents: Contents) -> str:
    if contents.box_detector:
        image = '{"type": "image", "path": "photo.jpg"}'
        boxes = "The processor finds the boxes of the objects itself, with the detector that it names."
    else:
        image = '{"type": "image", "path": "photo.jpg", "boxes": [[10, 20, 110, 70]]}'
        boxes = "Boxes are `[x1, y1, x2, y2]` in pixels of the upright image. Without boxes, answers get worse."
    return usage(contents, image, boxes, "torch torchvision timm accelerate pillow")


def _numbers(contents: Contents) -> str:
    config = contents.config
    text, clip, high_res = config.text_config, config.vision_config, config.high_res_vision_config
    sizes = {
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads, {text.vocab_size} rows of embeddings",
        "CLIP": f"{clip.num_hidden_layers} layers, width {clip.hidden_size}, {clip.image_size} px",
        "ConvNeXt": f"{high_res.architecture}, depths {list(high_res.depths)}, widths {list(high_res.hidden_sizes)}, "
        f"{high_res.image_size} px",
        "variant": f"fusion {config.fusion_type}, objects {config.object_merging}, box features "
        f"{config.box_feature_type}",
        "tokens per image": f"{config.image_seq_length}, and {config.num_tokens_per_box} for each box",
    }
    return f"""\
## Numbers

{parameter_table(contents, _MODULES, "fusion and projectors")}

{table(("", "size"), sizes.items())}

{memory_note(contents)}"""


def _paper_results(contents: Contents) -> list[str]:
    """Quote the paper's results, if the model was converted with the parts and the variant of the paper."""
    llm = contents.argument("llm")
    variant = {name: getattr(contents.config, name) for name in _PAPER_VARIANT}
    is_tuned = contents.report.get("checkpoint", {}).get("kind") == "sft"
    if llm not in _PAPER_RESULTS or variant != _PAPER_VARIANT or not is_tuned:
        return []
    checkpoint = contents.report.get("sources", {}).get("checkpoint", [])
    digests = ", ".join(f"`{file['file']}` (SHA-256 {file['sha256']})" for file in checkpoint)
    rows = zip(_BENCHMARKS, _PAPER_RESULTS[llm], strict=True)
    return [
        "## Results of the paper\n\n"
        f"What the paper reports for its model with {llm}. These are the authors' numbers for the authors' weights, "
        "with boxes of RAM++ and OWLv2; they were not measured again here. They hold for this repository if it was "
        f"converted from those weights: {digests}.\n\n{table(('benchmark', 'paper'), rows)}"
    ]


def _licenses(contents: Contents) -> str:
    origins = {part: contents.argument(argument) for argument, part in _ORIGINS.items()}
    rows = [(part, place(origin), terms(origin)) for part, origin in origins.items()]
    checkpoint = place(contents.argument("checkpoint"))
    rows.append(("fusion, projectors, tuning", checkpoint, "unknown: ask where the checkpoint came from"))
    for part in ("tagger", "detector"):
        detector = contents.box_detector or {}
        if isinstance(source := detector.get(part), str):
            rows.append((part, place(source, detector.get(f"{part}_revision")), terms(source)))
    return license_section(rows)


def _limits(contents: Contents) -> str:
    config = contents.config
    side = config.high_res_vision_config.image_size
    boxes = (
        "It takes no boxes."
        if config.object_merging == "none"
        else "The model was trained with boxes of RAM++ and OWLv2; boxes from other detectors may lower its accuracy."
    )
    return f"""\
## Limits

- Answers may be wrong, also about what an image shows. Safety was not evaluated.
- {boxes}
- Images are padded to a square and resized to {side} px; details that are too small at that size are lost.
- No benchmark was run on this model."""


__all__ = ["mgllava_card"]
