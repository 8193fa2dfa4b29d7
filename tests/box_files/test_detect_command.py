"""`mgllava detect` with the small OWLv2 of the golden data."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from mgllava import MGLlavaProcessor
from mgllava.box_files import (
    BoxFileError,
    detect_images,
    detection_settings,
    detectors,
    open_detector,
    read_boxes,
)
from mgllava.box_files.detectors import folder_digest
from mgllava.cli import app
from mgllava.commands.detect import parse_array_task, parse_labels
from mgllava.processing import COCO_80, BoxDetector
from tests.golden_cases import GOLDEN

OWLV2 = GOLDEN.parent / "golden_ram" / "owlv2"
COFFEE = GOLDEN.parents[1] / "examples" / "coffee.jpg"


def _run(*arguments):
    return CliRunner().invoke(app, ["detect", *map(str, arguments)])


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with Image.open(COFFEE) as coffee:
        for width in (90, 70, 64):
            coffee.resize((width, 60)).save(folder / f"{width}.png")
    return folder


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_command_writes_what_the_detector_finds(images, tmp_path, extension):
    output = tmp_path / f"boxes.{extension}"
    options = ["--detector", OWLV2, "--labels", "cat,dog", "--threshold", "0.01", "--batch-size", "1"]
    result = _run(images, "--output", output, *options, "--save-boxes", tmp_path / "shown")
    assert result.exit_code == 0, result.output
    assert f"Wrote {output}: 3 records," in result.output
    detector = BoxDetector(detector=OWLV2)
    file = read_boxes(output)
    assert list(file) == ["64.png", "70.png", "90.png"]
    for name, found in file.items():
        expected = detector.detect(str(images / name), labels=["cat", "dog"], threshold=0.01)[0]
        assert found["boxes"] == expected["boxes"].tolist() and found["labels"] == expected["labels"]
        assert found["scores"] == pytest.approx(expected["scores"].tolist())
    assert sum(len(found["boxes"]) for found in file.values()) > 0
    file.check_settings(detection_settings(detector, ["cat", "dog"], 0.01))
    assert len(list((tmp_path / "shown").iterdir())) == 3
    # On an existing output.
    result = _run(images, "--output", output, *options)
    assert result.exit_code == 1 and "exists. Choose another output" in result.output
    assert _run(images, "--output", output, *options, "--resume").exit_code == 0


@pytest.fixture(scope="session")
def processor_folder(repository, tmp_path_factory):
    """A processor with a detector in its folder."""
    processor = MGLlavaProcessor.from_pretrained(repository)
    processor.box_detector = BoxDetector(tagger=["cat", "dog"], detector=OWLV2, mode="clean")
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return folder


def test_detector_of_a_processor_and_its_settings_after_a_move(images, tmp_path, processor_folder):
    output = tmp_path / "boxes.json"
    result = _run(images, "--output", output, "--processor", processor_folder, "--threshold", "0.01")
    assert result.exit_code == 0, result.output
    file = read_boxes(output)
    assert file.settings["detector"]["tagger"] == ["cat", "dog"] and file.settings["detector"]["mode"] == "clean"
    assert all(isinstance(corner, float) for found in file.values() for box in found["boxes"] for corner in box)

    moved = shutil.copytree(processor_folder, tmp_path / "moved")
    config = MGLlavaProcessor.from_pretrained(moved).box_detector_config
    file.check_settings(detection_settings(config, threshold=0.01, repository=moved))
    weights = next((moved / "box_detector" / "detector").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BoxFileError, match=r"detector\.detector is"):
        file.check_settings(detection_settings(config, threshold=0.01, repository=moved))
    # An argument overrides the processor's mode.
    assert open_detector(str(processor_folder), mode="faithful").config["mode"] == "faithful"


def test_detectors_are_opened_without_reading_weights():
    assert open_detector(tagger="coco80").config == {
        "tagger": COCO_80,
        "detector": "google/owlv2-large-patch14-ensemble",
        "mode": "faithful",
    }
    assert detection_settings(open_detector(detector=str(OWLV2)))["detector"]["detector"].startswith("sha256:")


def test_model_with_a_detector_outside_its_folder_is_refused(processor_folder, tmp_path):
    moved = shutil.copytree(processor_folder, tmp_path / "moved")
    shutil.rmtree(moved / "box_detector" / "detector")
    (moved / "box_detector" / "detector").symlink_to(OWLV2)
    path = next(path for path in moved.glob("*.json") if "./box_detector/detector" in path.read_text())
    path.write_text(path.read_text().replace("./box_detector/detector", "./../outside"))
    with pytest.raises(BoxFileError, match=r"`processor`: .*outside"):
        open_detector(str(moved))


def test_detectors_are_loaded_once_at_the_first_image(monkeypatch):
    loaded = []

    class Loaded:
        def detect(self, images, **options):
            return [options] * len(images)

    def load(config, device, trust_remote_code):
        loaded.append((config["mode"], device.type, trust_remote_code))
        return Loaded()

    monkeypatch.setattr(detectors.BoxDetector, "from_config", load)
    for trusted in (False, True):
        detector = open_detector(tagger="coco80", mode="clean", trust_remote_code=trusted)
        options = {"labels": None, "threshold": 0.2, "batch_size": 8}
        assert detector.detect(["a"]) == [options] and detector.detect(["a", "b"]) == [options] * 2
        assert [entry[::2] for entry in loaded] == [("clean", trusted)]
        loaded.clear()
    assert open_detector(tagger="coco80").detect(["a"]) and loaded.pop()[2] is False
    with pytest.raises(BoxFileError, match="Nothing says what to look for: pass `labels` or a `tagger`"):
        open_detector().detect(["a"])
    assert open_detector().detect(["a"], labels=["cup"])[0]["labels"] == ["cup"]


def test_folders_of_models_are_identified_by_their_contents(tmp_path):
    """The digests are in box files, so a new release must find the same."""
    first = tmp_path / "first"
    first.mkdir()
    files = {"a.json": b"{}", "b.safetensors": b"\1\2", "c.bin": b"", "d.txt": b"words", "README.md": b"any"}
    for name, content in files.items():
        (first / name).write_bytes(content)
    digest = folder_digest(first)
    counted = b"".join(f"{name}\0{len(files[name])}\0".encode() + files[name] for name in sorted(files)[1:])
    assert (
        digest
        == f"sha256:{hashlib.sha256(counted).hexdigest()}"
        == folder_digest(shutil.copytree(first, tmp_path / "b"))
    )
    (first / "README.md").write_text("other")
    assert folder_digest(first) == digest
    # Of more than 4 MiB, 64 samples of 64 KiB are read, from the first byte to the last.
    size, step = (1 << 22) + 64, 1 << 16
    content = bytearray(size)
    content[size // 2] = 7
    digests = set()
    for changed in (None, 0, size - 1, size // 3):
        other = bytearray(content)
        if changed is not None:
            other[changed] ^= 255
        (first / "b.safetensors").write_bytes(other)
        digests.add(folder_digest(first))
        samples = b"".join(other[at : at + step] for at in ((size - step) * number // 63 for number in range(64)))
        parts = {**files, "b.safetensors": samples}
        sizes = {name: size if name == "b.safetensors" else len(part) for name, part in parts.items()}
        counted = b"".join(f"{name}\0{sizes[name]}\0".encode() + parts[name] for name in sorted(parts)[1:])
        assert folder_digest(first) == f"sha256:{hashlib.sha256(counted).hexdigest()}"
    assert len(digests) == 4
    (first / "b.safetensors").write_bytes(bytes(1 << 22))
    parts = {**files, "b.safetensors": bytes(1 << 22)}
    counted = b"".join(f"{name}\0{len(parts[name])}\0".encode() + parts[name] for name in sorted(parts)[1:])
    assert folder_digest(first) == f"sha256:{hashlib.sha256(counted).hexdigest()}"


def test_settings_name_folders_by_contents_and_leave_caches_out(tmp_path):
    for part in ("tagger", "detector"):
        (tmp_path / "box_detector" / part).mkdir(parents=True)
        (tmp_path / "box_detector" / part / "config.json").write_text(part)
    config = {part: f"./box_detector/{part}" for part in ("tagger", "detector")}
    found = detection_settings({**config, "mode": "clean", "prompt_embeds": [1]}, ("a",), 0.3, repository=tmp_path)
    folders = {part: folder_digest(tmp_path / "box_detector" / part) for part in ("tagger", "detector")}
    assert found == {"detector": {**folders, "mode": "clean"}, "labels": ["a"], "threshold": 0.3}
    for part in ("tagger", "detector"):
        with pytest.raises(BoxFileError, match=f"its {part} has no name"):
            detection_settings({part: config[part]})


def test_detector_that_does_not_follow_the_protocol_is_refused(tmp_path):
    class Simple:
        def detect(self, images):
            return []

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    detector = Simple()
    with pytest.raises(BoxFileError, match=r"must have `config`, a mapping of plain values.*got Simple without one"):
        detect_images([tmp_path / "a.png"], tmp_path / "boxes.json", detector)
    detector.config = {"detector": "simple 1.0"}
    with pytest.raises(BoxFileError, match="that of Simple does not take labels, threshold, batch_size"):
        detect_images([tmp_path / "a.png"], tmp_path / "boxes.json", detector)


def test_detector_without_a_name_is_refused():
    named = BoxDetector(detector=OWLV2)
    detector = BoxDetector(detector=named._detector.model, detector_processor=named._detector.processor)
    with pytest.raises(BoxFileError, match="its detector has no name"):
        detection_settings(detector)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--detector", OWLV2], "Nothing says what to look for: pass --labels"),
        (["--detector", "no/such-model", "--labels", "cat"], "--detector must be a folder or a repository"),
        (["--detector", OWLV2.parent, "--labels", "cat"], "The detector cannot be loaded: Unrecognized model"),
        (["--detector", OWLV2, "--labels", ","], "--labels must have at least one label"),
        (["--detector", OWLV2, "--labels", "cat", "--shard", "3/3"], "--shard must be I/N with 0 <= I < N"),
        (["--processor", "x", "--tagger", "y"], "brings its own detector"),
        (["--detector", OWLV2, "--labels", "cat", "--output", "boxes.txt"], "must end in .json or .parquet"),
    ],
)
def test_wrong_use_is_one_message(images, tmp_path, options, said):
    result = _run(images, "--output", tmp_path / "boxes.json", *options)
    assert result.exit_code == 1
    assert said in result.output and "error:" in result.output
    assert "Traceback" not in result.output and not (tmp_path / "boxes.json").exists()


def test_model_without_detector_is_one_message(images, tmp_path, repository):
    result = _run(images, "--output", tmp_path / "boxes.json", "--processor", repository)
    assert result.exit_code == 1 and "has no box detector. Pass --detector and --tagger" in result.output


def test_no_images_is_one_message(tmp_path):
    (tmp_path / "empty").mkdir()
    result = _run(tmp_path / "empty", "--output", tmp_path / "b.json", "--detector", OWLV2, "--labels", "cat")
    assert result.exit_code == 1 and "No images in" in result.output


def test_unreadable_images_are_reported(images, tmp_path, caplog):
    (images / "bad.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        result = _run(images, "--output", tmp_path / "b.json", "--detector", OWLV2, "--labels", "cat")
    assert result.exit_code == 0 and "Unreadable images: 1, see" in result.output
    assert "Skipped bad.jpg" in caplog.text


def test_labels_come_from_the_command_line_or_a_file(tmp_path):
    (tmp_path / "labels.txt").write_text("wine glass\n\n fork \nsalt, pepper\n")
    assert parse_labels("cup, wine glass,") == ["cup", "wine glass"]
    assert parse_labels(str(tmp_path / "labels.txt")) == ["wine glass", "fork", "salt, pepper"]
    assert parse_labels(None) is None
    assert parse_array_task("2/16") == (2, 16) and parse_array_task(None) == (0, 1)


@pytest.mark.slow
def test_command_under_accelerate_is_the_same_as_without(images, tmp_path):
    arguments = [images, "--detector", OWLV2, "--labels", "cat", "--threshold", "0.01", "--shard-size", "1"]
    assert _run(*arguments, "--output", tmp_path / "one.parquet").exit_code == 0
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "mgllava", "detect", *arguments, "--output", tmp_path / "two.parquet"]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
