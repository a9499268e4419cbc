"""Which rows `make test` runs where a backend is slow: in Triton's interpreter and in csrc's emulation.

There a row is one of many combinations (dtype, shape, activation, ...), and a fault shows through one value
or through two that meet. So of each test the rows run in which every pair of values meets at least once; the
rest is marked `sweep`, for `make test-all`. Where a backend is fast all rows run.
"""

import os
from collections import defaultdict
from itertools import combinations

import pytest

SLOW = {"TRITON_INTERPRET": "triton", "CUMO_EMULATE": "cuda"}


def pairs(item: pytest.Item) -> set:
    values = [(name, repr(value)) for name, value in item.callspec.params.items()]
    return {*values, *combinations(values, 2)}


def beyond_all_pairs(items: list[pytest.Item]) -> list[pytest.Item]:
    """The rows of one test without which all pairs of values still meet: the fullest row goes first."""
    missing, left = set().union(*map(pairs, items)), list(items)
    while missing:
        best = max(left, key=lambda item: len(pairs(item) & missing))
        missing -= pairs(best)
        left.remove(best)
    return left


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    slow = [backend for variable, backend in SLOW.items() if os.environ.get(variable)]
    rows = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") in slow:
            if "TRITON_INTERPRET" not in os.environ or not item.get_closest_marker("large"):
                rows[item.path, item.originalname].append(item)
    for group in rows.values():
        for item in beyond_all_pairs(group):
            item.add_marker(pytest.mark.sweep)
