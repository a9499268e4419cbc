"""Exact match, as GQA scores.

Formula: GQA (arXiv 1902.09506) and its official eval.py, which compares a prediction with the answer. The
prediction is made from the model's answer by LLaVA's and CuMo's scripts/convert_gqa_for_eval.py.
"""


def gqa_prediction(answer: str) -> str:
    """An answer as it is compared: without the periods at its end, in lower case.

    Odd, and kept: nothing else is taken away, so that a space or a newline at the end makes it wrong.
    """
    return answer.rstrip(".").lower()


def exact_match(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, which is in lower case in GQA's files."""
    return gqa_prediction(answer) == reference
