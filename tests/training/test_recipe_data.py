"""The data of a recipe: which files belong together, and what processor and collator are made for them."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from mgllava.families import FAMILIES
from mgllava.processing import CHAT_TEMPLATES
from mgllava.training import TrainingError
from mgllava.training.recipe import DataOptions, DetectorOptions, Recipe
from mgllava.training.recipe_data import make_collator, name_detector, open_data, refuse_boxes
from tests.training.conftest import tiny_processor, tiny_video_processor, write_samples

ARGS = SimpleNamespace(max_steps=0, main_process_first=lambda desc: nullcontext())


def opened(processor, section="data", **options):
    return open_data(DataOptions(allow_other_boxes=True, **options), processor, FAMILIES["mgllava"], ARGS, section)


def test_entries_at_the_same_position_belong_together_and_one_is_for_all(tmp_path, small_processor):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        write_samples(folder, count=3)
    samples, boxes, images = (
        [str(folder / name) for folder in folders] for name in ("samples.json", "boxes.json", "images")
    )
    data, processor = opened(small_processor, samples=samples, boxes=boxes, images=images[0], videos=images)
    assert processor is small_processor and len(data) == 6
    sources = data.sources
    assert [str(source.samples) for source in sources] == samples
    assert [source.boxes.name for source in sources] == boxes
    assert [str(source.images) for source in sources] == [images[0]] * 2
    assert [str(source.videos) for source in sources] == images
    (source,) = opened(small_processor, samples=samples[0], missing_boxes="empty", images=images[:1])[0].sources
    assert source.boxes is source.videos is None and source.image_folder == source.video_folder


def test_options_reach_dataset_and_collator(tmp_path, small_processor):
    write_samples(tmp_path, count=3)
    options = {"max_text_length": 30, "on_bad_sample": "skip", "missing_boxes": "empty"}
    given = DataOptions(samples=str(tmp_path / "samples.json"), images=str(tmp_path / "images"), **options)
    collator = make_collator(given, small_processor, 99)
    assert {name: getattr(collator, name) for name in options} == options
    assert collator.max_length == 99 and collator.return_sample_ids and not collator.original_labels
    (tmp_path / "images" / "0.png").unlink()
    data, _ = open_data(given, small_processor, FAMILIES["mgllava"], ARGS, "data")
    assert data.skipped == 1 and data[0]["boxes"] == [[]] and max(map(abs, data.lengths)) <= 30


@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_the_saved_processor_has_the_frames_of_training_and_its_own_template(tmp_path, section):
    write_samples(tmp_path, count=3)
    processor = tiny_video_processor(num_frames=3)
    before, template = processor.video_processor, processor.chat_template
    files = {"samples": str(tmp_path / "samples.json"), "images": str(tmp_path / "images"), "missing_boxes": "empty"}
    _, used = opened(processor, section, **files, num_frames=5, prompt_template="llama3")
    assert used is not processor and used.chat_template == CHAT_TEMPLATES["llama3"]
    assert processor.chat_template == template and before.num_frames == 3
    assert (used.video_processor.num_frames, used.video_processor.fps) == (5, None)
    assert processor.video_processor.num_frames == (5 if section == "data" else 3)


REFUSED = {"boxes": "b.json", "detector": DetectorOptions(), "allow_other_boxes": True, "missing_boxes": "empty"}


@pytest.mark.parametrize("section", ["data", "evaluation"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_without_boxes_have_no_settings_of_boxes(section, name):
    options = {"data": DataOptions(), "evaluation": None}
    refuse_boxes(Recipe(**options), FAMILIES["slime"])
    options[section] = DataOptions(**{name: REFUSED[name]})
    with pytest.raises(TrainingError, match=rf"`{section}\.{name}` must not be set: SliME takes no boxes"):
        refuse_boxes(Recipe(**options), FAMILIES["slime"])


def test_the_processor_keeps_its_detector_unless_the_recipe_names_one():
    processor = tiny_processor()
    processor.box_detector_config = {"detector": "own"}
    for given in (None, DetectorOptions(), DetectorOptions(detector="x/y")):
        name_detector(processor, given)
        assert processor.box_detector_config == {"detector": "own"}
    name_detector(processor, DetectorOptions(detector="x/y", tagger="z", mode="clean"))
    assert processor.box_detector_config == {"detector": "x/y", "tagger": "z", "mode": "clean"}
    name_detector(processor, DetectorOptions(detector="x/y", tagger="z", labels=["cup"]))
    assert processor.box_detector_config == {"detector": "x/y", "tagger": ["cup"], "mode": "faithful"}
