"""Sampling: which samples are in a micro-batch, as a function of (lengths, seed, epoch, rank) only.

A *unit* is the content of one row of a batch: one sample, or several packed samples. A *step* is the work of
all ranks between two optimizer updates: world * accumulation * batch_size units. As in LLaVA's trainer, a
step contains units of one kind (with a picture, or text only) and of similar length. The steps come in
random order. The remaining units of both kinds form the last step.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cumo_model.model.choices import GROUPINGS

DUMMY = -1  # in a micro-batch: run the tower on a grey picture, because another rank has real ones


def plan_packs(
    lengths: Sequence[int], has_image: Sequence[bool], max_length: int, seed: int = 0, window: int = 8192
) -> list[list[int]]:
    """Pack samples into rows of at most `max_length` tokens.

    The samples are put in random order and divided into windows. In each window they are packed by best fit,
    longest first. Samples with and without pictures are packed separately.

    Args:
        lengths: tokens of each sample.
        has_image: whether each sample has a picture.
        max_length: tokens of a row.
        seed: seed of the random order.
        window: samples per window. A larger window wastes fewer tokens and takes longer.

    Returns:
        Lists of sample numbers; each sample is in exactly one list.

    Raises:
        ValueError: a sample is longer than `max_length`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(
            f"max_length must be at least the longest sample's {lengths.max()}, got {max_length}"
        )
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).numpy()
    kinds = np.asarray(has_image, bool)[order]
    packs: list[list[int]] = []
    for kind in (True, False):
        members = order[kinds == kind]
        for start in range(0, len(members), window):
            part = members[start : start + window]
            part = part[np.argsort(-lengths[part], kind="stable")]
            packs += _best_fit(part.tolist(), lengths, max_length)
    return packs


def _best_fit(members: list[int], lengths: np.ndarray, max_length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for member in members:
        length = int(lengths[member])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, pack = max_length, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(place)
        packs[pack].append(member)
        if left - length:
            insort(room, (left - length, pack))
    return packs


class Units(Dataset):
    """A view of a data set as units: item u is the list of the samples of unit u."""

    def __init__(self, dataset: Dataset, units: Sequence[Sequence[int]]):
        self.dataset, self.units = dataset, units

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, unit: int) -> list[dict[str, Tensor | None]] | None:
        return self.__getitems__([unit])[0]

    def __getitems__(self, units: Sequence[int]) -> list[list[dict[str, Tensor | None]] | None]:
        """The rows of a batch; the data set is asked once for all their samples where it can be."""
        rows = [None if unit == DUMMY else self.units[unit] for unit in units]
        wanted = [sample for row in rows if row is not None for sample in row]
        many = getattr(self.dataset, "__getitems__", None)
        found = iter(many(wanted) if many and wanted else [self.dataset[sample] for sample in wanted])
        return [None if row is None else [next(found) for _ in row] for row in rows]


class StepSampler(Sampler[list[int]]):
    """Yields micro-batches of unit numbers for one rank. The order depends on the epoch and is reproducible.

    The length is the same in all epochs and on all ranks: the last step of an epoch is filled with units from
    the beginning of the order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        grouping: str = "modality_length",
    ):
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping must be one of {', '.join(GROUPINGS)}, got {grouping!r}")
        if not len(lengths):
            raise ValueError("lengths must name at least one unit, got none")
        self.lengths, self.has_image = np.asarray(lengths), np.asarray(has_image, bool)
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world, self.seed, self.grouping = rank, world, seed, grouping
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which determines the order."""
        self.epoch = epoch

    @property
    def _step_units(self) -> int:
        return self.batch_size * self.accumulation * self.world

    def __len__(self) -> int:
        return -(-len(self.lengths) // self._step_units) * self.accumulation

    def _steps(self) -> list[np.ndarray]:
        """The units of each step of this epoch."""
        size, generator = self._step_units, torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).numpy()
        if self.grouping == "none":
            order = np.resize(shuffled, -(-len(shuffled) // size) * size)  # repeats from the front
            return list(order.reshape(-1, size))
        kinds = [shuffled]
        if self.grouping == "modality_length":
            kinds = [shuffled[self.has_image[shuffled]], shuffled[~self.has_image[shuffled]]]
        steps, left = [], []
        for members in kinds:
            # sort by length inside megabatches of 50 steps, so that the overall order stays random
            full = len(members) // size * size
            for start in range(0, full, 50 * size):
                part = members[start : min(start + 50 * size, full)]
                part = part[np.argsort(-self.lengths[part], kind="stable")]
                steps += list(part.reshape(-1, size))
            left.append(members[full:])
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        rest = np.concatenate(left)
        while len(rest):
            part, rest = rest[:size], rest[size:]
            missing = size - len(part)
            filler = shuffled[~np.isin(shuffled, part)] if len(part) < len(shuffled) else shuffled
            part = np.concatenate([part, np.resize(filler, missing)]) if missing else part
            steps.append(part[np.argsort(-self.lengths[part], kind="stable")])
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        wide = self.batch_size * self.world
        for step in self._steps():
            for start in range(0, len(step), wide):
                units = step[start : start + wide]
                # units sorted by length are dealt to the ranks in turn, so that ranks have similar work
                mine = units[self.rank :: self.world].tolist()
                if self.world > 1 and self.has_image[units].any() and not self.has_image[mine].any():
                    mine.append(DUMMY)
                yield mine
