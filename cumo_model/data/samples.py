"""Tokenised records of both data sets: what truncation leaves of them, and how problems are summed up."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from cumo_model.data.records import Problem
from cumo_model.processing.conversation import (
    IGNORE_INDEX,
    IMAGE_MARKER,
    check_pieces,
    reserved_marker,
    tokenize_conversations,
)
from cumo_model.processing.processor import CumoProcessor, image_seq_length

SHOWN = 5  # problems that a summary names


class Tokenising:
    """Conversations as token ids and labels, truncated to `max_length` tokens."""

    def __init__(self, processor: CumoProcessor, template: str, max_length: int | None):
        if max_length is not None and (
            not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1
        ):
            raise ValueError(f"max_length must be a number of tokens, 1 or more, or None, got {max_length!r}")
        self.tokenizer, self.template, self.max_length = processor.tokenizer, template, max_length
        check_pieces(processor.tokenizer)
        self.tokens_per_image = image_seq_length(processor)
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_MARKER)

    def whole(self, conversations: Sequence[list[dict]]) -> list[tuple[Tensor, Tensor]]:
        """ids and labels, each (N,) int64, of each conversation, before truncation."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reserved markers are reported as problems of records
            return tokenize_conversations(conversations, self.tokenizer, self.template, self.tokens_per_image)

    def cut(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The first `max_length` ids and labels."""
        ids, labels = sample
        return ids[: self.max_length], labels[: self.max_length]

    def is_cut(self, sample: tuple[Tensor, Tensor]) -> bool:
        """Whether `cut` removes tokens."""
        return self.max_length is not None and len(sample[0]) > self.max_length

    def problem(self, turns: list[dict], sample: tuple[Tensor, Tensor]) -> str | None:
        """The reason why a record cannot be used with this `max_length`, or None."""
        ids, labels = sample
        if self.is_cut(sample) and (ids[self.max_length :] == self.image_id).any():
            return f"max_length {self.max_length} cuts through the {self.tokens_per_image} tokens of an image"
        if (labels[: self.max_length] != IGNORE_INDEX).any() or reserved_marker(turns, self.template):
            return None
        answers = (labels != IGNORE_INDEX).nonzero()
        if not len(answers):
            return "no token of its answers has a label: no label is trained on"
        return (
            f"its first answer begins at token {int(answers[0]) + 1} of {len(ids)}, max_length is "
            f"{self.max_length}: no label is trained on"
        )


def summaries(
    problems: Sequence[Problem],
    cut: int = 0,
    max_length: int | None = None,
    grey: Sequence[Problem] = (),
) -> list[str]:
    """One line for each kind of record that is not trained on as it is, with the first files and lines.

    Args:
        problems: of records that are left out (fatal), or have no labels.
        cut: number of records that are longer than `max_length`.
        max_length: as in `Tokenising`.
        grey: problems of records that are kept although a picture is missing.
    """
    found = []
    kinds = {
        "left out": [problem for problem in problems if problem.fatal],
        "trained on without labels": [problem for problem in problems if not problem.fatal],
        "kept with grey in place of a picture, their labels are not used": grey,
    }
    for said, kind in kinds.items():
        if kind:
            named = "; ".join(map(str, kind[:SHOWN])) + ("; ..." if len(kind) > SHOWN else "")
            found.append(f"records are {said}: {named} ({len(kind)} such records)")
    if cut:
        are = "record is longer" if cut == 1 else "records are longer"
        found.append(f"{cut} {are} than max_length {max_length} and {'is' if cut == 1 else 'are'} cut")
    return found
