"""Which process gets which samples in which step, written out; the packs of samples by hand."""

import pytest
import torch

from cumo_model.data.sampling import DUMMY, StepSampler, plan_packs


def _order(count, seed, epoch):
    """The random order of an epoch, and the generator that drew it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist(), generator


def _batches(lengths, has_image=None, *, batch, accumulation=1, world=1, seed=5, epoch=0, **more):
    """The micro-batches of each rank."""
    has_image = [False] * len(lengths) if has_image is None else has_image
    ranks = []
    for rank in range(world):
        sampler = StepSampler(lengths, has_image, batch, accumulation, rank, world, seed, **more)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize("units, steps", [(24, 2), (26, 3)])
def test_a_micro_batch_is_dealt_to_the_processes_in_turn(units, steps):
    """Two units for each of three processes, twice a step; the last step goes on from the beginning."""
    ranks = _batches([1] * units, batch=2, accumulation=2, world=3, epoch=7, grouping="none")
    order, _ = _order(units, 5, 7)
    order += order[: 12 * steps - units]
    for rank, found in enumerate(ranks):
        assert found == [[order[6 * n + rank], order[6 * n + rank + 3]] for n in range(2 * steps)]


def test_seed_and_epoch_each_give_another_order():
    found = [
        tuple(map(tuple, _batches([1] * 30, batch=2, seed=seed, epoch=epoch, grouping="none")[0]))
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    ]
    assert len(set(found)) == 9
    assert _batches([1] * 30, batch=2, seed=0) == _batches([1] * 30, batch=2, seed=0, epoch=0)


@pytest.mark.parametrize("grouping", ["length", "modality_length"])
def test_steps_are_groups_of_similar_length_in_random_order(grouping):
    """Sorted within each 50 steps, longest first; then the steps are shuffled."""
    count, batch, accumulation, world = 1004, 1, 2, 3
    lengths = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    pictured = [unit % 3 == 0 for unit in range(count)]
    order, generator = _order(count, 5, 0)
    kinds = [order]
    if grouping == "modality_length":
        kinds = [[u for u in order if pictured[u]], [u for u in order if not pictured[u]]]
    steps, rest = [], []
    for kind in kinds:
        full = len(kind) - len(kind) % 6
        for start in range(0, full, 300):
            part = sorted(kind[start : min(start + 300, full)], key=lambda unit: -lengths[unit])
            steps += [part[i : i + 6] for i in range(0, len(part), 6)]
        rest += kind[full:]
    steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
    assert len(rest) == (2 if grouping == "length" else 8)
    for part in [rest[:6], rest[6:]] if len(rest) > 6 else [rest]:
        filler = [unit for unit in order if unit not in part]
        steps.append(sorted(part + filler[: 6 - len(part)], key=lambda unit: -lengths[unit]))
    ranks = _batches(
        lengths, pictured, batch=batch, accumulation=accumulation, world=world, grouping=grouping
    )
    together = [[row[0] for row in rows] for rows in zip(*ranks, strict=True)]
    assert together == [step[half : half + 3] for step in steps for half in (0, 3)]
    mixed = [len({pictured[unit] for unit in step}) > 1 for step in steps]
    assert any(mixed[:-2]) == (grouping == "length")


def test_the_default_groups_by_kind_and_length():
    lengths, pictured = [*range(40)], [unit % 2 == 0 for unit in range(40)]
    default = _batches(lengths, pictured, batch=4)
    assert default == _batches(lengths, pictured, batch=4, grouping="modality_length")
    assert default != _batches(lengths, pictured, batch=4, grouping="length")


def test_a_data_set_smaller_than_a_step_is_repeated():
    ranks = _batches([3, 2, 1], batch=2, world=4, grouping="length")
    order, _ = _order(3, 5, 0)
    step = sorted([*order, *order, *order[:2]])  # unit 0 is the longest
    assert [sorted(unit for row in ranks for unit in row[0])] == [step] and len(ranks[0]) == 1
    two = _batches([2, 1], batch=4, grouping="length")[0]  # as many are missing as there are
    assert sorted(two[0]) == [0, 0, 1, 1]
    five = _batches([1] * 5, batch=4, grouping="length")[0]
    assert len(set(five[0])) == len(set(five[1])) == 4  # no unit occurs twice in a step that others can fill
    order = _order(5, 5, 0)[0]
    for alone in range(5):  # the one with a picture is left for the last step
        pictured = [unit == alone for unit in range(5)]
        *_, last = _batches([1] * 5, pictured, batch=4, grouping="modality_length")[0]
        assert sorted(last) == sorted([alone, *[unit for unit in order if unit != alone][:3]])
    for epoch in range(9):  # more than half a step: it is filled from the front of the order
        order = _order(3, 5, epoch)[0]
        assert sorted(_batches([1] * 3, batch=5, epoch=epoch, grouping="length")[0][0]) == sorted(
            [*order, *order[:2]]
        )


def test_a_rank_without_a_picture_runs_the_tower_only_if_another_has_one():
    # each process gets one unit of a step: two pictures and one text, then three texts
    pictured = [True, True, False, False, False, False]
    ranks = _batches([6, 5, 4, 3, 2, 1], pictured, batch=1, world=3, grouping="length")
    found = {rank[step][0]: rank[step][1:] for rank in ranks for step in (0, 1)}
    steps = [{rank[step][0] for rank in ranks} for step in (0, 1)]
    for step in steps:
        for unit in step:
            needs_one = not pictured[unit] and any(pictured[other] for other in step)
            assert found[unit] == ([DUMMY] if needs_one else [])
    assert {0, 1, 2} in steps and found[2] == [DUMMY] and found[3] == []


@pytest.mark.parametrize(
    "lengths, grouping, told", [([], "length", "at least one unit"), ([1], "x", "grouping")]
)
def test_no_units_and_unknown_groups_are_refused(lengths, grouping, told):
    with pytest.raises(ValueError, match=told):
        StepSampler(lengths, lengths, 1, grouping=grouping)


def test_packs_by_best_fit_longest_first():
    """The fullest pack that has room, by hand; pictures apart from texts, pictures first."""
    assert plan_packs([7, 5, 4, 3, 1], [False] * 5, 8) == [[0, 4], [1, 3], [2]]
    assert plan_packs([1, 3, 4, 5, 7], [True] * 5, 8) == [[4, 0], [3, 1], [2]]
    assert plan_packs([4, 3, 2, 1], [False, True, False, True], 8) == [[1, 3], [0, 2]]
    assert plan_packs([8, 8], [True, False], 8) == [[0], [1]]  # a sample may fill a pack
    assert plan_packs([], [], 8) == []


def test_packs_of_a_window_hold_no_sample_of_another():
    lengths = [9, 8, 7, 6, 5, 4, 3, 2]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    wanted = [sorted(order[start : start + 2]) for start in range(0, 8, 2)]  # lengths fall with the number
    assert plan_packs(lengths, [True] * 8, 20, seed=3, window=2) == wanted
    assert plan_packs(lengths, [True] * 8, 20, seed=3) == plan_packs(lengths, [True] * 8, 20, seed=4)
