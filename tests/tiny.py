"""Small models with random weights, and inputs for them: 96 px images, a 3x3 grid of tokens."""

import torch
from transformers import CONFIG_MAPPING

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, SlimeConfig, SlimeForConditionalGeneration

IMAGE_TOKEN_ID, VOCAB_SIZE = 100, 128
IMAGE_SIZE, NUM_FUSED_TOKENS = 96, 9
# Arguments of the configuration: the published model, and models that use the other kinds of modules.
VARIANTS = {
    "published": {},
    "fused_to_box": {"object_merging": "fused_to_box", "fusion_type": "resampler", "box_feature_type": "last_stage"},
    "box_to_fused": {
        "object_merging": "box_to_fused",
        "fusion_type": "patch_info_mining",
        "box_feature_type": "multi_level",
    },
    "low_resolution": {"object_merging": "none", "fusion_type": "none"},
}

_TEXT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that answers depend on the image.
    "initializer_range": 0.4,
}


_VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}


def tiny_config(llm: str = "llama", text_config: dict | None = None, **kwargs) -> MGLlavaConfig:
    sizes = {**_TEXT_SIZES, **({"head_dim": 8} if llm == "qwen3" else {}), **(text_config or {})}
    kwargs.setdefault("image_token_id", IMAGE_TOKEN_ID)
    kwargs.setdefault("unpadded_vocab_size", IMAGE_TOKEN_ID)
    return MGLlavaConfig(
        text_config=CONFIG_MAPPING[llm](**sizes),
        vision_config=_VISION_SIZES,
        high_res_vision_config={"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24], "image_size": IMAGE_SIZE},
        box_multi_level_size=20,
        **kwargs,
    )


def tiny_model(*args, seed: int = 0, **kwargs) -> MGLlavaForConditionalGeneration:
    """Build a model with random parameters, including those that start at zero."""
    torch.manual_seed(seed)
    model = MGLlavaForConditionalGeneration(tiny_config(*args, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("model.language_model", "lm_head")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def random_boxes(*shape: int, size: int = IMAGE_SIZE, seed: int = 0) -> torch.Tensor:
    """Draw int64 boxes inside a square of `size` pixels, of shape `(*shape, 4)`."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size + 1, (*shape, 2, 2), generator=generator)
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def tiny_inputs(
    box_counts: list[list[int]], tokens_per_box: int = 1, padding_side: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Make a batch of prompts: `box_counts[i]` lists the number of boxes of each image in prompt i."""
    generator = torch.Generator().manual_seed(seed)
    counts = [count for prompt in box_counts for count in prompt]
    rows = []
    for index, prompt in enumerate(box_counts):
        ids = [1, *torch.randint(3, 90, (2 + index,), generator=generator).tolist()]
        for count in prompt:
            ids += [IMAGE_TOKEN_ID] * (NUM_FUSED_TOKENS + tokens_per_box * count)
            ids += torch.randint(3, 90, (3,), generator=generator).tolist()
        rows.append(torch.tensor(ids))
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=padding_side),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True, padding_side=padding_side
        ),
    }
    if counts:
        boxes = torch.zeros(len(counts), max(counts), 4, dtype=torch.int64)
        for index, count in enumerate(counts):
            boxes[index, :count] = random_boxes(count, seed=seed + index)
        pixels = torch.randn(len(counts), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        inputs |= {"pixel_values": pixels, "boxes": boxes, "num_boxes": torch.tensor(counts)}
    return inputs


VIDEO_TOKEN_ID = 101


def tiny_video_inputs(
    prompts: list[list[int | list[int]]], padding_side: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Make a batch of prompts with images (their number of boxes) and videos (the number of boxes of each frame)."""
    generator = torch.Generator().manual_seed(seed)
    rows, images, videos = [], [], []
    for index, prompt in enumerate(prompts):
        ids = [1, *torch.randint(3, 90, (2 + index,), generator=generator).tolist()]
        for item in prompt:
            counts = item if isinstance(item, list) else [item]
            (videos if isinstance(item, list) else images).append(counts)
            token = VIDEO_TOKEN_ID if isinstance(item, list) else IMAGE_TOKEN_ID
            ids += [token] * (NUM_FUSED_TOKENS * len(counts) + sum(counts))
            ids += torch.randint(3, 90, (3,), generator=generator).tolist()
        rows.append(torch.tensor(ids))
    pad = {"batch_first": True, "padding_side": padding_side}
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, **pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **pad),
    }
    for groups, names in (
        (images, ("pixel_values", "boxes", "num_boxes")),
        (videos, ("pixel_values_videos", "video_boxes", "num_video_boxes")),
    ):
        counts = [count for group in groups for count in group]
        if not counts:
            continue
        boxes = torch.zeros(len(counts), max(counts), 4, dtype=torch.int64)
        for index, count in enumerate(counts):
            boxes[index, :count] = random_boxes(count, seed=seed + index)
        # Drawn item by item: those of a prompt do not depend on the others.
        pixels = torch.stack(
            [
                torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed + index))
                for index in range(len(counts))
            ]
        )
        inputs |= dict(zip(names, (pixels, boxes, torch.tensor(counts)), strict=True))
    if videos:
        size = _VISION_SIZES["image_size"]
        inputs["low_res_pixel_values_videos"] = torch.randn(
            len(inputs["pixel_values_videos"]), 3, size, size, generator=torch.Generator().manual_seed(seed)
        )
        inputs["num_video_frames"] = torch.tensor([len(group) for group in videos])
    return inputs


def one_prompt_with_videos(
    inputs: dict[str, torch.Tensor], prompts: list[list[int | list[int]]], index: int
) -> dict[str, torch.Tensor]:
    """Return one prompt of a batch of `tiny_video_inputs`, without its padding."""
    mask = inputs["attention_mask"][index].bool()
    single = {"input_ids": inputs["input_ids"][index : index + 1, mask]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])

    def count(items: list, kind: type) -> int:
        return sum(len(item) if kind is list else 1 for item in items if isinstance(item, kind))

    before = [item for prompt in prompts[:index] for item in prompt]
    for kind, names in (
        (int, ("pixel_values", "boxes", "num_boxes")),
        (list, ("pixel_values_videos", "low_res_pixel_values_videos", "video_boxes", "num_video_boxes")),
    ):
        first, number = count(before, kind), count(prompts[index], kind)
        if number:
            single |= {name: inputs[name][first : first + number] for name in names}
    if frames := [len(item) for item in prompts[index] if isinstance(item, list)]:
        single["num_video_frames"] = torch.tensor(frames)
    return single


def one_prompt(inputs: dict, box_counts: list[list[int]], index: int) -> dict[str, torch.Tensor]:
    """Return one prompt of a batch of `tiny_inputs`, without its padding."""
    mask = inputs["attention_mask"][index].bool()
    single = {"input_ids": inputs["input_ids"][index : index + 1, mask]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    first = sum(len(prompt) for prompt in box_counts[:index])
    images = slice(first, first + len(box_counts[index]))
    if box_counts[index]:
        most = max(box_counts[index])
        single |= {"pixel_values": inputs["pixel_values"][images], "boxes": inputs["boxes"][images, :most]}
        single["num_boxes"] = inputs["num_boxes"][images]
    return single


# Tokens of a tile of the small SliME model, before the router.
NUM_LOCAL_TOKENS = 4


def tiny_slime(llm: str = "llama", text_config: dict | None = None, seed: int = 0, **kwargs):
    """Build a SliME model with random parameters: views of 42 px, 9 tokens of the whole image, 4 of each tile."""
    torch.manual_seed(seed)
    sizes = {**_TEXT_SIZES, **({"head_dim": 8} if llm == "qwen3" else {}), **(text_config or {})}
    values = {
        "image_token_id": IMAGE_TOKEN_ID,
        "unpadded_vocab_size": IMAGE_TOKEN_ID,
        "separator_token_id": 5,
        "num_local_queries": NUM_LOCAL_TOKENS,
        "router_top_p": 0.6,
        **kwargs,
    }
    config = SlimeConfig(text_config=CONFIG_MAPPING[llm](**sizes), vision_config=_VISION_SIZES, **values)
    model = SlimeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("model.language_model", "lm_head")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def slime_inputs(tile_counts: list[list[int]], padding_side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Batch of prompts: `tile_counts[i]` lists the number of tiles of each image in prompt i, 0 for one view."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, prompt in enumerate(tile_counts):
        ids = [1, *torch.randint(3, 90, (2 + index,), generator=generator).tolist()]
        for count in prompt:
            ids += [IMAGE_TOKEN_ID] * (NUM_FUSED_TOKENS + (1 + NUM_LOCAL_TOKENS * count if count else 0))
            ids += torch.randint(3, 90, (3,), generator=generator).tolist()
        rows.append(torch.tensor(ids))
    pad = {"batch_first": True, "padding_side": padding_side}
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, **pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **pad),
    }
    if counts := [count for prompt in tile_counts for count in prompt]:
        size = _VISION_SIZES["image_size"]
        pixels = torch.randn(sum(1 + count for count in counts), 3, size, size, generator=generator)
        grids = torch.tensor([[1, count] if count else [0, 0] for count in counts])
        inputs |= {"pixel_values": pixels, "image_grids": grids}
    return inputs


def one_slime_prompt(inputs: dict, tile_counts: list[list[int]], index: int) -> dict[str, torch.Tensor]:
    """Cut one prompt out of a batch of `slime_inputs`, without its padding."""
    mask = inputs["attention_mask"][index].bool()
    single = {"input_ids": inputs["input_ids"][index : index + 1, mask]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    if tile_counts[index]:
        first = sum(len(prompt) for prompt in tile_counts[:index])
        view = sum(1 + count for prompt in tile_counts[:index] for count in prompt)
        views = sum(1 + count for count in tile_counts[index])
        single["pixel_values"] = inputs["pixel_values"][view : view + views]
        single["image_grids"] = inputs["image_grids"][first : first + len(tile_counts[index])]
    return single
