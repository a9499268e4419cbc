"""Which rows `make test` runs where a backend is slow: in Triton's interpreter and in csrc's emulation.

There a row is one of many combinations (dtype, shape, activation, ...), and a fault shows through one value
or through two that meet. So of each test the rows run in which every pair of values meets at least once; the
rest is marked `sweep`, for `make test-all`. Where a backend is fast all rows run; a row marked `large` runs
there and in emulation, not in the interpreter, where smaller ones have the same tiles.
"""

import os
from collections import defaultdict
from itertools import combinations

import pytest

if os.environ.get("TRITON_INTERPRET"):
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "tl")):
        patch, language = interpreter._patch_lang, interpreter.tl

        def patch_once(fn):
            """Triton patches its language again at every call of a helper, a third of a test's time."""
            seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
            if any(language.core.is_builtin(module.load) for module in seen):
                return patch(fn)
            return interpreter._LangPatchScope()

        interpreter._patch_lang = patch_once

HOPPER = os.environ.get("CUMO_EMULATE_CAPABILITY") == "90"
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
                # on Hopper some dtypes alone run (test_cuda_emulated.py), and their pairs are to meet too
                alone = item.callspec.params.get("dtype") if HOPPER else None
                rows[item.path, item.originalname, alone].append(item)
    for group in rows.values():
        for item in beyond_all_pairs(group):
            item.add_marker(pytest.mark.sweep)
