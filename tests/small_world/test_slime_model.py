"""The small SliME reads small print in tiles, which its global view does not show."""

import pytest

from small_world.dataset import write_dataset
from small_world.demo import SLIME
from small_world.evaluation import accuracy, answer_questions, load_model, read_questions

PICTURES = 25
# No training or other test uses these seeds.
FIRST_SEED = 2_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-print")
    write_dataset(folder, "fine-test", PICTURES, questions=8, first=FIRST_SEED, processes=1)
    return folder


def test_it_reads_what_only_tiles_show(data):
    model, processor = load_model(SLIME)
    questions = [question for question in read_questions(data) if question["kind"] == "reading"]
    shares = {}
    for branch in ("both", "global"):
        model.config.branch = branch
        shares[branch] = accuracy(list(answer_questions(model, processor, questions, data / "images", None)))["all"]
    # Of more questions, docs/small_slime.md has the shares.
    assert shares["both"] >= 0.6
    assert shares["global"] <= 0.4
