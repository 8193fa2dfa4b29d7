"""Training on videos: samples, box files, batches, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mgllava import MGLlavaVideoProcessor
from mgllava.box_files import BoxFile, detection_settings, write_boxes
from mgllava.processing import MGLlavaProcessor
from mgllava.training import (
    ConversationDataset,
    MGLlavaDataCollator,
    SampleError,
    TrainingError,
    load_recipe,
    open_source,
    stream_samples,
    train,
)
from mgllava.training.recipe_data import _check_detector
from mgllava.training.samples import frames_of_a_video
from tests.processing.detectors import OWLV2
from tests.processing.videos import make_frames
from tests.processing.videos import write as encode
from tests.tiny import NUM_FUSED_TOKENS
from tests.training.conftest import tiny_processor, tiny_video_processor, words_model

FRAMES = 3
ANSWER = {"from": "gpt", "value": "A cup."}
BOX = [5, 10, 40, 30]
ENTRY = {"boxes": [BOX], "labels": ["cup"], "scores": [0.9]}
EMPTY = {"boxes": [], "labels": [], "scores": []}


@pytest.fixture(scope="module")
def video_processor():
    return tiny_video_processor(num_frames=FRAMES)


def clip(count=5, first=0):
    return [Image.new("RGB", (90, 60), (40 * (first + index), 0, 0)) for index in range(count)]


def save(path, count=5, first=0):
    frames = clip(count, first)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def turns(text):
    return [{"from": "human", "value": text}, ANSWER]


def sample(**changes):
    given = {"id": "7", "video": clip(), "conversations": turns("<video>\nWhat is it?"), "boxes": [[BOX]] * FRAMES}
    return {**given, **changes}


IMAGE = {"id": "i", "image": clip(1)[0], "conversations": turns("<image>\nWhat is it?"), "boxes": [BOX]}
TEXT = {"id": "t", "conversations": turns("Say it.")}


def test_a_batch_of_all_modalities_has_the_inputs_of_each(video_processor):
    """Videos are read like the processor reads them alone, and none of their tokens is learned."""
    two = sample(
        video=[clip(), clip(2, first=3)],
        boxes=[[[BOX], [], [BOX, BOX]], {"frames": [ENTRY] * FRAMES}],
        conversations=turns("<video><video> Which?"),
    )
    collator = MGLlavaDataCollator(video_processor)
    batch = collator([IMAGE, two, TEXT, sample()])
    assert batch["num_video_frames"].tolist() == [FRAMES] * 3
    assert batch["num_video_boxes"].tolist() == [1, 1, 2] + [1] * FRAMES * 2
    assert len(batch["pixel_values_videos"]) == len(batch["low_res_pixel_values_videos"]) == 3 * FRAMES
    expected = video_processor.video_processor([clip(2, first=3)], return_tensors="pt")
    assert torch.equal(batch["pixel_values_videos"][FRAMES : 2 * FRAMES], expected["pixel_values_videos"])
    is_video = batch["input_ids"] == video_processor.video_token_id
    per_video = FRAMES * NUM_FUSED_TOKENS
    assert is_video.sum(1).tolist() == [0, 2 * per_video + 4 + FRAMES, 0, per_video + FRAMES]
    assert (batch["labels"][is_video] == -100).all() and (batch["labels"] != -100).any(1).all()
    for row, alone in enumerate([IMAGE, two, TEXT, sample()]):
        single = collator([alone])
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], single["input_ids"][0])
    assert "pixel_values_videos" not in collator([IMAGE, TEXT])


def test_the_number_of_frames_is_that_of_the_processor_where_it_does_not_depend_on_the_video():
    assert frames_of_a_video(tiny_video_processor(num_frames=5)) == 5
    assert frames_of_a_video(tiny_processor()) is None
    for name, value in (("fps", 2), ("do_sample_frames", False)):
        processor = tiny_video_processor(num_frames=5)
        setattr(processor.video_processor, name, value)
        assert frames_of_a_video(processor) is None


@pytest.mark.parametrize("as_array", [torch.tensor, np.array, tuple])
def test_boxes_of_a_video_may_be_arrays(video_processor, as_array):
    collator = MGLlavaDataCollator(video_processor)
    expected = collator([sample()])
    for boxes in (as_array([[BOX]] * FRAMES), as_array([[[BOX]] * FRAMES])):
        found = collator([sample(boxes=boxes)])
        assert torch.equal(found["video_boxes"], expected["video_boxes"])
    entry = {"frames": [ENTRY] * FRAMES}
    for boxes in (entry, [entry], [ENTRY] * FRAMES):
        assert torch.equal(collator([sample(boxes=boxes)])["video_boxes"], expected["video_boxes"])


def test_a_sample_may_have_images_and_videos(video_processor):
    mixed = sample(
        image=clip(1)[0],
        boxes=[BOX],
        video_boxes=[[BOX]] * FRAMES,
        conversations=turns("<video>\n<image>\nWhich?"),
    )
    batch = MGLlavaDataCollator(video_processor)([mixed])
    assert len(batch["pixel_values"]) == 1 and len(batch["pixel_values_videos"]) == FRAMES
    ids = batch["input_ids"][0].tolist()
    assert ids.index(video_processor.video_token_id) < ids.index(video_processor.image_token_id)


def test_a_video_counts_as_one_token_and_is_left_out_after_the_cut(video_processor):
    later = [*turns("Say it.")[:1], {"from": "gpt", "value": "It is red. " * 20}, *turns("<video> What is it?")]
    collator = MGLlavaDataCollator(video_processor, max_text_length=40)
    assert "pixel_values_videos" not in collator([sample(conversations=later)])
    both = collator([sample(conversations=later), sample()])
    assert both["num_video_frames"].tolist() == [FRAMES]
    length = collator([sample()])["input_ids"].shape[1] - FRAMES * (NUM_FUSED_TOKENS + 1) + 1
    cut = MGLlavaDataCollator(video_processor, max_text_length=length - 1)([sample()])
    assert cut["input_ids"].shape[1] == length - 2 + FRAMES * (NUM_FUSED_TOKENS + 1)


def test_a_sample_longer_than_the_model_is_refused_with_its_limit(video_processor):
    needed = MGLlavaDataCollator(video_processor)([sample()])["input_ids"].shape[1]
    assert MGLlavaDataCollator(video_processor, max_length=needed)([sample()])["input_ids"].shape[1] == needed
    with pytest.raises(
        SampleError, match=rf"has {needed} tokens .*but the model has {needed - 1} positions.*num_frames"
    ):
        MGLlavaDataCollator(video_processor, max_length=needed - 1)([sample()])


BAD = {
    "two for one": ({"conversations": turns("<video><video> Hm?")}, "got 2 <video> and 1 videos"),
    "none for one": ({"conversations": turns("Hm?")}, "got 0 <video> and 1 videos"),
    "no video": ({"video": None, "boxes": None}, "got 1 <video> and 0 videos"),
    "no boxes": ({"boxes": None}, "a video without boxes"),
    "other frames": ({"boxes": [[BOX]] * 2}, "each of the 3 sampled frames, got 2"),
    "other videos": ({"video": [clip(), clip()], "conversations": turns("<video><video>")}, "got 3 for 2 videos"),
    "no file": ({"video": "/nowhere/cup.mp4"}, "/nowhere/cup.mp4"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_named_or_skipped(video_processor, kind):
    changes, problem = BAD[kind]
    bad = sample(id="bad-13", **changes)
    with pytest.raises(SampleError, match="bad-13") as caught:
        MGLlavaDataCollator(video_processor)([sample(), bad])
    assert problem in str(caught.value)
    batch = MGLlavaDataCollator(video_processor, on_bad_sample="skip", return_sample_ids=True)([sample(), bad])
    assert batch["sample_ids"] == ["7"] and batch["skipped_samples"] == 1


def test_a_video_that_cannot_be_decoded_is_skipped_and_replaced_by_nothing(video_processor, tmp_path):
    save(tmp_path / "whole.gif")
    (tmp_path / "half.gif").write_bytes((tmp_path / "whole.gif").read_bytes()[:60])
    bad = sample(id="bad", video=str(tmp_path / "half.gif"))
    with pytest.raises(SampleError, match=r"Sample bad.*half\.gif"):
        MGLlavaDataCollator(video_processor)([bad])
    skipping = MGLlavaDataCollator(video_processor, on_bad_sample="skip")
    good = sample(video=str(tmp_path / "whole.gif"))
    assert torch.equal(skipping([bad, good])["pixel_values_videos"], skipping([good])["pixel_values_videos"])
    alone = skipping([bad])
    assert "pixel_values_videos" not in alone and (alone["labels"] == -100).all()


def test_a_missing_decoder_is_not_a_bad_sample(video_processor, monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError("Install one: pip install av.")

    monkeypatch.setattr(MGLlavaVideoProcessor, "read_clips", fail)
    with pytest.raises(ImportError, match="pip install av"):
        MGLlavaDataCollator(video_processor, on_bad_sample="skip")([sample()])


def test_models_without_videos_refuse_them(small_processor, tmp_path):
    """A processor that was saved without the placeholder, or a family without videos."""
    assert not small_processor.takes_videos
    with pytest.raises(SampleError, match="Sample 7 has a video, but this model takes none"):
        MGLlavaDataCollator(small_processor)([sample()])
    blocks = [{"type": "video", "path": "a.mp4", "boxes": []}, {"type": "text", "text": "Hm?"}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "A cup."}]
    with pytest.raises(SampleError, match="has a video, but this model takes none"):
        MGLlavaDataCollator(small_processor)([{"messages": messages}])
    save(tmp_path / "a.gif")
    (tmp_path / "s.json").write_text(json.dumps([sample(video="a.gif")]))
    with pytest.raises(TrainingError, match="has a video, but this model takes none"):
        ConversationDataset([open_source(tmp_path / "s.json", None, None)], small_processor)


@pytest.fixture
def folder(tmp_path):
    """Samples with a video, two videos, an image and text, and the boxes of their frames."""
    (tmp_path / "videos").mkdir()
    for number in range(3):
        save(tmp_path / "videos" / f"{number}.gif", first=number)
    clip(1)[0].save(tmp_path / "i.png")
    rows = [
        {"id": "one", "video": "0.gif", "conversations": turns("<video>\nWhat is it?")},
        {"id": "two", "video": ["1.gif", "2.gif"], "conversations": turns("<video><video> Which?")},
        {"id": "i", "image": "i.png", "conversations": turns("<image>\nWhat is it?")},
        TEXT,
    ]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    write(tmp_path)
    return tmp_path


def write(folder, frames=FRAMES, name="boxes.json", first="one"):
    entries = [ENTRY, EMPTY, ENTRY, ENTRY][:frames]
    keys = (first, "1.gif", "2")  # by the id, by the path, and by the name alone, as in the original's evaluation
    write_boxes(folder / name, [*({"id": key, "frames": entries} for key in keys), {"id": "i", **ENTRY}])


def source(folder, boxes="boxes.json"):
    return open_source(folder / "s.json", folder, None if boxes is None else folder / boxes, folder / "videos")


@pytest.mark.parametrize("name", ["boxes.json", "boxes.parquet"])
def test_a_dataset_of_all_modalities(folder, video_processor, name):
    write(folder, name=name)
    dataset = ConversationDataset([source(folder, name)], video_processor)
    assert dataset.modalities == ["video", "video", "image", "text"]
    assert [length > 0 for length in dataset.lengths] == [True, True, True, False]
    assert dataset[0]["videos"] == [str(folder / "videos" / "0.gif")]
    batch = MGLlavaDataCollator(video_processor)([dataset[index] for index in range(4)])
    # A frame without objects has one empty box.
    assert batch["num_video_boxes"].tolist() == [1] * 9 and batch["num_video_frames"].tolist() == [FRAMES] * 3
    assert [bool(boxes.any()) for boxes in batch["video_boxes"]] == [True, False, True] * 3
    assert list(stream_samples([source(folder, name)], FRAMES)) == [dataset[index] for index in range(4)]


def test_boxes_for_another_number_of_frames_name_both_numbers(folder, video_processor):
    write(folder, frames=2)
    with pytest.raises(
        TrainingError, match=r"2 of 4 samples.*needs boxes for 3 frames of 0.gif.* boxes for 2 \(one\)"
    ):
        ConversationDataset([source(folder)], video_processor)
    rows = json.loads((folder / "s.json").read_text())
    (folder / "s.json").write_text(json.dumps([{**rows[0], "video_boxes": [[BOX]] * 4}]))
    with pytest.raises(TrainingError, match=r"Sample one needs boxes for 3 frames.*for 4"):
        ConversationDataset([source(folder)], video_processor)


def test_videos_without_boxes_or_file_are_found_before_training(folder, video_processor):
    with pytest.raises(TrainingError, match=r"3 of 4 samples.*no box file"):
        ConversationDataset([source(folder, None)], video_processor)
    dataset = ConversationDataset([source(folder, None)], video_processor, missing_boxes="empty")
    assert not MGLlavaDataCollator(video_processor)([dataset[1]])["video_boxes"].any()
    write(folder, first="other")
    with pytest.raises(TrainingError, match=r"1 of 4 samples.*has none for 0\.gif or one"):
        ConversationDataset([source(folder)], video_processor)
    (folder / "videos" / "0.gif").unlink()
    dataset = ConversationDataset([source(folder)], video_processor, on_bad_sample="skip")
    assert dataset.skipped == 1 and len(dataset) == 3 and dataset.modalities[0] == "video"
    (folder / "i.png").unlink()
    expected = (
        r"\(1 without a video; 1 without an image\): Sample one: there is no video .* Sample i: there is no image"
    )
    with pytest.raises(TrainingError, match=expected):
        ConversationDataset([source(folder)], video_processor)


def test_a_video_without_boxes_may_be_taken_for_one_without_objects(folder, video_processor):
    options = {"missing_boxes": "empty"}
    write(folder, first="other")
    dataset = ConversationDataset([source(folder)], video_processor, **options)
    assert dataset[0]["video_boxes"] == [[]] and "boxes" not in dataset[0]
    rows = json.loads((folder / "s.json").read_text())
    (folder / "s.json").write_text(json.dumps([{**rows[0], "video_boxes": []}, {**rows[1], "video_boxes": None}]))
    dataset = ConversationDataset([source(folder)], video_processor, **options)
    assert len(dataset) == 2 and len(dataset[1]["video_boxes"]) == 2


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([{"id": "one", "frames": [ENTRY] * FRAMES}] * 2, r"Sample one has two records in .*boxes\.json \(one\)"),
        ([{"id": "one", **ENTRY}], r"Sample one is of a video, but .* has boxes of one image for it \(one\)"),
        ([{"id": "two", **ENTRY}], r"Sample one has no boxes: .*boxes\.json has none for 0\.gif or one"),
    ],
)
def test_unfit_records_of_a_video_are_refused(folder, video_processor, records, problem):
    write_boxes(folder / "boxes.json", records)
    with pytest.raises(TrainingError, match=problem):
        ConversationDataset([source(folder)], video_processor)


def test_frames_under_a_later_key_are_preferred_to_an_image_under_the_id(folder, video_processor):
    records = [{"id": "one", **ENTRY}, {"id": "0", "frames": [EMPTY, ENTRY, EMPTY]}]
    write_boxes(folder / "boxes.json", records)
    (folder / "s.json").write_text(json.dumps(json.loads((folder / "s.json").read_text())[:1]))
    (boxes,) = ConversationDataset([source(folder)], video_processor)[0]["video_boxes"]
    assert [bool(frame["boxes"]) for frame in boxes] == [False, True, False]


@pytest.mark.parametrize("number", [1, 2])
def test_boxes_by_an_id_that_two_videos_have_are_refused(folder, video_processor, number):
    """Several videos of one sample have their boxes by path, so that two samples may have the same id."""
    names = ["0.gif", "1.gif", "2.gif"]
    rows = [
        {"id": "one", "video": names[first : first + number], "conversations": turns("<video>" * number + "What?")}
        for first in (0, 1)
    ]
    (folder / "s.json").write_text(json.dumps(rows))
    write_boxes(folder / "boxes.json", [{"id": key, "frames": [ENTRY] * FRAMES} for key in ("one", *names)])
    if number == 2:
        assert len(ConversationDataset([source(folder)], video_processor)) == 2
        return
    with pytest.raises(TrainingError, match="Sample one has another video than an earlier sample of this id"):
        ConversationDataset([source(folder)], video_processor)


def test_a_recipe_trains_on_images_videos_and_text(folder, video_processor, tmp_path_factory):
    """The number of frames of the recipe is saved with the model."""
    model = tmp_path_factory.mktemp("model")
    words_model(video_token_id=video_processor.video_token_id).save_pretrained(model)
    video_processor.save_pretrained(model)
    write(folder, frames=4)
    changes = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"samples": "s.json", "images": "", "videos": "videos", "boxes": "boxes.json"},
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "dataloader_num_workers": 0,
            "dataloader_persistent_workers": False,
            "disable_tqdm": True,
        },
    }
    changes["data"] = {name: str(folder / value) for name, value in changes["data"].items()}
    changes["data"] |= {"allow_other_boxes": True, "num_frames": 4}
    recipe = {"extends": "stage_2.yaml", "global_batch_size": 4, **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = train(load_recipe(folder / "recipe.yaml"))
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 1 and 0 < state["log_history"][-1]["train_loss"] < 20
    assert MGLlavaProcessor.from_pretrained(output).video_processor.num_frames == 4


def test_recipes_of_the_video_model_sample_eight_frames_within_its_positions():
    for stage, name in ((1, "video_stage_1.yaml"), (2, "video_stage_2.yaml")):
        recipe, images = load_recipe(name), load_recipe(f"stage_{stage}_vicuna_7b.yaml")
        assert recipe.data.num_frames == 8 and recipe.train == images.train
        assert recipe.global_batch_size == images.global_batch_size
        # 100 boxes of a frame are most that come without a limit on labels
        assert recipe.model.config["text_config"]["max_position_embeddings"] >= 8 * (576 + 100) + 1472
    assert recipe.model.name == load_recipe("video_stage_1.yaml").training["output_dir"]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_files_of_encoders_are_read(video_processor, tmp_path, ending):
    """Videos as cameras write them, with frames of colors that tell which were sampled."""
    container = "matroska" if ending == "mkv" else ending
    frames = make_frames(10, 90, 60)
    (tmp_path / f"0.{ending}").write_bytes(encode(frames, "mpeg4", "yuv420p", container, qmin=1, qmax=2))
    rows = [{"id": "one", "video": f"0.{ending}", "conversations": turns("<video>\nWhat is it?")}]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    write_boxes(tmp_path / "boxes.json", [{"id": "one", "frames": [ENTRY, EMPTY, ENTRY]}])
    dataset = ConversationDataset(
        [open_source(tmp_path / "s.json", tmp_path, tmp_path / "boxes.json", tmp_path)], video_processor
    )
    batch = MGLlavaDataCollator(video_processor)([dataset[0]])
    wanted = video_processor.video_processor(frames[[0, 4, 9]], do_sample_frames=False, return_tensors="pt")
    distance = (batch["pixel_values_videos"] - wanted["pixel_values_videos"]).abs().mean(dim=(1, 2, 3))
    assert batch["num_video_frames"].tolist() == [FRAMES] and distance.max() < 0.15, distance
    assert [bool(boxes.any()) for boxes in batch["video_boxes"]] == [True, False, True]


@pytest.mark.parametrize(("sampled", "is_refused"), [(FRAMES, False), (FRAMES + 1, True), (None, True)])
def test_box_files_of_other_frames_are_refused(video_processor, monkeypatch, sampled, is_refused):
    """The settings of a box file say how many frames of a video were sampled."""
    config = {"tagger": ["cup"], "detector": str(OWLV2), "mode": "clean"}
    monkeypatch.setattr(video_processor, "locate_box_detector", lambda: config, raising=False)
    settings = detection_settings(config, num_frames=sampled)
    if sampled is None:  # of images, but with a rule for frames that says nothing
        settings["frames"] = None
    record = {"id": "one", "frames": [ENTRY, EMPTY, ENTRY]}
    file = BoxFile(["one"], [record], settings=settings, name="boxes.json")
    options = SimpleNamespace(allow_other_boxes=False, detector=None)
    sources = [SimpleNamespace(boxes=file)]
    if is_refused:
        with pytest.raises(TrainingError, match=r"frames.*data\.allow_other_boxes=true"):
            _check_detector(options, video_processor, sources, "data")
    else:
        _check_detector(options, video_processor, sources, "data")
