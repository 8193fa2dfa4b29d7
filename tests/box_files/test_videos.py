"""Jobs over videos. The files are GIF animations, which no decoder of videos is needed for."""

import json
import logging

import pytest
from PIL import Image

from mgllava.box_files import BoxFileError, detect_images, detection_settings, list_images, read_boxes, settings_digest
from tests.box_files.stub_detector import StubDetector


def save(path, count, width=40):
    path.parent.mkdir(exist_ok=True)
    frames = [Image.new("RGB", (width, 30), (10 * index, width, 0)) for index in range(count)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=100)


@pytest.fixture
def folder(tmp_path):
    """A video of 10 frames, one of 2 and one that is damaged, and an image."""
    folder = tmp_path / "files"
    save(folder / "a.mp4", 10)
    save(folder / "b.webm", 2, width=50)
    (folder / "c.mkv").write_bytes((folder / "a.mp4").read_bytes()[:50])
    Image.new("RGB", (20, 10)).save(folder / "i.png")
    return folder


class Counting(StubDetector):
    """Remembers how many images each call had."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def detect(self, images, **options):
        self.sizes.append(len(images))
        return super().detect(images, **options)


def alone(path, index):
    """What the detector finds in one frame."""
    with Image.open(path) as image:
        image.seek(index)
        return StubDetector().detect([image.convert("RGB")])[0]


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_a_folder_of_images_and_videos(folder, tmp_path, extension, caplog):
    """One entry for each frame that is sampled, as in the processor; short videos repeat frames."""
    detector = Counting()
    output = tmp_path / f"boxes.{extension}"
    with caplog.at_level(logging.WARNING):
        summary = detect_images(folder, output, detector, num_frames=4, batch_size=6)
    file = read_boxes(output)
    assert list(file) == ["a.mp4", "b.webm", "i.png"] and "frames" not in file["i.png"]
    assert file["a.mp4"]["frames"] == [alone(folder / "a.mp4", index) for index in (0, 3, 6, 9)]
    assert file["b.webm"]["frames"] == [alone(folder / "b.webm", index) for index in (0, 0, 0, 1)]
    # All frames of a video in one call, each once; the image would not fit into the batch of the damaged video.
    assert detector.sizes == [4, 2, 1]
    assert summary.unreadable == 1 and "c.mkv" in caplog.text and "c.mkv" in summary.unreadable_list.read_text()
    frames = [entry for record in file.values() for entry in record.get("frames", [record])]
    assert summary.boxes == sum(len(entry["boxes"]) for entry in frames)


def test_the_sampling_is_part_of_the_settings(folder, tmp_path):
    output = tmp_path / "boxes.json"
    detect_images(folder, output, StubDetector(), num_frames=4)
    settings = read_boxes(output).settings
    assert settings["frames"] == {"sampling": "linspace", "num_frames": 4}
    read_boxes(output).check_settings(detection_settings(StubDetector(), num_frames=4))
    with pytest.raises(BoxFileError, match=r"frames\.num_frames is 4, expected 8"):
        read_boxes(output).check_settings(detection_settings(StubDetector(), num_frames=8))
    with pytest.raises(BoxFileError, match=r"another job made it.*frames\.num_frames is 4, expected 8"):
        detect_images(folder, output, StubDetector(), resume=True)
    detect_images(folder / "i.png", tmp_path / "image.json", StubDetector(), num_frames=4)
    # Boxes of images do not depend on it, so their files stay comparable.
    assert settings_digest(read_boxes(tmp_path / "image.json").settings) == settings_digest(
        detection_settings(StubDetector())
    )


def test_a_job_on_videos_resumes(folder, tmp_path):
    class Failing(StubDetector):
        def detect(self, images, **options):
            if self.calls == 1:
                raise RuntimeError("killed")
            return super().detect(images, **options)

    whole = tmp_path / "whole.parquet"
    detect_images(folder, whole, StubDetector(), num_frames=4, batch_size=1)
    with pytest.raises(RuntimeError, match="killed"):
        detect_images(folder, tmp_path / "b.parquet", Failing(), num_frames=4, batch_size=1)
    rest = Counting()
    detect_images(folder, tmp_path / "b.parquet", rest, num_frames=4, batch_size=1, resume=True)
    assert rest.sizes == [2, 1]
    assert (tmp_path / "b.parquet").read_bytes() == whole.read_bytes()


def test_samples_with_videos(folder, tmp_path):
    """A video alone has the id of its sample; several have their paths."""
    rows = [
        {"id": 1, "video": "a.mp4"},
        {"id": 2, "video": ["a.mp4", "b.webm"]},
        {"id": 3, "image": "i.png", "video": "b.webm"},
        {"id": 4},
    ]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    (folder / "i.png").rename(tmp_path / "images" / "i.png")
    found = list_images(tmp_path / "s.json", image_folder=tmp_path / "images", video_folder=folder, num_frames=2)
    assert [(entry.ids, entry.image, entry.is_video) for entry in found.entries] == [
        (("1", "a.mp4"), "a.mp4", True),
        (("b.webm",), "b.webm", True),
        (("i.png",), "i.png", False),
    ]
    assert found.samples_without_image == 1
    assert len(found.load(0)) == 2 and found.load(2).size == (20, 10)


def test_drawings_of_videos_show_all_frames(folder, tmp_path):
    detect_images([folder / "a.mp4"], tmp_path / "b.json", StubDetector(), num_frames=3, show=tmp_path / "drawn")
    with Image.open(next((tmp_path / "drawn").iterdir())) as drawn:
        assert drawn.width > 2.5 * drawn.height  # three frames of 4:3


def test_a_missing_decoder_ends_the_job(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError("Install one: pip install av.")

    monkeypatch.setattr("mgllava.box_files.image_lists.read_video", fail)
    with pytest.raises(ImportError, match="pip install av"):
        detect_images(folder, tmp_path / "b.json", StubDetector())
