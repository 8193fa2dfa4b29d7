import pytest
from transformers import AutoModel

from mgllava.conversion import convert_ram_plus
from tests.ram_plus.golden import SOURCES


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """Convert the golden checkpoint, and return the model folder."""
    return convert_ram_plus(**SOURCES, output=tmp_path_factory.mktemp("ram_plus") / "repository")


@pytest.fixture
def load(repository):
    def run(**kwargs):
        return AutoModel.from_pretrained(repository, **kwargs).eval()

    return run


@pytest.fixture
def tagger(load):
    return load()
