"""The original's numbers, from pictures to answers."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mgllava.modeling.adapters_slime import SlimeProjector, SlimeQueryAdapter, route, sincos_positions
from mgllava.processing.image_processing_slime import choose_grid, fit_size
from tests.slime.golden import (
    GOLDEN,
    NUM_GLOBAL,
    VOCAB_SIZE,
    cases,
    expand,
    image_path,
    load_json,
    normalized_views,
    num_placeholders,
    tensors,
    weights_of_adapter,
)

ONE_IMAGE = [
    *(name for name in cases() if name.startswith("case")),
    *("seven_tiles_2352x336", "five_tiles_400x2000", "thin_3x900", "turn_1", "turn_2", "turn_3", "video_grid_4x2"),
]


def modules():
    return load_file(GOLDEN / "tensors" / "modules.safetensors")


def test_views_are_the_originals_bit_for_bit(slime_processor):
    for case in cases().values():
        if "views" in case and "image" in case:
            inputs = slime_processor.image_processor(image_path(case), return_tensors="pt")
            columns, rows = case["grid_wh"]
            assert inputs["image_grids"].tolist() == [[rows, columns]]
            expected = normalized_views(case["folder"] / case["views"])
            torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["mode_RGBA", "mode_L", "mode_P", "seven_tiles_2352x336", "thin_3x900"])
def test_pixels_of_other_pictures(slime_processor, name):
    case = cases()[name]
    pixels = slime_processor.image_processor(image_path(case), return_tensors="pt")["pixel_values"]
    expected = tensors(case)["pixel_values_sub"]
    torch.testing.assert_close(pixels[:, :, ::16, ::16], expected, atol=1e-6, rtol=0)


def test_grids_and_places_of_68_image_sizes():
    for entry in load_json("cases")["image_grids"]:
        width, height = entry["image_wh"]
        rows, columns = choose_grid(height, width, 336)
        assert [columns, rows] == entry["grid_wh"], entry
        if entry["content_box_ltrb"] is None:
            continue
        fitted_height, fitted_width = fit_size(height, width, rows * 336, columns * 336)
        left, top = (columns * 336 - fitted_width) // 2, (rows * 336 - fitted_height) // 2
        assert [left, top, left + fitted_width, top + fitted_height] == entry["content_box_ltrb"], entry


def inputs_of(case, image_id, processor):
    """Model inputs of a case with one image, from the stored views where there are any."""
    if "views" in case:
        pixels = normalized_views(case["folder"] / case["views"])
        columns, rows = case["grid_wh"]
        grids = torch.tensor([[rows, columns]])
    else:
        image = Image.open(image_path(case))
        pixels, grids = processor.image_processor(image, return_tensors="pt").values()
    ids = expand(tensors(case)["input_ids"][0].tolist(), [num_placeholders(*grids[0].tolist())], image_id)
    ids = torch.tensor([ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grids": grids}


def seen_rows(outputs, input_ids, values, row=0):
    """The rows of a sequence that the language model sees."""
    seen = input_ids != VOCAB_SIZE
    seen[input_ids == VOCAB_SIZE] = outputs.kept_tokens
    return values[row][seen[row]]


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_IMAGE)
def test_one_image(slime, slime_processor, name):
    case = cases()[name]
    expected = tensors(case)
    inputs = inputs_of(case, VOCAB_SIZE, slime_processor)
    outputs = slime(**inputs)
    kept = outputs.kept_tokens[NUM_GLOBAL + 1 :].nonzero().flatten()
    assert outputs.kept_tokens[: NUM_GLOBAL + 1].all()
    selected = expected.get("selected_indices", expected.get("selected_indices_0"))
    assert kept.tolist() == selected.tolist()

    arguments, _, _ = slime.model.embed(
        {name: inputs[name] for name in slime.image_arguments},
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
    )
    embeds = seen_rows(outputs, inputs["input_ids"], arguments["inputs_embeds"])
    for key, value in expected.items():
        if key == "inputs_embeds":
            torch.testing.assert_close(embeds, value, atol=1e-4, rtol=0)
        elif key == "inputs_embeds_sub":
            torch.testing.assert_close(embeds[None, ::6].reshape(value.shape), value, atol=1e-4, rtol=0)
        elif key == "inputs_embeds_row_sum":
            torch.testing.assert_close(embeds.sum(-1), value.flatten(), atol=5e-4, rtol=0)

    logits = seen_rows(outputs, inputs["input_ids"], outputs.logits)[:, :VOCAB_SIZE]
    if "logits" in expected:
        torch.testing.assert_close(logits[expected["logit_positions"]], expected["logits"], atol=5e-4, rtol=0)
    if "logits_last64" in expected:
        torch.testing.assert_close(logits[None, -64:], expected["logits_last64"], atol=5e-4, rtol=0)
    if "last_logits" in expected:
        torch.testing.assert_close(logits[-1], expected["last_logits"], atol=5e-4, rtol=0)
    if "generated_ids" in expected:
        answer = slime.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.tolist() == expected["generated_ids"][0].tolist()


@torch.no_grad()
def test_stages_of_the_vision_path(slime, slime_processor):
    case = cases()["case0_landscape_640x360"]
    expected = tensors(case)
    pixels = inputs_of(case, VOCAB_SIZE, slime_processor)["pixel_values"]
    projector, compressor = slime.model.multi_modal_projector, slime.model.local_compressor
    features = slime.model.vision_tower(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features[0], expected["vision_features_global"], atol=1e-4, rtol=0)
    stride = expected["row_strides"][0]
    torch.testing.assert_close(features[:, ::stride], expected["vision_features_sub"], atol=1e-4, rtol=0)
    torch.testing.assert_close(projector.gate_weights(features[0]), expected["gates"], atol=1e-4, rtol=0)
    experts = {
        "mlp_expert_sub": projector.project(features[:1])[0],
        "attn_expert_sub": projector.project(projector.query_adapter(features[:1]))[0],
    }
    for name, tokens in experts.items():
        torch.testing.assert_close(tokens[::8], expected[name], atol=1e-4, rtol=0)
    compressed = compressor(features[1:])
    torch.testing.assert_close(compressed, expected["local_compressed"], atol=1e-4, rtol=0)
    raster = slime.model._arrange(projector.project(compressed), 2, 2)
    torch.testing.assert_close(raster, expected["local_raster"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_answers_of_a_left_padded_batch(slime, slime_processor):
    case = cases()["left_padded_generation"]
    expected = tensors(case)
    images = [Image.open(image_path(case, name)) for name in case["images"]]
    pixels, grids = slime_processor.image_processor(images, return_tensors="pt").values()
    rows = []
    for ids, mask, grid in zip(expected["input_ids"], expected["attention_mask"], grids, strict=True):
        ids = ids[mask.bool()].tolist()
        rows.append(torch.tensor(expand(ids, [num_placeholders(*grid.tolist())], VOCAB_SIZE)))
    pad = {"batch_first": True, "padding_side": "left"}
    ids = torch.nn.utils.rnn.pad_sequence(rows, **pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **pad)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grids": grids}
    kept = slime(**inputs).kept_tokens.split([num_placeholders(*grid) for grid in grids.tolist()])
    for index, tokens in enumerate(kept):
        assert tokens[NUM_GLOBAL + 1 :].nonzero().flatten().tolist() == expected[f"selected_indices_{index}"].tolist()
    answers = slime.generate(**inputs, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    assert answers.tolist() == expected["generated_ids"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["single_view_4d", "two_images_4d"])
def test_images_of_one_view(slime, slime_processor, name):
    case = cases()[name]
    expected = tensors(case)
    images = [Image.open(image_path(case, image)) for image in case.get("images", [case.get("image")])]
    prompt = slime_processor.tokenizer.decode(
        [slime_processor.image_token_id if token < 0 else token for token in expected["input_ids"][0, 1:].tolist()]
    )
    features = slime_processor.image_processor(images, do_tile=False, return_tensors="pt")
    assert features["image_grids"].tolist() == [[0, 0]] * len(images)
    if "pixel_values_sub" in expected:
        pixels = features["pixel_values"][:, :, ::16, ::16]
        torch.testing.assert_close(pixels, expected["pixel_values_sub"], atol=1e-6, rtol=0)
    ids = torch.tensor([expand(expected["input_ids"][0].tolist(), [NUM_GLOBAL] * len(images), VOCAB_SIZE)])
    text = slime_processor(images, case.get("prompt", prompt), do_tile=False, return_tensors="pt")
    if "prompt" in case:
        assert text["input_ids"].tolist() == ids.tolist()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}
    outputs = slime(**inputs)
    assert outputs.kept_tokens.all()
    logits = outputs.logits[:, -64:, :VOCAB_SIZE]
    torch.testing.assert_close(logits, expected["logits_last64"], atol=5e-4, rtol=0)
    answer = slime.generate(**inputs, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    assert answer.tolist() == expected["generated_ids"].tolist()


@torch.no_grad()
def test_text_alone(slime):
    expected = tensors(cases()["text_only"])
    ids = expected["input_ids"]
    torch.testing.assert_close(slime(ids).logits[..., :VOCAB_SIZE], expected["logits"], atol=5e-4, rtol=0)
    answer = slime.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert answer[:, ids.shape[1] :].tolist() == expected["generated_ids"].tolist()


SWITCHES = {
    "use_global_only": {"branch": "global"},
    "use_local_only": {"branch": "local"},
    "mm_learnable_gated_0": {"forced_expert": 0},
    "mm_learnable_gated_1": {"forced_expert": 1},
    "mm_patch_merge_type_flat": {"local_order": "flat"},
    "mm_resampler_topp_1.0": {"router_top_p": 1.0},
    "mm_resampler_topp_0.5": {"router_top_p": 0.5},
}


@torch.no_grad()
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_the_configuration(golden_model, slime_processor, switch):
    expected = load_file(GOLDEN / "tensors" / "switches.safetensors")
    model = golden_model(**SWITCHES[switch])
    outputs = model(**inputs_of(cases()["case1_portrait_300x700"], VOCAB_SIZE, slime_processor))
    visual = outputs.image_hidden_states[outputs.kept_tokens]
    torch.testing.assert_close(visual[::8], expected[f"{switch}.visual_sub"], atol=1e-4, rtol=0)
    torch.testing.assert_close(visual.sum(-1), expected[f"{switch}.visual_row_sum"], atol=5e-4, rtol=0)


@torch.no_grad()
def test_tiles_that_are_not_compressed(golden_model, slime_processor):
    """The original cuts this prompt at 2,048 tokens; its first ones are compared."""
    case = cases()["no_sampler_spatial"]
    expected = tensors(case)
    model = golden_model(num_local_queries=None)
    pixels, grids = slime_processor.image_processor(image_path(case), return_tensors="pt").values()
    ids = torch.tensor([expand(expected["input_ids"][0].tolist(), [5 * NUM_GLOBAL], VOCAB_SIZE)])
    images = {"pixel_values": pixels, "image_grids": grids}
    embeds = model.model.embed(images, input_ids=ids)[0]["inputs_embeds"][:, :2048]
    torch.testing.assert_close(embeds[:, ::6], expected["inputs_embeds_sub"], atol=1e-4, rtol=0)
    logits = model(inputs_embeds=embeds).logits[:, -64:, :VOCAB_SIZE]
    torch.testing.assert_close(logits, expected["logits_last64"], atol=5e-4, rtol=0)
    assert model(input_ids=ids, **images).kept_tokens.all()


@torch.no_grad()
def test_query_adapter():
    found = modules()
    adapter = SlimeQueryAdapter(32, 9)
    adapter.num_heads = 2  # one for each 128 channels in every published size
    adapter.load_state_dict(weights_of_adapter(found, "resampler_plain.weights."))
    for suffix in ("", "_same_grid"):
        tokens = adapter(found[f"resampler_plain.x{suffix}"])
        torch.testing.assert_close(tokens, found[f"resampler_plain.y{suffix}"], atol=1e-4, rtol=0)
    positions = adapter.key_positions(25)
    torch.testing.assert_close(positions, found["resampler_plain.key_pos_5x5"].to(positions), atol=1e-4, rtol=0)


@torch.no_grad()
def test_gated_projector():
    found = load_file(GOLDEN / "tensors" / "module_gated_adapter.safetensors")
    projector = SlimeProjector(128, 48, 576, None).eval()
    projector.query_adapter.load_state_dict(weights_of_adapter(found, "weights.attn."))
    for number, layer in ((0, projector.linear_1), (2, projector.linear_2)):
        layer.load_state_dict({kind: found[f"weights.projection.{number}.{kind}"] for kind in ("weight", "bias")})
    projector.gate.copy_(found["weights.w_gate"])
    tokens = found["x"].float()[None]
    torch.testing.assert_close(projector(tokens)[0], found["y"], atol=1e-4, rtol=0)
    torch.testing.assert_close(projector.gate_weights(tokens)[0], found["gates"], atol=1e-4, rtol=0)
    torch.testing.assert_close(projector(tokens.flip(1))[0, ::4], found["y_batch_item1_sub"], atol=1e-4, rtol=0)
    torch.testing.assert_close(projector.project(found["x_short"].float()), found["y_short"], atol=1e-4, rtol=0)
    for expert in (0, 1):
        projector.forced_expert = expert
        torch.testing.assert_close(projector(tokens)[0, ::4], found[f"y_forced_{expert}"], atol=1e-4, rtol=0)


def test_noise_of_the_gate(monkeypatch):
    found = load_file(GOLDEN / "tensors" / "module_gated_adapter.safetensors")
    projector = SlimeProjector(128, 48, 576, None).train()
    projector.gate.data.copy_(found["weights.w_gate"])
    monkeypatch.setattr(torch, "randn_like", lambda scores: found["train_noise"].view_as(scores))
    torch.testing.assert_close(
        projector.gate_weights(found["x"].float()), found["train_gates"].float(), atol=1e-4, rtol=0
    )


def test_position_tables():
    found = modules()
    for name in ("128x4", "32x3", "64x12"):
        width, size = map(int, name.split("x"))
        assert torch.equal(sincos_positions(size, width).half(), found[f"sincos.{name}"])
    adapter = SlimeQueryAdapter(64, 144)
    positions = adapter.key_positions(576)
    torch.testing.assert_close(positions, found["sincos.64x12_to_24x24_fp32"], atol=1e-6, rtol=0)


def test_selections_of_the_router():
    found = modules()
    local, text, mask = found["router.local"], found["router.text"], found["router.mask"].bool()
    _, scores = route(local, text, mask, 0.95, 1.0)
    # The stored values are probabilities.
    torch.testing.assert_close(scores.softmax(0), found["router.cosine"].softmax(0), atol=1e-4, rtol=0)
    for entry in load_json("cases")["modules"]["selection_table"]:
        kept, _ = route(local, text, mask, entry["topp"], entry["temp"])
        assert kept.nonzero().flatten().tolist() == entry["selected"], entry


def test_prompts_and_ids(slime_processor):
    for case in load_json("cases")["conversations"]:
        if case["template"] != "v1":
            continue
        turns = [text for text in case["messages"] if text is not None]
        roles = ("user", "assistant")
        conversation = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
        has_prompt = case["messages"][-1] is None
        prompt = slime_processor.apply_chat_template(conversation, add_generation_prompt=has_prompt)
        assert prompt == f"<s>{case['prompt']}"
    for case in load_json("cases")["tokenization"]:
        num_images = case["text"].count("<image>")
        image = Image.new("RGB", (336, 336))
        inputs = slime_processor([image] * num_images or None, case["text"], do_tile=False)
        assert inputs["input_ids"][0] == expand(case["ids"], [NUM_GLOBAL] * num_images, VOCAB_SIZE)
