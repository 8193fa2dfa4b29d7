"""Questions in the words of the original, from the rows of a benchmark."""

import ast
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import BadRowError, EvaluationError
from .metrics import HUMAN_ANSWERS
from .tables import Row

_CHINESE = re.compile("[\u4e00-\u9fff]")
# Tokenizers do not accept them, and files cannot be written with them.
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
_HINTS = {
    "multi_choice": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
    "the end.",
    "float 1": "Please answer the question requiring a floating-point number with one decimal place and provide the "
    "final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "Please answer the question requiring a floating-point number with two decimal places and provide the "
    "final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
    "[1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


@dataclass(frozen=True)
class Question:
    """A question of a benchmark.

    Attributes:
        number: Index among the rows of the benchmark.
        key: The id of the question.
        box_key: The id of its image or video in the box file.
        prompt: The text after the image or video.
        answer: The reference answer: a text, several texts, or `None` if the file has none.
        category: Category of the question, in whose column its score counts; may be empty.
        row: The row that it comes from.
    """

    number: int
    key: Any
    box_key: Any
    prompt: str
    answer: str | tuple[str, ...] | None
    category: str
    row: Row


def _text(row: Row, *names: str) -> str:
    """Return the first of some columns that the row has."""
    for name in names:
        if name in row.values and (text := _plain(row.values[name], name)).strip():
            return text
    raise BadRowError(f"it has no {' or '.join(names)}")


def _plain(value: Any, name: str) -> str:
    """Return a text or a number as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRowError(f"its {name} must be a text or a number, got {type(value).__name__}")
    text = str(value)
    if _SURROGATE.search(text):
        raise BadRowError(f"its {name} has half of a character (a lone surrogate), as of a text that was cut")
    return text


def options_of(row: Row) -> dict[str, str]:
    """Return the options of a question by their letter.

    Args:
        row ([`Row`]): A row with the columns `A`, `B`, …, or with a list in `options` or `choices`.

    Returns:
        `dict[str, str]`: The options; letters without an option are left out.
    """
    for name in ("options", "choices"):
        listed = _as_list(row.values.get(name))
        if listed is not None:
            if len(listed) > len(string.ascii_uppercase):
                raise BadRowError(f"it has {len(listed)} options, which is more than there are letters")
            options = dict(zip(string.ascii_uppercase, listed, strict=False))
            return {letter: _plain(option, f"option {letter}") for letter, option in options.items()}
    found = {
        letter: _plain(row.values[letter], f"option {letter}")
        for letter in string.ascii_uppercase
        if letter in row.values
    }
    if "A" not in found and _is_mmmu(row) and "answer" in row.values:
        # Open questions of MMMU, which the original turns into a choice.
        return {**found, "A": str(row.values["answer"]), "B": "Other Answers"}
    return found


def _is_mmmu(row: Row) -> bool:
    return "MMMU" in row.stem.upper()


def _as_list(value: Any) -> list[Any] | None:
    """Read a list, or the text of a Python or JSON list; `None` for other values."""
    if isinstance(value, str) and value.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return list(value) if isinstance(value, list | tuple) else None


def choice_prompt(row: Row) -> str:
    """Hint, question, options and the request for a letter (MMBench, SEED, ScienceQA, AI2D, MMStar, MMMU)."""
    options = options_of(row)
    if not options:
        raise BadRowError("its options are empty (columns A, B, …)")
    if empty := [letter for letter, option in options.items() if not option.strip()]:
        raise BadRowError(f"its options {', '.join(empty)} are empty")
    lines = [_plain(row.values["hint"], "hint")] if row.values.get("hint") else []
    lines += [_text(row, "question"), *(f"{letter}. {option}" for letter, option in sorted(options.items()))]
    text = "\n".join(lines) + "\n"
    request = (
        "请直接回答选项字母。"
        if _CHINESE.search(text)
        else "Answer with the option's letter from the given choices directly."
    )
    return text + request


def choice_answer(row: Row) -> str | None:
    """Return the letter of the right option; with a list of choices, the answer may be an index."""
    if "answer" not in row.values:
        return None
    given, options = row.values["answer"], options_of(row)
    is_index = "A" not in row.values and isinstance(given, int) and not isinstance(given, bool)
    if is_index and 0 <= given < len(options):
        return string.ascii_uppercase[given]
    answer = str(given).strip()
    if answer in options or (_is_mmmu(row) and "A" not in row.values):
        return answer
    raise BadRowError(f"its answer {answer[:40]!r} is not one of its options {', '.join(sorted(options))}")


def free_prompt(row: Row) -> str:
    """Return the text of the row as it is (LLaVA-Wild, MM-Vet, files of LLaVA)."""
    return _text(row, "text", "question")


def short_prompt(row: Row) -> str:
    """Return the text of a file of LLaVA as it is; a bare question gets the request that those files have."""
    if "text" in row.values:
        return _text(row, "text")
    tokens = _as_list(row.values.get("ocr_tokens"))
    reference = "" if tokens is None else f"\nReference OCR token: {', '.join(map(str, tokens))}"
    return _text(row, "question") + reference + _SHORT_ANSWER


def document_prompt(row: Row) -> str:
    """Return a question with the request for a word or a phrase (DocVQA)."""
    return _text(row, "question") + _SHORT_ANSWER


def yes_no_prompt(row: Row) -> str:
    """Return a question with the request for yes or no (POPE, HallusionBench)."""
    return _text(row, "text", "question") + "\nPlease answer the question with yes or no."


def hallusion_prompt(row: Row) -> str:
    """Return a question of HallusionBench; its score reads set, figure and question from the index."""
    if str(row.values.get("index", "")).count("_") < 5:
        raise BadRowError(
            f"its index must end in _SET_FIGURE_QUESTION after three words, got {row.values.get('index')!r}"
        )
    return yes_no_prompt(row)


def mme_prompt(row: Row) -> str:
    """Return a question of MME, whose request the original changes."""
    return _text(row, "question").replace(
        "Please answer yes or no.", "Please answer the question only a single word yes or no."
    )


def mathvista_prompt(row: Row) -> str:
    """Return hint, question and choices (MathVista)."""
    values = row.values
    kind = str(values.get("question_type"))
    if kind != "multi_choice":
        kind = str(values.get("answer_type"))
        if kind == "float":
            kind = f"float {float(values.get('precision', 0)):g}"
    if kind not in _HINTS:
        raise BadRowError(f"its question_type, answer_type and precision ask for {kind!r}, which has no hint")
    question = f"Question: {_text(row, 'question')}"
    if values.get("unit"):
        question += f" (Unit: {values['unit']})"
    lines = [f"Hint: {_HINTS[kind]}", question]
    choices = _as_list(values.get("choices"))
    if choices:
        lines.append("Choices:")
        lines += [f"({letter}) {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
    return "\n".join(lines).strip()


def mmvp_prompt(row: Row) -> str:
    """Return question and options in one line (MMVP)."""
    return f"{_text(row, 'Question', 'question')} {_text(row, 'Options', 'options')}"


def text_answer(row: Row) -> str | None:
    """Return the answer as text."""
    for name in ("answer", "label", "Correct Answer"):
        if name in row.values:
            return _plain(row.values[name], name).strip()
    return None


def yes_no_answer(row: Row) -> str | None:
    """Return `Yes` or `No`."""
    answer = text_answer(row)
    if answer is None:
        return None
    if answer.lower() not in ("yes", "no"):
        raise BadRowError(f"its answer must be yes or no, got {answer[:40]!r}")
    return answer.capitalize()


def list_answer(row: Row) -> tuple[str, ...] | None:
    """Return all answers that count as right (DocVQA)."""
    value = row.values.get("answers", row.values.get("answer"))
    if value is None:
        return None
    listed = _as_list(value)
    answers = tuple(_plain(answer, "answers") for answer in ([value] if listed is None else listed))
    if not answers:
        raise BadRowError("its list of answers is empty")
    return answers


def human_answers(row: Row) -> tuple[str, ...] | None:
    """Return the ten human answers (TextVQA, VQAv2)."""
    listed = _as_list(row.values.get("answers"))
    if listed is None:
        return None
    answers = tuple(_plain(item.get("answer") if isinstance(item, Mapping) else item, "answers") for item in listed)
    if len(answers) != HUMAN_ANSWERS:
        raise BadRowError(f"it has {len(answers)} human answers, and the soft accuracy is defined for {HUMAN_ANSWERS}")
    return answers


def question_in_prompt(prompt: str) -> str:
    """Return the question of a TextVQA prompt in lower case, as its annotations are found.

    Args:
        prompt (`str`): A prompt of LLaVA's TextVQA file.

    Returns:
        `str`: The question.

    Raises:
        BadRowError: If the prompt has another form.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match is not None:
            return match[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise BadRowError("its text has none of the forms of TextVQA's prompts, so its annotations cannot be found")


# By the id of a question, or by the image and the question.
Annotations = Mapping[Any, Any]


def read_annotations(path: str | Path) -> dict[Any, Any] | list[Any]:
    """Read the answers of a benchmark whose questions are in another file.

    Args:
        path (`str` or `Path`): JSON of TextVQA (`TextVQA_0.5.1_val.json`), VQAv2
            (`v2_mscoco_val2014_annotations.json`), GQA (`testdev_balanced_questions.json`), or a list of answers such
            as that of MSVD-QA.

    Returns:
        `dict` or `list`: The answers by question id as text; for TextVQA by image id and lower-case question; a list
        without question ids in its order.

    Raises:
        EvaluationError: If the file has another form.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(content, list) and content:
            return _listed_answers(path, content)
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            return {
                (str(entry["image_id"]), str(entry["question"]).lower()): entry["answers"] for entry in content["data"]
            }
        if isinstance(content, dict) and isinstance(content.get("annotations"), list):
            return {str(entry["question_id"]): entry["answers"] for entry in content["annotations"]}
        if isinstance(content, dict):
            return {
                str(key): entry["answer"]
                for key, entry in content.items()
                if entry.get("isBalanced", True) is not False
            }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EvaluationError(
            f"`annotations`: {path} is not a file of TextVQA, VQAv2 or GQA, nor a list of answers "
            f"({type(error).__name__}: {error})."
        ) from error
    raise EvaluationError(
        f"`annotations`: {path} must be a dictionary of TextVQA, VQAv2 or GQA, or a list of answers."
    )


def _listed_answers(path: str | Path, content: list[Any]) -> dict[str, Any] | list[Any]:
    """Read a list of answers: by question id if all have one, else in the order of the questions."""
    answers = [entry["answer"] if isinstance(entry, Mapping) else entry for entry in content]
    ids = [str(entry["question_id"]) for entry in content if isinstance(entry, Mapping) and "question_id" in entry]
    if len(ids) < len(content):
        return answers
    if len(set(ids)) < len(ids):
        twice = next(name for number, name in enumerate(ids) if name in ids[:number])
        raise EvaluationError(f"`annotations`: {path} has two answers for the question_id {twice!r}.")
    return dict(zip(ids, answers, strict=True))


def make_question(
    number: int,
    row: Row,
    prompt: Callable[[Row], str],
    answer: Callable[[Row], Any],
    keys: Sequence[str],
    box_key: str | None,
    annotations: Annotations | None,
) -> Question:
    """Turn a row into a question, or raise `BadRowError`."""
    key = _id(row, keys) if keys else number + 1
    text = prompt(row)
    if annotations is not None:
        row = _with_annotations(row, key, text, annotations)
    category = next((row.values[name] for name in ("category", "type", "kind") if name in row.values), "")
    own = key if row.box_id is None else row.box_id
    box_id = own if box_key is None else _id(row, (box_key,))
    return Question(number, key, box_id, text, answer(row), str(category), row)


def _id(row: Row, names: Sequence[str]) -> Any:
    key = next((row.values[name] for name in names if name in row.values), None)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise BadRowError(f"it has no {' or '.join(names)} as text or a whole number, got {key!r}")
    return key


def _with_annotations(row: Row, key: Any, text: str, annotations: Annotations) -> Row:
    by_image = any(isinstance(known, tuple) for known in annotations)
    wanted = (str(row.values.get("image_id", key)), question_in_prompt(text)) if by_image else str(key)
    if wanted not in annotations:
        raise BadRowError(f"the annotations have no answer for {wanted!r}")
    found = annotations[wanted]
    name = "answers" if isinstance(found, list) else "answer"
    return replace(row, values={**row.values, name: found})


__all__ = [
    "Annotations",
    "Question",
    "choice_answer",
    "choice_prompt",
    "document_prompt",
    "free_prompt",
    "hallusion_prompt",
    "human_answers",
    "list_answer",
    "make_question",
    "mathvista_prompt",
    "mme_prompt",
    "mmvp_prompt",
    "options_of",
    "question_in_prompt",
    "read_annotations",
    "short_prompt",
    "text_answer",
    "yes_no_answer",
    "yes_no_prompt",
]
