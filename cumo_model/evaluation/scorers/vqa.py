"""VQA accuracy: an answer compared with those of ten people, after both were normalised.

Formula and normalisation: VQA: Visual Question Answering (arXiv 1505.00468) and its official repository
GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py. EvalAI's server and TextVQA's scorer (mmf,
pythia/tasks/processors.py and its copy m4c_evaluator.py in LLaVA and CuMo) do a little more before it.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

# words with all their apostrophes; a word that lacks one of them is corrected
_CORRECT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
""".split()
_APOSTROPHES = {
    word[:at] + word[at + 1 :]: word for word in _CORRECT for at, letter in enumerate(word) if letter == "'"
}
_APOSTROPHES["somebody'd"] = "somebodyd"  # the official table has these two the wrong way round
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIODS = 32  # as many are taken away: the official code passes a flag where `sub` takes a count


def _without_marks(text: str) -> str:
    """Marks beside a space are taken away, and others become a space.

    If a comma stands between two digits anywhere, all marks are taken away."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        apart = in_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if apart else " ")
    return _PERIOD.sub("", result, count=_PERIODS)


def _in_digits(text: str) -> str:
    """Lower case, digits for the words of numbers, no articles, and missing apostrophes."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 14)
def normalised(answer: str) -> str:
    """An answer as EvalAI's server and TextVQA's scorer compare it.

    Before the rules of the VQA evaluation it is written in lower case, without commas and question marks, and
    with a space before "'s". Odd, and kept: of more than 32 periods only the first 32 are taken away, and
    "somebody'd" becomes "somebodyd".
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _in_digits(_without_marks(_on_one_line(text)))


@lru_cache(maxsize=1 << 14)
def _normalised_by_vqa(answer: str) -> str:
    return _in_digits(_without_marks(answer))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy as TextVQA's scorer computes it.

    Each reference is left out once, and min(1, matches among the others / 3) is averaged.

    Args:
        answer: as the model gives it.
        references: the answers of people, usually ten.

    Returns:
        A number from 0 to 1; of ten references one, two, three and four equal ones give 0.3, 0.6, 0.9 and 1.

    Raises:
        ValueError: there are no references.
    """
    return _left_out(normalised(answer), [normalised(reference) for reference in references])


def vqa_accuracy_of_server(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy as the server of VQAv2 computes it from a submission.

    The submission has answers as `normalised` gives them (LLaVA's scripts/convert_vqav2_for_submission.py).
    The official evaluation then normalises answer and references by its own rules, and only where the
    references are not all the same. Odd, and kept: so "2" is wrong if all ten people wrote "two".

    Args:
        answer: as the model gives it.
        references: as in `vqa_accuracy`.

    Raises:
        ValueError: there are no references.
    """
    given = _on_one_line(normalised(answer))
    kept = [_on_one_line(reference) for reference in references]
    if len(set(kept)) > 1:
        given, kept = _normalised_by_vqa(given), [_normalised_by_vqa(reference) for reference in kept]
    return _left_out(given, kept)


def _left_out(answer: str, references: list[str]) -> float:
    """The mean over the references left out, in whole numbers up to the last division."""
    if not references:
        raise ValueError("references must hold at least one answer, got none")
    matches = references.count(answer)
    others = len(references) - matches
    return (matches * min(3, matches - 1) + others * min(3, matches)) / (3 * len(references))
