import copy
import json
import logging
import shutil

import pytest
import torch
from tokenizers import normalizers

from mgllava.box_files import read_boxes, write_boxes
from mgllava.training import ConversationDataset, MGLlavaDataCollator, TrainingError, open_source, stream_samples
from mgllava.training.dataset import _Measure
from tests.golden_cases import case
from tests.training.conftest import write_samples
from tests.training.test_collator import golden_sample


def source(folder, boxes="boxes.json", samples="samples.json"):
    return open_source(folder / samples, folder / "images", None if boxes is None else folder / boxes)


@pytest.fixture
def folder(tmp_path, samples_folder):
    """Samples that a test may change."""
    return shutil.copytree(samples_folder, tmp_path / "samples")


def change(folder, number, **changes):
    samples = json.loads((folder / "samples.json").read_text())
    samples[number] |= changes
    (folder / "samples.json").write_text(json.dumps(samples))


def test_samples_come_with_paths_boxes_and_lengths(samples_folder, small_processor):
    dataset = ConversationDataset([source(samples_folder)], small_processor)
    assert len(dataset) == 12
    assert dataset[0]["images"] == [str(samples_folder / "images" / "0.png")]
    assert dataset[1]["boxes"] == [read_boxes(samples_folder / "boxes.json")["sample-1"]]
    assert "boxes" not in dataset[3] and dataset.lengths[3] < 0
    collator = MGLlavaDataCollator(small_processor)
    for index in range(len(dataset)):
        batch = collator([dataset[index]])
        image_tokens = int((batch["input_ids"] == small_processor.image_token_id).sum())
        length = batch["input_ids"].shape[1] - image_tokens + (1 if image_tokens else 0)
        assert dataset.lengths[index] == (length if image_tokens else -length)


def test_a_sample_whose_boxes_are_null_has_those_of_the_file(folder, small_processor):
    expected = ConversationDataset([source(folder)], small_processor)[1]
    change(folder, 1, boxes=None)
    assert ConversationDataset([source(folder)], small_processor)[1] == expected


def test_lengths_are_those_of_the_original(processor, tmp_path):
    """It counts an image as one token, and cuts."""
    golden = case("batch_with_text_only")
    samples = [golden_sample(*entry) for entry in enumerate(golden["samples"])]
    (tmp_path / "s.json").write_text(json.dumps(samples))
    expected = [len(golden["samples"][0]["input_ids"]), -len(golden["samples"][1]["input_ids"])]
    assert ConversationDataset([open_source(tmp_path / "s.json", None, None)], processor).lengths == expected
    cut = ConversationDataset([open_source(tmp_path / "s.json", None, None)], processor, max_text_length=40)
    assert cut.lengths == [40, expected[1]]


def test_files_of_all_forms_give_the_same(samples_folder, folder, small_processor):
    """JSON lines, Parquet boxes, ids as numbers, keys that only some samples have."""
    samples = json.loads((folder / "samples.json").read_text())
    for number, entry in enumerate(samples):
        entry["id"] = number if number % 2 else entry["id"]
        if number == 2:
            entry["model"] = "m"
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(entry) for entry in samples) + "\n")
    records = [
        {**read_boxes(folder / "boxes.json")[f"sample-{number}"], "id": str(entry["id"])}
        for number, entry in enumerate(samples)
        if "image" in entry
    ]
    write_boxes(folder / "boxes.parquet", records)
    a = ConversationDataset([source(samples_folder)], small_processor)
    b = ConversationDataset([source(folder, "boxes.parquet", "samples.jsonl")], small_processor)
    collator = MGLlavaDataCollator(small_processor)
    x, y = collator([a[i] for i in range(12)]), collator([b[i] for i in range(12)])
    assert all(torch.equal(x[name], y[name]) for name in x)


def test_streaming_gives_the_same_samples(samples_folder, small_processor):
    dataset = ConversationDataset([source(samples_folder)], small_processor)
    assert list(stream_samples([source(samples_folder)])) == [dataset[index] for index in range(12)]


def test_sources_are_put_together(samples_folder, tmp_path, small_processor):
    write_samples(tmp_path, count=5, text_every=0)
    both = ConversationDataset([source(samples_folder), source(tmp_path)], small_processor)
    assert len(both) == 17
    assert both[13]["images"] == [str(tmp_path / "images" / "1.png")]


def test_changed_files_are_read_again(folder, small_processor):
    """The datasets library caches; what it knows must not outlive the file."""
    before = ConversationDataset([source(folder)], small_processor)
    change(folder, 3, conversations=[{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It. " * 30}])
    assert ConversationDataset([source(folder)], small_processor).lengths[3] < before.lengths[3]
    (folder / "images" / "0.png").unlink()
    with pytest.raises(TrainingError, match="sample-0"):
        ConversationDataset([source(folder)], small_processor)


BAD = {
    "image": {"image": "gone.png"},
    "number": {"image": 5},
    "answer": {"conversations": [{"from": "human", "value": "<image>"}]},
    "boxes": {"id": "unknown"},
    "placeholder": {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Hm."}]},
    "late_answer": {
        "conversations": [{"from": "human", "value": "<image>" + "What? " * 1500}, {"from": "gpt", "value": "Hm."}]
    },
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_found_before_training(folder, small_processor, kind, caplog):
    change(folder, 5, **BAD[kind])
    name = BAD[kind].get("id", "sample-5")
    with pytest.raises(TrainingError, match=f"1 of 12 samples.*{name}"):
        ConversationDataset([source(folder)], small_processor)
    with caplog.at_level(logging.WARNING):
        dataset = ConversationDataset([source(folder)], small_processor, on_bad_sample="skip")
    assert name in caplog.text
    assert dataset.skipped == 1 and len(dataset) == len(dataset.lengths) == 11
    assert name not in {dataset[index]["id"] for index in range(11)}


def test_missing_boxes_may_be_taken_for_none(folder, small_processor):
    with pytest.raises(TrainingError, match=r"9 of 12 samples.*\(9 without boxes\).*no box file") as caught:
        ConversationDataset([source(folder, boxes=None)], small_processor)
    assert str(caught.value).count("no box file is given") == 5  # the others are counted only
    dataset = ConversationDataset([source(folder, boxes=None)], small_processor, missing_boxes="empty")
    assert len(dataset) == 12
    assert dataset[0]["boxes"] == [[]] and "video_boxes" not in dataset[0] and "boxes" not in dataset[3]


def test_the_digest_is_of_ids_paths_and_lengths_without_the_folder(folder, small_processor, tmp_path):
    def digest(at=folder):
        return ConversationDataset([source(at)], small_processor).digest

    before = digest()
    assert digest(shutil.copytree(folder, tmp_path / "moved")) == before
    shutil.copy(folder / "images" / "1.png", folder / "images" / "one.png")
    write_boxes(
        folder / "boxes.json", [*read_boxes(folder / "boxes.json").values(), {"id": "0.png", **found_at(FIRST)}]
    )
    assert digest() == before
    found = set()
    longer = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It. " * 30}]
    for number, changes in ((0, {"id": "other"}), (1, {"image": "one.png"}), (3, {"conversations": longer})):
        change(folder, number, **changes)
        found.add(digest())
    assert len(found | {before}) == 4


def test_errors_of_chat_templates_name_the_sample(folder, small_processor):
    template = "{% generation %}{{ raise_exception('no tongue') }}{% endgeneration %}"
    processor = copy.copy(small_processor)
    processor.chat_template = template
    with pytest.raises(TrainingError, match=r"12 of 12 samples .*\(12 of another form\): Sample sample-0: no tongue"):
        ConversationDataset([source(folder)], processor)


def test_samples_without_an_id_are_named_by_file_and_row(folder, small_processor):
    samples = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps([{**samples[3], "id": 0}]))
    assert ConversationDataset([source(folder)], small_processor)[0]["id"] == "0"
    for entry in samples:
        del entry["id"]
    (folder / "s.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, samples[2:4])))
    with pytest.raises(
        TrainingError, match=r"Sample s\.jsonl:0 has no boxes: .*boxes.json has none for s\.jsonl:0 or 2"
    ):
        ConversationDataset([source(folder, samples="s.jsonl")], small_processor)


@pytest.mark.parametrize("argument", ["samples", "images", "boxes", "videos"])
def test_what_does_not_exist_is_named_with_its_key(folder, argument):
    paths = dict.fromkeys(("images", "videos"), folder)
    paths |= {"samples": folder / "samples.json", "boxes": folder / "boxes.json", argument: folder / "gone"}
    with pytest.raises(TrainingError, match=rf"^`evaluation\.{argument}`: .*gone does not exist"):
        open_source(**paths, section="evaluation")
    with pytest.raises(TrainingError, match=rf"^`{argument}`: "):
        open_source(**paths)


def test_what_is_no_list_of_samples_is_refused(tmp_path, small_processor):
    for content, problem in (("{}", "a list"), ("[3]", "dictionary"), ("[", "not JSON"), ("[]", "no samples")):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(TrainingError, match=problem):
            ConversationDataset([open_source(tmp_path / "s.json", None, None)], small_processor)
    with pytest.raises(TrainingError, match="samples"):
        open_source(tmp_path / "none.json", None, None)


def found_at(box):
    return {"boxes": [box], "labels": ["square"], "scores": [0.9]}


def two_pictures(folder, records, boxes=None):
    """A sample with two pictures, and a box file with some records."""
    write_samples(folder, count=2, text_every=0)
    sample = {
        "id": "pair",
        "image": ["0.png", "1.png"],
        "conversations": [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "It is red."}],
    }
    (folder / "pair.json").write_text(json.dumps([sample | ({} if boxes is None else {"boxes": boxes})]))
    write_boxes(folder / "pair-boxes.json", [{"id": key, **found_at(box)} for key, box in records.items()])
    return open_source(folder / "pair.json", folder / "images", folder / "pair-boxes.json")


FIRST, SECOND = [5, 10, 40, 30], [6, 10, 41, 30]


def test_each_image_of_a_sample_has_its_own_boxes(small_processor, tmp_path):
    """From the sample, or from a box file that names images by their paths, as a job over a folder does."""
    named = two_pictures(tmp_path / "a", {"0.png": FIRST, "1.png": SECOND, "other": FIRST})
    given = two_pictures(tmp_path / "b", {"other": FIRST}, boxes=[[FIRST], [SECOND]])
    for source in (named, given):
        batch = MGLlavaDataCollator(small_processor)([ConversationDataset([source], small_processor)[0]])
        expected = small_processor.image_processor(
            [str(tmp_path / "a" / "images" / name) for name in ("0.png", "1.png")], boxes=[[FIRST], [SECOND]]
        )
        assert batch["boxes"].tolist() == [boxes.tolist() for boxes in expected["boxes"]]


def boxes_of(sample, processor, **options):
    batch = MGLlavaDataCollator(processor, **options)([sample])
    return [boxes[:number].tolist() for boxes, number in zip(batch["boxes"], batch["num_boxes"], strict=True)]


def test_boxes_of_a_sample_come_first_then_those_of_its_id_then_those_of_paths(small_processor, tmp_path):
    """A record of the sample's id has a list with an entry for each image."""
    images = [str(tmp_path / "images" / name) for name in ("0.png", "1.png")]

    def expected(*boxes):
        prepared = small_processor.image_processor(images, boxes=[[box] for box in boxes])
        return [boxes.tolist() for boxes in prepared["boxes"]]

    paths = {"0.png": FIRST, "1.png": FIRST}
    by_path = two_pictures(tmp_path, paths)
    assert boxes_of(ConversationDataset([by_path], small_processor)[0], small_processor) == expected(FIRST, FIRST)
    records = [{"id": name, **found_at(box)} for name, box in paths.items()]
    write_boxes(tmp_path / "l.json", [{"id": "pair", "frames": [found_at(FIRST), found_at(SECOND)]}, *records])
    by_id = open_source(tmp_path / "pair.json", tmp_path / "images", tmp_path / "l.json")
    for given in (ConversationDataset([by_id], small_processor)[0], next(iter(stream_samples([by_id])))):
        assert boxes_of(given, small_processor) == expected(FIRST, SECOND)
    two_pictures(tmp_path, paths, boxes=[[SECOND], [FIRST]])
    assert boxes_of(ConversationDataset([by_id], small_processor)[0], small_processor) == expected(SECOND, FIRST)


def test_a_list_of_boxes_for_another_number_of_images_is_refused(small_processor, tmp_path, caplog):
    source = two_pictures(tmp_path, {"0.png": FIRST, "1.png": SECOND})
    write_boxes(tmp_path / "pair-boxes.json", [{"id": "pair", "frames": [found_at(FIRST)] * 3}])
    source = open_source(source.samples, source.images, tmp_path / "pair-boxes.json")
    expected = r"Sample pair has 2 images, and .*pair-boxes.json boxes of 3 for it"
    with pytest.raises(TrainingError, match=expected):
        ConversationDataset([source], small_processor)
    with pytest.raises(TrainingError, match="No sample is left"):
        ConversationDataset([source], small_processor, on_bad_sample="skip")


def test_the_only_image_of_a_sample_may_have_its_boxes_by_path(folder, small_processor):
    """A job over a folder names records by paths, and samples with one and with several images share the file."""
    expected = ConversationDataset([source(folder)], small_processor)[1]["boxes"]
    records = [
        {**record, "id": f"{record['id'].removeprefix('sample-')}.png"}
        for record in read_boxes(folder / "boxes.json").values()
    ]
    write_boxes(folder / "by-path.json", records)
    found = ConversationDataset([source(folder, "by-path.json")], small_processor)[1]["boxes"]
    assert [entry["boxes"] for entry in found] == [entry["boxes"] for entry in expected]


def test_images_without_boxes_do_not_take_those_of_the_others_away(small_processor, tmp_path):
    source = two_pictures(tmp_path, {"1.png": SECOND})
    with pytest.raises(TrainingError, match=r"has none for 0\.png"):
        ConversationDataset([source], small_processor)
    dataset = ConversationDataset([source], small_processor, missing_boxes="empty")
    collator = MGLlavaDataCollator(small_processor, missing_boxes="empty")
    boxes = collator([dataset[0]])["boxes"]
    assert boxes[0].tolist() == [[0, 0, 0, 0]] and boxes[1].any()
    two_pictures(tmp_path, {}, boxes=[[FIRST], None])
    with pytest.raises(TrainingError, match="Sample pair has boxes for some of its images only"):
        ConversationDataset([source], small_processor)
    dataset = ConversationDataset([source], small_processor, missing_boxes="empty")
    assert boxes_of(dataset[0], small_processor, missing_boxes="empty")[1] == [[0, 0, 0, 0]]


@pytest.mark.parametrize("missing_boxes", ["error", "empty"])
def test_one_record_for_several_images_is_refused(small_processor, tmp_path, missing_boxes):
    source = two_pictures(tmp_path, {"pair": FIRST})
    expected = r"Sample pair has 2 images, and .* one record for all of them"
    with pytest.raises(TrainingError, match=expected):
        ConversationDataset([source], small_processor, missing_boxes=missing_boxes)
    with pytest.raises(TrainingError, match=expected):
        next(iter(stream_samples([source])))


def test_two_records_of_one_image_are_refused(small_processor, tmp_path):
    source = two_pictures(tmp_path, {"0.png": FIRST, "1.png": SECOND})
    records = [{"id": key, **found_at(FIRST)} for key in ("0.png", "1.png", "1.png")]
    write_boxes(tmp_path / "pair-boxes.json", records)
    source = open_source(source.samples, source.images, tmp_path / "pair-boxes.json")
    with pytest.raises(TrainingError, match=r"Sample pair has two records in .*pair-boxes\.json \(1\.png\)"):
        ConversationDataset([source], small_processor)


def test_boxes_by_an_id_that_two_images_have_are_refused(small_processor, tmp_path):
    write_samples(tmp_path, count=2, text_every=0)
    samples = json.loads((tmp_path / "samples.json").read_text())
    samples[1]["id"] = samples[0]["id"]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    source = open_source(tmp_path / "samples.json", tmp_path / "images", tmp_path / "boxes.json")
    with pytest.raises(TrainingError, match="Sample sample-0 has another image than an earlier sample of this id"):
        ConversationDataset([source], small_processor)


def test_boxes_of_a_video_are_no_boxes_of_an_image(folder, small_processor):
    record = {"boxes": [[5, 10, 40, 30]], "labels": ["square"], "scores": [0.9]}
    records = list(read_boxes(folder / "boxes.json").values())
    write_boxes(folder / "boxes.json", [{"id": records[0]["id"], "frames": [record]}, *records[1:]])
    with pytest.raises(TrainingError, match=r"frames of a video for it \(sample-0\)"):
        ConversationDataset([source(folder)], small_processor)


def test_lengths_are_measured_again_if_the_tokenizer_splits_words_differently(small_processor):
    """With the same vocabulary, a tokenizer with another normalizer makes other tokens."""
    changed = copy.deepcopy(small_processor)
    changed.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    same = copy.deepcopy(small_processor)
    prints = [_Measure(processor, 100, False).fingerprint for processor in (small_processor, same, changed)]
    assert prints[0] == prints[1] != prints[2]
