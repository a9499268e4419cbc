"""Batches written out by hand: rows of different lengths, a padding id that is a word, several pictures."""

import pytest
import torch

from cumo_model.data.batches import Collator, collate, collate_packed, pad

PAD, SIDE = 9, 2


def _sample(first, count, pictures=0):
    """Token ids from `first` on, each its own label, and pictures whose values are their number."""
    ids = torch.arange(first, first + count)
    numbers = torch.arange(first, first + pictures, dtype=torch.float32)
    pixels = numbers.view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE) if pictures else None
    return {"input_ids": ids, "labels": ids + 100, "pixel_values": pixels}


def _numbers(batch):
    """The number of each picture of a batch."""
    assert batch["pixel_values"].shape[1:] == (3, SIDE, SIDE)
    return batch["pixel_values"][:, 0, 0, 0].tolist()


def test_rows_are_padded_on_the_right_with_the_given_id():
    batch = pad([(torch.tensor([1, 2]), torch.tensor([3, 4])), (torch.tensor([5]), torch.tensor([6]))], PAD)
    assert batch["input_ids"].tolist() == [[1, 2], [5, 9]]
    assert batch["labels"].tolist() == [[3, 4], [6, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pictures_are_in_the_order_of_the_rows():
    samples = [_sample(10, 3, 2), _sample(20, 1), _sample(30, 2, 1)]
    batch = collate(samples, PAD)
    assert batch["input_ids"].tolist() == [[10, 11, 12], [20, 9, 9], [30, 31, 9]]
    assert _numbers(batch) == [10, 11, 30]
    assert _numbers(collate(samples[::-1], PAD)) == [30, 10, 11]
    packed = collate_packed([[samples[2], samples[1]], [samples[0]]], PAD)
    assert _numbers(packed) == [30, 10, 11]


def test_a_packed_row_is_written_out():
    """Positions begin again in each conversation; its first token is not predicted from the last one."""
    rows = [[_sample(10, 3), _sample(20, 2)], [_sample(30, 1)]]
    batch = collate_packed(rows, PAD)
    assert set(batch) == {"input_ids", "labels", "position_ids", "router_mask"}
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21], [30, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 111, 112, -100, 121], [-100] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0] * 5]
    assert batch["router_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert rows[0][0]["labels"].tolist() == [110, 111, 112]  # those of the data set are unchanged


@pytest.mark.parametrize("rows", [[], [[_sample(1, 1)], []]])
def test_a_packed_row_without_a_sample_is_refused(rows):
    with pytest.raises(ValueError, match="every packed row must hold at least one sample"):
        collate_packed(rows, PAD)


def test_the_options_of_a_collator_choose_the_form_of_its_batches():
    rows = [[_sample(10, 3, 1)], [_sample(20, 2)]]
    padded = Collator(PAD, SIDE)(rows)
    assert set(padded) == {"input_ids", "labels", "attention_mask", "pixel_values"}
    packed = Collator(PAD, SIDE, packed=True)(rows)
    assert set(packed) == {"input_ids", "labels", "position_ids", "router_mask", "pixel_values"}
    counted = Collator(PAD, SIDE, packed=True, padding_counts=True)(rows)
    assert set(counted) == set(packed) - {"router_mask"}
    for batch in (padded, packed, counted):
        assert batch["input_ids"].tolist() == [[10, 11, 12], [20, 21, 9]]


@pytest.mark.parametrize("packed", [False, True])
def test_grey_pictures_come_last_and_are_counted(packed):
    """One for a rank that has none, one where only the tower learns; of compat one for each text."""
    text, other, pictured = [_sample(10, 2)], [_sample(20, 1)], [_sample(30, 2, 2)]

    def collated(rows, **options):
        batch = Collator(PAD, SIDE, packed, **options)(rows)
        return _numbers(batch) if "pixel_values" in batch else [], batch.get("num_dummy_images", 0)

    assert collated([text, other]) == ([], 0)
    assert collated([text, other, None]) == ([0], 1)
    assert collated([text, None, None]) == ([0], 1)
    assert collated([text, pictured], needs_image=True) == ([30, 31], 0)
    assert collated([text, other], needs_image=True) == ([0], 1)
    assert collated([text, pictured, other], dummy_images=True) == ([30, 31, 0, 0], 2)
    assert collated([text, other, None], dummy_images=True) == ([0, 0], 2)
    assert collated([pictured], dummy_images=True) == ([30, 31], 0)
