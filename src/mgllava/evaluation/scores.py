"""Scores of the answers to a benchmark, by the original's rules."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .metrics import anls, chosen_letters, soft_accuracy, token_f1
from .normalization import normalize_answer, yes_or_no
from .questions import Question

_PERCENT = 100.0
# MMBench asks each question several times with rotated options, under indices that differ by multiples of this.
_CIRCULAR = 1_000_000
_PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
_COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


@dataclass(frozen=True)
class Scores:
    """Scores of a benchmark.

    Attributes:
        main: Name of the score that tables of models show.
        values: All scores by name; percentages, except for points of MME.
        categories: The main score, or the nearest to it, by category.
        credits: For each answer, from 0 (wrong) to 1 (right).
        notes: What a reader of the scores must know.
    """

    main: str
    values: dict[str, float]
    categories: dict[str, float]
    credits: list[float]
    notes: list[str] = field(default_factory=list)


Score = Callable[[Sequence[Question], Sequence[str]], Scores]


def _by_category(questions: Sequence[Question], credits: Sequence[float]) -> dict[str, float]:
    groups = defaultdict(list)
    for question, credit in zip(questions, credits, strict=True):
        groups[question.category].append(credit)
    groups.pop("", None)
    return {name: _PERCENT * fmean(group) for name, group in sorted(groups.items())}


def _mean(name: str, questions: Sequence[Question], credits: list[float]) -> Scores:
    values = {name: _PERCENT * fmean(credits)}
    splits = {str(question.row.values.get("split", "")) for question in questions}
    if len(splits) > 1:
        for split in sorted(splits):
            part = [
                credit
                for question, credit in zip(questions, credits, strict=True)
                if str(question.row.values.get("split", "")) == split
            ]
            values[f"{name}, split {split or '(none)'}"] = _PERCENT * fmean(part)
    return Scores(name, values, _by_category(questions, credits), credits)


def score_choices(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score choices; questions whose indices differ by multiples of a million count as one, right or wrong."""
    credits = [
        float(chosen_letters(text) == question.answer) for question, text in zip(questions, answers, strict=True)
    ]
    groups: dict[object, list[int]] = {}
    for position, question in enumerate(questions):
        index = question.key
        group = index % _CIRCULAR if isinstance(index, int) else index
        groups.setdefault(group, []).append(position)
    mains, passed = [], []
    for group, positions in groups.items():
        main = next((questions[position] for position in positions if questions[position].key == group), None)
        # As in the original, rotations of a question that is not there do not count.
        if main is not None:
            mains.append(main)
            passed.append(float(all(credits[position] for position in positions)))
    if not mains:
        return Scores("accuracy", {"accuracy": 0.0}, {}, credits, ["No question has an index below a million."])
    scores = _mean("accuracy", mains, passed)
    if len(mains) < len(questions):
        scores.values["accuracy of single questions"] = _PERCENT * fmean(credits)
        scores.notes.append("A question counts as right if it is answered right in all its rotations (CircularEval).")
    beyond = sum(not set(str(question.answer)) <= set("ABCD") for question in questions)
    if beyond:
        scores.notes.append(
            f"{beyond} questions have another answer than A to D. The original's rule reads only these letters, so "
            "they count as wrong."
        )
    groups_of = {question.category for question in mains}
    level_2 = {str(question.row.values.get("l2-category", "")) for question in mains} - {"", *groups_of}
    for name in sorted(level_2):
        part = [
            credit
            for question, credit in zip(mains, passed, strict=True)
            if question.row.values.get("l2-category") == name
        ]
        scores.values[f"accuracy, {name}"] = _PERCENT * fmean(part)
    return Scores("accuracy", scores.values, scores.categories, credits, scores.notes)


def score_exactly(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score answers that must be equal to the reference; case and surrounding spaces do not matter."""
    credits = [
        float(text.strip().lower() == str(question.answer).lower())
        for question, text in zip(questions, answers, strict=True)
    ]
    return _mean("accuracy", questions, credits)


def gqa_prediction(text: str) -> str:
    """Return an answer as the evaluation of GQA compares it.

    Args:
        text (`str`): The answer.

    Returns:
        `str`: In lower case, without points at the end.
    """
    return text.rstrip(".").lower()


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score GQA: equal to the reference."""
    credits = [
        float(gqa_prediction(text) == question.answer) for question, text in zip(questions, answers, strict=True)
    ]
    return _mean("accuracy", questions, credits)


def score_softly(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score TextVQA and VQAv2 by the soft accuracy among human answers."""
    credits = [soft_accuracy(text, question.answer or ()) for question, text in zip(questions, answers, strict=True)]
    return _mean("accuracy", questions, credits)


def score_documents(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score DocVQA by ANLS."""
    credits = [anls(text, question.answer or ()) for question, text in zip(questions, answers, strict=True)]
    return _mean("ANLS", questions, credits)


def score_videos(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score questions about videos: normalized by the rule of VQAv2, equal to the reference, and the words' F1."""
    pairs = [(text, str(question.answer)) for question, text in zip(questions, answers, strict=True)]
    credits = [float(normalize_answer(text) == normalize_answer(wanted)) for text, wanted in pairs]
    scores = _mean("exact match", questions, credits)
    scores.values["token F1"] = _PERCENT * fmean(token_f1(text, wanted) for text, wanted in pairs)
    scores.notes.append(
        "The original and the paper count the answers that GPT-3.5 accepts, which are more than exact matches."
    )
    return scores


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score POPE: accuracy, precision, recall and F1 of `Yes`, each averaged over the categories."""
    said = [yes_or_no(text) == "Yes" for text in answers]
    wanted = [question.answer == "Yes" for question in questions]
    groups = defaultdict(list)
    for question, pair in zip(questions, zip(said, wanted, strict=True), strict=True):
        groups[question.category or question.row.stem].append(pair)
    parts = {name: _of_yes(pairs) for name, pairs in sorted(groups.items())}
    values = {name: fmean(part[name] for part in parts.values()) for name in next(iter(parts.values()))}
    for category, part in parts.items() if len(parts) > 1 else ():
        values |= {f"{name}, {category}": value for name, value in part.items()}
    credits = [float(left == right) for left, right in zip(said, wanted, strict=True)]
    return Scores("F1", values, {name: part["F1"] for name, part in parts.items()}, credits)


def _of_yes(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Return percentages of (said, wanted)."""
    right = sum(said and wanted for said, wanted in pairs)
    said, wanted = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    precision, recall = right / said if said else 0.0, right / wanted if wanted else 0.0
    both = precision + recall
    return {
        "F1": _PERCENT * (2 * precision * recall / both if both else 0.0),
        "accuracy": _PERCENT * fmean(said == wanted for said, wanted in pairs),
        "precision": _PERCENT * precision,
        "recall": _PERCENT * recall,
        "share of yes": _PERCENT * said / len(pairs),
    }


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score MME: per category the accuracy plus that of images with both questions right; the sums of two groups."""
    credits = [float(yes_or_no(text) == question.answer) for question, text in zip(questions, answers, strict=True)]
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question, credit in zip(questions, credits, strict=True):
        images[question.category][str(question.row.values.get("image_path", question.key))].append(credit)
    notes, points = [], {}
    for category, by_image in sorted(images.items()):
        singles = [credit for image in by_image.values() for credit in image]
        pairs = [image[0] * image[1] for image in by_image.values() if len(image) > 1]
        points[category] = _PERCENT * (fmean(singles) + (fmean(pairs) if pairs else 0.0))
        if alone := sum(len(image) != 2 for image in by_image.values()):
            notes.append(f"{category}: {alone} images do not have two questions, which the accuracy of pairs needs.")
    values = {}
    for name, group in (("perception", _PERCEPTION), ("cognition", _COGNITION)):
        values[name] = sum(points.get(category, 0.0) for category in group)
        if absent := [category for category in group if category not in points]:
            notes.append(f"{name} is the sum without {', '.join(absent)}, of which there are no answers.")
    values |= {"total": sum(values.values()), "accuracy": _PERCENT * fmean(credits)}
    return Scores("perception", values, points, credits, notes)


def score_hallusion(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score HallusionBench: of all questions, of figures and of questions with all their variants right."""
    credits = [float(yes_or_no(text) == question.answer) for question, text in zip(questions, answers, strict=True)]
    figures, variants = defaultdict(list), defaultdict(list)
    for question, credit in zip(questions, credits, strict=True):
        level_2 = str(question.row.values.get("l2-category", ""))
        set_id, figure, number = str(question.key).split("_")[3:6]
        figures[level_2, set_id, figure].append(credit)
        variants[level_2, set_id, number].append(credit)
    values = {
        "aAcc": _PERCENT * fmean(credits),
        "fAcc": _PERCENT * fmean(float(all(group)) for group in figures.values()),
        "qAcc": _PERCENT * fmean(float(all(group)) for group in variants.values()),
    }
    return Scores("aAcc", values, _by_category(questions, credits), credits)


__all__ = [
    "Score",
    "Scores",
    "gqa_prediction",
    "score_choices",
    "score_documents",
    "score_exactly",
    "score_gqa",
    "score_hallusion",
    "score_mme",
    "score_pope",
    "score_softly",
    "score_videos",
]
