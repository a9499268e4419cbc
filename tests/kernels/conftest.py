"""Selects the rows that `make test` runs on slow backends: Triton's interpreter and csrc's emulation.

There a row is one of many combinations (dtype, shape, activation, ...), and a fault is triggered by one value
or by a pair of values. So of each test those rows run in which every pair of values occurs at least once; the
rest is marked `sweep`, for `make test-all`. On fast backends all rows run. A row marked `large` runs there
and in emulation, but not in the interpreter, where smaller rows have the same tiles.
"""

import os
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET"):
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "tl")):
        patch, language = interpreter._patch_lang, interpreter.tl

        def patch_once(fn):
            """Patch only once: Triton patches at every call of a helper, a third of a test's time."""
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
    """The rows of one test that are not needed to cover all pairs of values; chosen greedily."""
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
                # on Hopper only some dtypes run (test_cuda_emulated.py); their pairs must be covered too
                alone = item.callspec.params.get("dtype") if HOPPER else None
                rows[item.path, item.originalname, alone].append(item)
    for group in rows.values():
        for item in beyond_all_pairs(group):
            item.add_marker(pytest.mark.sweep)


@pytest.fixture
def ordered_dots(monkeypatch, backend):
    """In Triton's interpreter each sum of `tl.dot` is taken in one order, as on a GPU.

    There it is numpy's matmul, whose BLAS may take another order for other rows of the same tile.
    """
    if backend != "triton" or "TRITON_INTERPRET" not in os.environ:
        yield
        return
    calls = []

    def matmul(a, b, dtype):
        calls.append(dtype)
        out = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
        for k in range(a.shape[-1]):
            out += a[..., k, None].astype(dtype) * b[..., k, None, :].astype(dtype)
        return out

    monkeypatch.setattr(np, "matmul", matmul)
    yield
    assert calls, "the interpreter must take tl.dot from numpy.matmul"
