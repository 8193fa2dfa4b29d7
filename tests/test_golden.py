"""The original's numbers through the public interface: convert, load, process, run."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.golden_cases import (
    GOLDEN,
    IMAGE_ID,
    NUM_FUSED_TOKENS,
    VOCAB_SIZE,
    case,
    cases,
    expand_placeholders,
    load_json,
    load_tensors,
    process,
    recorded_stages,
    run,
    stage_pairs,
    thinned,
)

# Limits of the golden README: float32 sums in another order differ far less.
PIXELS, FEATURES, LOGITS, LOSS = 1e-6, 5e-5, 3e-4, 1e-4


def assert_near(actual, expected, limit):
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def assert_stages_equal(stages, tensors):
    limits = {"pixel_values_aux": PIXELS, "pixel_values": PIXELS, "logits": LOGITS}
    compared = set()
    for stage, actual, expected in stage_pairs(stages, tensors):
        assert_near(actual, expected, limits.get(stage, FEATURES))
        compared.add(stage)
    return compared


def greedy(model, inputs, steps=20):
    output = model.generate(**inputs, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


IMAGE_CASES = [golden["name"] for golden in cases("image")]


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_inputs_equal_golden(processor, name):
    golden, tensors = case(name), load_tensors(f"cases/{name}")
    inputs = process(processor, golden, return_box_labels=True)
    assert inputs["input_ids"][0].tolist() == expand_placeholders(golden["input_ids"], golden["n_boxes"])
    assert inputs["attention_mask"].all()
    assert inputs["boxes"][0].tolist() == golden["boxes"]
    assert inputs["num_boxes"].tolist() == [golden["n_boxes"]]
    assert list(inputs["box_labels"][0]) == golden["labels"]
    assert_near(thinned("pixel_values_aux_s16", inputs["pixel_values"][0]), tensors["pixel_values_aux_s16"], PIXELS)


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_every_stage_and_the_answer_equal_golden(model, processor, name):
    golden, tensors = case(name), load_tensors(f"cases/{name}")
    inputs = process(processor, golden)
    stages = run(model, inputs)
    compared = assert_stages_equal(stages, tensors)
    assert compared >= {
        "pixel_values_aux",
        "pixel_values",
        "clip_features",
        "convnext_stage3",
        "fused",
        "inputs_embeds",
        "box_features",
        "box_projected",
        "logits",
    }
    assert stages["logits"].argmax(-1).tolist() == tensors["logits_argmax"].tolist()
    assert greedy(model, inputs) == golden["generated_ids"]


def test_projected_tokens_replace_the_placeholder(model, processor):
    golden, tensors = case("landscape_basic"), load_tensors("cases/landscape_basic")
    stages = run(model, process(processor, golden))
    start = golden["input_ids"].index(-200)
    assert_near(stages["projected"], tensors["inputs_embeds"][start : start + 576], FEATURES)
    assert_near(
        stages["inputs_embeds"][start + 576 : start + 576 + golden["n_boxes"]], tensors["box_projected"], FEATURES
    )


@pytest.mark.parametrize(
    ("checkpoint", "name"), [("iter_5_pretrain.pth", "pretrain_ckpt"), ("iter_8_lora.pth", "lora_ckpt")]
)
def test_other_checkpoints_equal_golden(convert, checkpoint, name):
    repository = convert(checkpoint)
    model = AutoModel.from_pretrained(repository, dtype=torch.float32).eval()
    inputs = process(AutoProcessor.from_pretrained(repository, backend="pil"), case("landscape_basic"))
    tensors = load_tensors(f"cases/{name}")
    assert assert_stages_equal(run(model, inputs), tensors) >= {"box_projected", "logits"}
    if "generated_ids" in tensors:
        assert greedy(model, inputs) == tensors["generated_ids"].tolist()


@pytest.fixture(scope="module")
def convert_state(convert, tmp_path_factory):
    """Convert a state dict of the ablation files as a checkpoint of the pretraining stage."""

    def run(file, prefix):
        tensors = load_tensors(f"ablations/{file}")
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if "projector.model.0.weight" not in state:  # the file has only the box part
            stage_1 = torch.load(GOLDEN / "xtuner" / "iter_5_pretrain.pth", weights_only=True)["state_dict"]
            state = {key: value for key, value in stage_1.items() if not key.startswith("bbox_")} | state
        path = tmp_path_factory.mktemp("checkpoint") / "iter_1.pth"
        torch.save({"meta": {"cfg": ""}, "state_dict": state}, path)
        repository = convert(path)
        model = AutoModel.from_pretrained(repository, dtype=torch.float32).eval()
        return model, AutoProcessor.from_pretrained(repository, backend="pil")

    return run


@pytest.mark.parametrize(
    ("file", "fusion_type"),
    [
        ("model_fuse1", "conv_gate_concat"),
        ("model_fuse2", "channel_concat"),
        ("model_fuse3", "plain_channel_concat"),
    ],
)
def test_fusion_variants_as_whole_models_equal_golden(convert_state, file, fusion_type):
    model, processor = convert_state(file, "state.")
    assert model.config.fusion_type == fusion_type
    stages = run(model, process(processor, case("landscape_basic")))
    assert assert_stages_equal(stages, load_tensors(f"ablations/{file}")) == {
        "fused",
        "projected",
        "box_projected",
        "logits",
    }


@pytest.mark.parametrize(
    ("variant", "box_feature_type"), [("multi_level", "multi_level"), ("last_only", "last_stage")]
)
def test_box_feature_variants_equal_golden(convert_state, variant, box_feature_type):
    tensors = load_tensors("ablations/align_variants")
    model, processor = convert_state("align_variants", f"{variant}.state.")
    assert model.config.box_feature_type == box_feature_type
    stages = run(model, process(processor, case("landscape_basic")))
    assert_near(stages["box_features"], tensors[f"image_{variant}_features"], FEATURES)
    assert_near(stages["box_projected"], tensors[f"image_{variant}"], FEATURES)

    assert_unit_map_equals_golden(model.model.box_projector, variant)


def assert_unit_map_equals_golden(box_projector, variant):
    """The unit check of the set: a map of 16x16 cells for an "image" of 768 px."""
    tensors, features = load_tensors("ablations/align_variants"), []
    levels = tensors["map"].split([16, 24, 32, 48], dim=1)
    hook = box_projector.linear_1.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0][0]))
    with torch.no_grad():
        projected = box_projector(levels, tensors["boxes"].unsqueeze(0))[0]
    hook.remove()
    assert_near(features[0], tensors[f"out_{variant}_features"], FEATURES)
    assert_near(projected, tensors[f"out_{variant}"], FEATURES)


def test_default_box_features_equal_golden_on_the_unit_map(model):
    assert_unit_map_equals_golden(model.model.box_projector, "default")


def batch_inputs(processor, golden):
    """Expand the samples of a batch case, as the original's merge does, and pad on the right."""
    rows, images, boxes = [], [], []
    for sample in golden["samples"]:
        ids, labels = sample["input_ids"], sample["labels"]
        if sample["image"]:
            images.append(Image.open(GOLDEN / "images" / sample["image"]))
            boxes.append(torch.tensor(sample["boxes"]))
            position = ids.index(-200)
            tokens = 576 + len(sample["boxes"])
            labels = labels[:position] + [-100] * tokens + labels[position + 1 :]
            ids = expand_placeholders(ids, len(sample["boxes"]))
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    inputs = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
        )
        for name, value in fill.items()
    }
    inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    inputs["boxes"] = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    inputs["num_boxes"] = torch.tensor([len(entry) for entry in boxes])
    return inputs


@pytest.mark.parametrize("name", ["batch_two_masked", "batch_two_asis", "batch_with_text_only"])
def test_batches_equal_golden(model, processor, name):
    golden, tensors = case(name), load_tensors(f"cases/{name}")
    inputs = batch_inputs(processor, golden)
    with torch.no_grad():
        output = model(**inputs)
    assert output.loss.item() == pytest.approx(golden["loss"], abs=LOSS)

    length = inputs["labels"].shape[1]
    mask = inputs["attention_mask"].bool()
    # The original adds an empty row for a text-only sample; one row per sample is kept here.
    expected = tensors["merged_labels"][: len(golden["samples"]), :length]
    assert torch.equal(inputs["labels"][mask], expected[mask])
    if name == "batch_two_masked":
        assert torch.equal(mask, tensors["merged_attention_mask"].bool())
        with recorded_stages(model) as stages, torch.no_grad():
            model(**inputs)
        # Padding positions, which are not used, hold the embedding of id 0 here and zeros in the original.
        assert_near(stages["inputs_embeds"][mask[0]], tensors["inputs_embeds"][0][mask[0]], FEATURES)
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = inputs["labels"][:, 1:] != -100
    assert_near(output.logits[predicts][:, :VOCAB_SIZE], tensors["logits_at_labels"], LOGITS)


def test_placeholders_in_labels_are_ignored(model, processor):
    golden = case("batch_two_masked")
    inputs = batch_inputs(processor, golden)
    inputs["labels"] = torch.where(inputs["input_ids"] == IMAGE_ID, IMAGE_ID, inputs["labels"])
    with torch.no_grad():
        assert model(**inputs).loss.item() == pytest.approx(golden["loss"], abs=LOSS)


def test_training_text_equals_golden(processor):
    """`apply_chat_template` returns the ids and labels of a whole conversation."""
    prompts, texts = load_json("prompts"), load_json("train_text")["cases"]
    assert prompts["yi_template"] == "qwen_chat"
    golden = texts["vicuna.two_turns_no_system"]
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "What is shown in this picture?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": "What color is it?"},
        {"role": "assistant", "content": "It is red."},
    ]
    conversation[0]["content"][1]["image"] = Image.new("RGB", (64, 48))
    encoded = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encoded["input_ids"][0], encoded["assistant_masks"][0]
    assert list(ids) == expand_placeholders(golden["input_ids"], 1)
    labels = [token if is_target else -100 for token, is_target in zip(ids, trained, strict=True)]
    assert [label for label in labels if label != -100] == [label for label in golden["labels"] if label != -100]
    position = golden["input_ids"].index(-200)
    assert (
        labels[:position] + labels[position + 577 :] == golden["labels"][:position] + golden["labels"][position + 1 :]
    )


VIDEO_CASES = [golden["name"] for golden in cases("video")]


def process_video(processor, golden, **kwargs):
    frames = load_tensors("cases/video_pad")["frames"].numpy()
    video = np.zeros((golden["total_frames"], *frames.shape[1:]), np.uint8)
    video[golden["sampled_frame_indices"]] = frames
    return processor(
        text=f"USER: <video>\n{golden['question']} ASSISTANT:",
        videos=video,
        video_boxes=[golden["raw_frames"]],
        num_frames=golden["num_frames"],
        do_pad=golden["pad_to_square"],
        return_tensors="pt",
        **kwargs,
    )


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_videos_equal_golden(model, processor, name):
    golden, tensors = case(name), load_tensors(f"cases/{name}")
    inputs = process_video(processor, golden, return_box_labels=True, return_metadata=True)
    assert inputs["video_metadata"][0].frames_indices == golden["sampled_frame_indices"]
    assert inputs["video_box_labels"][0] == golden["labels"]
    assert inputs["num_video_boxes"].tolist() == tensors["n_boxes"].tolist()
    counts = inputs["num_video_boxes"].tolist()
    boxes = torch.cat([rows[:count] for rows, count in zip(inputs["video_boxes"], counts, strict=True)])
    assert boxes.tolist() == tensors["boxes"].tolist()
    low, high = inputs["low_res_pixel_values_videos"], inputs["pixel_values_videos"]
    assert_near(low[:, :, 8::16, 8::16].transpose(0, 1), tensors["pixel_values_s16"], PIXELS)
    assert_near(high[:, :, 16::32, 16::32].transpose(0, 1), tensors["pixel_values_aux_s32"], PIXELS)

    ids, video_id = golden["input_ids"], processor.video_token_id
    start = ids.index(golden["video_token_index"])
    length = NUM_FUSED_TOKENS * len(counts) + sum(counts)
    assert inputs["input_ids"][0].tolist() == ids[:start] + [video_id] * length + ids[start + 1 :]
    assert len(inputs["input_ids"][0]) == golden["seq_len"]
    with torch.no_grad():
        stages = {}
        hook = model.model.language_model.register_forward_pre_hook(
            lambda m, i, kwargs: stages.update(embeds=kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        logits = model(**inputs).logits[0, :, :VOCAB_SIZE]
        hook.remove()
    assert_near(stages["embeds"][::4], tensors["inputs_embeds_s4"], FEATURES)
    assert_near(logits[-16:], tensors["logits_last16"], LOGITS)
    assert_near(logits[::64], tensors["logits_s64"], LOGITS)
    if "generated_ids" in golden:
        assert greedy(model, inputs) == golden["generated_ids"]


def test_every_golden_video_is_compared():
    assert len(VIDEO_CASES) == 2
