"""The parts of the small model are trained on the inputs that they get in the model, and build a model together."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_convert, clip_boxes_to_image
from transformers import AutoImageProcessor, AutoModel, LlamaForCausalLM

from mgllava import BoxDetector, MGLlavaImageProcessor, build_from_parts
from mgllava.training import MGLlavaDataCollator
from small_world.dataset import write_dataset
from small_world.frames import cells_of_centers, centered_frame, cornered_frame, squeezed_frame
from small_world.oracle_scenes import ANSWERS, CAPTION, Lesson, OracleScenes, collate_oracle_scenes
from small_world.parts import architecture
from small_world.parts.architecture import DETECTOR_IMAGE_SIZE, IMAGE_SIZE, TAGGER_IMAGE_SIZE
from small_world.parts.detector import DetectorTraining, make_tokenizer, prompts
from small_world.parts.language_model import LanguageModelTraining
from small_world.parts.objectives import CELL_LABELS, BoxAttributes, CellContents, CellPlace, features_at_centers
from small_world.parts.tagger import TaggerTraining, descriptions
from small_world.parts.tokenizer import train_tokenizer
from small_world.parts.towers import HighResTowerTraining, VisionTowerTraining
from small_world.parts.training import collate_pictures, train_part
from small_world.pictures import ATTRIBUTES, CHARACTERS, Pictures
from small_world.questions import GRID, KINDS, ask, reading_order
from small_world.scenes import ANY_SHAPE, COLORS, SHAPES, TEXTURES, make_scene
from small_world.texts import conversation_texts

FRAME = centered_frame(IMAGE_SIZE)
SIDE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-world")
    write_dataset(folder, "train", 12, processes=1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(data):
    words = " ".join((*SHAPES, *COLORS, *TEXTURES, *CHARACTERS))  # twelve pictures do not contain all of them
    tokenizer = train_tokenizer([*conversation_texts(data), *[words] * 10])
    tokenizer.add_tokens("<image>", special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def batch(data, tokenizer):
    pictures = Pictures(data, FRAME, tokenizer)
    return collate_pictures([pictures[index] for index in range(4)])


def processed(data, numbers):
    """Return the output of the model's image processor for pictures and their true boxes."""
    records = {record["id"]: record for record in json.loads((data / "boxes.json").read_text())}
    processor = MGLlavaImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIDE)
    images = [Image.open(data / "images" / f"{number:06d}.jpg") for number in numbers]
    boxes = [records[f"train/{number}"]["boxes"] for number in numbers]
    return processor(images, boxes=boxes, return_tensors="pt")


def train_a_little(module, batch, learning_rate):
    """Take twelve steps on one batch, and return the losses and the outputs of the last step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)
    losses = []
    for _ in range(12):
        outputs = module(**batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(outputs["loss"].item())
    return losses, outputs


def test_pictures_equal_the_output_of_the_image_processor(data, batch):
    expected = processed(data, range(4))
    pixels = HighResTowerTraining().normalize(batch["pixel_values"])
    torch.testing.assert_close(pixels, expected["pixel_values"], atol=1e-5, rtol=0)
    for number, count in enumerate(expected["num_boxes"]):
        # The boxes of the model are integers, as in the original.
        difference = batch["boxes"][number, :count] - expected["boxes"][number, :count]
        assert difference.abs().max() <= 1
        assert count == (batch["attributes"][number, :, 0] >= 0).sum()


def test_attributes_are_those_of_the_scene(batch):
    for number in range(4):
        objects, attributes = make_scene("train", number).objects, batch["attributes"][number].tolist()
        for item, (shape, color, _, character) in zip(objects, attributes, strict=False):
            assert (SHAPES[shape], list(COLORS)[color]) == (item.shape, item.color)
            assert (CHARACTERS[character - 1] if character else None) == item.character


def test_prepared_pictures_are_cached(data, batch):
    cache = data / f"pixels-centered-{IMAGE_SIZE}.npy"
    before = cache.stat().st_mtime_ns
    assert np.array_equal(Pictures(data, FRAME)[1]["pixel_values"], batch["pixel_values"][1])
    assert cache.stat().st_mtime_ns == before


def test_cells_contain_the_objects_with_their_center_in_them():
    contents = CellContents(CELL_LABELS, grid=4, image_size=64)
    nn.init.eye_(contents.head.weight)
    nn.init.zeros_(contents.head.bias)
    # A star (3) in green (1) with the character 5 around (20, 40), which is in row 2, column 1; then padding.
    boxes = torch.tensor([[[10.0, 30.0, 30.0, 50.0], [0.0, 0.0, 0.0, 0.0]]])
    attributes = torch.tensor([[[3, 1, 0, 5], [-1, -1, -1, -1]]])
    wanted = torch.zeros(1, 16, CELL_LABELS)
    wanted[0, 2 * 4 + 1, [3, len(SHAPES) + 1, len(SHAPES) + len(COLORS) + 4]] = 1
    loss, counts = contents(60 * wanted - 30, boxes, attributes)
    assert loss < 1e-6
    assert counts.tolist() == [[1, 1]]
    assert contents(60 * wanted.roll(1, 1) - 30, boxes, attributes)[0] > 1


def test_places_are_counted_row_by_row():
    place = CellPlace(8, grid=4)
    for layer, offset in ((place.row, 0), (place.column, 4)):
        nn.init.zeros_(layer.bias)
        layer.weight.data = 30 * torch.eye(8)[offset : offset + 4]
    tokens = torch.zeros(1, 16, 8)
    for cell in range(16):
        tokens[0, cell, [cell // 4, 4 + cell % 4]] = 1
    loss, counts = place(tokens)
    assert loss < 1e-6
    assert counts.tolist() == [[16, 16]]
    assert place(tokens.roll(1, 1))[1][0, 0] == 0


def test_padding_boxes_are_ignored():
    torch.manual_seed(0)
    heads = BoxAttributes(8)
    features = torch.randn(2, 3, 8)
    attributes = torch.tensor([[[1, 2, 0, 0], [4, 5, 1, 7], [-1] * 4], [[0, 0, 2, 1], [-1] * 4, [-1] * 4]])
    loss, counts = heads(features, attributes)
    changed = features.masked_fill((attributes[..., :1] < 0), 100.0)
    torch.testing.assert_close(heads(changed, attributes)[0], loss)
    expected = dict.fromkeys(ATTRIBUTES, 3) | {"character": 2}
    assert {name: rows[0, 1].item() for name, rows in counts.items()} == expected


def test_a_word_has_the_same_ids_at_any_position(tokenizer):
    assert len(tokenizer) <= architecture.VOCABULARY_SIZE
    ids = tokenizer("red", add_special_tokens=False)["input_ids"]
    assert tokenizer("What is red", add_special_tokens=False)["input_ids"][-len(ids) :] == ids
    assert tokenizer.decode(tokenizer("Ünïcode stays.")["input_ids"]).strip() == "Ünïcode stays."


def test_oracle_scenes_have_the_ids_and_labels_of_training_samples(tokenizer):
    """The language model is pretrained on the same ids and labels as in `mgllava train`."""
    scenes = OracleScenes(tokenizer, "train", 10)
    collator = MGLlavaDataCollator(scenes.processor)
    for index in (0, 1):
        (scene, turns), item = scenes._scene(index), scenes[index]
        boxes = {"boxes": [[0, 0, 9, 9]] * len(item["found"]), "labels": ["object"] * len(item["found"])}
        for number, turn in enumerate(turns, 1):
            conversation = [{"from": "human", "value": f"<image>\n{turn.text}"}, {"from": "gpt", "value": turn.answer}]
            sample = {"id": scene.id, "images": [Image.new("RGB", (336, 336))], "boxes": [boxes]}
            expected = collator([{**sample, "conversations": conversation}])
            seen = (item["conversations"] == 0) | (item["conversations"] == number)
            for name in ("input_ids", "labels"):
                assert item[name][seen].tolist() == expected[name][0].tolist()
        assert item["conversations"].max() == len(turns)


def test_conversations_about_a_scene_do_not_see_each_other(tokenizer):
    torch.manual_seed(0)
    module = LanguageModelTraining(tokenizer).eval()
    batch = collate_oracle_scenes([OracleScenes(tokenizer, "train", 10)[index] for index in (1, 2)])
    of_scene = [name for name in batch if name not in ("input_ids", "labels", "kinds", "conversations")]
    losses, tokens = [], []
    for scene in range(2):
        for number in range(1, batch["conversations"][scene].max() + 1):
            seen = (batch["conversations"][scene] == 0) | (batch["conversations"][scene] == number)
            alone = {name: batch[name][scene : scene + 1, seen] for name in ("input_ids", "labels", "kinds")}
            alone["conversations"] = torch.zeros_like(alone["input_ids"])
            losses.append(module(**alone, **{name: batch[name][scene : scene + 1] for name in of_scene})["loss"])
            tokens.append((alone["labels"] != -100).sum())
    together = module(**batch)["loss"]
    torch.testing.assert_close(sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens), together)


def test_answers_have_the_kind_of_their_question(tokenizer):
    scenes = OracleScenes(tokenizer, "train", 10)
    assert {ANSWERS[kind] for kind in scenes[0]["kinds"].unique() if kind >= 0} == {CAPTION}
    (_, turns), item = scenes._scene(1), scenes[1]
    for kind, name in enumerate(ANSWERS):
        answers = [turn.answer for turn in turns if turn.kind == name]
        assert tokenizer.decode(item["input_ids"][item["kinds"] == kind]).split() == " ".join(answers).split()


def test_lessons_follow_each_other(tokenizer):
    first, second = Lesson(0.25, ("color",), 2), Lesson(0.75, (*KINDS, CAPTION), 15)
    scenes = OracleScenes(tokenizer, "train", 40, (first, second))
    taught = [scenes._scene(index) for index in range(40)]
    assert all(len(scene.objects) <= 2 and {turn.kind for turn in turns} == {"color"} for scene, turns in taught[:10])
    assert max(len(scene.objects) for scene, _ in taught[10:]) > 8
    assert {turn.kind for _, turns in taught[10:] for turn in turns} == {*KINDS, CAPTION}
    assert len({scene.id for scene, _ in taught}) == 40


def test_oracle_cells_are_those_of_the_towers(data, tokenizer):
    """Oracle tokens and pictures have objects and margins in the same cells."""
    pictures, scenes = Pictures(data, FRAME), OracleScenes(tokenizer, "train", 1)
    for picture, scene in zip(pictures, pictures.scenes, strict=False):
        scenes._scene = lambda index, scene=scene: (scene, ask(scene, 1))
        item = scenes[0]
        boxes = torch.tensor([[*item.center, *item.center] for item in reading_order(scene)])
        side = max(scene.width, scene.height)
        boxes += torch.tensor([side - scene.width, side - scene.height] * 2) / 2
        assert item["cells"].tolist() == cells_of_centers(boxes[None], GRID, side)[0].tolist()
        # Margins have a single color, except for the pixel at the resampled edge of the picture.
        cells = picture["pixel_values"].float().unfold(1, 32, 32).unfold(2, 32, 32)[..., 1:-1, 1:-1]
        assert cells.flatten(3).std(-1).amax(0).flatten()[item["margin"] > 0.99].sum() == 0


def test_oracle_tokens_are_sums_of_word_embeddings(tokenizer):
    torch.manual_seed(0)
    module = LanguageModelTraining(tokenizer)
    scenes = OracleScenes(tokenizer, "train", 10)
    batch = collate_oracle_scenes([scenes[index] for index in (1, 2)])
    tokens = module._oracle_tokens(*(batch[name] for name in ("attributes", "cells", "margin", "found")))
    assert len(tokens) == (batch["input_ids"] == module.image_token_id).sum()

    def words(item):
        said = [item.shape, item.color, *([item.texture] * (item.texture != "plain")), *(item.character or "")]
        ids = tokenizer(" ".join(said), add_special_tokens=False)["input_ids"]
        assert len(ids) == len(said)
        return module.model.embed_tokens.weight[ids].sum(0)

    objects = reading_order(scenes._scene(1)[0])
    torch.testing.assert_close(tokens[GRID**2], words(objects[batch["found"][0, 0]]) + module.is_object)
    cell = batch["cells"][0, 0]
    place = module.rows[cell // GRID] + module.columns[cell % GRID]
    contents = sum(words(item) for item, number in zip(objects, batch["cells"][0], strict=False) if number == cell)
    expected = contents + place + batch["margin"][0, cell] * module.is_margin + module.is_cell
    torch.testing.assert_close(tokens[cell], expected)


def test_a_word_of_several_tokens_is_refused():
    tokenizer = train_tokenizer([])
    tokenizer.add_tokens("<image>", special_tokens=True)
    with pytest.raises(ValueError, match="a token for each word of the small world, got 7 for 'circle'"):
        LanguageModelTraining(tokenizer)


def test_parts_compute_the_same_in_training_and_in_the_model(data, batch, tokenizer, tmp_path):
    torch.manual_seed(0)
    language_model, vision, high_res = (
        part.eval() for part in (LanguageModelTraining(tokenizer), VisionTowerTraining(), HighResTowerTraining())
    )
    for part, name in ((language_model, "llm"), (vision, "clip"), (high_res, "convnext")):
        part.save(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "llm")
    model = build_from_parts(
        llm=tmp_path / "llm",
        vision_tower=tmp_path / "clip",
        high_res_tower=tmp_path / "convnext",
        high_res_image_size=IMAGE_SIZE,
    )
    assert model.config.image_seq_length == 64
    inputs = processed(data, range(4))
    seen = {}
    vision.cell_contents.register_forward_hook(lambda module, arguments, output: seen.update(low=arguments[0]))
    high_res.cell_contents.register_forward_hook(lambda module, arguments, output: seen.update(high=arguments[0]))
    with torch.no_grad():
        vision(**batch)
        high_res(**{name: batch[name] for name in ("pixel_values", "boxes", "attributes")})
        _, _, outputs = model.model.encode_images(inputs["pixel_values"], inputs["boxes"], inputs["num_boxes"])
        maps = model.model.high_res_vision_tower(inputs["pixel_values"]).feature_maps
    torch.testing.assert_close(outputs.last_hidden_state[:, 1:], seen["low"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), seen["high"], atol=1e-4, rtol=1e-4)
    assert sum(parameter.numel() for parameter in model.parameters()) * 2 < 11e6


def test_a_part_is_trained_evaluated_and_resumed(tokenizer, tmp_path):
    scenes, tests = OracleScenes(tokenizer, "train", 12), OracleScenes(tokenizer, "test", 4)
    options = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "label_names": ["labels"], "use_cpu": True}
    results = []
    for seed in (0, 1):  # the second run loads the checkpoint instead of its own initial weights
        torch.manual_seed(seed)
        module = LanguageModelTraining(tokenizer)
        results.append(
            train_part(module, scenes, tests, collate_oracle_scenes, tmp_path, max_steps=3, save_steps=3, **options)
        )
    first, again = results
    assert again["loss"] == pytest.approx(first["loss"])
    assert set(first) == {"loss", *ANSWERS}
    assert 0 <= first["caption"] <= 1


def test_features_are_taken_at_the_centers_of_boxes():
    feature_map = torch.arange(16.0).view(1, 1, 4, 4)
    # A box around (20, 40) of 64, which is in row 2, column 1; and one at the right lower corner.
    boxes = torch.tensor([[[10.0, 30.0, 30.0, 50.0], [60.0, 60.0, 68.0, 68.0]]])
    assert features_at_centers(feature_map, boxes, 64).flatten().tolist() == [2 * 4 + 1, 15]


def test_the_detectors_tokenizer_ends_prompts_with_its_highest_id():
    tokenizer = make_tokenizer()
    ids = tokenizer(prompts(), padding=True, return_tensors="pt")["input_ids"]
    assert (ids.argmax(-1) == (ids == tokenizer.eos_token_id).int().argmax(-1)).all()
    assert len({tuple(row) for row in ids.tolist()}) == len(SHAPES) + 1
    assert tokenizer.unk_token_id not in tokenizer("a Green dog, 7!", add_special_tokens=False)["input_ids"]


def test_the_detector_learns(data):
    torch.manual_seed(0)
    pictures = Pictures(data, cornered_frame(DETECTOR_IMAGE_SIZE))
    batch = collate_pictures([pictures[index] for index in range(4)])
    losses, outputs = train_a_little(DetectorTraining(), batch, 2e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert outputs["counts"]["recall"][0, 1] == (batch["attributes"][..., 0] >= 0).sum()


def test_the_box_detector_computes_what_was_trained(data, tmp_path):
    torch.manual_seed(0)
    module = DetectorTraining().eval()
    nn.init.normal_(module.model.class_head.dense0.weight, std=0.5)  # so that scores of patches differ more
    module.save(tmp_path)
    pictures = Pictures(data, cornered_frame(DETECTOR_IMAGE_SIZE))
    batch = collate_pictures([pictures[index] for index in range(3)])
    seen = {}
    for name in ("class_predictor", "box_predictor"):
        method = getattr(module.model, name)

        def keep(*arguments, method=method, name=name):
            seen[name] = method(*arguments)
            return seen[name]

        setattr(module.model, name, keep)
    with torch.no_grad():
        module(**batch)
    tags = [*SHAPES, ANY_SHAPE]
    scores, labels = seen["class_predictor"][0].sigmoid().max(-1)

    detector = BoxDetector(detector=str(tmp_path), mode="clean")
    files = [str(data / "images" / f"{number:06d}.jpg") for number in range(3)]
    found = detector.detect(files, labels=tags, threshold=0.0)
    for number, record in enumerate(found):
        scene = make_scene("train", number)
        side = max(scene.width, scene.height)
        boxes = box_convert(seen["box_predictor"][number], "cxcywh", "xyxy") * side
        boxes = clip_boxes_to_image(boxes, (scene.height, scene.width))
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(-1)
        assert record["labels"] == [tags[label] for label in labels[number, kept]]
        torch.testing.assert_close(torch.as_tensor(record["boxes"]), boxes[kept], atol=0.3, rtol=0)
        torch.testing.assert_close(torch.as_tensor(record["scores"]), scores[number, kept], atol=0.01, rtol=0)


def test_the_tagger_learns_and_computes_the_same_when_it_is_loaded(data, tokenizer, tmp_path):
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(architecture.language_model_config()).eval()
    pictures = Pictures(data, squeezed_frame(TAGGER_IMAGE_SIZE))
    batch = collate_pictures([pictures[index] for index in range(4)])
    module = TaggerTraining(language_model, tokenizer)
    described = module.model.decoder.label_embed.clone()
    # The embedding of a description does not depend on the lengths of the others.
    for tag, number in ((0, 0), (3, 1), (9, 9)):
        ids = tokenizer(descriptions(SHAPES[tag])[number], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = language_model.model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(described[tag, number], last / last.norm(), atol=1e-5, rtol=1e-5)
    losses, _ = train_a_little(module, batch, 1e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(module.model.decoder.label_embed, described)

    module.eval().save(tmp_path / "tagger")
    model = AutoModel.from_pretrained(tmp_path / "tagger")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tagger")
    images = [Image.open(data / "images" / f"{number:06d}.jpg") for number in range(4)]
    seen = {}
    module.model.register_forward_hook(lambda module, arguments, output: seen.update(logits=output.logits))
    with torch.no_grad():
        module(**batch)
        outputs = model(**processor(images, return_tensors="pt"))
    torch.testing.assert_close(outputs.logits, seen["logits"], atol=1e-4, rtol=1e-4)
    assert list(model.config.id2label.values()) == list(SHAPES)
