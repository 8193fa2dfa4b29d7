"""The processor with a box detector: end to end, saving, loading, pickling, workers, the Hub."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from mgllava import BoxDetector, MGLlavaProcessor
from mgllava.processing import box_detector_files_mgllava, processing_mgllava
from mgllava.processing.owlv2_detection_mgllava import PromptEmbeds

from .detectors import (
    CASES,
    OWLV2,
    assert_same_boxes,
    boxes_from_worker,
    boxes_of,
    golden_image,
    grounding_dino,
    labels_of,
)
from .test_processing import small

CASE = CASES[0]
IMAGE, LABELS = golden_image(CASE), labels_of(CASE)
EXPECTED = CASE["result"]


def owlv2():
    return AutoModelForZeroShotObjectDetection.from_pretrained(OWLV2), AutoProcessor.from_pretrained(OWLV2)


@pytest.fixture
def processor():
    processor = small()
    processor.box_detector = BoxDetector(LABELS, OWLV2)
    return processor


@pytest.fixture
def saved(processor, tmp_path):
    processor.detect(IMAGE)
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_processor_finds_boxes_itself_as_if_they_were_given(processor):
    found = processor(IMAGE, "a <image>", return_box_labels=True, return_tensors="pt")
    given = processor(IMAGE, "a <image>", boxes=[EXPECTED], return_box_labels=True, return_tensors="pt")
    assert found["num_boxes"].item() > 1 and found["box_labels"] == given["box_labels"]
    torch.testing.assert_close(found["boxes"], given["boxes"])
    assert torch.equal(found["input_ids"], given["input_ids"])
    (seen,) = processor.detect(IMAGE)
    assert_same_boxes(seen, EXPECTED)
    assert_same_boxes(
        processor.detect([IMAGE], labels=["x"], threshold=0.99)[0], {"boxes": [], "labels": [], "scores": []}
    )


def test_a_saved_processor_is_complete_in_its_folder(saved, tmp_path):
    config = json.loads((saved / "processor_config.json").read_text())["box_detector_config"]
    assert config == {
        "tagger": LABELS,
        "detector": "./box_detector/detector",
        "mode": "faithful",
        "prompt_embeds": "./box_detector/prompt_embeds.safetensors",
    }
    moved = shutil.move(saved, tmp_path / "moved")
    for load in (MGLlavaProcessor, AutoProcessor):
        loaded = load.from_pretrained(moved)
        assert loaded._box_detector is None  # until it is needed
        assert_same_boxes(loaded.detect(IMAGE)[0], EXPECTED)
    assert (moved / "box_detector" / "detector" / "model.safetensors").read_bytes() == (
        OWLV2 / "model.safetensors"
    ).read_bytes()


def test_saved_embeddings_are_used_unless_another_text_tower_made_them(saved, monkeypatch):
    loaded = MGLlavaProcessor.from_pretrained(saved)
    text_model = loaded.box_detector._detector.model.owlv2.text_model
    monkeypatch.setattr(text_model, "forward", None)
    assert_same_boxes(loaded.detect(IMAGE)[0], EXPECTED)

    messages = []
    monkeypatch.setattr("mgllava.processing.owlv2_detection_mgllava.logger.warning", messages.append)
    other = AutoModelForZeroShotObjectDetection.from_pretrained(OWLV2)
    with torch.no_grad():
        other.owlv2.text_projection.weight.mul_(2)
    other.save_pretrained(saved / "box_detector" / "detector")
    loaded = MGLlavaProcessor.from_pretrained(saved)
    assert len(loaded.box_detector._detector.prompt_embeds) == 0
    assert len(messages) == 1 and "another text tower" in messages[0]


def test_embeddings_are_written_when_complete_and_read_back(tmp_path):
    table = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    embeds = PromptEmbeds(lambda prompts: torch.tensor([table[prompt] for prompt in prompts]), "x")
    embeds.add(["b", "a", "b"])
    embeds.save(tmp_path / "table.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]
    other = PromptEmbeds(lambda prompts: torch.tensor([table[prompt] for prompt in prompts]), "x")
    other.add(["c", "a"])
    other.load(tmp_path / "table.safetensors", torch.device("cpu"))
    vectors, mask = other.get([["a", "b", "c"], ["b"]])
    torch.testing.assert_close(vectors[0], torch.tensor(list(table.values())))
    assert mask.tolist() == [[True] * 3, [True, False, False]] and vectors[1, 0].tolist() == table["b"]


def test_saving_what_was_never_loaded_copies_the_folders(saved, tmp_path):
    untouched = MGLlavaProcessor.from_pretrained(saved)
    untouched.save_pretrained(tmp_path / "again")
    assert untouched._box_detector is None
    first, second = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in (folder / "box_detector").rglob("*")
            if path.is_file()
        }
        for folder in (saved, tmp_path / "again")
    )
    assert first == second and len(first) > 4
    untouched.save_pretrained(saved)  # onto itself
    assert_same_boxes(MGLlavaProcessor.from_pretrained(saved).detect(IMAGE)[0], EXPECTED)


@pytest.mark.parametrize(
    ("make", "options"), [(owlv2, {"labels": LABELS}), (grounding_dino, {"labels": ["cat", "dog"], "threshold": 0.3})]
)
def test_models_in_memory_are_saved_and_loaded(make, options, tmp_path):
    processor, (model, own_processor) = small(), make()
    processor.box_detector = BoxDetector(None, model, mode="clean", detector_processor=own_processor)
    assert processor.box_detector_config == {
        "tagger": None,
        "detector": "./box_detector/detector",
        "mode": "clean",
    }
    processor.save_pretrained(tmp_path)
    loaded = MGLlavaProcessor.from_pretrained(tmp_path)
    (found,) = loaded.detect(IMAGE, **options)
    assert found["labels"]
    assert_same_boxes(found, processor.detect(IMAGE, **options)[0])
    assert loaded.box_detector.mode == "clean" and found["boxes"].dtype == torch.float32


def test_repository_ids_are_saved_as_ids(processor, tmp_path, monkeypatch):
    processor.box_detector = None
    processor.box_detector_config = {"tagger": "some/tagger", "detector": "some/detector"}
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "box_detector").exists()
    loaded = MGLlavaProcessor.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=True)
    assert loaded.box_detector_config == {"tagger": "some/tagger", "detector": "some/detector"}
    seen = []

    monkeypatch.setattr(processing_mgllava.BoxDetector, "__init__", lambda self, **kwargs: seen.append(kwargs))
    loaded.load_box_detector(device="cpu", dtype=torch.float16)
    assert seen == [
        {
            "tagger": "some/tagger",
            "detector": "some/detector",
            "device": "cpu",
            "dtype": torch.float16,
            "trust_remote_code": True,
            "cache_dir": None,
            "force_download": False,
            "local_files_only": True,
            "token": None,
        }
    ]


def test_switching_off_keeps_the_configuration(saved, monkeypatch):
    loaded = MGLlavaProcessor.from_pretrained(saved)
    loaded.box_detector = None
    assert loaded(IMAGE, "<image>", return_tensors="pt")["boxes"].tolist() == [[[0, 0, 0, 0]]]
    with pytest.raises(ValueError, match="`box_detector` must be set to find boxes"):
        loaded.detect(IMAGE)
    assert loaded.to_dict()["box_detector_config"]["detector"] == "./box_detector/detector"
    assert_same_boxes(loaded.load_box_detector(dtype=torch.float32).detect(IMAGE)[0], EXPECTED)
    assert loaded.box_detector is not None


def test_the_detector_is_not_loaded_if_boxes_are_given(saved):
    loaded = MGLlavaProcessor.from_pretrained(saved)
    loaded([IMAGE, IMAGE], "<image><image>", boxes=[[], [[0, 0, 9, 9]]])
    assert loaded._box_detector is None


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_find_the_same_boxes(saved, start):
    loaded = MGLlavaProcessor.from_pretrained(saved)
    here = boxes_of([IMAGE, IMAGE], loaded)
    torch.testing.assert_close(boxes_from_worker([IMAGE, IMAGE], loaded, start), here)


def test_pickling_keeps_the_configuration_and_leaves_the_models_out(saved):
    loaded = MGLlavaProcessor.from_pretrained(saved)
    before = len(pickle.dumps(loaded))
    loaded.detect(IMAGE)
    data = pickle.dumps(loaded)
    assert len(data) < before + 1000
    assert_same_boxes(pickle.loads(data).detect(IMAGE)[0], EXPECTED)


def test_a_detector_of_models_in_memory_is_pickled_with_the_processor(tmp_path):
    processor, (model, own_processor) = small(), owlv2()
    processor.box_detector = BoxDetector(LABELS, model, detector_processor=own_processor)
    for copied in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert_same_boxes(copied.detect(IMAGE)[0], EXPECTED)
        assert copied.box_detector is not processor.box_detector
    with pytest.raises(ValueError, match="this processor was not loaded from one"):
        processor.load_box_detector()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"detectors": "x"}, ValueError, "got also detectors"),
        ({"detector": "./../detector"}, ValueError, "must name paths inside the repository"),
        ({"detector": "./box_detector/none"}, FileNotFoundError, "has no such file or folder"),
        ({"detector": "no/such"}, OSError, "`detector` must be a folder or a repository on the Hub"),
    ],
)
def test_wrong_configurations_are_named(saved, config, error, message):
    loaded = MGLlavaProcessor.from_pretrained(saved)
    loaded.box_detector_config = config
    with pytest.raises(error, match=message):
        loaded.detect(IMAGE)
    loaded.box_detector_config = None
    with pytest.raises(ValueError, match="`box_detector_config` must say what to load"):
        loaded.load_box_detector()


def test_a_processor_from_the_hub_fetches_its_folders(saved, monkeypatch):
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["revision"], options["allow_patterns"], options["token"]))
        return str(saved)

    loaded = MGLlavaProcessor.from_pretrained(saved, revision="v1", token="secret")
    loaded._repository = box_detector_files_mgllava.ProcessorRepository(
        "user/model", "v1", loaded._repository.hub_options
    )
    monkeypatch.setattr(box_detector_files_mgllava, "snapshot_download", download)
    assert_same_boxes(loaded.detect(IMAGE)[0], EXPECTED)
    folder, embeds = "box_detector/detector", "box_detector/prompt_embeds.safetensors"
    assert asked == [
        ("user/model", "v1", [folder, f"{folder}/*"], "secret"),
        ("user/model", "v1", [embeds, f"{embeds}/*"], "secret"),
    ]


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}, {"force_download": True}], ids=str)
@pytest.mark.parametrize("is_cached", [True, False])
def test_without_a_connection_cached_folders_are_used(saved, monkeypatch, options, is_cached):
    def download(repo_id, local_files_only=False, **_):
        if not local_files_only or "local_files_only" in options:
            raise ConnectionError("no connection")
        if not is_cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(saved)

    loaded = MGLlavaProcessor.from_pretrained(saved)
    loaded._repository = box_detector_files_mgllava.ProcessorRepository(
        "user/model", None, {**loaded._repository.hub_options, **options}
    )
    monkeypatch.setattr(box_detector_files_mgllava, "snapshot_download", download)
    if is_cached and not options:
        assert_same_boxes(loaded.detect(IMAGE)[0], EXPECTED)
    else:
        with pytest.raises(ConnectionError, match="no connection"):
            loaded.detect(IMAGE)


def test_links_in_a_circle_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "box_detector" / "detector" / "again").symlink_to("again")
    with pytest.raises(ValueError, match="again' leads out of"):
        MGLlavaProcessor.from_pretrained(folder).detect(IMAGE)


def test_uploading_sends_the_folders_too(saved, monkeypatch):
    sent = []

    class Api:
        def upload_folder(self, **options):
            sent.append(options)

    def base(self, working_dir, repo_id, files_timestamps, **kwargs):
        sent.append(files_timestamps)

    monkeypatch.setattr(processing_mgllava, "HfApi", Api)
    monkeypatch.setattr(processing_mgllava.ProcessorMixin, "_upload_modified_files", base)
    loaded = MGLlavaProcessor.from_pretrained(saved)
    loaded._upload_modified_files(saved, "user/model", {"a": 1.0}, token="secret", commit_message="x")
    options = {"repo_id": "user/model", "folder_path": saved / "box_detector", "path_in_repo": "box_detector"}
    assert sent == [{"a": 1.0, "box_detector": float("inf")}, {**options, "token": "secret"}]


def test_a_copy_that_fails_leaves_the_old_folder(saved, monkeypatch):
    def fail(source, target, **kwargs):
        target.mkdir()
        (target / "half").touch()
        raise OSError("disk full")

    processor = small()
    processor.box_detector = BoxDetector(LABELS, OWLV2)
    monkeypatch.setattr(box_detector_files_mgllava.shutil, "copytree", fail)
    with pytest.raises(OSError, match="disk full"):
        processor.save_pretrained(saved)
    monkeypatch.undo()
    assert sorted(path.name for path in (saved / "box_detector").iterdir()) == [
        "detector",
        "prompt_embeds.safetensors",
    ]
    assert_same_boxes(MGLlavaProcessor.from_pretrained(saved).detect(IMAGE)[0], EXPECTED)
    assert processor.box_detector_config["detector"] == str(OWLV2)
