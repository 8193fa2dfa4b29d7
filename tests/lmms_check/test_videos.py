"""Questions about videos in lmms-eval, for `make lmms-check`: answers and scores are those of `mgllava eval`.

Skipped where lmms-eval is not installed.
"""

import json
from pathlib import Path

import pytest

from mgllava.box_files import write_boxes
from mgllava.evaluation import evaluate

pytest.importorskip("lmms_eval")

MODEL = Path(__file__).parents[2] / "small_world" / "video_model"
FIRST = 500
# The question whose reference answer is wrong on purpose, so that scores are not 1.
WRONG = 3


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three videos of the small world, with their true boxes, in the files of MSVD-QA."""
    from small_world.video_dataset import make_sample

    folder, questions, answers, records = tmp_path_factory.mktemp("videos"), [], [], []
    for number in range(FIRST, FIRST + 3):
        sample = make_sample("test", number, folder)
        records.append({"id": sample["video"], "frames": sample["frames"]})
        for question in sample["questions"]:
            answers.append({"answer": "two zebras" if len(answers) == WRONG else question["answer"]})
            row = {"question_id": len(questions), "video_name": sample["video"], "question": question["text"]}
            questions.append(row)
    paths = folder / "test_q.json", folder / "test_a.json"
    for path, content in zip(paths, (questions, answers), strict=True):
        path.write_text(json.dumps(content))
    return *paths, write_boxes(folder / "boxes.parquet", records)


def test_answers_depend_on_the_boxes_and_are_those_of_the_own_evaluation(data, tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from mgllava.integrations.lmms_eval import write_video_task

    questions, answers, box_file = data
    write_video_task("msvd-qa", [questions], tmp_path / "tasks", annotations=answers)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), model_name="mgllava")
    texts = {}
    for source in ("none", "file"):
        given = str(box_file) if source == "file" else None
        expected = evaluate(
            str(MODEL),
            "msvd-qa",
            questions,
            tmp_path / source,
            annotations=answers,
            boxes=source,
            box_file=given,
            dtype="float32",
            device="cpu",
        )
        lines = (tmp_path / source / "answers.jsonl").read_text().splitlines()
        texts[source] = [json.loads(line)["answer"] for line in lines]
        options = f"pretrained={MODEL},dtype=float32,box_limit=0,boxes={source}"
        found = simple_evaluate(
            model="mgllava",
            model_args=options + (f",box_file={given}" if given else ""),
            tasks=["msvd_qa_local"],
            batch_size=4,
            device="cpu",
            task_manager=manager,
        )
        samples = sorted(found["samples"]["msvd_qa_local"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in samples] == texts[source]
        results = found["results"]["msvd_qa_local"]
        for metric, name in (("exact_match", "exact match"), ("token_f1", "token F1")):
            assert 100 * results[f"{metric},none"] == pytest.approx(expected.scores[name]), (source, name)
            assert 0 < expected.scores[name] < 100
    assert texts["none"] != texts["file"]
