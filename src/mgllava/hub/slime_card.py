"""The card of a SliME model."""

from huggingface_hub import ModelCardData

from .card_sections import (
    LICENSES,
    Contents,
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

_MODULES = {"language_model": "language model", "lm_head": "language model", "vision_tower": "CLIP"}
_BENCHMARKS = ("TextVQA", "GQA", "VQAv2", "MMBench", "MMBench-CN", "MMMU val", "LLaVA-W", "MME-P", "MME-C", "MM-Vet")
# As arXiv 2406.08487 and its README report them, by released model.
_PAPER_RESULTS = {
    "yifanzhang114/SliME-vicuna-7B": (64.39, 63.13, 80.32, 69.32, 61.85, 37.20, 76.10, 1544, 383, 35.40),
    "yifanzhang114/SliME-Llama3-8B": (64.76, 63.94, 80.69, 75.00, 71.80, 41.20, 73.90, 1578, 337, 37.40),
    "yifanzhang114/SliME-vicuna-13B": (66.11, 63.60, 80.43, 71.13, 65.20, 38.00, 73.10, 1606, 293, 41.20),
}
# Language models of those releases, for the license.
_LANGUAGE_MODELS = {
    "yifanzhang114/SliME-vicuna-7B": "lmsys/vicuna-7b-v1.5",
    "yifanzhang114/SliME-Llama3-8B": "meta-llama/Meta-Llama-3-8B-Instruct",
    "yifanzhang114/SliME-vicuna-13B": "lmsys/vicuna-13b-v1.5",
}

_CITATION = """\
@article{zhang2024slime,
  title   = {Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models},
  author  = {Zhang, Yi-Fan and Wen, Qingsong and Fu, Chaoyou and Wang, Xue and Zhang, Zhang and Wang, Liang and
             Jin, Rong},
  journal = {arXiv preprint arXiv:2406.08487},
  year    = {2024}
}"""


def slime_card(contents: Contents) -> tuple[ModelCardData, list[str]]:
    """Return the metadata and the sections of a card."""
    checkpoint = contents.argument("checkpoint")
    llm = contents.argument("llm") or _LANGUAGE_MODELS.get(checkpoint or "")
    license = LICENSES.get(llm or "")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=hub_ids([llm, contents.argument("vision_tower"), checkpoint]),
        license=license.identifier if license else None,
        tags=["slime", "custom_code", "arxiv:2406.08487"],
    )
    return data, [
        f"# {contents.title}",
        "SliME ([arXiv 2406.08487](https://arxiv.org/abs/2406.08487)) for transformers: a vision-language model that "
        "reads an image as a whole and in 2 to 7 tiles, and keeps the tokens of tiles that matter for the question.",
        usage(
            contents,
            '{"type": "image", "path": "photo.jpg"}',
            "`processor(images, text, do_tile=False)` shows the model one center-cropped view of each image, as "
            "VLMEvalKit does with the original.",
            "torch torchvision accelerate pillow",
        ),
        _numbers(contents),
        *_paper_results(contents),
        _differences(),
        _licenses(contents, llm),
        _limits(contents),
        checks(contents),
        citation(_CITATION),
    ]


def _numbers(contents: Contents) -> str:
    config = contents.config
    text, clip = config.text_config, config.vision_config
    local = config.num_local_queries
    sizes = {
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads, {text.vocab_size} rows of embeddings",
        "CLIP": f"{clip.num_hidden_layers} layers, width {clip.hidden_size}, {clip.image_size} px",
        "tokens per image": f"{config.num_global_tokens} of the whole image, {config.num_local_tokens} of each tile"
        + ("" if local is None else " before the router"),
        "router": "none" if local is None else f"top-p {config.router_top_p}, temperature {config.router_temperature}",
        "branch, expert": f"{config.branch}, "
        + ("mixed by the gate" if config.forced_expert is None else f"{config.forced_expert} alone"),
    }
    return f"""\
## Numbers

{parameter_table(contents, _MODULES, "adapters")}

{table(("", "size"), sizes.items())}

{memory_note(contents)}"""


def _paper_results(contents: Contents) -> list[str]:
    """Quote the paper's results, if this is the converted form of a released model."""
    checkpoint = contents.argument("checkpoint")
    if checkpoint not in _PAPER_RESULTS:
        return []
    rows = zip(_BENCHMARKS, _PAPER_RESULTS[checkpoint], strict=True)
    return [
        "## Results of the paper\n\n"
        f"What the authors report for {checkpoint}. These are their numbers with their code; they were not measured "
        f"again here.\n\n{table(('benchmark', 'paper'), rows)}"
    ]


def _differences() -> str:
    return """\
## What differs from the original

- The router computes in float32 whatever the model's dtype; the original computes in the model's dtype, which may keep
  a few other tokens.
- Pictures are turned upright by their EXIF orientation; the original does not turn them.
- Several images in one prompt work, each routed by all text of the prompt. Prompts are not cut at 2,048 tokens.
- The default image processor resizes with torchvision; `AutoProcessor.from_pretrained(..., backend="pil")` gives the
  original's pixels.
- Which tokens of an image are kept depends on all text of the prompt, later turns included. A cache of an image must
  not be used for another prompt."""


def _licenses(contents: Contents, llm: str | None) -> str:
    vision_tower = contents.argument("vision_tower") or "openai/clip-vit-large-patch14-336"
    rows = [
        ("language model", place(llm), terms(llm)),
        ("CLIP", place(vision_tower), terms(vision_tower)),
        ("adapters, tuning", place(contents.argument("checkpoint")), "unknown: ask where the checkpoint came from"),
    ]
    return license_section(rows)


def _limits(contents: Contents) -> str:
    size = contents.config.vision_config.image_size
    return f"""\
## Limits

- Answers may be wrong, also about what an image shows. Safety was not evaluated.
- At most 7 tiles of {size} px are made of an image; details that are too small at that size are lost.
- No benchmark was run on this model."""


__all__ = ["slime_card"]
