"""Measures of answers that need no judge."""

import re
from collections import Counter
from collections.abc import Sequence

from .normalization import normalize_answer

_LETTERS = re.compile(r"[A-D]+")
# Human answers per question in TextVQA and VQAv2.
HUMAN_ANSWERS = 10


def chosen_letters(text: str) -> str:
    """Return the first run of the letters A to D in an answer, as the original does.

    Args:
        text (`str`): The answer.

    Returns:
        `str`: The letters, or an empty text. An answer that spells "A" in a word, such as "Because", counts too.
    """
    match = _LETTERS.search(text)
    return match[0] if match else ""


def soft_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Return the accuracy of an answer among ten human answers, as TextVQA and VQAv2 define it.

    Each human answer is left out in turn, and the answer gets a third of a point, up to one, for each of the other
    nine that it equals; the result is the mean.

    Args:
        answer (`str`): The answer.
        human_answers (`Sequence[str]`): Ten answers.

    Returns:
        `float`: From 0 to 1.
    """
    wanted = normalize_answer(answer)
    equal = sum(normalize_answer(human) == wanted for human in human_answers)
    others = len(human_answers) - equal
    # If one of the equal answers is left out, one less agrees.
    return (equal * min(1.0, (equal - 1) / 3) + others * min(1.0, equal / 3)) / len(human_answers)


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Return the normalized Levenshtein similarity of an answer to the nearest reference (DocVQA).

    Args:
        answer (`str`): The answer.
        references (`Sequence[str]`): Answers that count as right.
        threshold (`float`): Smaller similarities are 0.

    Returns:
        `float`: From 0 to 1.
    """
    best = max(_similarity(answer, reference) for reference in references)
    return best if best >= threshold else 0.0


def _similarity(answer: str, reference: str) -> float:
    left, right = (" ".join(text.strip().lower().split()) for text in (answer, reference))
    # As in the original, the length is that of the texts before spaces are removed.
    length = max(len(answer.upper()), len(reference.upper()))
    return 1.0 - (edit_distance(left, right) / length if length else 0.0)


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of the words of an answer, both texts normalized by the rule of VQAv2.

    Args:
        answer (`str`): The answer.
        reference (`str`): The reference answer.

    Returns:
        `float`: From 0 to 1; 1 for two texts without words.
    """
    said, wanted = (Counter(normalize_answer(text).split()) for text in (answer, reference))
    if not said and not wanted:
        return 1.0
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total())


def edit_distance(left: str, right: str) -> int:
    """Return how many letters must be inserted, removed or replaced to turn one text into the other.

    Args:
        left (`str`): A text.
        right (`str`): A text.

    Returns:
        `int`: The Levenshtein distance.
    """
    row = list(range(len(right) + 1))
    for count, letter in enumerate(left, start=1):
        diagonal, row[0] = row[0], count
        for column, other in enumerate(right, start=1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (letter != other)),
            )
    return row[-1]


__all__ = ["HUMAN_ANSWERS", "anls", "chosen_letters", "edit_distance", "soft_accuracy", "token_f1"]
