"""The letter of an answer to a multiple choice, for ScienceQA and SEED-Bench."""

import re
from string import ascii_uppercase

_SCIENCEQA = tuple("ABCDE")
_SCIENCEQA_ANSWER = re.compile(r"The answer is ([A-Z]).")
_BETWEEN = re.compile(r"[\s,;/&.:()\[\]*]+")  # letters that are the whole answer
_FIRST = re.compile(r"[(\[*\s]*([A-Z])\s*[)\].:*]")
_NAMED = re.compile(r"\banswer(?: is|:)[\s:(\[*]*([A-Z])(?![A-Za-z0-9'])", re.IGNORECASE)


def scienceqa_letter(answer: str) -> str | None:
    """The letter in an answer, by the rules for ScienceQA (arXiv 2209.09513) of LLaVA and CuMo.

    From llava/eval/eval_science_qa.py: the answer is a letter, or begins with one, a period and a space, or
    has "The answer is X." once, where X is any capital and "." any character but a newline.

    Returns:
        The letter, which may be that of no choice; None if there is none.
    """
    if answer in _SCIENCEQA:
        return answer
    if answer[:1] in _SCIENCEQA and answer[1:3] == ". ":
        return answer[0]
    found = _SCIENCEQA_ANSWER.findall(answer)
    return found[0] if len(found) == 1 else None


def letter_by_pattern(answer: str, choices: int) -> str | None:
    """The letter that an answer names, more generously than official scorers do; None if it names no or two.

    The answer is one letter with marks around it ("b", "(B)", "B."), or begins with one and a mark ("B. the
    dog", "(B) the dog"), or says "answer is B" or "answer: B".

    Args:
        answer: as the model gives it.
        choices: number of choices, at most 26; other letters are none.

    Raises:
        ValueError: choices is not from 1 to 26.
    """
    if not 1 <= choices <= len(ascii_uppercase):
        raise ValueError(f"choices must be from 1 to {len(ascii_uppercase)}, got {choices}")
    text = answer.strip()
    if len(text) == 1:
        text = text.upper()
    words = {word for word in _BETWEEN.split(text) if word not in ("", "and", "or")}
    if all(len(word) == 1 for word in words):
        found = words
    elif first := _FIRST.match(text):
        found = {first[1]}
    else:
        found = set(_NAMED.findall(text))
    letter = found.pop() if len(found) == 1 else ""
    return letter if letter and letter in ascii_uppercase[:choices] else None
