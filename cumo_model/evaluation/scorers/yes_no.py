"""Yes or no about objects in pictures, as POPE scores.

Formula: POPE (arXiv 2305.10355), evaluate.py of its official repository AoiDragon/POPE, of which CuMo's
cumo/eval/eval_pope.py is a copy for three files.
"""

from collections.abc import Sequence


def pope_says_yes(answer: str) -> bool:
    """Whether an answer counts as yes: its first sentence has none of the words "No", "no" and "not".

    Odd, and kept: a sentence ends at a period, commas are dropped, and only spaces separate words. So "NO",
    "No!" and "No" before a newline count as yes, as an empty answer does.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def five_figures(said: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes; yes is the class that is looked for.

    A quotient without a denominator is 0, where the official script ends with an error.

    Args:
        said: whether each answer is yes.
        labels: whether yes is right, for each answer.

    Returns:
        The figures, from 0 to 1, by name: "accuracy", "precision", "recall", "f1" and "yes ratio".

    Raises:
        ValueError: there are no answers, or not as many as labels.
    """
    if len(said) != len(labels) or not said:
        raise ValueError(f"said must hold an answer for each of {len(labels)} labels, got {len(said)}")
    both = sum(one and label for one, label in zip(said, labels, strict=True))
    yes, present = sum(map(bool, said)), sum(map(bool, labels))
    right = sum(bool(one) == bool(label) for one, label in zip(said, labels, strict=True))
    return {
        "accuracy": right / len(said),
        "precision": both / yes if yes else 0.0,
        "recall": both / present if present else 0.0,
        "f1": 2 * both / (yes + present) if yes + present else 0.0,
        "yes ratio": yes / len(said),
    }
