"""MMBench: the letter that an answer means, and circular evaluation.

Sources: Liu et al., MMBench (arXiv 2307.06281), sections 4.1 and 4.2; the rules are those of the official
evaluator, `can_infer` in vlmeval/utils/matching_util.py of open-compass/VLMEvalKit, whose earlier form
lmms-eval has in lmms_eval/tasks/mmbench/mmbench_evals.py.
"""

from collections.abc import Mapping, Sequence

LETTERS = "ABCDE"
MANY_WORDS = 3  # in an answer with more, "A" can be the article
# what may stand before and after a letter, the first that fits exactly one letter decides
AROUND = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


def letter_of(answer: str, choices: Mapping[str, str]) -> str:
    """The letter that an answer means, by rules alone.

    A letter must be a word by itself, bare or with the punctuation of AROUND, and the only one. Else the text
    of one choice must be in the answer, in any case, and of no other. Corners of the official rules: E is
    looked for also where it is no choice; a bare "A" in an answer of more than three words does not count.

    Args:
        answer: what the model says.
        choices: letter -> text of each choice.

    Returns:
        The letter, or "" where the rules find none or several.
    """
    words = set(answer.split())
    bare = [letter for letter in LETTERS if letter in words]
    if len(bare) == 1 and not (bare == ["A"] and len(answer.split()) > MANY_WORDS):
        return bare[0]
    for before, after in AROUND:
        found = [letter for letter in LETTERS if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    said = answer.lower()
    named = [letter for letter, text in choices.items() if text.lower() in said]
    return named[0] if len(named) == 1 else ""


def is_right_in_all(letters: Sequence[str], references: Sequence[str]) -> bool:
    """Circular evaluation: a question is right if its letter is right in each order of its choices.

    Args:
        letters: the letter of each answer, "" for none.
        references: the right letter in the same order of the choices.
    """
    return all(letter == right for letter, right in zip(letters, references, strict=True))
