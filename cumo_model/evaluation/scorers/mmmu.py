"""MMMU: the letter or the words that an answer means, and whether they are right.

Source: Yue et al., MMMU (arXiv 2311.16502), section 4.1; the rules are those of the official
mmmu/utils/eval_utils.py of MMMU-Benchmark/MMMU, which CuMo has as cumo/eval/mmmu_utils/eval_utils.py.
"""

import re
import string
from collections.abc import Sequence

STRIPPED = ",.!?;:'"  # taken off the ends of an answer, one after the other
LONG = 5  # words: only a longer answer is searched for the texts of choices
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # with an exponent
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter that an answer means: `parse_multi_choice_response` without its guess.

    First "(A)" is looked for, then "A" between spaces, then, in answers of more than five words, the texts of
    the options; of several the one that stands last counts. Corners of the official rules: "A." or "A)" in
    the middle of an answer, and a letter beside a line break, do not count; an empty option is in each long
    answer; of two options that end at one place the first counts.

    Args:
        answer: what the model says.
        options: the text of each option, A first.

    Returns:
        The letter, or "" where the official scorer draws one at random.
    """
    for mark in STRIPPED:
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = string.ascii_uppercase[: len(options)]
    for form in ("({})", " {} "):
        if found := [letter for letter in letters if form.format(letter) in answer]:
            return max(found, key=lambda letter: answer.rfind(form.format(letter)))
    if len(answer.split()) > LONG:
        said = answer.lower()
        texts = {letter: text.lower() for letter, text in zip(letters, options, strict=True)}
        if found := [letter for letter in letters if texts[letter] in said]:
            return max(found, key=lambda letter: said.rfind(texts[letter]))
    return ""


def normalised(text: str) -> list[str | float]:
    """A number rounded to two decimals, or words in lower case; a single character has a space beside it.

    As in Python, "nan", "1e5", "1_000" and digits of other scripts are numbers.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def candidates(answer: str) -> list[str | float]:
    """What an answer to an open question may mean: `parse_open_response`, in order and without doubles.

    Of each line the shortest rest behind one of KEYS counts (and behind "=", in the last line), or else the
    whole answer; and each number in these. Corners of the official rules: sentences are not split, because
    the answer is in lower case when capitals are looked for; of "1,234" and "5e3" also the ends 234 and 3
    are numbers.
    """
    answer = answer.strip().strip(".").lower()
    lines, parts = answer.split("\n"), []
    for number, line in enumerate(lines):
        keys = (*KEYS, "=") if number == len(lines) - 1 else KEYS
        shortest = ""
        for rest in (line.split(key)[-1].strip() for key in keys if key in line):
            # an empty rest is replaced by the next one, whatever its length
            if not shortest or len(rest) < len(shortest):
                shortest = rest
        if shortest and shortest not in TRIVIAL:
            parts.append(shortest)
    parts = parts or [answer]
    numbers = [found for part in parts for pattern in NUMBERS for found in re.findall(pattern, part)]
    return list(dict.fromkeys(value for part in [*parts, *numbers] for value in normalised(part)))


def is_open_right(answer: str, references: str | Sequence[str]) -> bool:
    """Whether an answer to an open question is right: `eval_open`.

    Args:
        answer: what the model says.
        references: the right answer, or several.

    Returns:
        True if a number of the answer is that of a reference, or the words of a reference are in its words.
    """
    references = [references] if isinstance(references, str) else references
    right = [value for reference in references for value in normalised(reference)]
    words = [value for value in right if isinstance(value, str)]
    return any(
        any(word in said for word in words) if isinstance(said, str) else said in right
        for said in candidates(answer)
    )
