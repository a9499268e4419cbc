"""MathVista: the value in an answer, its normal form, and whether it is right.

Source: Lu et al., MathVista (arXiv 2310.02255), section 4.1; the rules are those of the official
evaluation/extract_answer.py and evaluation/calculate_score.py of lupantech/MathVista.
"""

import re
import string
from collections.abc import Sequence

MULTIPLE = "multi_choice"


def by_rules(answer: str, question_type: str, answer_type: str, choices: Sequence[str] = ()) -> str | None:
    """The value in an answer where no judge is needed: `extract_answer` without its question to a judge.

    That is an empty answer, the text of a choice, or an answer that is an integer or a decimal number as
    Python reads it ("1_000" and digits of other scripts too). A letter alone, such as "B", "(B)" or "B.", is
    taken too; the official script asks its judge, which is shown how to answer with the letter.

    Args:
        answer: what the model says.
        question_type: "multi_choice" or "free_form".
        answer_type: "text", "integer", "float" or "list".
        choices: the texts of the choices.

    Returns:
        The value, or None where a judge must extract it.
    """
    if answer == "":
        return ""
    if question_type == MULTIPLE:
        if answer in choices:
            return answer
        letters = string.ascii_uppercase[: len(choices)]
        if letters and (found := re.fullmatch(rf"\s*\(?([{letters}])\)?[.:]?\s*", answer)):
            return found[1]
    try:
        if answer_type == "integer":
            return str(int(answer))
        if answer_type == "float":
            return str(float(answer))
    except ValueError:
        pass
    return None


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the number of characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def normalised(
    value: str,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] = (),
    precision: float | None = None,
) -> str | None:
    """The form in which a value is compared: `normalize_extracted_answer`.

    Multiple choice: the first letter in brackets, or a letter alone, stands for its choice; anything else for
    the choice with the smallest edit distance, so that an empty answer is the shortest choice. Where choices
    are letters in brackets in another order (problems 168 and 849 of testmini), the text of one choice is
    taken for the letter of another. Integers are cut ("2.9" is "2"), decimal numbers rounded. `precision` may
    be a float such as 1.0, as in parquet files: CuMo's copy of the script then fails to round and finds each
    decimal answer wrong.

    Args:
        value: as extracted.
        question_type: as in `by_rules`.
        answer_type: as in `by_rules`.
        choices: as in `by_rules`.
        precision: decimals of a decimal number.

    Returns:
        The text to compare with the reference; None where there is no number.
    """
    if question_type == MULTIPLE:
        value = value.strip()
        if found := re.search(r"\(([a-zA-Z])\)", value):
            value = found[1].upper()
        letters = string.ascii_uppercase[: len(choices)]
        if len(value) == 1 and value in letters:
            return choices[letters.index(value)]
        return min(choices, key=lambda choice: edit_distance(value, choice))
    try:
        if answer_type == "integer":
            return str(int(float(value)))
        if answer_type == "float":
            return None if precision is None else str(round(float(value), int(precision)))
    except (ValueError, OverflowError):
        return None
    return value


def is_right(
    value: str,
    reference: str,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] = (),
    precision: float | None = None,
) -> bool:
    """Whether an extracted value is right: its normal form is the reference, character by character.

    Args:
        value: as in `normalised`, like the arguments below.
        reference: the official answer; that of a multiple choice is the text of the choice.
    """
    return normalised(value, question_type, answer_type, choices, precision) == reference
