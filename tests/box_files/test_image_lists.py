import json

import numpy as np
import pytest
from PIL import Image

from mgllava.box_files import BoxFileError, list_images


@pytest.fixture
def folder(tmp_path):
    """Three images: b.jpg, which EXIF rotates, below/a.png and below/deeper/c.PNG."""
    folder = tmp_path / "images"
    (folder / "below" / "deeper").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(folder / "b.jpg", exif=exif)
    Image.new("L", (8, 6)).save(folder / "below" / "a.png")
    Image.new("RGBA", (5, 4)).save(folder / "below" / "deeper" / "c.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def ids(images):
    return [entry.ids for entry in images.entries]


def test_folder_is_read_with_its_subfolders_in_order(folder):
    images = list_images(folder)
    assert ids(images) == [("b.jpg",), ("below/a.png",), ("below/deeper/c.PNG",)]
    assert [images.load(number).size for number in range(3)] == [(10, 20), (8, 6), (5, 4)]
    assert all(images.load(number).mode == "RGB" for number in range(3))


def test_16_bit_images_are_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 6), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    image = list_images(tmp_path).load(0)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (128, 128, 128)


def test_excluded_folder_is_skipped(folder):
    assert len(list_images(folder, exclude=folder / "below")) == 1


def test_files_of_all_usual_extensions_are_found_in_any_case(tmp_path):
    images = "avif bmp gif jfif jpeg jpg png ppm tif tiff webp"
    videos = "3gp avi flv m4v mkv mov mp4 mpeg mpg ogv webm wmv"
    for name in f"{images} {videos} txt pdf json".split():
        for written in (name, name.upper()):
            (tmp_path / f"{written}.{written}").touch()
    found = {entry.image: entry.is_video for entry in list_images(tmp_path).entries}
    expected = dict.fromkeys(images.split(), False) | dict.fromkeys(videos.split(), True)
    both = {(written, is_video) for name, is_video in expected.items() for written in (name, name.upper())}
    assert found == {f"{written}.{written}": is_video for written, is_video in both}


def test_image_files_keep_the_order_given(folder):
    paths = [str(folder / "below" / "a.png"), str(folder / "b.jpg")]
    images = list_images(paths)
    assert ids(images) == [(path,) for path in paths]
    assert images.load(1).size == (10, 20)
    assert ids(list_images(paths[0])) == [(paths[0],)]


def test_questions_keep_their_ids_and_share_images(folder):
    lines = [
        {"question_id": 3, "image": "b.jpg", "text": "?"},
        {"question_id": "4", "image": "below/a.png"},
        {"question_id": 5, "image": "b.jpg"},
        {"question_id": 5, "image": "b.jpg"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    images = list_images(folder / "questions.jsonl")
    assert ids(images) == [(3, 5), ("4",)]
    assert images.load(1).size == (8, 6)


def test_llava_samples_have_text_ids_and_may_have_no_image(folder, tmp_path):
    samples = [
        {"id": 1, "image": "b.jpg", "conversations": []},
        {"id": "text", "conversations": []},
        {"id": "film", "video": "f.mp4"},
        {"id": "2", "image": "below/a.png"},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(samples))
    images = list_images(tmp_path / "llava.json", image_folder=folder)
    assert ids(images) == [("1",), ("film",), ("2",)] and images.samples_without_image == 1
    assert images.load(0).size == (10, 20)


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_ids_are_in_the_first_key_that_there_is(folder, name):
    samples = [
        {"index": 1, "id": 2, "question_id": 3, "image": "b.jpg"},
        {"index": 4, "id": 5, "image": "below/a.png"},
        {"index": 6, "image": "c"},
    ]
    text = json.dumps(samples) if name == "list.json" else "\n".join(map(json.dumps, samples))
    (folder / name).write_text(text)
    expected = [(3,), (5,), (6,)]
    assert ids(list_images(folder / name)) == (
        [(str(key),) for (key,) in expected] if name == "list.json" else expected
    )


@pytest.fixture
def dataset(folder):
    datasets = pytest.importorskip("datasets")
    paths = [folder / "b.jpg", folder / "below" / "a.png"]
    columns = {"question_id": [7, 8], "picture": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
    features = datasets.Features({"question_id": datasets.Value("int64"), "picture": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


def test_dataset_in_memory_on_disk_and_as_parquet(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(str(tmp_path / "parquet" / "train-00000.parquet"))
    for inputs in (dataset, tmp_path / "saved", tmp_path / "parquet", tmp_path / "parquet" / "train-00000.parquet"):
        images = list_images(inputs)
        assert ids(images) == [(7,), (8,)]
        assert [images.load(number).size for number in range(2)] == [(10, 20), (8, 6)]
    assert ids(list_images(dataset.remove_columns("question_id"))) == [(0,), (1,)]
    for name in ("id", "index"):
        assert ids(list_images(dataset.rename_column("question_id", name))) == [(7,), (8,)]


def test_rows_without_an_image_are_unreadable(dataset):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "picture": None if row["question_id"] == 8 else row["picture"]} for row in dataset]
    images = list_images(datasets.Dataset.from_list(rows, features=dataset.features))
    assert images.load(0).size == (10, 20)
    with pytest.raises(OSError, match="the row holds no image"):
        images.load(1)


def test_errors_of_unusable_datasets_say_what_to_do(dataset, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(BoxFileError, match="holds the splits test; give one of them"):
        list_images(tmp_path / "splits")
    with pytest.raises(BoxFileError, match=r"the column question_id must hold text or integers, got 7\.0"):
        list_images(dataset.cast_column("question_id", datasets.Value("float64")))
    with pytest.raises(BoxFileError, match="has no column of images, only question_id"):
        list_images(dataset.remove_columns("picture"))
    with pytest.raises(BoxFileError, match=r"must be paths or a datasets\.Dataset .*, got IterableDataset"):
        list_images(dataset.to_iterable_dataset())


def test_digests_of_different_lists_differ(folder):
    digest = list_images(folder).digest
    assert digest == list_images(folder).digest
    Image.new("RGB", (2, 2)).save(folder / "new.png")
    assert digest != list_images(folder).digest
    sample = {"id": 1, "image": "b.jpg"}
    digests = set()
    for samples in ([sample], [sample, {"id": 2}], [{**sample, "id": 3}], [{**sample, "image": "new.png"}]):
        (folder / "list.json").write_text(json.dumps(samples))
        digests.add(list_images(folder / "list.json").digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("questions.jsonl", '{"question_id": 1, "image": "a"}\n{', "line 2 is not JSON"),
        ("questions.jsonl", '{"image": "a.jpg"}', "must have question_id, id, index as text or an integer, got None"),
        ("questions.jsonl", '{"id": 1, "image": ["a", 2]}', "`image` must be a path or a list of paths"),
        ("questions.jsonl", '{"id": 1, "image": ["a", ""]}', "`image` must be a path or a list of paths"),
        ("questions.jsonl", '{"id": 1, "video": 5}', "`video` must be a path or a list of paths, got 5"),
        ("questions.jsonl", '{"id": true, "image": "a"}', "as text or an integer, got True"),
        ("questions.jsonl", '{"id": 1}', "No images in"),
        ("llava.json", '{"id": 1}\n{"id": 2}', r"is not JSON .* one sample per line, name it \.jsonl"),
        ("llava.json", '{"id": 1}', "must hold a list of samples, got dict"),
        ("llava.json", "[3]", "sample 0 must be a dictionary, got int"),
        ("list.csv", "", "must be a folder, an image"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(BoxFileError, match=said):
        list_images(tmp_path / name)


def test_input_without_images_is_an_error(tmp_path, folder):
    with pytest.raises(BoxFileError, match=r"No images in .*empty \(looked for \.avif"):
        (tmp_path / "empty").mkdir()
        list_images(tmp_path / "empty")
    with pytest.raises(BoxFileError, match=r"No such file or folder: .*absent"):
        list_images(tmp_path / "absent")
    with pytest.raises(BoxFileError, match="must all be images"):
        list_images([folder / "b.jpg", folder / "notes.txt"])
