"""lmms-eval from beginning to end with the small model, for `make lmms-check`: texts and scores by value.

Skipped where lmms-eval is not installed. Expected texts come from single prompts, and expected scores from them by
plain formulas. lmms-eval exits with 0 after errors, so results are read, not the exit status.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mgllava.box_files import read_boxes, write_boxes

pytest.importorskip("lmms_eval")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "small_world" / "model"
# Rows whose reference answer is wrong on purpose, so that scores are not 0 or 1.
WRONG = (2, 5)
FIRST_SEED = 3_100_000


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Questions about pictures of the small world: whether something is there, and what is printed on it."""
    from small_world.drawing import draw_scene
    from small_world.questions import ask
    from small_world.scenes import make_scene

    folder, made = tmp_path_factory.mktemp("pictures"), []
    for seed in range(FIRST_SEED, FIRST_SEED + 6):
        scene = make_scene("test", seed)
        picture, boxes = draw_scene(scene)
        path = folder / f"{seed}.png"
        picture.save(path)
        for kind in ("existence", "reading"):
            for question in ask(scene, 1, (kind,)):
                is_yes = question.answer == "yes"
                made.append(
                    {
                        "question_id": f"q{len(made)}",
                        "question": question.text,
                        "answer": "yes" if is_yes != (len(made) in WRONG) else "no",
                        "category": "random",
                        "path": path,
                        "boxes": boxes,
                        "labels": [item.shape for item in scene.objects],
                    }
                )
    return made


@pytest.fixture(scope="session")
def box_file(rows, tmp_path_factory):
    records = [
        {"id": row["question_id"], "boxes": row["boxes"], "labels": row["labels"], "scores": [1.0] * len(row["boxes"])}
        for row in rows
    ]
    return write_boxes(tmp_path_factory.mktemp("boxes") / "boxes.json", records)


@pytest.fixture(scope="session")
def tasks(rows, tmp_path_factory):
    """POPE with local data, and without its request for a word or a phrase, which the small model does not know."""
    import datasets

    from mgllava.integrations.lmms_eval import write_local_task

    folder = tmp_path_factory.mktemp("tasks")
    columns = ("question_id", "question", "answer", "category")
    table = [{**{name: row[name] for name in columns}, "image": str(row["path"])} for row in rows]
    features = datasets.Features({**{name: datasets.Value("string") for name in columns}, "image": datasets.Image()})
    datasets.Dataset.from_list(table, features=features).to_parquet(folder / "pope.parquet")
    path = write_local_task("pope", [folder / "pope.parquet"], folder)
    task = json.loads(path.read_text())
    task["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": ""}}
    path.write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="session")
def expected(rows, box_file):
    """Texts of single prompts by the source of the boxes."""
    from mgllava.chat.loading import load
    from mgllava.evaluation import Answerer

    answerer = Answerer(*load(str(MODEL), dtype="float32", device="cpu"), 128)
    file = read_boxes(box_file)

    def texts(source):
        found = []
        for row in rows:
            with Image.open(row["path"]) as image:
                image = image.convert("RGB")
            boxes = {
                "none": lambda image, row: {"boxes": []},
                "file": lambda image, row: file[row["question_id"]],
                "detector": lambda image, row: answerer.detect([image])[0],
            }[source](image, row)
            found += answerer.answer([image], [row["question"]], [boxes])
        return found

    return {source: texts(source) for source in ("none", "file", "detector")}


def scores(rows, texts):
    said, wanted = [text.lower() == "yes" for text in texts], [row["answer"] == "yes" for row in rows]
    hits = sum(left and right for left, right in zip(said, wanted, strict=True))
    precision, recall = hits / sum(said), hits / sum(wanted)
    right = [text.lower() == row["answer"] for text, row in zip(texts, rows, strict=True)]
    return {
        "pope_accuracy,none": sum(right) / len(right),
        "pope_precision,none": precision,
        "pope_recall,none": recall,
        "pope_f1_score,none": 2 * precision * recall / (precision + recall),
    }


def options_of(source, box_file):
    options = f"pretrained={MODEL},dtype=float32,boxes={source}"
    return options + (f",box_file={box_file}" if source == "file" else "")


def check(results, samples, rows, texts):
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"] for sample in samples]
    # Files of samples have a text instead of a list of one.
    assert [answer if isinstance(answer, str) else answer[0] for answer in answers] == texts
    for name, value in scores(rows, texts).items():
        assert results[name] == pytest.approx(value), name
    assert 0 < results["pope_accuracy,none"] < 1


def test_texts_depend_on_the_boxes(expected):
    """Otherwise the other tests could not tell whether boxes arrive."""
    assert len({tuple(texts) for texts in expected.values()}) >= 2


@pytest.mark.parametrize("source", ["none", "file"])
def test_evaluation_in_batches(source, rows, tasks, box_file, expected):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model="mgllava",
        model_args=options_of(source, box_file),
        tasks=["pope_local"],
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), model_name="mgllava"),
    )
    check(found["results"]["pope_local"], found["samples"]["pope_local"], rows, expected[source])


def test_command_with_the_detector(rows, tasks, box_file, expected, tmp_path):
    options = ["--model", "mgllava", "--model_args", options_of("detector", box_file), "--batch_size", "4"]
    where = ["--tasks", "pope_local", "--include_path", tasks, "--output_path", tmp_path, "--log_samples"]
    command = [sys.executable, "-m", "lmms_eval", *options, "--device", "cpu", *where]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    written = list(tmp_path.rglob("*_results.json"))
    assert len(written) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    (lines,) = tmp_path.rglob("*_samples_pope_local.jsonl")
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    results = json.loads(written[0].read_text())["results"]["pope_local"]
    check(results, samples, rows, expected["detector"])
