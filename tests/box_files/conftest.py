import numpy as np
import pytest
from PIL import Image

# Their sizes differ, so that a record of the wrong image is noticed.
NUMBER = 500


@pytest.fixture(scope="session")
def many_images(tmp_path_factory):
    """500 tiny images, three of them damaged."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    for number in range(NUMBER):
        pixels = generator.integers(0, 256, (4 + number % 7, 5 + number % 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    (folder / "0000.png").write_bytes(b"")
    (folder / "0250.png").write_bytes(b"no image")
    (folder / "0499.png").write_bytes((folder / "0498.png").read_bytes()[:60])
    return folder


@pytest.fixture
def some_images(tmp_path):
    """Ten tiny images."""
    folder = tmp_path / "some"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (20 + number, 10), (number * 20, 90, 0)).save(folder / f"{number}.png")
    return folder
