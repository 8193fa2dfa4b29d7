"""The small SliME that this git repository ships reads small print in tiles, and cannot in the global view alone."""

import pytest

from small_world.dataset import write_dataset
from small_world.demo import SLIME
from small_world.evaluation import accuracy, answer_questions, load_model, read_questions

PICTURES = 12
# No training or other test uses these seeds.
FIRST_SEED = 2_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-print")
    write_dataset(folder, "fine-test", PICTURES, questions=5, first=FIRST_SEED, processes=1)
    return folder


@pytest.fixture(scope="module")
def loaded():
    return load_model(SLIME)


def shares(loaded, data, branch):
    model, processor = loaded
    model.config.branch = branch
    questions = read_questions(data)
    return accuracy(list(answer_questions(model, processor, questions, data / "images", None)))


def test_it_reads_what_only_tiles_show(loaded, data):
    both, global_only = (shares(loaded, data, branch) for branch in ("both", "global"))
    assert both["all"] >= 0.5
    assert both["reading"] >= global_only["reading"] + 0.3
