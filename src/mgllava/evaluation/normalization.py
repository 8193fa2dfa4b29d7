"""The answer normalization of TextVQA and VQAv2 (M4C), and the reading of yes-or-no answers."""

import re

# A mark is removed if it touches a space somewhere in the text, and otherwise becomes a space.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The lookbehind of the public code is for the text "<=" and a digit, so in effect every point that no digit follows is
# removed; and at most `re.UNICODE` of them, which is 32.
_POINT = re.compile(r"(?!<=\d)\.(?!\d)")
_MAX_POINTS = int(re.UNICODE)
_NUMBER_COMMA = re.compile(r"\d,\d")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}}

# Contractions lack their apostrophe or, if there are two, one of them. Words such as "its" and "were" are not in the
# public table; its entries with a capital I or "'s" never match, since answers are lower case and cut there by then.
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_DOUBLE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    """Map contractions without their apostrophe, or without one of two, to the written form."""
    table = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _DOUBLE.split():
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = table[f"{first}'{second}{third}"] = word
    # As they stand in the public table, which is not regular here.
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= {"'ows'at": "'ow's'at", "somebody'd": "somebodyd"}
    return table


_CONTRACTIONS = _contractions()


def _remove_marks(text: str) -> str:
    """Remove punctuation, or turn it into spaces."""
    result = text
    joins = _NUMBER_COMMA.search(text) is not None
    for mark in _MARKS:
        touches_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_space or joins else " ")
    return _POINT.sub("", result, count=_MAX_POINTS)


def normalize_answer(text: str) -> str:
    """Normalize an answer by the rule of TextVQA and VQAv2, as in Pythia's M4C and in LLaVA.

    Lower case, no punctuation, no articles, digits for the numbers up to ten, and apostrophes in contractions.

    Args:
        text (`str`): The answer.

    Returns:
        `str`: The answer in normal form.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = _remove_marks(text.replace("\n", " ").replace("\t", " ")).split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def yes_or_no(text: str) -> str:
    """Read a yes-or-no answer by the rule of VLMEvalKit, which the original uses for MME, POPE and HallusionBench.

    Args:
        text (`str`): The answer.

    Returns:
        `str`: `"Yes"` or `"No"` if exactly one of the two words is in the text, else `"Unknown"`.
    """
    words = set(_remove_marks(text.lower()).split())
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


__all__ = ["normalize_answer", "yes_or_no"]
