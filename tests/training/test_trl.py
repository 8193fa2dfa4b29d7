"""TRL's own trainers and collators, which know nothing of boxes: what the model learns, and which boxes it sees."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version

pytest.importorskip("trl")

from mgllava.training import MGLlavaDataCollator
from tests.training import trl_session
from tests.training.conftest import tiny_processor, words_model
from tests.training.trl_session import ANSWERS, BOXES, FORMS, QUESTION, REJECTED, answer, pictures, question

SAMPLES = range(len(ANSWERS))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    for template in ("vicuna", "llama3"):
        words_model().save_pretrained(folder / template)
        tiny_processor(template).save_pretrained(folder / template)
    return folder


def expected(processor, answers):
    """What our own collator learns, and the boxes that it makes."""
    samples = [
        {"messages": [question(sample), answer(text)], "images": pictures(sample)}
        for sample, text in zip(SAMPLES, answers, strict=True)
    ]
    batch = MGLlavaDataCollator(processor)(samples)
    learned = [row[row != -100].tolist() for row in batch["labels"]]
    boxes = [of_image[:count].tolist() for of_image, count in zip(batch["boxes"], batch["num_boxes"], strict=True)]
    return learned, boxes


# Trainers differ in what they ask of a processor, code and templates do not: a form of each kind is enough for them.
CASES = [
    *(pytest.param(form, False, id=form) for form in FORMS),
    *(
        pytest.param(form, True, id=f"{form}-remote", marks=[] if form in ("messages", "grpo") else pytest.mark.slow)
        for form in FORMS
    ),
]


@pytest.mark.parametrize(("form", "with_remote_code"), CASES)
def test_answers_are_learned_and_boxes_arrive(form, with_remote_code, repositories):
    if form == "assistant_only" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL refuses `assistant_only_loss` with images there")
    # Another template for each code: one closes answers by EOS and a separator, the other by a suffix.
    repository = repositories / ("llama3" if with_remote_code else "vicuna")
    _, processor = trl_session.load(repository)
    learned, boxes = expected(processor, ANSWERS)
    assert all(processor.decode(row, skip_special_tokens=True).strip() for row in learned)
    seen = trl_session.run(form, repository, with_remote_code, **FORMS[form])
    if form == "grpo":
        # Each prompt was answered twice, and the rows came in two shuffled batches.
        answers = [completion[: ends_at(completion)] for completion in seen["completions"]]
        assert sorted(seen["learned"]) == sorted(answers)
        of_prompts = [entry for sample in SAMPLES[:2] for entry in boxes_of(sample, boxes)] * 2
        assert sorted(seen["boxes"]) == sorted(of_prompts)
        return
    if form == "dpo":
        learned, boxes = learned + expected(processor, REJECTED)[0], boxes * 2
    assert sorted(seen["learned"]) == sorted(learned)
    assert sorted(seen["boxes"]) == sorted(boxes)


def ends_at(completion, eos=2):
    return completion.index(eos) + 1 if eos in completion else len(completion)


def boxes_of(sample, boxes):
    first = sum(len(entry) for entry in BOXES[:sample])
    return boxes[first : first + len(BOXES[sample])]


@pytest.mark.slow
def test_the_same_is_learned_where_the_package_is_missing(repositories, tmp_path):
    repository = repositories / "vicuna"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, trl_session.__file__, str(repository), str(tmp_path / "seen.json")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for form, seen in json.loads((tmp_path / "seen.json").read_text()).items():
        assert seen == trl_session.run(form, repository, **FORMS[form]), form


@pytest.mark.parametrize("form", ["messages", "dpo"])
def test_boxes_in_a_column_that_trl_does_not_read_are_missed(form, small_repository, tmp_path):
    model, processor = trl_session.load(small_repository)
    options = {"with_boxes": False, "samples": (0, 1), "remove_unused_columns": False}
    trainer = trl_session.trainer(form, model, processor, tmp_path, **options)
    with pytest.raises(ValueError, match=r"`boxes` must be given for training, got none.*image blocks"):
        trainer.train()


@pytest.mark.parametrize(("beta", "message"), [(0.0, "packs_boxes"), (0.1, "boxes")])
def test_boxes_that_a_trainer_would_lose_are_missed(beta, message, small_repository, tmp_path):
    """With one box, what is left of the inputs would fit the placeholders."""
    model, processor = trl_session.load(small_repository)
    asked = {"role": "user", "content": [{"type": "image", "boxes": [[5, 10, 40, 30]]}]}
    rows = [{"prompt": [asked], "images": pictures(0)}] * 2
    trainer = trl_session.trainer("grpo", model, processor, tmp_path, rows=rows, beta=beta)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()


def test_a_completion_of_several_turns_is_refused(small_repository, tmp_path):
    model, processor = trl_session.load(small_repository)
    turns = [answer("Red."), {"role": "user", "content": [{"type": "text", "text": QUESTION}]}, answer("Yellow.")]
    rows = [{"prompt": [question(0)], "completion": turns, "images": pictures(0)}]
    trainer = trl_session.trainer("prompt_completion", model, processor, tmp_path, rows=rows)
    with pytest.raises(ValueError, match="one answer, got 2"):
        trainer.train()


@pytest.mark.parametrize("form", ["messages", "prompt_completion"])
def test_a_length_that_cuts_an_image_is_refused(form, small_repository, tmp_path):
    model, processor = trl_session.load(small_repository)
    trainer = trl_session.trainer(form, model, processor, tmp_path, samples=(0, 1), max_length=8)
    with pytest.raises(ValueError, match="truncat"):
        trainer.train()
