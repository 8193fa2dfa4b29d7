"""Files for evaluation servers and judges, in the forms that these read."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mgllava.atomic_files import replacing
from mgllava.model_files.json_files import write_json

from .normalization import normalize_answer
from .questions import Question, options_of
from .scores import gqa_prediction

# Writes the answers into a folder, and returns the files.
Upload = Callable[[Path, Sequence[Question], Sequence[str]], list[Path]]
# Control characters that XML, and so a workbook, cannot hold.
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def _json(path: Path, content: Any) -> list[Path]:
    write_json(path, content)
    return [path]


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> list[Path]:
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return [path]


def _in_order(questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[Question, str]]:
    """Return questions and answers by key, as the original sorts them: by number, or by text if any key is text."""
    are_numbers = all(isinstance(question.key, int) for question in questions)
    return sorted(
        zip(questions, answers, strict=True), key=lambda pair: pair[0].key if are_numbers else str(pair[0].key)
    )


def upload_choices(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `predictions.tsv`, and `.xlsx` if openpyxl is installed, with the columns that MMBench's server reads."""
    letters = sorted({letter for question in questions for letter in options_of(question.row)} | set("ABCD"))
    others = [
        name
        for name in ("category", "l2-category", "split", "answer")
        if any(name in question.row.values for question in questions)
    ]
    table: list[list[Any]] = [["index", "question", *letters, "prediction", *others]]
    for question, text in zip(questions, answers, strict=True):
        options, values = options_of(question.row), question.row.values
        table.append(
            [
                question.key,
                values.get("question", question.prompt),
                *(options.get(letter, "") for letter in letters),
                text,
                *(values.get(name, "") for name in others),
            ]
        )
    path = folder / "predictions.tsv"
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table)
    written = [path]
    if find_spec("openpyxl") is not None:
        written.append(_workbook(folder / "predictions.xlsx", table))
    return written


def _workbook(path: Path, table: Sequence[Sequence[Any]]) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    for row, cells in enumerate(table, start=1):
        for column, value in enumerate(cells, start=1):
            cell = book.active.cell(row, column)
            if isinstance(value, str):
                cell.value = _NOT_IN_XML.sub("", value)
                # Otherwise a text that starts with "=" is a formula.
                cell.data_type = "s"
            else:
                cell.value = value
    with replacing(path) as partial:
        book.save(partial)
    return path


def upload_lines(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `answers_llava.jsonl` with question_id, prompt and text, as LLaVA's tools read it."""
    records = [
        {"question_id": question.key, "prompt": question.prompt, "text": text, "metadata": {}}
        for question, text in _in_order(questions, answers)
    ]
    return _lines(folder / "answers_llava.jsonl", records)


def upload_vqav2(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `vqav2_results.json`, the list of normalized answers that the server of VQAv2 reads."""
    content = [
        {"question_id": question.key, "answer": normalize_answer(text)}
        for question, text in zip(questions, answers, strict=True)
    ]
    return _json(folder / "vqav2_results.json", content)


def upload_gqa(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `gqa_predictions.json`, as the evaluation script of GQA reads it."""
    content = [
        {"questionId": str(question.key), "prediction": gqa_prediction(text)}
        for question, text in zip(questions, answers, strict=True)
    ]
    return _json(folder / "gqa_predictions.json", content)


def upload_docvqa(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `docvqa_results.json`, the list that the server of the Robust Reading Competition reads."""
    content = [
        {"questionId": question.row.values.get("questionId", question.key), "answer": text}
        for question, text in zip(questions, answers, strict=True)
    ]
    return _json(folder / "docvqa_results.json", content)


def upload_mmvet(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `mmvet_results.json`, the dictionary that the server of MM-Vet reads, and the lines of LLaVA."""
    content = {
        str(question.key) if str(question.key).startswith("v1_") else f"v1_{question.key}": text
        for question, text in _in_order(questions, answers)
    }
    return _json(folder / "mmvet_results.json", content) + upload_lines(folder, questions, answers)


def upload_mathvista(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `mathvista_results.json`, the problems with query and response, as MathVista's scripts read them."""
    # The scripts read fields such as `choices` of every problem, also where they are null.
    names = dict.fromkeys(name for question in questions for name in question.row.values)
    content = {
        str(question.key): {**names, **question.row.values, "query": question.prompt, "response": text}
        for question, text in zip(questions, answers, strict=True)
    }
    return _json(folder / "mathvista_results.json", content)


def upload_mmvp(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `mmvp_results.jsonl`, as the grader of MMVP reads it."""
    records = [
        {
            "question_id": question.key,
            "prompt": question.prompt,
            "answer": question.answer,
            "response": text,
            "metadata": {},
        }
        for question, text in _in_order(questions, answers)
    ]
    return _lines(folder / "mmvp_results.jsonl", records)


def upload_videos(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Write `video_qa_results.json`, the list of id, question, answer and pred that the original gives its judge."""
    content = [
        {"id": question.key, "question": question.prompt, "answer": question.answer, "pred": text}
        for question, text in zip(questions, answers, strict=True)
    ]
    return _json(folder / "video_qa_results.json", content)


__all__ = [
    "Upload",
    "upload_choices",
    "upload_docvqa",
    "upload_gqa",
    "upload_lines",
    "upload_mathvista",
    "upload_mmvet",
    "upload_mmvp",
    "upload_videos",
    "upload_vqav2",
]
