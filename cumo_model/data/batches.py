"""Samples to batches: padded rows, or packed rows in which every conversation is on its own.

A packed row is several conversations end to end. `position_ids` begin again at 0 in each, which is how the
attention masks and rotary embeddings of transformers (varlen flash attention too) keep them apart, and no
`attention_mask` is given. Pictures stay apart by themselves: tower and connector see (pictures, 3, s, s), so
that their losses are per picture or crop, packed or not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cumo_model.processing.conversation import IGNORE_INDEX

Sample = dict[
    str, Tensor | None
]  # input_ids, labels (N,) int64; pixel_values (pictures, 3, s, s) fp32 or None


def pad(samples: Sequence[tuple[Tensor, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """(ids, labels) pairs -> input_ids, labels, attention_mask (B, N) int64, padded on the right."""
    if not samples:
        raise ValueError("a batch must hold at least one sample, got none")
    shape = (len(samples), max(len(ids) for ids, _ in samples))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (ids, targets) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = targets
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _with_pictures(batch: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
    pictures = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    if pictures:
        batch["pixel_values"] = torch.cat(pictures)
    return batch


def collate(samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right and stack.

    Args:
        samples: B items of a data set of conversations.
        pad_id: written behind the shorter ones.

    Returns:
        input_ids (B, N) int64, labels (B, N) int64 with -100 behind, attention_mask (B, N) int64 (1 on real
        tokens), and, if any sample has a picture, pixel_values (pictures, 3, s, s) fp32 in the order of their
        markers.
    """
    batch = pad([(sample["input_ids"], sample["labels"]) for sample in samples], pad_id)
    return _with_pictures(batch, samples)


def collate_packed(rows: Sequence[Sequence[Sample]], pad_id: int) -> dict[str, Tensor]:
    """Concatenate the samples of each row; pad on the right.

    Returns:
        input_ids, labels, position_ids (B, N) int64, and pixel_values as in `collate`. The first label of
        every sample is -100, so that no sample is predicted from the one before. Padding has position 0 and
        attends to itself.
    """
    if not rows or not all(rows):
        raise ValueError("every packed row must hold at least one sample")
    joined, positions = [], []
    for row in rows:
        labels = [sample["labels"].clone() for sample in row]
        for first in labels:
            first[:1] = IGNORE_INDEX
        joined.append((torch.cat([sample["input_ids"] for sample in row]), torch.cat(labels)))
        positions.append(torch.cat([torch.arange(len(sample["input_ids"])) for sample in row]))
    batch = pad(joined, pad_id)
    del batch["attention_mask"]
    batch["position_ids"] = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
    return _with_pictures(batch, [sample for row in rows for sample in row])


class Collator:
    """What the data loader calls: rows of `Units` -> the model's arguments.

    A row is None where a rank without pictures must still run the tower, because another rank does in the
    same step; the batch then gets one grey picture that no marker stands for (`num_dummy_images`).
    """

    def __init__(
        self,
        pad_id: int,
        image_size: int,
        packed: bool = False,
        dummy_images: bool = False,
        needs_image: bool = False,
    ):
        """
        Args:
            dummy_images: one grey picture per text-only sample, as the original runs them (compat).
            needs_image: a grey picture where there is none at all, for training only what sees pictures.
        """
        self.pad_id, self.image_size = pad_id, image_size
        self.packed, self.dummy_images, self.needs_image = packed, dummy_images, needs_image

    def __call__(self, rows: Sequence[Sequence[Sample] | None]) -> dict[str, Tensor]:
        real = [row for row in rows if row is not None]
        samples = [sample for row in real for sample in row]
        dummies = int(len(real) < len(rows))
        if self.packed:
            batch = collate_packed(real, self.pad_id)
        else:
            batch = collate(samples, self.pad_id)
        if self.needs_image and "pixel_values" not in batch:
            dummies = 1
        if self.dummy_images:
            dummies = sum(sample["pixel_values"] is None for sample in samples)
        if dummies:
            # zero is the mean colour after normalisation
            grey = torch.zeros(dummies, 3, self.image_size, self.image_size)
            batch["pixel_values"] = (
                torch.cat([batch["pixel_values"], grey]) if "pixel_values" in batch else grey
            )
            batch["num_dummy_images"] = dummies
        return batch
