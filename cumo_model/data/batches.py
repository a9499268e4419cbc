"""Batches of samples: padded rows, or packed rows in which conversations do not attend to each other.

A packed row is a concatenation of conversations. `position_ids` restart at 0 in each conversation, and there
is no `attention_mask`; `router_mask` tells the routers what is padding. transformers derives the
block-diagonal attention mask and the rotary embeddings from these positions, also for varlen flash attention.
Packing does not change the processing of pictures: tower
and connector get (pictures, 3, s, s), so their losses are per picture or per crop in both cases.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cumo_model.processing.conversation import IGNORE_INDEX

Sample = dict[
    str, Tensor | None
]  # input_ids, labels (N,) int64; pixel_values (pictures, 3, s, s) fp32 or None


def pad(samples: Sequence[tuple[Tensor, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Pad (ids, labels) pairs on the right: input_ids, labels and attention_mask, each (B, N) int64."""
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
    """Pad samples on the right and stack them.

    Args:
        samples: B items of a data set of conversations.
        pad_id: token id of the padding.

    Returns:
        input_ids (B, N) int64; labels (B, N) int64, -100 on padding; attention_mask (B, N) int64, 1 on real
        tokens; and, if any sample has a picture, pixel_values (pictures, 3, s, s) fp32 in the order of the
        markers.
    """
    batch = pad([(sample["input_ids"], sample["labels"]) for sample in samples], pad_id)
    return _with_pictures(batch, samples)


def collate_packed(rows: Sequence[Sequence[Sample]], pad_id: int) -> dict[str, Tensor]:
    """Concatenate the samples of each row and pad the rows on the right.

    Args:
        rows: B rows, each with at least one sample.
        pad_id: token id of the padding.

    Returns:
        input_ids, labels, position_ids and router_mask, each (B, N) int64, and pixel_values as in `collate`.
        The first label of each sample is -100, so that it is not predicted from the previous sample. Padding
        has position 0 and attends to itself; router_mask is 0 there.
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
    batch["router_mask"] = batch.pop("attention_mask")
    batch["position_ids"] = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
    return _with_pictures(batch, [sample for row in rows for sample in row])


class Collator:
    """The collate function of the data loader: rows of `Units` -> arguments of the model.

    A row is None if this rank has no picture in a step in which another rank has one: all ranks must run the
    tower. The batch then gets one grey picture without placeholders (`num_dummy_images`).
    """

    def __init__(
        self,
        pad_id: int,
        image_size: int,
        packed: bool = False,
        dummy_images: bool = False,
        needs_image: bool = False,
        padding_counts: bool = False,
    ):
        """Set the options of all batches.

        Args:
            pad_id: token id of the padding.
            image_size: side of a grey picture in pixels.
            packed: whether rows are packed (`collate_packed`) or single samples (`collate`).
            dummy_images: add one grey picture per text-only sample, as the original code does (compat).
            needs_image: add a grey picture to a batch without pictures; needed if only the tower or the
                connector is trained.
            padding_counts: leave out the router_mask of packed rows, so that their padding counts in the
                router losses (compat), as that of padded rows does.
        """
        self.pad_id, self.image_size = pad_id, image_size
        self.packed, self.dummy_images, self.needs_image = packed, dummy_images, needs_image
        self.padding_counts = padding_counts

    def __call__(self, rows: Sequence[Sequence[Sample] | None]) -> dict[str, Tensor]:
        real = [row for row in rows if row is not None]
        samples = [sample for row in real for sample in row]
        dummies = int(len(real) < len(rows))
        if self.packed:
            batch = collate_packed(real, self.pad_id)
            if self.padding_counts:
                del batch["router_mask"]
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
