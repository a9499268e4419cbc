"""Scores in the texts of judges: LLaVA-Bench's pair and MM-Vet's correctness.

Sources: Liu et al., Visual Instruction Tuning (arXiv 2304.08485), section 5.1, with `parse_score` in
llava/eval/eval_gpt_review_bench.py and llava/eval/summarize_gpt_review.py of haotian-liu/LLaVA; Yu et al.,
MM-Vet (arXiv 2308.02490), section 3.3, with mm-vet_evaluator.ipynb of yuweihao/MM-Vet.
"""

import math
import re
from collections.abc import Sequence


def pair_of(review: str) -> tuple[float, float] | None:
    """The scores of two answers in the first line of a review of LLaVA-Bench.

    The line must be two numbers with one space or one comma between them. A corner of the official rules:
    "8, 9" has two separators and does not count.

    Returns:
        Both scores, or None where the line is anything else; the official script then counts -1 for both.
    """
    words = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def relative_score(pairs: Sequence[tuple[float, float]]) -> float:
    """The sum of the second scores in percent of that of the first ones; nan without any."""
    total = sum(first for first, _ in pairs)
    return 100 * sum(second for _, second in pairs) / total if total else float("nan")


def correctness_of(review: str) -> float | None:
    """MM-Vet's correctness: the number between 0 and 1 at the beginning of a review.

    "Grade:" or asterisks may stand before it and a period or asterisks behind it.

    Returns:
        The number, or None where the review begins otherwise; the official notebook asks again, at last
        counting 0.
    """
    found = re.match(
        r"[\s*]*(?:grade|score|correctness)?[\s*:]*([01](?:\.\d+)?|\.\d+)\.?[\s*]*(?:\s|$)", review, re.I
    )
    value = float(found[1]) if found else 2
    return value if value <= 1 else None
