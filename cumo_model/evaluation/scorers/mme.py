"""Yes or no twice about each picture, as MME scores.

Formula: MME (arXiv 2306.13394) and the official eval_tool/calculation.py: of each task the accuracy, in
percent, plus accuracy+, the percentage of pictures with both answers right; a sum over the tasks.
"""

from collections.abc import Mapping, Sequence

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
HIGHEST = 200.0  # points of a task


def mme_verdict(answer: str) -> str:
    """Which answer it counts as: "yes" or "no" if its first four characters hold that word, or else "other".

    Spaces at its ends do not count. Odd, and kept: "Nobody knows" and "Snow" are "no", "eyes" is "yes", and
    "It is not" is "other".
    """
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_points(pictures: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Accuracy and accuracy+ of a task, in percent.

    Args:
        pictures: for each picture, whether each of its answers is right.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("pictures must hold at least one picture, got none")
    answers = [right for picture in pictures for right in picture]
    return 100 * sum(answers) / len(answers), 100 * sum(map(all, pictures)) / len(pictures)


def mme_sum(points: Mapping[str, float], tasks: Sequence[str]) -> float:
    """The sum of the points of several tasks.

    A task without points (its pictures were not drawn for a small run) counts as the mean of the others.

    Args:
        points: name of a task -> accuracy + accuracy+.
        tasks: names of the tasks: `PERCEPTION` or `COGNITION`.

    Returns:
        The sum; nan if none of the tasks has points.
    """
    known = [points[task] for task in tasks if task in points]
    return sum(known) * len(tasks) / len(known) if known else float("nan")
