"""The model of lmms-eval, where it is installed: answers in order, boxes by source, options of tasks."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from mgllava.box_files import write_boxes
from mgllava.evaluation import Answerer, EvaluationError

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

COLORS = ("red", "green", "blue")


@pytest.fixture
def documents():
    return [{"question_id": n, "image": Image.new("RGB", (40, 30), color)} for n, color in enumerate(COLORS)]


@pytest.fixture
def ask(repository, documents):
    from mgllava.integrations.lmms_eval import MGLlavaChat

    def to_messages(document):
        content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": "Q?"}]
        return [{"role": "user", "content": content}]

    def run(options=({"max_new_tokens": 4},) * 3, **arguments):
        chat = MGLlavaChat(str(repository), device="cpu", dtype="float32", batch_size=2, **arguments)
        chat.task_dict = {"task": {"test": documents}}
        requests = [
            SimpleNamespace(args=("context", to_messages, options[number], number, "task", "test"))
            for number in (2, 0, 1)
        ]
        return chat.generate_until(requests)

    return run


def test_answers_are_in_the_order_of_the_requests(ask, model, processor, documents):
    expected = Answerer(model, processor, 4).answer([document["image"] for document in documents], ["Q?"] * 3)
    assert ask() == [expected[number] for number in (2, 0, 1)]
    # Options of generation differ, so that the batches do too.
    options = [{"max_new_tokens": 4}, {"max_new_tokens": 2}, {"max_new_tokens": 4, "until": [expected[2][:1]]}]
    found = ask(options)
    assert found[:2] == ["", expected[0]]


def test_boxes_of_a_file(ask, model, processor, documents, tmp_path):
    records = [{"id": n, "boxes": [[n, 0, 30, 30]], "labels": ["a"], "scores": [0.9]} for n in range(3)]
    file = str(write_boxes(tmp_path / "b.json", records))
    images = [document["image"] for document in documents]
    expected = Answerer(model, processor, 4).answer(images, ["Q?"] * 3, records)
    assert ask(box_file=file) == [expected[number] for number in (2, 0, 1)]
    file = str(write_boxes(tmp_path / "b.json", records[:1]))
    with pytest.raises(EvaluationError, match="no boxes for id"):
        ask(box_file=file)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"boxes": "oracle"}, "`boxes` must be one of none, file, detector"),
        ({"boxes": "file"}, "needs a file"),
        ({"boxes": "detector"}, "has none"),
        ({"temperature": 1}, "has temperature, which mgllava does not know"),
    ],
)
def test_wrong_arguments(arguments, problem, ask):
    with pytest.raises(EvaluationError, match=problem):
        ask(**arguments)


def test_local_variant_of_a_task(tmp_path):
    from mgllava.integrations.lmms_eval import write_local_task

    data = tmp_path / "a.parquet"
    data.touch()
    content = json.loads(write_local_task("pope", [data], tmp_path / "tasks").read_text())
    assert content["task"] == "pope_local" and content["include"].endswith("pope.yaml")
    assert content["dataset_kwargs"] == {"data_files": {"test": [str(data)]}}
    with pytest.raises(EvaluationError, match="no task 'absent'"):
        write_local_task("absent", [data], tmp_path)
